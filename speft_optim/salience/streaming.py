"""Salience from the backward passes that train: no batches and no passes of its own.

At any time one group of weights, as many as have fp32 accumulators within a budget, adds up the gradients of the very
backward passes that train. After `window` optimizer steps the group's entries are scored and its accumulators freed,
and the next group's turn begins; a round is one turn of each group. A weight too large for the budget takes several
turns, a panel of rows each. Where few groups would make a round too short, each turn begins with steps of waiting: a
mask that changes too often leaves its newcomers no time to train.

In one turn a part of the entries has new scores, all others have those by which they were kept. Both compete for the
places: the best of the new and the stored ones are trained, exactly as many as wanted. In the first round, while some
trained entries have no score yet, each group keeps its number of them. What is stored is one score for each trained
entry. The alternative, one threshold over the latest scores of all groups, does not give an exact number.

Scores are of the raw gradients as the backward passes give them: not clipped, and with the factors of a loss scaler
and of the division by accumulation steps. A constant factor changes no choice; one that changes weighs stored scores
against new ones until a round has passed.

Beside the accumulators a selection takes some ten bytes for each entry that competes for its places and is kept, for a
moment between two steps, when there are no activations.
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
    """Scores of one group of weights after another, from the backward passes that train.

    Args:
        weights: the sparsified weights, in the model's order.
        measure: of the statistic "gradient" or "squared_gradient".
        scope: whether entries compete within their weight ("local") or over all weights ("global").
        window: optimizer steps that are summed in a turn.
        interval: least number of steps in a round.
        memory_budget: bytes for the accumulators of a group.

    Attributes:
        turns: how many turns ended so far.
        steps: optimizer steps taken in the present turn.
        groups: the row slices of weights that have a turn together.
        scores: by weight, (k,) the score by which each trained entry was kept; only where later turns need it.
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
        self.groups = cut_into_groups((w.target for w in weights), memory_budget, measure.entry_bytes)
        # Steps of a turn.
        self.period = max(window, -(-interval // len(self.groups)))
        # Long enough to keep a device busy, and short enough that temporaries of a selection are few.
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
        """The row slices whose turn it is."""
        return self.groups[self.turns % len(self.groups)]

    @property
    def bytes_held(self) -> int:
        """Bytes of accumulators and stored scores that are held now."""
        stored = sum(scores.nbytes for scores in self.scores.values())
        return stored + sum(accumulated.bytes_held for accumulated in self._sums.values())

    def end_step(self) -> bool:
        """Count an optimizer step; whether the turn is over."""
        self._end_passes()
        self.steps += 1
        if self.steps == self.period - self.window:
            self._begin_window()
        return self.steps >= self.period

    def start_anew(self) -> None:
        """Begin the window again, as after a step whose gradients were not finite; changes nothing before it."""
        if self._sums:
            self._begin_window()

    def select(self, wanted: Mapping[str, int] | int) -> dict[str, Mask] | None:
        """End the turn and choose the entries of its group.

        Args:
            wanted: entries to keep, by weight in local scope and over all weights in global scope. Where the group is
                too small to make up for a changed number, later turns do.

        Returns:
            The new masks of the weights whose entries change; None if a gradient of the window was not finite, so that
            it begins anew.

        Raises:
            ValueError: scores of finite gradients are not finite.
        """
        is_used = self._gather()
        if is_used is None:
            self._warn_once("A gradient of the last %d steps was not finite: their window begins anew.", self.window)
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
                "%d weights got no gradient in %d steps, e.g. %s (an expert without a token, a frozen part): where "
                "there is nothing to choose by, masks stay as they are.",
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
        """What a checkpoint keeps with a weight.

        Returns:
            `schedule_turn`, (5,) int64: turns, steps, number of groups, window and steps of a turn. `schedule_scores`,
            (k,), or (0,) where they are not stored. `schedule_accumulator`, with the first weight fp32 in CPU memory,
            as long as the largest group whatever the turn, with others (0,).
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
        """Raise a ValueError for what `state_of` cannot have given.

        Args:
            weight: the weight.
            entries: of the saved mask.
            saved: the saved state of the weight.
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
        """Restore what `state_of` gave, after the weight's mask."""
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
        """How many sums a checkpoint keeps with a weight."""
        largest = max(sum(row_slice.entries for row_slice in group) for group in self.groups)
        return largest if weight is self.weights[0] else 0

    def _parts(self, accumulator: Tensor) -> Iterator[tuple[RowSlice, Tensor]]:
        """Yield the row slices of the group, each with its part of a flat tensor, of its accumulator's shape."""
        parts = accumulator[: sum(row_slice.entries for row_slice in self.group)].split(
            [row_slice.entries for row_slice in self.group]
        )
        for row_slice, part in zip(self.group, parts, strict=True):
            yield row_slice, part.view(row_slice.last - row_slice.first, row_slice.columns)

    @property
    def _counts(self) -> list[int]:
        """What must be equal in a run that is resumed."""
        return [len(self.groups), self.window, self.period]

    def _begin_turn(self) -> None:
        """Wait for the window, which may begin at once."""
        self.steps, self._sums = 0, {}
        self._attach()
        if self.period == self.window:
            self._begin_window()

    def _begin_window(self) -> None:
        """Sum gradients from the next backward pass on."""
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
        """Average over processes; tell which weights of the group got a gradient, None if one is not finite."""
        self._end_passes()
        for row_slice in self.group:
            placed(row_slice, row_slice.target.device)
        if is_distributed():
            average_([row_slice.accumulator for row_slice in self.group], total(1))
        ends = [torch.stack(torch.aminmax(row_slice.accumulator)).tolist() for row_slice in self.group]
        if not torch.tensor(ends).isfinite().all():
            return None
        # Where no gradient arrives, as at an expert without tokens, a choice would be of the first positions.
        return {row_slice.target.name: any(both) for row_slice, both in zip(self.group, ends, strict=True)}

    def _compete(self, weights: list[SparseWeight], count: int) -> dict[str, Mask]:
        """Let entries compete for `count` places; the masks that change. Stores the scores of those that are kept."""
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
        """What of a weight can be kept, in the order of positions."""
        # The model may have moved since its masks were made.
        indices, scores = weight.mask.indices.to(weight.values.device), self.scores.get(weight.name)
        row_slice = self._sums[weight.name].row_slice if weight.name in self._sums else None
        if scores is None:
            # Where no scores are stored the row slice is the whole weight.
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
        """Tell whether all trained entries of the weights outside the group were kept by a score."""
        now = self.turns % len(self.groups)
        return all(g < self.turns or g == now for weight in weights for g in self._groups_of[weight.name])

    def _warn_once(self, message: str, *details: object) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message + " Told of once.", *details)

    def __setstate__(self, state: dict) -> None:
        """Return a copied schedule observes the weights of the copied model."""
        self.__dict__.update(state)
        self._attach()
