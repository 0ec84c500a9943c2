"""Salience from the backward passes of training itself, without calibration batches or extra passes.

At any time one group of weights, whose fp32 accumulators fit a budget, accumulates its gradients from these passes.
After `window` optimizer steps the group's entries are scored, its accumulators are freed, and the turn of the next
group begins; a round is one turn of each group. A weight that is larger than the budget has several turns, one for each
row slice. If there are so few groups that a round would be too short, each turn begins by waiting for some steps, since
entries that are replaced too often have no time to train.

At the end of a turn the entries of one group have new scores; all other trained entries have stored scores. Both
compete, and exactly the wanted number of best entries is trained next. In the first round, while some trained entries
have no score yet, each group keeps its number of them. Stored is one score for each trained entry. The alternative, one
threshold for the latest scores of all groups, does not give an exact number.

Scores are those of the raw gradients: not clipped, and including the factors of a loss scaler and of gradient
accumulation. A constant factor does not change the selection. A changing factor favours stored or new scores until a
round has passed.

Beside the accumulators a selection takes some fourteen bytes for each candidate that is kept, and then some 270 MB to
carry moments, or 64 bytes an entry of a weight with more than four million. It does so between two steps, when no
activations are held.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from speft_optim.distributed import average_, is_distributed, together, world_size
from speft_optim.masks.mask import Mask
from speft_optim.salience.accumulators import GradientSum, RowSlice, SquareSum, placed
from speft_optim.salience.competition import keep_best, runs_of
from speft_optim.salience.groups import cut_into_groups
from speft_optim.salience.measures import Measure
from speft_optim.salience.topk import extremes
from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The entries of a weight that are to be trained from now on.

    Attributes:
        mask: the entries.
        scores: (k,) the scores by which they were kept; None if later turns do not need them.
    """

    mask: Mask
    scores: Tensor | None


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
        period: the number of steps in a turn.
        waiting: how many of these come before the window.
        groups: the row slices that have a turn together.
        scores: by weight name, (k,) the score by which each trained entry was kept, if later turns need it. Whoever
            changes a mask to that of a `Choice` stores the scores of the choice here.
    """

    _is_shared = False

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
        self.period = max(window, -(-interval // len(self.groups)))
        self.waiting = self.period - window
        # Chunks are long enough to keep a device busy, and short enough that their temporaries are small.
        longest = 2**23 if weights[0].values.is_cuda else 2**20
        self._chunk = max(2**10, min(longest, memory_budget // 256))
        self._groups_of: dict[str, list[int]] = {weight.name: [] for weight in weights}
        for number, group in enumerate(self.groups):
            for row_slice in group:
                self._groups_of[row_slice.target.name].append(number)
        self.turns = self.steps = 0
        self._told: set[str] = set()
        dtype = measure.scores(weights[0].name, torch.ones(2), torch.ones(2)).dtype
        stored = weights if scope == "global" and len(self.groups) > 1 else filter(self._is_cut, weights)
        # The highest score stands for none, so that a weight without a gradient keeps its entries until it gets one.
        highest = torch.finfo(dtype).max
        self.scores = {w.name: torch.full((len(w.mask),), highest, dtype=dtype, device=w.values.device) for w in stored}
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

    @property
    def is_summing(self) -> bool:
        """Whether a window has begun, so that passes add up the gradients of the group."""
        return bool(self._sums)

    @property
    def holds_all(self) -> bool:
        """Whether this process needs no sums of others to go on: in a window they have theirs, but for `share`."""
        return self._is_shared or not is_distributed() or self.steps <= self.waiting

    def share(self) -> None:
        """Give each process the average of the sums of all, which changes no choice; all of them call this."""
        if not self.holds_all:
            self._average()
            self._is_shared = True

    def end_step(self) -> bool:
        """Count an optimizer step, and tell whether the turn is over."""
        for accumulated in self._sums.values():
            accumulated.end_step()
        self.steps += 1
        self._is_shared = False
        if self.steps == self.waiting:
            self._begin_window()
        return self.steps >= self.period

    def end_passes(self) -> None:
        """Add what the latest backward pass left to the accumulators."""
        for accumulated in self._sums.values():
            accumulated.end_pass()

    def start_anew(self) -> None:
        """Begin the window again, as after a step whose gradients were not finite; while waiting, do nothing."""
        if self._sums:
            self._begin_window()

    def drop_gradients(self) -> None:
        """Let no choice depend on the gradients since the last step, which were dropped.

        If earlier ones are in the sums too, these are spoilt, and the window begins again at its end: all processes
        find that out together there, also if only some of them have got a gradient.
        """
        new = [accumulated for accumulated in self._sums.values() if accumulated.has_new]
        if new and self.steps == self.waiting:
            self._begin_window()
            return
        for accumulated in new:
            accumulated.spoil()

    def select(self, wanted: Mapping[str, int] | int) -> dict[str, Choice] | None:
        """End the turn and choose the entries of its group.

        Args:
            wanted: how many entries to keep: for each weight in local scope, over all weights in global scope. If that
                number changed by more than the group has entries, later turns make up for it.

        Returns:
            The choices for the weights whose entries change; None if a gradient of the window was not finite, or was
            dropped without a step, so that the window begins again.

        Raises:
            ValueError: a score is not finite though the gradients are.
            RuntimeError: another process failed.
        """
        is_used = self._gather()
        if is_used is None:
            self.warn_once(
                "A gradient of the last %d steps was not finite, or was dropped without a step, so that their window "
                "begins again.",
                self.window,
            )
            self._begin_window()
            return None
        # Rows of sharded weights are read from other processes, which one that fails meanwhile cannot tell.
        reads_rows = any(weight.place.shards is not None for weight in self.weights)
        with nullcontext() if reads_rows else together():
            chosen = self._choose(is_used, wanted)
        if unused := [r.target.name for r in self.group if r.entries and not is_used[r.target.name]]:
            self.warn_once(
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

    def go_to(self, turns: int, steps: int) -> None:
        """Go to a step of a turn of a resumed run; the accumulators of its group are empty there."""
        for row_slice in self.group:
            row_slice.accumulator = None
        self.turns = turns
        self._begin_turn()
        if steps >= self.waiting:
            self._begin_window()
        self.steps = steps
        # All processes load the same sums, which are those of all.
        self._is_shared = True

    def _begin_turn(self) -> None:
        """Begin a turn: wait for its window, or begin the window immediately."""
        self.steps, self._sums = 0, {}
        self._attach()
        if not self.waiting:
            self._begin_window()

    def _begin_window(self) -> None:
        """Sum the gradients of the group from the next backward pass on."""
        self.steps = self.waiting
        for row_slice in self.group:
            row_slice.accumulator = None
        self._sums = {row_slice.target.name: self._sum_of(row_slice) for row_slice in self.group}
        self._attach()

    def _attach(self) -> None:
        for weight in self.weights:
            weight.accumulator = self._sums.get(weight.name)

    def _gather(self) -> dict[str, bool] | None:
        """Average the sums over processes and tell by weight whether it got a gradient; None if one is not finite."""
        self._average()
        ends = [extremes(row_slice.accumulator) for row_slice in self.group]
        if not all(math.isfinite(end) for both in ends for end in both):
            return None
        # Without a gradient, as in an expert without tokens, the first positions would be chosen.
        return {row_slice.target.name: any(both) for row_slice, both in zip(self.group, ends, strict=True)}

    def _average(self) -> None:
        """Average the sums over processes."""
        # A process that runs out of memory would let the others hang in the exchange.
        with together():
            self.end_passes()
            for row_slice in self.group:
                placed(row_slice, row_slice.target.device)
        if is_distributed():
            average_([row_slice.accumulator for row_slice in self.group], world_size())

    def _choose(self, is_used: Mapping[str, bool], wanted: Mapping[str, int] | int) -> dict[str, Choice]:
        """Return the choices for weights whose entries change; those of the group without a gradient keep theirs."""
        chosen = {}
        if self.scope == "global" and any(is_used.values()):
            # Without a gradient all scores would be zero, and the weight would lose its entries to the others.
            resting = [weight for weight in self.weights if not is_used.get(weight.name, True)]
            taken = sum(len(weight.mask) for weight in resting)
            chosen = self._compete([weight for weight in self.weights if weight not in resting], wanted - taken)
        elif self.scope == "local":
            for weight in (weight for weight in self.weights if is_used.get(weight.name)):
                chosen.update(self._compete([weight], wanted[weight.name]))
        return chosen

    def _compete(self, weights: list[SparseWeight], count: int) -> dict[str, Choice]:
        """Keep the best `count` entries, and return the choices for weights whose entries change."""
        slices = {name: accumulated.row_slice for name, accumulated in self._sums.items()}
        runs = [run for w in weights for run in runs_of(w, slices.get(w.name), self.scores.get(w.name))]
        kept = keep_best(runs, count, self._are_scored(weights), self.measure, self._chunk)
        changed = {}
        for weight, (positions, scores) in kept.items():
            is_stored = weight.name in self.scores
            # Of a weight without new scores entries can only leave.
            may_differ = len(positions) != len(weight.mask) or weight.name in slices
            if may_differ and not _are_those_of(weight.mask, positions):
                mask = Mask.of_sorted(positions, weight.mask.shape)
                changed[weight.name] = Choice(mask, scores if is_stored else None)
            elif is_stored:
                self.scores[weight.name] = scores
        return changed

    def _is_cut(self, weight: SparseWeight) -> bool:
        return len(self._groups_of[weight.name]) > 1

    def _are_scored(self, weights: list[SparseWeight]) -> bool:
        """Tell whether all trained entries outside the current group have a stored score."""
        now = self.turns % len(self.groups)
        return all(g < self.turns or g == now for weight in weights for g in self._groups_of[weight.name])

    def warn_once(self, message: str, *details: object) -> None:
        """Log a warning, unless the run has logged it before."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message + " This is not logged again.", *details)

    def __setstate__(self, state: dict) -> None:
        """Attach a copied schedule to the weights of the copied model."""
        self.__dict__.update(state)
        self._attach()


def _are_those_of(mask: Mask, positions: Tensor) -> bool:
    """Return whether positions are those of a mask."""
    return len(positions) == len(mask) and torch.equal(positions.to(indices := mask.indices), indices)
