"""Competition for the places of a mask: entries with new scores against those that are trained already.

A weight with new scores has all its entries as candidates; any other weight has its trained entries, each with the
score that is stored for it. All candidates are numbered in the order of weights and positions, so that one running
selection of the best serves both kinds. If two scores are equal the earlier candidate wins, as in `select_masks`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.measures import Measure
from speft_optim.salience.topk import BestEntries, extremes
from speft_optim.weights.sparse_weight import SparseWeight


@dataclass(eq=False)
class Candidates:
    """Candidates of one weight in the order of their positions: trained entries, or all entries of a row slice.

    Attributes:
        weight: the weight.
        positions: (k,) flat positions of the trained entries; None if there is a row slice.
        scores: (k,) the stored scores of these; None if there is a row slice.
        row_slice: the row slice whose entries have new scores; None for trained entries.
    """

    weight: SparseWeight
    positions: Tensor | None = None
    scores: Tensor | None = None
    row_slice: RowSlice | None = None

    def __len__(self) -> int:
        return len(self.positions) if self.row_slice is None else self.row_slice.entries

    def positions_at(self, places: Tensor) -> Tensor:
        """Flat positions in the weight of the candidates at `places`: int64, or as trained entries have them."""
        if self.row_slice is None:
            return self.positions.index_select(0, places.to(self.positions.device))
        return places.long() + self.row_slice.first * self.row_slice.columns

    def new_scores(self, measure: Measure, chunk: int) -> Iterator[Tensor]:
        """Yield the scores of a row slice in order, about `chunk` at a time.

        Raises:
            ValueError: a score is not finite.
        """
        for _, weight, statistic in self.row_slice.chunks(chunk):
            scores = measure.scores(self.weight.name, weight, statistic)
            if not all(map(math.isfinite, extremes(scores))):
                raise ValueError(
                    f"Scores of {self.weight.name} are not finite though its gradients are; look for NaN or inf in its "
                    "entries, and at the salience function."
                )
            yield scores


def _scores_of(runs: list[Candidates], measure: Measure, chunk: int) -> Iterator[Tensor]:
    """Yield the scores of all candidates in order; the stored ones of many weights on one device come together."""
    for device, part in itertools.groupby(runs, lambda run: run.scores.device if run.row_slice is None else None):
        if device is not None:
            yield torch.cat([run.scores for run in part])
        else:
            yield from itertools.chain.from_iterable(run.new_scores(measure, chunk) for run in part)


def runs_of(weight: SparseWeight, row_slice: RowSlice | None, scores: Tensor | None) -> Iterator[Candidates]:
    """Yield the candidates of a weight in the order of positions.

    Args:
        weight: the weight.
        row_slice: the rows with new scores; None if no entry has one.
        scores: (k,) the stored scores of the trained entries; None if none are stored, where a row slice is the whole
            weight.
    """
    if scores is None:
        yield Candidates(weight, row_slice=row_slice)
        return
    # The model may have moved to another device since its masks were made.
    indices = weight.mask.indices.to(weight.values.device)
    scores = scores.to(indices.device)
    if row_slice is None:
        yield Candidates(weight, indices, scores)
        return
    ends = [row_slice.first * row_slice.columns, row_slice.last * row_slice.columns]
    low, high = torch.searchsorted(indices, torch.tensor(ends, dtype=indices.dtype, device=indices.device)).tolist()
    yield Candidates(weight, indices[:low], scores[:low])
    yield Candidates(weight, row_slice=row_slice)
    yield Candidates(weight, indices[high:], scores[high:])


def keep_best(
    runs: list[Candidates], count: int, all_compete: bool, measure: Measure, chunk: int
) -> dict[SparseWeight, tuple[Tensor, Tensor]]:
    """Keep the best `count` candidates, or all if there are fewer.

    Args:
        runs: the candidates, in the order of weights and positions.
        count: how many to keep.
        all_compete: whether trained entries without a new score compete by their stored ones. If not, all of these are
            kept, and the other candidates compete for the rest of `count`.
        measure: the measure that gives the new scores.
        chunk: how many entries to score at a time.

    Returns:
        For each weight the positions that are kept, (k,) int32 or int64 in rising order, and their scores, (k,), both
        on the device of its values.
    """
    competing = [run for run in runs if all_compete or run.row_slice is not None]
    count -= sum(len(run) for run in runs) - sum(len(run) for run in competing)
    size = sum(len(run) for run in competing)
    best, first = BestEntries(min(max(count, 0), size), size, chunk), 0
    for scores in _scores_of(competing, measure, chunk):
        best.update(scores, first)
        first += len(scores)
    starts = [0, *itertools.accumulate(map(len, competing))]
    positions, scores = best.positions, best.scores
    bounds = torch.tensor(starts, dtype=positions.dtype, device=positions.device)
    cuts = torch.searchsorted(positions, bounds).tolist()
    kept = {}
    for number, run in enumerate(competing):
        chosen = slice(cuts[number], cuts[number + 1])
        kept[run] = run.positions_at(positions[chosen] - starts[number]), scores[chosen]
    parts: dict[SparseWeight, list] = {}
    for run in runs:
        parts.setdefault(run.weight, []).append(kept.get(run, (run.positions, run.scores)))
    return {weight: _joined(both, weight.values.device) for weight, both in parts.items()}


def _joined(parts: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        positions, scores = parts[0]
        return positions.to(device), scores.to(device)
    positions, scores = zip(*parts, strict=True)
    return torch.cat([part.to(device).long() for part in positions]), torch.cat([part.to(device) for part in scores])
