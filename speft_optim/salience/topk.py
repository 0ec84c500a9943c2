"""The best k of scores that come in chunks.

No tensor of all scores exists at any time, and the outcome equals that of one `topk` over everything: ties go to the
earlier position.
"""

import torch
from torch import Tensor

_INT32_LIMIT = 2**31 - 1


class BestEntries:
    """The best k of the scores seen so far, exactly k of them and the earlier of equals.

    Candidates gather in one buffer, somewhat longer than k. Whenever it is full, it is cut back to the best k in place:
    a k-th best found by halving and a pass over short runs, where a sort would take several times the buffer.

    Args:
        k: how many to keep, at least 0.
        entries: how many scores there are in all; at least k.
        step: entries to work on at a time.
    """

    def __init__(self, k: int, entries: int, step: int = 2**20):
        self.k = k
        # Short runs of a long buffer would be many; a 64th of it adds little.
        self.step = max(step, k // 64)
        self.capacity = min(entries, k + max(k // 8, self.step)) if k else 0
        self.count = 0
        self._narrow = entries <= _INT32_LIMIT
        self._scores: Tensor | None = None
        self._positions = torch.empty(0, dtype=self._position_dtype)
        self._worst: float | None = None

    @staticmethod
    def bytes(k: int, entries: int, score_bytes: int) -> int:
        """About what keeping the best k of so many entries takes, beside temporaries of one step."""
        buffer = min(entries, k + k // 8) * (score_bytes + (4 if entries <= _INT32_LIMIT else 8))
        # Of a run of a 64th of the buffer a cut takes some 40 bytes an entry.
        return buffer + 40 * (k // 64)

    @property
    def _position_dtype(self) -> torch.dtype:
        return torch.int32 if self._narrow else torch.int64

    @property
    def scores(self) -> Tensor:
        """The scores kept, in the order of their positions."""
        self._cut()
        return self._scores[: self.count]

    @property
    def positions(self) -> Tensor:
        """The positions kept, rising; int32 where all positions fit."""
        self._cut()
        return self._positions[: self.count]

    def update(self, scores: Tensor, first: int) -> None:
        """Take in 1-D `scores` of the consecutive positions from `first` on, which follow all positions seen before."""
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
        """Places of those scores that can be among the best k."""
        if self._worst is None:
            return torch.arange(part.numel(), device=part.device)
        # Only what beats the worst of k entries can enter, since of equals the earlier stays.
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
            # Indexing copies, so that the run may be overwritten.
            self._scores[self.count : end] = scores[kept]
            self._positions[self.count : end] = self._positions[run][kept]
            self.count = end


def _kth_best(scores: Tensor, k: int, step: int) -> tuple[float, int]:
    """Return the k-th best score, and how many equal to it are among the best k; about `step` entries are copied at most.

    The range that holds it is halved until so few scores lie in it that one `topk` over them tells.
    """
    # By their bits and not their values, so that a range can be halved until nothing is left between its ends.
    low, high = (int(_ordered(bound.add(0.0).reshape(1))) for bound in torch.aminmax(scores))
    high += 1
    above, inside = 0, scores.numel()
    while inside > step and high - low > 1:
        middle = (low + high) // 2
        bound = _score_of(middle, scores)
        count = sum((part >= bound).sum() for part in scores.split(step)).item()
        # At least k scores are not below `low`, fewer than k are not below `high`.
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
    """Return the score with a key of `_ordered`, beside `like` and of its dtype."""
    dtype = torch.int32 if like.dtype == torch.float32 else torch.int64
    return _ordered(torch.tensor([key], dtype=dtype).view(like.dtype)).view(like.dtype)[0].to(like.device)


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of fp32 or fp64 scores without negative zeros, in their place; its own inverse."""
    keys = scores.view(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    # A negative number's other bits count downwards.
    mask = torch.iinfo(keys.dtype).max
    return keys.bitwise_xor_((keys >> (8 * keys.element_size() - 1)).bitwise_and_(mask))
