"""Moments that go along with the entries that stay when masks change, of many weights at a time.

8-bit moments are dequantised, rearranged and quantised again. The moments of some weights are joined for that, each
padded to whole blocks, so that a GPU gets a few large operations in place of some thirty small ones for each weight.
The blocks stay those of single weights, and so do their codes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from speft_optim.kernels.blockwise import BLOCK, dequantize_blockwise, quantize_blockwise
from speft_optim.optim.moments import SIGNED

# Entries are joined up to this number; places and temporaries take some fifty-six bytes for each.
_JOINED = 2**22


class Move(NamedTuple):
    """A changed mask of one weight.

    Attributes:
        state: the optimizer state of its values, with moments.
        count: the number of new entries.
        before: (m,) int64, the places among the old entries of those that stay.
        after: (m,) int64, their places among the new ones.
    """

    state: dict[str, Any]
    count: int
    before: Tensor
    after: Tensor


def carry_moments_(moves: Iterable[Move]) -> None:
    """Rearrange moments for changed masks: entries that stay keep theirs, new ones start from zero.

    The step count is shared, so the bias of a new entry's moments is not corrected: with the usual betas its first
    update is some three times the learning rate, (1 - beta1) / sqrt(1 - beta2). It was measured to be the best of
    several rules all the same (see docs/negative-results.md).

    Args:
        moves: the changes. An iterator is asked for a few at a time, so that their places need not all be there; if it
            raises, those that came before are carried.
    """
    for run in _runs(moves):
        quantised = [move for move in run if "exp_avg_scale" in move.state]
        if quantised:
            _carry_quantised_(quantised)
        for move in (move for move in run if "exp_avg_scale" not in move.state):
            for key in SIGNED:
                old = move.state[key]
                move.state[key] = old.new_zeros(move.count).index_copy_(0, move.after, old[move.before])


def _runs(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Yield moves of weights on one device, together; if `moves` raises, after those that came before."""
    run, size = [], 0
    try:
        for move in moves:
            larger = max(len(move.state["exp_avg"]), move.count)
            if run and (size + larger > _JOINED or move.after.device != run[0].after.device):
                ready, run, size = run, [], 0
                yield ready
            run.append(move)
            size += larger
    finally:
        if run:
            yield run


def _carry_quantised_(moves: list[Move]) -> None:
    old, new = _starts(len(move.state["exp_avg"]) for move in moves), _starts(move.count for move in moves)
    before = torch.cat([move.before + start for move, start in zip(moves, old, strict=False)])
    after = torch.cat([move.after + start for move, start in zip(moves, new, strict=False)])
    for key, signed in SIGNED.items():
        codes = torch.cat([_padded(move.state[key]) for move in moves])
        scales = torch.cat([move.state[f"{key}_scale"] for move in moves])
        moments = dequantize_blockwise(codes, scales, signed)
        carried = moments.new_zeros(new[-1]).index_copy_(0, after, moments[before])
        codes, scales = quantize_blockwise(carried, signed)
        for move, start, end in zip(moves, new, new[1:], strict=False):
            # As copies, since a state is saved with all memory that its tensors share.
            move.state[key] = codes[start : start + move.count].clone()
            move.state[f"{key}_scale"] = scales[start // BLOCK : end // BLOCK].clone()


def _starts(counts: Iterable[int]) -> list[int]:
    """Return where each weight starts, and where the last one ends, if each takes whole blocks."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // BLOCK) * BLOCK)
    return starts


def _padded(codes: Tensor) -> Tensor:
    return pad(codes, (0, -len(codes) % BLOCK))
