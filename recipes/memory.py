"""What a sparse run will need on the GPU, from the model's configuration alone.

Weights and what belongs to the trained entries are counted to the byte on a model without data. Activations are counted
from what a block keeps for its backward, in bf16 with norms in fp32, at the three moments that can set the peak: the
loss, the backward of the last block (all boundaries between blocks are still there), and that of the first one (all
gradients are there already).
"""

import os
from collections.abc import Mapping, Sequence

from recipes.loss import CHUNK_BYTES
from recipes.shapes import Shape

GIB = 2**30
# Sold sizes, taken as 10^9 bytes a GB: GPUs with error correction have little more than that to give.
GPU_SIZES = (12, 16, 24, 40, 48, 80)
# The CUDA context with its kernels, a few hundred MiB by GPU and driver, and gaps between the allocator's blocks.
OVERHEAD_BYTES = 3 * 2**28
# Of cuBLAS, on an H100; other GPUs take less.
WORKSPACE_BYTES = 64 * 2**20
# The library forms the gradients of uniform masks in dense panels of at most so many bytes.
PANEL_BYTES = 64 * 2**20


def let_segments_grow() -> None:
    """Let torch's allocator cut its blocks to size, unless the user has set it up; to be called before CUDA is used.

    By default up to 1 MB behind a tensor of more than 1 MB is lost; measured, 20 MiB in training an 8B model at 1 %.
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
) -> dict[str, dict[str, int]]:
    """Return the bytes of each part at the moments that can set the peak of a training step; see `peak_bytes`.

    Args:
        shape: the model's sizes.
        bits: 16 for bf16 weights, 8 and 4 for those of bitsandbytes (nf4 with double quantisation).
        entries: trained entries; 0 for a frozen model.
        batch: sequences in a forward pass.
        length: tokens in each.
        targets: suffixes of the names of the weights that share the entries by size; None for all linear weights.
        state_bits: of the optimizer's two moments.
        accumulation: forward passes in a step; gradients of the first are there during the others.
        checkpointing: whether blocks are recomputed in backward.
        sums: bytes of the sums of gradients by which masks move.

    Returns:
        By moment (`loss`, `last block`, `first block`) the bytes by part. The loss is taken in chunks (`recipes.loss`).
    """
    held = {"weights": _weight_bytes(shape, bits), **_entry_bytes(shape.targets(targets), entries, state_bits)}
    gradients, block, saved = 4 * entries, *_block_bytes(shape, batch, length, bits, entries > 0)
    row = batch * length * shape.width  # numbers in the hidden states
    # Where scores are formed whole, the masks of full and of sliding attention are too.
    masks = 4 * batch * length * length if shape.score_heads else 0
    boundary = 2 * row if checkpointing else saved
    chunk = min(CHUNK_BYTES, 4 * batch * length * shape.vocabulary)
    # Hidden states, their gradient, those that have a label, and the last norm's fp32 input; logits, the temporary of a
    # sum of exponentials, and the slope of a cap.
    loss = 10 * row + chunk * (3 if shape.capped else 2)
    earlier = gradients if accumulation > 1 else 0
    held["workspace"] = WORKSPACE_BYTES
    if sums:
        held["sums of gradients"] = sums
    kept = boundary * shape.layers + masks
    recomputed = block if checkpointing else block - saved
    return {
        "loss": held | {"gradients": earlier, "kept activations": kept, "loss chunk": loss},
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
    """Return an estimate for people: GiB of each part at each moment, the peak, and the GPU that it fits."""
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


def _weight_bytes(shape: Shape, bits: int) -> int:
    total = 2 * shape.others
    for rows, columns in shape.linears.values():
        entries = rows * columns
        if bits == 16:
            total += 2 * entries
        elif bits == 8:
            total += entries + 4 * rows
        else:
            # Two codes a byte, and a one-byte scale for each 64, themselves scaled by an fp32 number for each 256. Each
            # weight carries its tables, of 16 and 256 fp32 numbers, and the mean of its scales.
            blocks = -(-entries // 64)
            total += -(-entries // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
    return total


def _entry_bytes(targets: Sequence[tuple[int, int]], entries: int, state_bits: int) -> dict[str, int]:
    """Return the bytes of values, positions and moments, with the entries shared by the weights according to their size."""
    whole = sum(rows * columns for rows, columns in targets)
    positions = moments = 0
    for rows, columns in targets:
        own = round(entries * rows * columns / whole)
        # By rows, with columns of 16 bits, or flat positions of 32.
        positions += min(4 * own, 2 * own + 4 * (rows + 1))
        moments += 8 * own if state_bits == 32 else 2 * own + 8 * -(-own // 256)
    return {"values": 4 * entries, "positions": positions, "moments": moments}


def _block_bytes(shape: Shape, batch: int, length: int, bits: int, trains: bool) -> tuple[int, int]:
    """Return the bytes of a block's activations at the peak of its backward, and of those that its forward saved for it."""
    tokens = batch * length
    scores = tokens * length * shape.score_heads
    # Queries and attention's output, keys and values; with norms of their own two of them in fp32 too.
    attention = tokens * (4 + 4 * shape.head_norms) * (shape.heads + shape.keys)
    # Scores behind the cap and the softmax in bf16, the softmax in fp32 as well.
    attention += 8 * scores
    norm, inner = 4 * tokens * shape.width, 2 * tokens * shape.inner
    # Only trained layers save their input: the two normed ones here, the product of the feed-forward part below.
    normed = norm * trains
    # Gate, its activation and up.
    saved = attention + shape.norms * norm + normed + 3 * inner
    panel = PANEL_BYTES if trains else 0
    dense = 2 * max(rows * columns for rows, columns in shape.linears.values()) if bits < 16 else 0
    at_product = saved + max(3 * inner, inner * (1 + trains) + max(panel, dense))
    # A norm behind the feed-forward part goes first, with five fp32 temporaries.
    at_last_norm = saved + inner * trains + (5 * norm if shape.norms > 2 else 0)
    # The feed-forward part is gone; the cap and the softmax are saved, its gradient comes and one goes, all in fp32.
    at_scores = attention + norm + normed + 6 * scores
    residual = 2 * tokens * shape.width
    return residual + max(at_product, at_last_norm, at_scores), saved + inner * trains
