"""The saved state of a turn of `TrainingSalience`: counters, stored scores and accumulators, saved with the weights.

The accumulators of the group are saved with the first weight, padded to the length of the largest group, so that the
size of the state does not depend on the turn.

Of several processes each has sums of its own. The state of a sharded model is asked for by all processes together, and
holds the average of all; that of another model is as a rule asked for by one, which can then save only the window's
beginning, unless all have called `TrainingSalience.share` before.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.streaming import TrainingSalience
from speft_optim.weights.averaging import is_under_fsdp
from speft_optim.weights.sparse_weight import SparseWeight


def state_of(training: TrainingSalience, weight: SparseWeight) -> dict[str, Tensor]:
    """Return the state that a checkpoint saves with a weight.

    Returns:
        `schedule_turn`, (5,) int64: turns, steps, number of groups, window, and steps of a turn. `schedule_scores`: the
        stored scores, (k,), or (0,) if there are none. `schedule_accumulator`, fp32 in CPU memory: with the first
        weight the accumulators of the group, padded to the length of the largest group; with other weights (0,).
    """
    training.end_passes()
    # Also where only other blocks are sharded: all weights have the same counters. This is called for each weight, so
    # that all of them are looked at only where it matters.
    if not training.holds_all and any(map(is_under_fsdp, training.weights)):
        training.share()
    steps = training.steps
    if not training.holds_all:
        training.warn_once(
            "A state that is saved within a window of MaskSchedule has no sums of other processes, so that a run "
            "resumed from it begins the window again; call share_sums() of the schedule in all processes before one of "
            "them saves."
        )
        steps = training.waiting
    counters = torch.tensor([training.turns, steps, *_counts(training)])
    scores = training.scores.get(weight.name, torch.zeros(0, device=weight.values.device))
    accumulator = torch.zeros(_accumulated_by(training, weight))
    if len(accumulator) and training.holds_all:
        for row_slice, part in _parts(training.group, accumulator):
            if row_slice.accumulator is not None:
                part.copy_(row_slice.accumulator)
    return dict(schedule_turn=counters, schedule_scores=scores, schedule_accumulator=accumulator)


def check_state_of(training: TrainingSalience, weight: SparseWeight, entries: int, saved: Mapping[str, Tensor]) -> None:
    """Refuse a saved state that `state_of` cannot have returned in a run with the same options.

    Args:
        training: the run's salience.
        weight: the weight.
        entries: the number of entries of the saved mask.
        saved: the saved state of the weight.

    Raises:
        ValueError: a tensor has another dtype, shape or content.
    """
    turn = saved["schedule_turn"]
    if turn.dtype != torch.int64 or turn.shape != (5,) or int(turn.min()) < 0:
        raise ValueError(f"The saved schedule_turn is {turn}, not five whole numbers as int64; load another state.")
    if turn[2:].tolist() != _counts(training) or int(turn[1]) >= training.period:
        raise ValueError(
            f"The saved schedule_turn is {turn.tolist()}, here there are {len(training.groups)} groups of weights and "
            f"a window of {training.window} in {training.period} steps; build MaskSchedule with the saved run's "
            "window, interval, salience and memory_budget."
        )
    own = training.scores.get(weight.name, torch.zeros(0))
    expected = {
        "schedule_scores": (own.dtype, entries if weight.name in training.scores else 0),
        "schedule_accumulator": (torch.float32, _accumulated_by(training, weight)),
    }
    for key, (dtype, length) in expected.items():
        if saved[key].dtype != dtype or saved[key].shape != (length,):
            raise ValueError(
                f"The saved {key} of {weight.name} is of {saved[key].dtype} and shape {tuple(saved[key].shape)}, "
                f"not of {dtype} and ({length},); build MaskSchedule with the saved run's options."
            )


def load_state_of(training: TrainingSalience, weight: SparseWeight, saved: Mapping[str, Tensor]) -> None:
    """Restore what `state_of` returned, after the weight's mask was restored."""
    if weight.name in training.scores:
        training.scores[weight.name] = saved["schedule_scores"].detach().to(weight.values.device, copy=True)
    if weight is training.weights[0]:
        turns, steps, *_ = saved["schedule_turn"].tolist()
        training.go_to(turns, steps)
        if steps > training.waiting:
            for row_slice, part in _parts(training.group, saved["schedule_accumulator"].detach()):
                row_slice.accumulator = part.to(row_slice.target.device, copy=True)


def _counts(training: TrainingSalience) -> list[int]:
    """Return the numbers that must be the same in a run that is resumed: groups, window, and steps of a turn."""
    return [len(training.groups), training.window, training.period]


def _accumulated_by(training: TrainingSalience, weight: SparseWeight) -> int:
    """Return the length of `schedule_accumulator` in the state of a weight."""
    largest = max(sum(row_slice.entries for row_slice in group) for group in training.groups)
    return largest if weight is training.weights[0] else 0


def _parts(group: list[RowSlice], accumulator: Tensor) -> Iterator[tuple[RowSlice, Tensor]]:
    """Yield the row slices of a group, each with its part of a flat tensor in its accumulator's shape."""
    sizes = [row_slice.entries for row_slice in group]
    for row_slice, part in zip(group, accumulator[: sum(sizes)].split(sizes), strict=True):
        yield row_slice, part.view(row_slice.last - row_slice.first, row_slice.columns)
