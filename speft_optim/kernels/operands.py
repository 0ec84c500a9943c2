"""What kernels take: tensors, in groups. No Triton here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Positions(Protocol):
    """Masked entries of a matrix, as `Mask` holds them."""

    shape: torch.Size

    @property
    def indices(self) -> Tensor:
        """Sorted flat positions, (k,) int32 or int64."""

    @property
    def row_group(self) -> int | None:
        """How many rows share one of the `group_starts`; None if the positions are not packed by rows."""

    def packed(self) -> Mapping[str, Tensor]:
        """`indices`, or `group_starts`, `row_starts` and `columns`."""

    def derived(self, make: Callable[["Positions"], Made]) -> Made:
        """What `make` makes of the positions, made once."""


def row_starts_of(positions: Positions) -> tuple[Tensor, Tensor, Tensor, int]:
    """`group_starts`, `row_starts` and `columns` of packed positions, and the number of rows in a group."""
    parts = positions.packed()
    return parts["group_starts"], parts["row_starts"], parts["columns"], positions.row_group


@dataclass
class Update:
    """One weight's part of an optimizer step; all tensors contiguous on one device.

    Attributes:
        values: (k,) fp32, updated.
        gradient: (k,) fp32.
        moments: first and second, (k,), updated: fp32, or uint8 codes.
        scales: (blocks,) fp32 scales of the two moments' codes, updated; empty for fp32 moments.
        step: number of this step, from 1.
        weight: the dense weight to write the new values into, or None.
        positions: packed positions of the values in `weight`.
    """

    values: Tensor
    gradient: Tensor
    moments: list[Tensor]
    scales: list[Tensor]
    step: int
    weight: Tensor | None = None
    positions: Positions | None = None

    @property
    def kind(self) -> tuple[torch.device, bool, torch.dtype | None]:
        """What one launch has in common: the device, whether moments are codes, the weight's dtype."""
        return self.values.device, bool(self.scales), None if self.weight is None else self.weight.dtype

    def addresses(self) -> list[int]:
        """A row of the table that a launch reads."""
        row = [self.values.numel(), *(part.data_ptr() for part in (self.values, self.gradient, *self.moments))]
        row += [scale.data_ptr() for scale in self.scales] or [0, 0]
        if self.weight is None:
            return row + [0] * 7
        *parts, group = row_starts_of(self.positions)
        rows, width = len(parts[1]) - 1, self.positions.shape[-1]
        return [*row, self.weight.data_ptr(), *(part.data_ptr() for part in parts), group, rows, width]
