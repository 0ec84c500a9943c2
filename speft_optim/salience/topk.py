"""The best k of scores that come in chunks.

No tensor of all scores exists at any time. The result equals that of one `topk` over all of them, and of equal scores
the one at the earlier position is kept.
"""

import torch
from torch import Tensor

_INT32_LIMIT = 2**31 - 1


class BestEntries:
    """The best k of the scores seen so far; of equal ones the earliest.

    Candidates are kept in one buffer that is somewhat longer than k. Whenever it is full, it is cut back to the best k
    in place: the k-th best score is found by halving, and one pass over short runs keeps what is better. Sorting would
    take several times the memory of the buffer.

    Args:
        k: how many to keep, at least 0.
        entries: how many scores there are in all, at least k.
        step: how many entries to work on at a time.
    """

    def __init__(self, k: int, entries: int, step: int = 2**20):
        self.k = k
        # A long buffer is worked on in 64 runs: their temporaries are small beside it, and their number is too.
        self.step = max(step, k // 64)
        self.capacity = min(entries, k + max(k // 8, self.step)) if k else 0
        self.count = 0
        self._narrow = entries <= _INT32_LIMIT
        self._scores: Tensor | None = None
        self._positions = torch.empty(0, dtype=self._position_dtype)
        self._worst: float | None = None

    @staticmethod
    def bytes(k: int, entries: int, score_bytes: int) -> int:
        """Estimate the bytes that keeping the best k takes, beside temporaries of one step.

        Args:
            k: how many are kept.
            entries: how many scores there are in all.
            score_bytes: bytes of a score.
        """
        buffer = min(entries, k + k // 8) * (score_bytes + (4 if entries <= _INT32_LIMIT else 8))
        # Cutting takes some 40 bytes for each entry of a run, which is a 64th of the buffer.
        return buffer + 40 * (k // 64)

    @property
    def _position_dtype(self) -> torch.dtype:
        return torch.int32 if self._narrow else torch.int64

    @property
    def scores(self) -> Tensor:
        """The scores kept, (k,), in the order of their positions."""
        self._cut()
        return self._scores[: self.count]

    @property
    def positions(self) -> Tensor:
        """The positions kept, (k,) in rising order; int32 if all positions fit, else int64."""
        self._cut()
        return self._positions[: self.count]

    def update(self, scores: Tensor, first: int) -> None:
        """Add the scores of consecutive positions that follow all positions seen before.

        Args:
            scores: (n,) fp32 or fp64.
            first: the position of the first.
        """
        if self._scores is None:
            self._scores = torch.empty(self.capacity, dtype=scores.dtype, device=scores.device)
            self._positions = torch.empty(self.capacity, dtype=self._position_dtype, device=scores.device)
        if not self.k:
            return
        for part in scores.split(self.step):
            chosen = self._eligible(part)
            if self.count + chosen.numel() > self.capacity:
                self._cut()
                chosen = self._eligible(part)
            end = self.count + chosen.numel()
            self._scores[self.count : end] = part[chosen]
            self._positions[self.count : end] = chosen.add_(first)
            self.count = end
            first += part.numel()

    def _eligible(self, part: Tensor) -> Tensor:
        """Return the places of those scores that can still be among the best k."""
        if self._worst is None:
            return torch.arange(part.numel(), device=part.device)
        # A score equal to the worst of the k kept comes later, so it does not enter.
        return (part > self._worst).nonzero().squeeze(1)

    def _cut(self) -> None:
        """Keep the best k, in place."""
        if self.count <= self.k:
            return
        self._worst, ties = _kth_best(self._scores[: self.count], self.k, self.step)
        count, self.count = self.count, 0
        for start in range(0, count, self.step):
            run = slice(start, min(count, start + self.step))
            scores = self._scores[run]
            kept = scores > self._worst
            tied = (scores == self._worst).nonzero().squeeze(1)[:ties]
            ties -= tied.numel()
            kept[tied] = True
            kept = kept.nonzero().squeeze(1)
            end = self.count + kept.numel()
            # Indexing has made copies, so the run may be overwritten.
            self._scores[self.count : end] = scores[kept]
            self._positions[self.count : end] = self._positions[run][kept]
            self.count = end


def _kth_best(scores: Tensor, k: int, step: int) -> tuple[float, int]:
    """Find the k-th best score, and count the scores equal to it that are among the best k.

    The range that contains it is halved until at most `step` scores lie in it, which one `topk` then orders.

    Args:
        scores: (n,) fp32 or fp64, n at least k.
        k: at least 1.
        step: about how many entries are copied at a time.
    """
    # The bits of the scores are halved as integers, so that a range ends at two neighbouring numbers.
    low, high = (int(_ordered(bound.add(0.0).reshape(1))) for bound in torch.aminmax(scores))
    high += 1
    above, inside = 0, scores.numel()
    while inside > step and high - low > 1:
        middle = (low + high) // 2
        bound = _score_of(middle, scores)
        count = sum((part >= bound).sum() for part in scores.split(step)).item()
        # Invariant: at least k scores are at or above `low`, fewer than k at or above `high`.
        if count >= k:
            low, inside = middle, count - above
        else:
            high, above, inside = middle, count, inside + above - count
    if high - low == 1:
        worst = _score_of(low, scores)
    else:
        bound, end = _score_of(low, scores), _score_of(high, scores)
        rest = [part[(part >= bound) & (part < end)] for part in scores.split(step)]
        worst = torch.cat(rest).topk(k - above, sorted=False).values.min()
    better = sum((part > worst).sum() for part in scores.split(step)).item()
    return worst.item(), k - better


def _score_of(key: int, like: Tensor) -> Tensor:
    """Return the score that has this key in `_ordered`, on the device and of the dtype of `like`."""
    dtype = torch.int32 if like.dtype == torch.float32 else torch.int64
    return _ordered(torch.tensor([key], dtype=dtype).view(like.dtype)).view(like.dtype)[0].to(like.device)


def _ordered(scores: Tensor) -> Tensor:
    """Turn fp32 or fp64 scores in place into integers of the same order; its own inverse. No score may be -0."""
    keys = scores.view(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    # The magnitude bits of negative floats order them backwards, so these are inverted.
    mask = torch.iinfo(keys.dtype).max
    return keys.bitwise_xor_((keys >> (8 * keys.element_size() - 1)).bitwise_and_(mask))
