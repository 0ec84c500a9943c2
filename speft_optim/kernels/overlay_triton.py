"""A Triton kernel that writes values over a matrix row by row; one program takes one row.

A program finds its entries through the row pointers. So no flat position is formed, and the host needs no counts from
the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speft_optim.kernels.csr import CSR

ENTRIES = 128


@triton.jit
def overlay_row(line, row, values, row_pointers, columns, BLOCK: tl.constexpr):
    """Write the values of row number `row` at their columns; `line` points to the row's first entry."""
    end = tl.load(row_pointers + row + 1)
    for first in range(tl.load(row_pointers + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(columns + entry, entry < end, other=0).to(tl.int32)
        value = tl.load(values + entry, entry < end)
        tl.store(line + column, value.to(line.dtype.element_ty), entry < end)


@triton.jit
def _overlay(values, row_pointers, columns, weight, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    overlay_row(weight + row.to(tl.int64) * width, row, values, row_pointers, columns, BLOCK)


def overlay_(weight: Tensor, positions: CSR, values: Tensor) -> None:
    """Write `values` (k,) fp32, rounded to the weight's dtype, into contiguous `weight` at `positions`."""
    rows = len(positions.row_pointers) - 1
    # Triton launches on the current device, which need not be the weight's where a model lies on several.
    with torch.cuda.device_of(weight):
        _overlay[(rows,)](values.contiguous(), *positions, weight, weight.shape[-1], BLOCK=ENTRIES, num_warps=1)
    # Autograd and `SparseWeight` detect writes by the version counter, which a kernel does not advance.

    torch.autograd.graph.increment_version(weight)
