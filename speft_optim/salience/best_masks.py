"""From scores to masks: the best entries of each weight, or of all weights together.

A running selection of the best k gets the scores in chunks: no tensor of all scores exists at any time, and the result
equals that of one `topk` over all of them. Of equal scores the earlier weight and position is kept.
"""

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask
from speft_optim.salience.topk import BestEntries, extremes
from speft_optim.weights.targets import Target

logger = logging.getLogger(__name__)


def best_masks(
    scores: Iterable[tuple[str, int, Tensor]],
    targets: Mapping[str, Target],
    amount: int | Mapping[str, int],
    memory_budget: int,
) -> Masks:
    """Return the masks of the entries with the highest scores.

    Args:
        scores: of all entries, as `stream_scores` yields them.
        targets: the weights that are scored.
        amount: how many entries to keep: of each weight, by name, or of all weights together.
        memory_budget: bytes; a small one makes the chunks of the selection small.

    Raises:
        ValueError: a score is not finite.
    """
    # Runs are long enough to keep a device busy, and short enough that their temporaries are small.
    longest = 2**22 if next(iter(targets.values())).device.type == "cuda" else 2**20
    step = max(2**10, min(longest, memory_budget // 512))
    if isinstance(amount, Mapping):
        return _best_of_each(scores, targets, amount, step)
    return _best_of_all(scores, targets, amount, step)


def _best_of_each(
    scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], shares: Mapping[str, int], step: int
) -> Masks:
    # A weight of size 0 gets no scores, but it has a mask as in global scope.
    masks = Masks({name: Mask(torch.empty(0, dtype=torch.int32), target.shape) for name, target in targets.items()})
    best, ranges = None, _Ranges()
    for name, first, chunk in scores:
        ranges.see(name, chunk)
        if first == 0:
            best = BestEntries(shares[name], targets[name].shape.numel(), step)
        best.update(chunk, first)
        if first + chunk.numel() == targets[name].shape.numel():
            masks[name] = Mask(best.positions, targets[name].shape)
            # The buffer is freed before the next group is accumulated.
            best = None
    ranges.warn_of_ties(masks)
    return masks


def _best_of_all(
    scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], total: int, step: int
) -> Masks:
    starts, start = {}, 0
    for name, target in targets.items():
        starts[name] = start
        start += target.shape.numel()
    best, ranges = BestEntries(total, start, step), _Ranges()
    for name, first, chunk in scores:
        ranges.see(name, chunk)
        best.update(chunk, starts[name] + first)
    masks = Masks()
    kept = best.positions
    # This frees the scores.
    del best
    bounds = torch.tensor([*starts.values(), start], dtype=kept.dtype, device=kept.device)
    cuts = torch.searchsorted(kept, bounds).tolist()
    for number, (name, target) in enumerate(targets.items()):
        positions = kept[cuts[number] : cuts[number + 1]] - starts[name]
        masks[name] = Mask(positions.to(target.device), target.shape)
    ranges.warn_of_ties(masks)
    return masks


class _Ranges:
    """The smallest and largest score of each weight."""

    def __init__(self):
        self._of: dict[str, tuple[float, float]] = {}

    def see(self, name: str, scores: Tensor) -> None:
        """Note the range of some scores of a weight.

        Raises:
            ValueError: a score is not finite.
        """
        if not scores.numel():
            return
        low, high = extremes(scores)
        if not math.isfinite(low) or not math.isfinite(high):
            bad = scores.numel() - int(torch.isfinite(scores).sum())
            raise ValueError(
                f"{bad:,} scores of {name} are not finite; check its weights and the calibration data for NaN or inf."
            )
        before = self._of.get(name, (low, high))
        self._of[name] = min(before[0], low), max(before[1], high)

    def warn_of_ties(self, masks: Masks) -> None:
        """Warn of weights whose scores are all equal, so that the choice among their entries has no reason."""
        tied = [name for name, (low, high) in self._of.items() if low == high]
        tied = [name for name in tied if 0 < len(masks[name]) < masks[name].shape.numel()]
        if tied:
            logger.warning(
                "All scores of %d weights are equal, e.g. of %s, so that their first entries are kept: no batch uses "
                "these weights, or their entries are all alike. Leave them out of targets, or look at the batches.",
                len(tied),
                tied[0],
            )
