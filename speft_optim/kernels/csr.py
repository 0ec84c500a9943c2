"""Positions of masked entries in compressed sparse row (CSR) form, which the kernels take."""

from typing import NamedTuple

import torch
from torch import Tensor


class CSR(NamedTuple):
    """Positions of masked entries, row by row.

    Attributes:
        row_pointers: (rows + 1,) int32; the entries of row r are number `row_pointers[r]` up to, but not including,
            number `row_pointers[r + 1]`.
        columns: (k,) uint16, the column of each entry, ascending within a row.
    """

    row_pointers: Tensor
    columns: Tensor

    def flat(self, width: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the flat, row-major positions in a matrix of `width` columns: (k,) of `dtype`, ascending."""
        counts = self.row_pointers.diff()
        row_starts = torch.arange(len(counts), device=counts.device, dtype=dtype).mul_(width)
        return row_starts.repeat_interleave(counts, output_size=len(self.columns)).add_(self.columns.to(dtype))


def flat_positions(positions: CSR | Tensor, width: int) -> Tensor:
    """Return positions of either form as flat, row-major positions (k,) in a matrix of `width` columns."""
    return positions.flat(width) if isinstance(positions, CSR) else positions
