"""The best k of scores that come in chunks.

No tensor of all scores exists at any time. The result equals that of one `topk` over all of them, and of equal scores
the one at the earlier position is kept.
"""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

_INT32_LIMIT = 2**31 - 1
# The formats of `struct` for a score and for its bits.
_FORMATS = {torch.float32: ("<f", "<i"), torch.float64: ("<d", "<q")}


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
        # A long buffer is worked on a few 64ths at a time: temporaries are small beside it, and operations are few.
        self.step = max(step, k // 64)
        self.capacity = min(entries, k + max(k // 8, self.step)) if k else 0
        self.count = 0
        self._narrow = entries <= _INT32_LIMIT
        self._scores: Tensor | None = None
        self._positions = torch.empty(0, dtype=self._position_dtype)
        self._worst: float | None = None

    @staticmethod
    def bytes(k: int, entries: int, score_bytes: int) -> int:
        """Estimate the bytes for keeping the best k, without the temporaries of one step.

        Args:
            k: how many are kept.
            entries: how many scores there are in all.
            score_bytes: bytes of a score.
        """
        buffer = min(entries, k + k // 8) * (score_bytes + (4 if entries <= _INT32_LIMIT else 8))
        # Cutting takes some 40 bytes for each entry of a step, which is a 64th of the buffer.
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
        self._worst, better, tied = _kth_best(self._scores[: self.count], self.k, self.step)
        places = self.k - better
        count, self.count = self.count, 0
        # Beside a byte and a place of eight, what is copied for each entry of a run takes 16 bytes for one of a step.
        length = 16 * self.step // (self._scores.itemsize + self._positions.itemsize)
        for start in range(0, count, length):
            run = slice(start, min(count, start + length))
            scores = self._scores[run]
            kept = scores >= self._worst
            if tied > places:
                # Of the scores equal to the worst one the first are kept.
                equal = (scores == self._worst).nonzero().squeeze(1)
                kept[equal[places:]] = False
                places -= min(places, equal.numel())
                del equal
            kept = kept.nonzero().squeeze(1)
            end = self.count + kept.numel()
            # Indexing has made copies, so the run may be overwritten.
            self._scores[self.count : end] = scores[kept]
            self._positions[self.count : end] = self._positions[run][kept]
            self.count = end


def _kth_best(scores: Tensor, k: int, step: int) -> tuple[float, int, int]:
    """Find the k-th best score, and count the scores that are better and those that are equal to it.

    The range that contains it is halved until at most `step` scores lie in it, which one `topk` then orders.

    Args:
        scores: (n,) fp32 or fp64, n at least k.
        k: at least 1.
        step: at most so many scores are ordered, and four times as many are compared at a time.
    """
    # The bits of the scores are halved as integers, so that a range ends at two neighbouring numbers.
    low, high = (_key_of(bound, scores.dtype) for bound in extremes(scores))
    high += 1
    above, inside = 0, scores.numel()
    # Counting takes five bytes for each entry of a part, and few entries are copied.
    parts = scores.split(4 * step)
    while inside > step and high - low > 1:
        middle = (low + high) // 2
        bound = _score_of(middle, scores.dtype)
        count = _count(part >= bound for part in parts)
        # Invariant: at least k scores are at or above `low`, fewer than k at or above `high`.
        if count >= k:
            low, inside = middle, count - above
        else:
            high, above, inside = middle, count, inside + above - count
    worst = _score_of(low, scores.dtype)
    if high - low > 1:
        end = _score_of(high, scores.dtype)
        rest = [part[(part >= worst) & (part < end)] for part in parts]
        worst = torch.cat(rest).topk(k - above, sorted=False).values.min().item()
    return worst, _count(part > worst for part in parts), _count(part == worst for part in parts)


def extremes(numbers: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest number, waiting for the device once; both are NaN if any number is.

    Of no numbers they are 0.
    """
    if not numbers.numel():
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(numbers)).tolist()
    return low, high


def _count(parts: Iterable[Tensor]) -> int:
    """Return how many entries of tensors of bools are True; by default torch would sum them as int64."""
    return int(torch.stack([part.sum(dtype=torch.int32) for part in parts]).sum())


def _key_of(score: float, dtype: torch.dtype) -> int:
    """Return an integer in the order of scores of a dtype: neighbouring scores have neighbouring ones."""
    number, integer = _FORMATS[dtype]
    # A zero without its sign; all else is unchanged.
    return _flip(struct.unpack(integer, struct.pack(number, score + 0.0))[0], dtype)


def _score_of(key: int, dtype: torch.dtype) -> float:
    """Return the score of a dtype that has this key."""
    number, integer = _FORMATS[dtype]
    return struct.unpack(number, struct.pack(integer, _flip(key, dtype)))[0]


def _flip(bits: int, dtype: torch.dtype) -> int:
    """Turn the bits of a score into its key; its own inverse."""
    # The magnitude bits of negative floats order them backwards, so these are inverted.
    return bits ^ (2 ** (8 * dtype.itemsize - 1) - 1) if bits < 0 else bits
