"""Accumulators of row slices: of whole weights, or of some of their rows, as `groups.py` cuts them.

On a sharded model a row slice is divided: each process accumulates some of its rows (see `exchange.py`).

While a model trains, `GradientSum` and `SquareSum` fill the accumulators from the backward passes of the training.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from speft_optim.distributed import from_owners_
from speft_optim.kernels.product import accumulate_product_
from speft_optim.weights.gradient_nodes import present_backward
from speft_optim.weights.targets import Target


@dataclass(eq=False)
class RowSlice:
    """Rows `first` to `last` (exclusive) of a weight seen as a matrix, and the statistic accumulated for them.

    Attributes:
        target: the weight.
        first: the first row.
        last: the row after the last.
        accumulator: fp32 of shape (last - first, columns), or of one that broadcasts to it if entries share a
            statistic; None if the measure needs none. Of a divided row slice it has the rows of this process alone.
        processes: over how many processes the accumulator is divided, as evenly as `torch.chunk` divides; 1 for one
            that is whole in each.
    """

    target: Target
    first: int
    last: int
    accumulator: Tensor | None = None
    processes: int = 1

    @functools.cached_property
    def columns(self) -> int:
        """Entries in a row."""
        return self.target.matrix_shape[1]

    @property
    def entries(self) -> int:
        """Entries of the weight in this row slice."""
        return (self.last - self.first) * self.columns

    @property
    def division(self) -> list[int]:
        """How many rows each process accumulates: the first ones equally many, the last ones fewer or none."""
        rows = self.last - self.first
        part = -(-rows // self.processes)
        return [max(0, min(part, rows - number * part)) for number in range(self.processes)]

    @property
    def own(self) -> tuple[int, int]:
        """The first row that this process accumulates, and the row after the last."""
        if self.processes == 1:
            return self.first, self.last
        rank, sizes = dist.get_rank(), self.division
        first = self.first + sum(sizes[:rank])
        return first, first + sizes[rank]

    def allocate(self) -> None:
        """Start an fp32 accumulator of zeros."""
        first, last = self.own
        shape = (last - first, self.columns)
        self.accumulator = torch.zeros(shape, dtype=torch.float32, device=self.target.device)

    def rows_of(self, dense: Tensor) -> Tensor:
        """Return the rows that are accumulated here of a tensor of the weight's shape, as a matrix."""
        first, last = self.own
        return dense.reshape(self.target.matrix_shape)[first:last]

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add the rows of `left.T @ right` that are accumulated here, in fp32."""
        first, last = self.own
        accumulate_product_(self.accumulator, left.flatten(0, -2)[:, first:last], right.flatten(0, -2))

    def from_dense(self, gradient: Tensor) -> None:
        """Add the rows of a dense gradient that are accumulated here, in fp32."""
        self.accumulator += self.rows_of(gradient)

    def chunks(self, entries: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield the row slice in runs of whole rows, of about `entries` entries each.

        Yields:
            (first flat position in the weight, fp32 weight entries, fp32 statistic entries or None), both 1-D.
        """
        step = max(1, entries // max(1, self.columns))
        for row in range(self.first, self.last, step):
            end = min(self.last, row + step)
            weight = self.target.rows(row, end).float().reshape(-1)
            statistic = None if self.accumulator is None else self._statistic(row, end).reshape(-1)
            yield row * self.columns, weight, statistic

    def _statistic(self, first: int, last: int) -> Tensor:
        """The accumulated rows `first` to `last` (exclusive), those of other processes too."""
        if self.processes == 1:
            whole = self.accumulator.expand(self.last - self.first, self.columns)
            return whole[first - self.first : last - self.first]
        start, stop = self.own
        begin, end = max(first, start), min(last, stop)
        rows = self.accumulator.new_zeros(last - first, self.columns)
        if begin < end:
            rows[begin - first : end - first] = self.accumulator[begin - start : end - start]
        return from_owners_(rows)


class GradientSum:
    """Adds up gradients in the accumulator of a row slice, which the first gradient allocates.

    Attributes:
        has_new: whether it got a gradient since the last optimizer step.
    """

    has_new = False

    def __init__(self, row_slice: RowSlice):
        self.row_slice = row_slice

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right`."""
        self.has_new = True
        placed(self.row_slice, left.device).from_product(left, right)

    def from_dense(self, gradient: Tensor) -> None:
        """Add a dense gradient."""
        self.has_new = True
        placed(self.row_slice, gradient.device).from_dense(gradient)

    def end_pass(self) -> None:
        """Note that the last backward pass is over."""

    def end_step(self) -> None:
        """Note that the optimizer has taken a step by the gradients so far."""
        self.end_pass()
        self.has_new = False

    def spoil(self) -> None:
        """Make the sum NaN, since a gradient that led to no step cannot be taken out of it again."""
        self.row_slice.accumulator.fill_(torch.nan)

    @property
    def bytes_held(self) -> int:
        """Bytes of the accumulator."""
        return _bytes(self.row_slice)


class SquareSum(GradientSum):
    """Adds up the squares of the gradients of single backward passes.

    A weight that is used several times gets its gradient in several parts; all parts that arrive in one backward pass
    are added before they are squared. Reentrant checkpointing runs a backward pass for each block, so that the gradient
    of a weight that two blocks share is squared in two parts.
    """

    def __init__(self, row_slice: RowSlice):
        super().__init__(row_slice)
        self._gradient = RowSlice(row_slice.target, row_slice.first, row_slice.last)
        self._pass: int | None = None

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right` to the gradient of the present pass."""
        self._begin_pass()
        placed(self._gradient, left.device).from_product(left, right)

    def from_dense(self, gradient: Tensor) -> None:
        """Add a dense gradient to that of the present pass."""
        self._begin_pass()
        placed(self._gradient, gradient.device).from_dense(gradient)

    def end_pass(self) -> None:
        """Square the gradient of the last pass."""
        if self._pass is not None:
            gradient = self._gradient.accumulator
            placed(self.row_slice, gradient.device).accumulator.addcmul_(gradient, gradient)
            gradient.zero_()
            self._pass = None

    @property
    def bytes_held(self) -> int:
        """Bytes of the accumulators."""
        return _bytes(self.row_slice) + _bytes(self._gradient)

    def spoil(self) -> None:
        """The same; the gradient of the last pass may not be squared yet."""
        self.end_pass()
        super().spoil()

    def _begin_pass(self) -> None:
        self.has_new = True
        # Autograd numbers the calls of backward.
        now = present_backward()
        if now != self._pass:
            self.end_pass()
            self._pass = now


def _bytes(row_slice: RowSlice) -> int:
    return 0 if row_slice.accumulator is None else row_slice.accumulator.nbytes


def placed(row_slice: RowSlice, device: torch.device) -> RowSlice:
    """Return the row slice with its accumulator on `device`, to which the model may have moved meanwhile.

    Raises:
        ValueError: the weight itself is on another device.
    """
    if row_slice.accumulator is None:
        row_slice.allocate()
    if row_slice.accumulator.device != device:
        if row_slice.target.device != device:
            raise ValueError(
                f"A gradient of {row_slice.target.name} is on {device}, but the weight is on "
                f"{row_slice.target.device}. "
                "The replicas of nn.DataParallel cannot share an accumulator; start one process per GPU with torchrun."
            )
        row_slice.accumulator = row_slice.accumulator.to(device)
    return row_slice
