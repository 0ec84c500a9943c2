"""Moments carried for entries that stay when masks change, for many weights at a time.

8-bit moments are dequantised, rearranged and quantised again. The moments of some weights are joined for that, each
padded to whole blocks, so that a GPU gets a few large operations in place of some thirty small ones for each weight.
The blocks stay those of single weights, and so do their codes.

Nothing here changes a state: the new moments are complete before any mask changes, so after an out-of-memory error
masks and moments still match.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from speft_optim.kernels.blockwise import BLOCK, blocks_in, dequantize_blockwise, quantize_blockwise
from speft_optim.optim.moments import SIGNED

# Entries are joined up to this number; positions, places and temporaries take some sixty-four bytes for each.
_JOINED = 2**22


class MaskChange(NamedTuple):
    """A change of one weight's mask that is prepared and not made yet.

    Attributes:
        values: the compact values, (k,) before the change.
        entries: the number of entries after it.
        before: (m,) int64, the places among the old entries of those that stay.
        after: (m,) int64, their places among the new ones.
        exchange: completes what `make` needs of other processes; all of them call it.
        make: changes mask and values, without an exchange.
    """

    values: Tensor
    entries: int
    before: Tensor
    after: Tensor
    exchange: Callable[[], None]
    make: Callable[[], None]


def in_runs(changes: Iterable[MaskChange]) -> Iterator[list[MaskChange]]:
    """Yield changes of weights on one device whose moments are carried together.

    The list is the same each time, and emptied before the next changes are asked for, so that the places of a few
    weights are in memory at a time.
    """
    run, size = [], 0
    for change in changes:
        larger = max(len(change.values), change.entries)
        if run and (size + larger > _JOINED or change.after.device != run[0].after.device):
            yield run
            run.clear()
            size = 0
        run.append(change)
        size += larger
    if run:
        yield run


def carried_moments(changes: list[MaskChange], states: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Return the moments for changed masks: entries that stay keep theirs, new ones start from zero.

    The step count is shared, so the bias of a new entry's moments is not corrected: with the usual betas its first
    update is some three times the learning rate, (1 - beta1) / sqrt(1 - beta2). It was measured to be the best of
    several rules all the same (see docs/negative-results.md).

    Args:
        changes: the changes, of weights on one device.
        states: the optimizer states of their values, with moments.

    Returns:
        For each change the keys of its state that get a new tensor.
    """
    quantised = [number for number, state in enumerate(states) if "exp_avg_scale" in state]
    joined = _carried_together([changes[n] for n in quantised], [states[n] for n in quantised]) if quantised else ()
    found = dict(zip(quantised, joined, strict=True))
    return [
        found[number]
        if number in found
        else {
            key: state[key].new_zeros(change.entries).index_copy_(0, change.after, state[key][change.before])
            for key in SIGNED
        }
        for number, (change, state) in enumerate(zip(changes, states, strict=True))
    ]


def _carried_together(changes: list[MaskChange], states: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Return the same of 8-bit moments, by one operation for all weights."""
    old, new = _starts(len(state["exp_avg"]) for state in states), _starts(change.entries for change in changes)
    before = torch.cat([change.before + start for change, start in zip(changes, old, strict=False)])
    after = torch.cat([change.after + start for change, start in zip(changes, new, strict=False)])
    carried: list[dict[str, Tensor]] = [{} for _ in changes]
    for key, signed in SIGNED.items():
        codes = torch.cat([_padded(state[key]) for state in states])
        scales = torch.cat([state[f"{key}_scale"] for state in states])
        moments = dequantize_blockwise(codes, scales, signed)
        moments = moments.new_zeros(new[-1]).index_copy_(0, after, moments[before])
        codes, scales = quantize_blockwise(moments, signed)
        for change, mine, start, end in zip(changes, carried, new, new[1:], strict=False):
            # As copies, since a state is saved with all memory that its tensors share.
            mine[key] = codes[start : start + change.entries].clone()
            mine[f"{key}_scale"] = scales[start // BLOCK : end // BLOCK].clone()
    return carried


def _starts(counts: Iterable[int]) -> list[int]:
    """Return where each weight starts, and where the last one ends, if each takes whole blocks."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + blocks_in(count) * BLOCK)
    return starts


def _padded(codes: Tensor) -> Tensor:
    return pad(codes, (0, -len(codes) % BLOCK))
