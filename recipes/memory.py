"""An estimate of a sparse run's GPU memory, from the model's configuration alone.

Weights, values, positions and moments are counted to the byte on a model without data. Activations are counted by what
a block keeps for its backward, in bf16 with norms in fp32, at the moments when the peak can occur: the loss, the
backward of the final norm and of the last block (the inputs of all blocks are still there), and that of the first one
(all gradients are there already).
"""

import os
from collections.abc import Mapping, Sequence

from recipes.loss import CHUNK_BYTES
from recipes.shapes import Shape

GIB = 2**30
# Common sizes in GB of 10^9 bytes: GPUs with error correction have little more for tensors.
GPU_SIZES = (6, 8, 12, 16, 24, 40, 48, 80)
# The CUDA context takes a few hundred MiB, which depend on GPU and driver; the rest is for gaps between tensors.
OVERHEAD_BYTES = 3 * 2**28
# cuBLAS takes this workspace on an H100; less on other GPUs.
WORKSPACE_BYTES = 64 * 2**20
# The library forms the gradients of uniform masks in dense panels of at most so many bytes.
PANEL_BYTES = 64 * 2**20
# Where the weights are in host memory, those of a block start at multiples of so many bytes in a buffer on the GPU.
ALIGNMENT = 256
# Each 4-bit weight of bitsandbytes has its own tables of 16 and 256 fp32 numbers, and the mean of its scales.
TABLE_BYTES = 4 * (16 + 256 + 1)


