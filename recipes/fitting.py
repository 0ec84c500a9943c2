"""The fastest way to hold frozen weights so that training fits a GPU: there or in host memory, and in how many bits.

Quantised weights cost a few percent of a step, and weights in host memory what their copies take beyond the
computation, which falls with the tokens in a forward pass.
"""

import argparse
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from recipes import memory, presets, processes

# From so many tokens in a forward pass on, 16-bit weights are copied to the GPU while it computes: a step of Llama-3-8B
# on an H200 took 1.32 of the resident one at half of them, and 1.06 at these.
HIDING_TOKENS = 4 * 2048


@dataclass(frozen=True)
class Mode:
    """A way to hold the frozen weights.

    Attributes:
        bits: bits of each, as `--base-bits`.
        offload: whether they are in host memory.
    """

    bits: int
    offload: bool

    @property
    def name(self) -> str:
        """The name of the mode for people."""
        return f"{self.bits} bits {'in host memory' if self.offload else 'on the GPU'}"


def by_speed(tokens: int) -> list[Mode]:
    """Return all modes, the fastest first, for so many tokens in a forward pass."""
    on_gpu = [Mode(bits, offload=False) for bits in (16, 8, 4)]
    if tokens >= HIDING_TOKENS:
        # The copies cost less than dequantising does.
        return [on_gpu[0], Mode(16, offload=True), *on_gpu[1:], Mode(8, offload=True), Mode(4, offload=True)]
    # What is copied sets the time.
    return [*on_gpu, *(Mode(bits, offload=True) for bits in (4, 8, 16))]


def offload_refusal(args: argparse.Namespace) -> str | None:
    """Return why the other options leave no frozen weights in host memory; None if they do."""
    if args.method != "sparse":
        return f"--offload leaves frozen weights in host memory for a mask; leave it out of --method {args.method}"
    if processes.count() > 1:
        return "--offload is for one process, and this run has several; leave it out, or start one"
    for flag in ("compile", "cuda_graphs"):
        if getattr(args, flag):
            return f"--offload copies weights to the GPU from Python; leave out --{flag.replace('_', '-')}"
    if args.salience in ("grasp", "synflow"):
        return f"--salience {args.salience} needs the whole model on its device; choose another with --offload"
    return None


def choose(args: argparse.Namespace) -> str:
    """Set `base_bits` and `offload` to the fastest mode that fits the GPU of `--gpu-gb`, and return why.

    With `offload` this also sets how much of the model stays on the GPU: as much as fits. An option that was typed, and
    so is not None, stays. Modes that do not go with other options are left out.

    Raises:
        ValueError: no mode fits, or memory of this architecture is not known.
    """
    limit, missed = memory.usable_bytes(args.gpu_gb), {}
    has = f"of the {limit / memory.GIB:.1f} GiB that a GPU of {args.gpu_gb} GB has for tensors"
    possible = (False, True) if args.offload is None and offload_refusal(args) is None else (bool(args.offload),)
    for mode in by_speed(args.batch_size * args.max_length):
        if args.base_bits not in (None, mode.bits) or mode.offload not in possible:
            continue
        needed = _needed(args, options_of(mode))
        if needed <= limit:
            vars(args).update(options_of(mode))
            stays = _fill(args, limit) if mode.offload else ""
            return f"{_needs(mode, _needed(args))} {has}{stays}; {_compared(missed)}"
        missed[mode] = needed
    leanest = min(missed, key=missed.__getitem__)
    raise ValueError(
        f"nothing fits: {_needs(leanest, missed[leanest])} {has}; take fewer or shorter sequences, a smaller budget or "
        "a larger GPU"
    )


def _fill(args: argparse.Namespace, limit: int) -> str:
    """Let the head, for whose copy there may be no room beside a block, and as many blocks as fit stay on the GPU.

    What was typed, and so is not None, stays. Returns what was chosen, for people.
    """
    if args.resident_head is None:
        args.resident_head = _needed(args, {"resident_head": True}) <= limit
    layers = presets.shape_of(args).layers
    if args.resident_blocks is None:
        # The last two blocks take no more than the buffers through which they would travel.
        args.resident_blocks = (
            bisect_right(range(layers + 1), limit, key=lambda number: _needed(args, {"resident_blocks": number})) - 1
        )
    head = " and the head" if args.resident_head else ""
    return f", with {args.resident_blocks} of {layers} blocks{head} on the GPU" if args.resident_blocks or head else ""


def _needed(args: argparse.Namespace, options: Mapping = MappingProxyType({})) -> int:
    return memory.peak_bytes(presets.expected_memory(argparse.Namespace(**{**vars(args), **options})))


def _needs(mode: Mode, needed: int) -> str:
    return f"{mode.name} needs {needed / memory.GIB:.1f} GiB"


def _compared(missed: dict[Mode, int]) -> str:
    """Say why no faster mode was taken, by the one that is faster by least."""
    return f"the next faster mode, {_needs(*list(missed.items())[-1])}" if missed else "no other mode is faster"


def options_of(mode: Mode) -> dict:
    """Return the options of the command line that choose a mode."""
    return {"base_bits": mode.bits, "offload": mode.offload}
