"""Weights cut into row slices whose accumulators fit a budget.

A row slice is a whole weight, or some of its rows if the weight is larger than the budget. Row slices are grouped in
the order of the weights: one pass over the calibration batches serves a group, and the scores come out in order.

While a model trains, `GradientSum` and `SquareSum` fill the accumulators from the backward passes of the training.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from speft_optim.kernels.product import accumulate_product_
from speft_optim.weights.targets import Target


@dataclass(eq=False)
class RowSlice:
    """Rows `first` to `last` (exclusive) of a weight seen as a matrix, and the statistic accumulated for them.

    Attributes:
        target: the weight.
        first: the first row.
        last: the row after the last.
        accumulator: fp32 of shape (last - first, columns), or of one that broadcasts to it if entries share a
            statistic; None if the measure needs none.
    """

    target: Target
    first: int
    last: int
    accumulator: Tensor | None = None

    @property
    def columns(self) -> int:
        """Entries in a row."""
        return self.target.matrix_shape[1]

    @property
    def entries(self) -> int:
        """Entries of the weight in this row slice."""
        return (self.last - self.first) * self.columns

    def allocate(self) -> None:
        """Start an fp32 accumulator of zeros."""
        shape = (self.last - self.first, self.columns)
        self.accumulator = torch.zeros(shape, dtype=torch.float32, device=self.target.device)

    def rows_of(self, dense: Tensor) -> Tensor:
        """Return this slice's rows of a tensor of the weight's shape, as a matrix."""
        return dense.reshape(self.target.matrix_shape)[self.first : self.last]

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add this slice's rows of `left.T @ right`, in fp32."""
        accumulate_product_(self.accumulator, left.flatten(0, -2)[:, self.first : self.last], right.flatten(0, -2))

    def from_dense(self, gradient: Tensor) -> None:
        """Add this slice's rows of a dense gradient, in fp32."""
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
            statistic = None
            if self.accumulator is not None:
                whole = self.accumulator.expand(self.last - self.first, self.columns)
                statistic = whole[row - self.first : end - self.first].reshape(-1)
            yield row * self.columns, weight, statistic


def cut_into_groups(targets: Iterable[Target], budget: int, entry_bytes: int) -> list[list[RowSlice]]:
    """Cut weights into row slices, in their order, and group these so that a group takes at most `budget` bytes.

    Args:
        targets: the weights.
        budget: bytes that a group may take; a weight that needs more is cut into slices of at least one row.
        entry_bytes: bytes that the statistic takes for each entry; 0 puts all weights into one group.
    """
    groups: list[list[RowSlice]] = []
    room = 0
    for target in targets:
        rows, columns = target.matrix_shape
        panel = max(1, min(rows, budget // max(1, entry_bytes * columns)))
        for first in range(0, rows, panel):
            row_slice = RowSlice(target, first, min(rows, first + panel))
            need = entry_bytes * row_slice.entries
            if not groups or need > room:
                groups.append([])
                room = budget
            groups[-1].append(row_slice)
            room -= need
    return groups


class GradientSum:
    """Adds up gradients in the accumulator of a row slice, which the first gradient allocates."""

    def __init__(self, row_slice: RowSlice):
        self.row_slice = row_slice

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right`."""
        placed(self.row_slice, left.device).from_product(left, right)

    def from_dense(self, gradient: Tensor) -> None:
        """Add a dense gradient."""
        placed(self.row_slice, gradient.device).from_dense(gradient)

    def end_pass(self) -> None:
        """Note that the last backward pass is over."""

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

    def _begin_pass(self) -> None:
        # Autograd numbers the calls of backward.
        now = torch._C._current_graph_task_id()
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