def let_segments_grow() -> None:
    """Let torch's allocator grow its segments, unless the user has configured it; call it before CUDA is used.

    By default up to 1 MB is lost after each tensor of more than 1 MB: measured, 20 MiB in training an 8B model at 1 %.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def estimate(
    shape: Shape,
    *,
    bits: int,
    entries: int,
    batch: int,
    length: int,
    targets: Sequence[str] | None = None,
    state_bits: int = 32,
    accumulation: int = 1,
    checkpointing: bool = True,
    sums: int = 0,
    offload: bool = False,
    resident_blocks: int = 0,
    resident_head: bool = False,
) -> dict[str, dict[str, int]]:
    """Return the bytes of each part at the moments that can set the peak of a training step; see `peak_bytes`.

    Args:
        shape: the model's sizes.
        bits: 16 for bf16 weights, 8 and 4 for those of bitsandbytes (nf4 with double quantisation).
        entries: trained entries; 0 for a frozen model.
        batch: sequences in a forward pass.
        length: tokens in each.
        targets: suffixes of the names of the weights that share the entries by size; None for all linear weights.
        state_bits: bits of each of the optimizer's two moments.
        accumulation: forward passes in a step; gradients of the first are there during the others.
        checkpointing: whether blocks are recomputed in backward.
        sums: bytes of the sums of gradients by which masks move.
        offload: whether the frozen weights and the inputs of blocks are in host memory; blocks are then checkpointed.
        resident_blocks: how many blocks `offload` leaves on the GPU.
        resident_head: whether `offload` leaves the head there.

    Returns:
        By moment (`loss`, `final norm`, `last block`, `first block`) the bytes by part. The loss is taken in chunks
        (`recipes.loss`).
    """
    head = 2 * shape.vocabulary * shape.width if offload else 0
    weights = _buffer_bytes(shape, bits, resident_blocks) if offload else _weight_bytes(shape, bits)
    weights += head if resident_head else 0
    held = {"weights": weights, **_entry_bytes(shape.targets(targets), entries, state_bits)}
    checkpointing = checkpointing or offload
    gradients, block, saved = 4 * entries, *_block_bytes(shape, batch, length, bits, entries > 0)
    row = batch * length * shape.width  # numbers in the hidden states
    # Attention that forms whole scores also forms the masks of full and of sliding attention.
    masks = 4 * batch * length * length if shape.score_heads else 0
    boundary = 2 * row if checkpointing else saved
    chunk = min(CHUNK_BYTES, 4 * batch * length * shape.vocabulary)
    # These are hidden states, their gradient, those with a label, and the last norm's fp32 input; then logits in fp32
    # and in bf16, and the slope of a cap.
    loss = 10 * row + (2 * chunk if shape.capped else 3 * chunk // 2)
    earlier = gradients if accumulation > 1 else 0
    held["workspace"] = WORKSPACE_BYTES
    if sums:
        held["sums of gradients"] = sums
    # From host memory the input of the next block comes while one is computed; the head comes for the loss.
    kept = boundary * (2 if offload else shape.layers) + masks
    loss += 0 if resident_head else head
    recomputed = block if checkpointing else block - saved
    # Its gradient, its fp32 input, and five temporaries in fp32.
    norm = 26 * row
    return {
        "loss": held | {"gradients": earlier, "kept activations": kept, "loss chunk": loss},
        "final norm": held | {"gradients": earlier, "kept activations": kept, "one norm": norm},
        "last block": held | {"gradients": earlier, "kept activations": kept, "one block": recomputed},
        "first block": held | {"gradients": gradients, "kept activations": boundary + masks, "one block": recomputed},
    }


def peak_bytes(moments: Mapping[str, Mapping[str, int]]) -> int:
    """Return the bytes of the largest moment of an estimate."""
    return max(sum(parts.values()) for parts in moments.values())


def smallest_gpu(needed: int) -> int | None:
    """Return the smallest of the common GPUs, in GB, on which so many bytes of tensors fit beside the CUDA context."""
    return next((gb for gb in GPU_SIZES if usable_bytes(gb) >= needed), None)


def usable_bytes(gb: int) -> int:
    """Return the bytes that a GPU of so many GB has for tensors."""
    return gb * 10**9 - OVERHEAD_BYTES


def describe(moments: Mapping[str, Mapping[str, int]]) -> str:
    """Format an estimate for people: GiB of each part at each moment, the peak, and the GPU that it fits."""
    kinds = list(dict.fromkeys(kind for parts in moments.values() for kind in parts))
    lines = ["GiB".ljust(18) + "".join(moment.rjust(13) for moment in moments)]
    for kind in kinds:
        lines.append(kind.ljust(18) + "".join(f"{parts.get(kind, 0) / GIB:13.3f}" for parts in moments.values()))
    lines.append("together".ljust(18) + "".join(f"{sum(parts.values()) / GIB:13.3f}" for parts in moments.values()))
    needed = peak_bytes(moments)
    gb = smallest_gpu(needed)
    fits = f"fits a GPU of {gb} GB" if gb else f"fits none of the common GPUs, up to {GPU_SIZES[-1]} GB"
    overhead = f"with {OVERHEAD_BYTES / GIB:.2f} GiB for the CUDA context and gaps"
    return "\n".join([*lines, f"expected peak {needed / GIB:.2f} GiB; {overhead} it {fits}"])


def host_bytes(shape: Shape, *, bits: int, batch: int, length: int) -> int:
    """Return the bytes of host memory that the frozen weights and the inputs of all blocks take under `offload`."""
    return _weight_bytes(shape, bits) + 2 * batch * length * shape.width * shape.layers


def _weight_bytes(shape: Shape, bits: int) -> int:
    tables = TABLE_BYTES * len(shape.linears) if bits == 4 else 0
    return 2 * shape.others + tables + sum(sum(_linear_bytes(*size, bits)) for size in shape.linears.values())


def _linear_bytes(rows: int, columns: int, bits: int) -> list[int]:
    """Return the bytes of each tensor of a linear weight, without the tables of 4-bit ones."""
    entries = rows * columns
    if bits == 16:
        return [2 * entries]
    if bits == 8:
        return [entries, 4 * rows]
    # A byte holds two codes, 64 codes share a one-byte scale, and 256 scales share an fp32 number.
    blocks = -(-entries // 64)
    return [-(-entries // 2), blocks, 4 * -(-blocks // 256)]


def _buffer_bytes(shape: Shape, bits: int, resident: int) -> int:
    """Return the bytes on the GPU of `resident` blocks' weights, of two more, and of the tables of 4-bit weights."""
    tables = TABLE_BYTES * len(shape.linears) if bits == 4 else 0
    each = [2 * count for count in shape.block_others]
    for rows, columns in list(shape.linears.values())[: len(shape.linears) // shape.layers]:
        each += _linear_bytes(rows, columns, bits)
    return min(resident + 2, shape.layers) * sum(-(-size // ALIGNMENT) * ALIGNMENT for size in each) + tables


def _entry_bytes(targets: Sequence[tuple[int, int]], entries: int, state_bits: int) -> dict[str, int]:
    """Return the bytes of values, positions and moments; weights have entries in proportion to their size."""
    whole = sum(rows * columns for rows, columns in targets)
    positions = moments = 0
    for rows, columns in targets:
        own = round(entries * rows * columns / whole)
        # Positions are held by rows, with 16-bit columns, or flat in 32 bits.
        positions += min(4 * own, 2 * own + 4 * (rows + 1))
        moments += 8 * own if state_bits == 32 else 2 * own + 8 * -(-own // 256)
    return {"values": 4 * entries, "positions": positions, "moments": moments}


def _block_bytes(shape: Shape, batch: int, length: int, bits: int, trains: bool) -> tuple[int, int]:
    """Return the bytes of a block's activations at the peak of its backward, and of those that forward saved."""
    tokens = batch * length
    scores = tokens * length * shape.score_heads
    # Queries and attention's output, keys and values; if queries and keys have norms, these are in fp32 too.
    attention = tokens * (4 + 4 * shape.head_norms) * (shape.heads + shape.keys)
    # Capped scores and softmax in bf16, and the softmax in fp32 too.
    attention += 8 * scores
    norm, inner = 4 * tokens * shape.width, 2 * tokens * shape.inner
    # Only trained layers save their input: the two normed ones here, the product of the feed-forward part below.
    normed = norm * trains
    # Gate, its activation and up.
    saved = attention + shape.norms * norm + normed + 3 * inner
    panel = PANEL_BYTES if trains else 0
    dense = 2 * max(rows * columns for rows, columns in shape.linears.values()) if bits < 16 else 0
    at_product = saved + max(3 * inner, inner * (1 + trains) + max(panel, dense))
    # The backward of a norm after the feed-forward part comes first, with five fp32 temporaries.
    at_last_norm = saved + inner * trains + (5 * norm if shape.norms > 2 else 0)
    # The feed-forward part is freed; cap and softmax are saved, and gradients of scores are formed, all in fp32.
    at_scores = attention + norm + normed + 6 * scores
    residual = 2 * tokens * shape.width
    return residual + max(at_product, at_last_norm, at_scores), saved + inner * trains
