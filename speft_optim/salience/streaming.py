"""Salience from the backward passes of training itself, without calibration batches or extra passes.

At any time one group of weights, whose fp32 accumulators fit a budget, adds up its gradients from these passes. After
`window` optimizer steps the group's entries are scored and its accumulators are freed, and the next group's turn
begins; a round is one turn of each group. A weight that is larger than the budget takes several turns, one for each row
slice. If few groups would make a round too short, each turn begins with steps of waiting, since entries that are
replaced too often have no time to train.

In a turn the entries of one group have new scores; all other trained entries have the scores by which they were kept.
Both compete, and the best are trained, exactly as many as wanted. In the first round, while some trained entries have
no score yet, each group keeps its number of them. Stored is one score for each trained entry. The alternative, one
threshold for the latest scores of all groups, does not give an exact number.

Scores are those of the raw gradients: not clipped, and including the factors of a loss scaler and of gradient
accumulation. A constant factor changes no choice. One that changes favours stored or new scores until a round has
passed.

Beside the accumulators a selection takes some ten bytes for each candidate that is kept, for a moment between two steps
in which no activations are held.
"""

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from speft_optim.distributed import average_, is_distributed, total
from speft_optim.masks.mask import Mask
from speft_optim.salience.accumulators import GradientSum, RowSlice, SquareSum, cut_into_groups, placed
from speft_optim.salience.competition import Candidates, keep_best
from speft_optim.salience.measures import Measure
from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class TrainingSalience:
    """Scores one group of weights after another by gradients from the backward passes of training.

    Args:
        weights: the sparsified weights, in the model's order.
        measure: a measure with the statistic "gradient" or "squared_gradient".
        scope: whether entries compete within their weight ("local") or over all weights ("global").
        window: over how many optimizer steps gradients are summed in a turn.
        interval: the least number of steps in a round.
        memory_budget: bytes for the accumulators of a group.

    Attributes:
        turns: how many turns have ended.
        steps: how many optimizer steps of the current turn were taken.
        groups: the row slices that have a turn together.
        scores: by weight name, (k,) the score by which each trained entry was kept, if later turns need it.
    """

    def __init__(
        self,
        weights: list[SparseWeight],
        measure: Measure,
        scope: str,
        *,
        window: int,
        interval: int,
        memory_budget: int,
    ):
        self.weights, self.measure, self.scope, self.window = weights, measure, scope, window
        self._sum_of = SquareSum if measure.statistic == "squared_gradient" else GradientSum
        self.groups = cut_into_groups((w.place.target for w in weights), memory_budget, measure.entry_bytes)
        # The number of steps in a turn.
        self.period = max(window, -(-interval // len(self.groups)))
        # Chunks are long enough to keep a device busy, and short enough that their temporaries are small.
        longest = 2**22 if weights[0].values.is_cuda else 2**20
        self._chunk = max(2**10, min(longest, memory_budget // 512))
        self._groups_of: dict[str, list[int]] = {weight.name: [] for weight in weights}
        for number, group in enumerate(self.groups):
            for row_slice in group:
                self._groups_of[row_slice.target.name].append(number)
        self.turns = self.steps = 0
        self._told: set[str] = set()
        dtype = measure.scores(weights[0].name, torch.ones(2), torch.ones(2)).dtype
        stored = weights if scope == "global" and len(self.groups) > 1 else filter(self._is_cut, weights)
        self.scores = {w.name: torch.zeros(len(w.mask), dtype=dtype, device=w.values.device) for w in stored}
        self._begin_turn()

    @property
    def group(self) -> list[RowSlice]:
        """The row slices whose turn it is now."""
        return self.groups[self.turns % len(self.groups)]

    @property
    def bytes_held(self) -> int:
        """Bytes of accumulators and stored scores that are held now."""
        stored = sum(scores.nbytes for scores in self.scores.values())
        return stored + sum(accumulated.bytes_held for accumulated in self._sums.values())

    def end_step(self) -> bool:
        """Count an optimizer step, and tell whether the turn is over."""
        self._end_passes()
        self.steps += 1
        if self.steps == self.period - self.window:
            self._begin_window()
        return self.steps >= self.period

    def start_anew(self) -> None:
        """Begin the window again, as after a step whose gradients were not finite; while waiting, do nothing."""
        if self._sums:
            self._begin_window()

    def select(self, wanted: Mapping[str, int] | int) -> dict[str, Mask] | None:
        """End the turn and choose the entries of its group.

        Args:
            wanted: how many entries to keep: for each weight in local scope, over all weights in global scope. If that
                number changed by more than the group has entries, later turns make up for it.

        Returns:
            The new masks of the weights whose entries change; None if a gradient of the window was not finite, so that
            the window begins again.

        Raises:
            ValueError: a score is not finite though the gradients are.
        """
        is_used = self._gather()
        if is_used is None:
            self._warn_once(
                "A gradient of the last %d steps was not finite, so that their window begins again.", self.window
            )
            self._begin_window()
            return None
        chosen = {}
        if self.scope == "global" and any(is_used.values()):
            chosen = self._compete(self.weights, wanted)
        elif self.scope == "local":
            for weight in (weight for weight in self.weights if is_used.get(weight.name)):
                chosen.update(self._compete([weight], wanted[weight.name]))
        if unused := [name for name, used in is_used.items() if not used]:
            self._warn_once(
                "%d weights got no gradient in %d steps, e.g. %s (an expert without a token, a frozen part), so that "
                "their masks stay as they are.",
                len(unused),
                self.window,
                unused[0],
            )
        for row_slice in self.group:
            row_slice.accumulator = None
        self.turns += 1
        self._begin_turn()
        return chosen

    def state_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        """Return the state that a checkpoint saves with a weight.

        Returns:
            `schedule_turn`, (5,) int64: turns, steps, number of groups, window, and steps of a turn. `schedule_scores`:
            the stored scores, (k,), or (0,) if there are none. `schedule_accumulator`, fp32 in CPU memory: with the
            first weight the accumulators of the group, padded to the length of the largest group, so that the size does
            not depend on the turn; with other weights (0,).
        """
        self._end_passes()
        counters = torch.tensor([self.turns, self.steps, *self._counts])
        scores = self.scores.get(weight.name, torch.zeros(0, device=weight.values.device))
        accumulator = torch.zeros(self._accumulated_by(weight))
        if len(accumulator):
            for row_slice, part in self._parts(accumulator):
                if row_slice.accumulator is not None:
                    part.copy_(row_slice.accumulator)
        return dict(schedule_turn=counters, schedule_scores=scores, schedule_accumulator=accumulator)

    def check_state_of(self, weight: SparseWeight, entries: int, saved: Mapping[str, Tensor]) -> None:
        """Refuse a saved state that `state_of` cannot have returned in a run with the same options.

        Args:
            weight: the weight.
            entries: the number of entries of the saved mask.
            saved: the saved state of the weight.

        Raises:
            ValueError: a tensor has another dtype, shape or content.
        """
        turn = saved["schedule_turn"]
        if turn.dtype != torch.int64 or turn.shape != (5,) or int(turn.min()) < 0:
            raise ValueError(f"The saved schedule_turn is {turn}, not five whole numbers as int64; load another state.")
        if turn[2:].tolist() != self._counts or int(turn[1]) >= self.period:
            raise ValueError(
                f"The saved schedule_turn is {turn.tolist()}, here there are {len(self.groups)} groups of weights and "
                f"a window of {self.window} in {self.period} steps; build MaskSchedule with the saved run's window, "
                "interval, salience and memory_budget."
            )
        own = self.scores.get(weight.name, torch.zeros(0))
        expected = {
            "schedule_scores": (own.dtype, entries if weight.name in self.scores else 0),
            "schedule_accumulator": (torch.float32, self._accumulated_by(weight)),
        }
        for key, (dtype, length) in expected.items():
            if saved[key].dtype != dtype or saved[key].shape != (length,):
                raise ValueError(
                    f"The saved {key} of {weight.name} is of {saved[key].dtype} and shape {tuple(saved[key].shape)}, "
                    f"not of {dtype} and ({length},); build MaskSchedule with the saved run's options."
                )

    def load_state_of(self, weight: SparseWeight, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state_of` returned, after the weight's mask was restored."""
        turns, steps, *_ = saved["schedule_turn"].tolist()
        if weight.name in self.scores:
            self.scores[weight.name] = saved["schedule_scores"].detach().to(weight.values.device, copy=True)
        if weight is self.weights[0]:
            for row_slice in self.group:
                row_slice.accumulator = None
            self.turns = turns
            self._begin_turn()
            self.steps, waiting = steps, self.period - self.window
            if steps >= waiting:
                self._begin_window()
                self.steps = steps
            for row_slice, part in self._parts(saved["schedule_accumulator"].detach()) if steps > waiting else ():
                row_slice.accumulator = part.to(row_slice.target.device, copy=True)

    def _accumulated_by(self, weight: SparseWeight) -> int:
        """Return the length of `schedule_accumulator` in the state of a weight."""
        largest = max(sum(row_slice.entries for row_slice in group) for group in self.groups)
        return largest if weight is self.weights[0] else 0

    def _parts(self, accumulator: Tensor) -> Iterator[tuple[RowSlice, Tensor]]:
        """Yield the row slices of the group, each with its part of a flat tensor in its accumulator's shape."""
        parts = accumulator[: sum(row_slice.entries for row_slice in self.group)].split(
            [row_slice.entries for row_slice in self.group]
        )
        for row_slice, part in zip(self.group, parts, strict=True):
            yield row_slice, part.view(row_slice.last - row_slice.first, row_slice.columns)

    @property
    def _counts(self) -> list[int]:
        """Numbers that must be the same in a run that is resumed: groups, window, and steps of a turn."""
        return [len(self.groups), self.window, self.period]

    def _begin_turn(self) -> None:
        """Begin a turn: wait for the window, or begin it at once."""
        self.steps, self._sums = 0, {}
        self._attach()
        if self.period == self.window:
            self._begin_window()

    def _begin_window(self) -> None:
        """Sum the gradients of the group from the next backward pass on."""
        self.steps = self.period - self.window
        for row_slice in self.group:
            row_slice.accumulator = None
        self._sums = {row_slice.target.name: self._sum_of(row_slice) for row_slice in self.group}
        self._attach()

    def _end_passes(self) -> None:
        for accumulated in self._sums.values():
            accumulated.end_pass()

    def _attach(self) -> None:
        for weight in self.weights:
            weight.accumulator = self._sums.get(weight.name)

    def _gather(self) -> dict[str, bool] | None:
        """Average the sums over processes and tell by weight whether it got a gradient; None if one is not finite."""
        self._end_passes()
        for row_slice in self.group:
            placed(row_slice, row_slice.target.device)
        if is_distributed():
            average_([row_slice.accumulator for row_slice in self.group], total(1))
        ends = [torch.stack(torch.aminmax(row_slice.accumulator)).tolist() for row_slice in self.group]
        if not torch.tensor(ends).isfinite().all():
            return None
        # Without a gradient, as in an expert without tokens, the first positions would be chosen.
        return {row_slice.target.name: any(both) for row_slice, both in zip(self.group, ends, strict=True)}

    def _compete(self, weights: list[SparseWeight], count: int) -> dict[str, Mask]:
        """Keep the best `count` entries, store their scores, and return the masks that change."""
        runs = [run for weight in weights for run in self._runs(weight)]
        kept = keep_best(runs, count, self._are_scored(weights), self.measure, self._chunk)
        changed = {}
        for weight, (positions, scores) in kept.items():
            before = weight.mask.indices
            if weight.name in self.scores:
                self.scores[weight.name] = scores
            if len(positions) != len(before) or not torch.equal(positions.to(before), before):
                changed[weight.name] = Mask(positions, weight.mask.shape)
        return changed

    def _runs(self, weight: SparseWeight) -> Iterator[Candidates]:
        """Yield the candidates of a weight in the order of positions."""
        # The model may have moved to another device since its masks were made.
        indices, scores = weight.mask.indices.to(weight.values.device), self.scores.get(weight.name)
        row_slice = self._sums[weight.name].row_slice if weight.name in self._sums else None
        if scores is None:
            # If no scores are stored, the row slice is the whole weight.
            yield Candidates(weight, row_slice=row_slice)
            return
        scores = scores.to(indices.device)
        if row_slice is None:
            yield Candidates(weight, indices, scores)
            return
        ends = [row_slice.first * row_slice.columns, row_slice.last * row_slice.columns]
        low, high = torch.searchsorted(indices, torch.tensor(ends, dtype=indices.dtype, device=indices.device)).tolist()
        yield Candidates(weight, indices[:low], scores[:low])
        yield Candidates(weight, row_slice=row_slice)
        yield Candidates(weight, indices[high:], scores[high:])

    def _is_cut(self, weight: SparseWeight) -> bool:
        return len(self._groups_of[weight.name]) > 1

    def _are_scored(self, weights: list[SparseWeight]) -> bool:
        """Tell whether all trained entries outside the current group have a stored score."""
        now = self.turns % len(self.groups)
        return all(g < self.turns or g == now for weight in weights for g in self._groups_of[weight.name])

    def _warn_once(self, message: str, *details: object) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message + " This is not logged again.", *details)

    def __setstate__(self, state: dict) -> None:
        """Attach a copied schedule to the weights of the copied model."""
        self.__dict__.update(state)
        self._attach()
