"""Triton kernels that walk the masked entries of a matrix row by row; the compact side, (k,), is passed in order.

One program takes one row and finds its entries through the packed positions, so that no flat position is ever unpacked
and the host need not know how many entries lie where.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speft_optim.kernels.operands import Positions, row_starts_of

ENTRIES = 128


@triton.jit
def row_start(group_starts, row_starts, row, group):
    """The number of the first entry of `row`, int32."""
    return tl.load(group_starts + row // group) + tl.load(row_starts + row).to(tl.int32)


@triton.jit
def lay_over_row(line, row, values, group_starts, row_starts, columns, group, BLOCK: tl.constexpr):
    """Write the values of `row` at their columns of the `line` in memory that holds it."""
    end = row_start(group_starts, row_starts, row + 1, group)
    for first in range(row_start(group_starts, row_starts, row, group), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(columns + entry, entry < end, other=0).to(tl.int32)
        value = tl.load(values + entry, entry < end)
        tl.store(line + column, value.to(line.dtype.element_ty), entry < end)


@triton.jit
def _lay_over(values, group_starts, row_starts, columns, group, weight, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lay_over_row(weight + row.to(tl.int64) * width, row, values, group_starts, row_starts, columns, group, BLOCK)


@triton.jit
def _pick(panel, group_starts, row_starts, columns, group, first_row, width, out, BLOCK: tl.constexpr):
    row = first_row + tl.program_id(0)
    end = row_start(group_starts, row_starts, row + 1, group)
    line = panel + tl.program_id(0).to(tl.int64) * width
    for first in range(row_start(group_starts, row_starts, row, group), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(columns + entry, entry < end, other=0).to(tl.int32)
        tl.store(out + entry, tl.load(line + column, entry < end), entry < end)


def lay_over_(weight: Tensor, positions: Positions, values: Tensor) -> None:
    """Write `values` (k,) fp32, rounded to the weight's dtype, into contiguous `weight` at packed positions."""
    width = positions.shape[-1]
    rows = positions.shape.numel() // width
    # Triton launches on the current device, which need not be the weight's where a model lies on several.
    with torch.cuda.device_of(weight):
        _lay_over[(rows,)](values.contiguous(), *row_starts_of(positions), weight, width, BLOCK=ENTRIES, num_warps=1)
    # Autograd and the model's own bookkeeping tell by the counter that a tensor was written.
    torch.autograd.graph.increment_version(weight)


def pick_(out: Tensor, panel: Tensor, positions: Positions, first_row: int) -> None:
    """Write those entries of `out` (k,) that lie in a panel (rows, width) that starts at `first_row` of the matrix.

    Called in backward, where autograd has made the tensors' device the current one.
    """
    rows, width = panel.shape
    _pick[(rows,)](panel, *row_starts_of(positions), first_row, width, out, BLOCK=ENTRIES, num_warps=1)
