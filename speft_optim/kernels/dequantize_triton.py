"""Triton kernels that dequantise a bitsandbytes weight with an overlay of compact values, in one launch.

One program takes one row: it writes the dequantised row, and then the row's values over it. The arithmetic is that of
`weights/int8.py` and `weights/four_bit.py`, product by product, so that a weight read by entries or by rows is the same
to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.overlay_triton import ENTRIES, overlay_row

_CHUNK = 2048


@triton.jit
def _int8(codes, scales, values, row_pointers, columns, out, width, CHUNK: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    scale = tl.load(scales + row).to(tl.float32) * (1 / 127)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)
        code = tl.load(codes + start + column, column < width, other=0).to(tl.float32)
        tl.store(out + start + column, (code * scale).to(out.dtype.element_ty), column < width)
    if values is not None:
        # Wait for the program's other threads: an entry below was just written by one of them.
        tl.debug_barrier()
        overlay_row(out + start, row, values, row_pointers, columns, B)


@triton.jit
def _four_bits(
    codes,
    table,
    scales,
    second_table,
    second_scales,
    offset,
    values,
    row_pointers,
    columns,
    out,
    runs,
    SIZE: tl.constexpr,
    SECOND_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * runs
    HALF: tl.constexpr = SIZE // 2
    for first in range(0, runs, CHUNK // SIZE):
        run = first + tl.arange(0, CHUNK // SIZE)
        inside = run < runs
        scale = tl.load(scales + start + run, inside, other=0)
        if second_table is not None:
            second = tl.load(second_scales + (start + run) // SECOND_SIZE, inside, other=0)
            scale = tl.load(second_table + scale.to(tl.int32)) * second + tl.load(offset)
        place = (start + run)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        pair = tl.load(codes + place, inside[:, None], other=0).to(tl.int32)
        high, low = tl.load(table + (pair >> 4)), tl.load(table + (pair & 15))
        both = tl.interleave(high * scale[:, None], low * scale[:, None])
        place = (start + run)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(out + place, both.to(out.dtype.element_ty), inside[:, None])
    if values is not None:
        # Wait for the program's other threads, as `_int8` does.
        tl.debug_barrier()
        overlay_row(out + start * SIZE, row, values, row_pointers, columns, B)


def dequantize_int8(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, positions: CSR | None, values: Tensor | None
) -> Tensor:
    """Return `codes * scales / 127`, with `values` at `positions`, newly made.

    Args:
        codes: (R, C) int8, contiguous.
        scales: (R,) fp32.
        dtype: of the result; products are formed in fp32 and rounded once.
        positions: of the overlay; None for none.
        values: (k,) fp32; None with `positions`.

    Returns:
        (R, C) of `dtype`.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, width = codes.shape
    with torch.cuda.device_of(out):
        _int8[(rows,)](codes, scales, *_overlay_arguments(positions, values), out, width, CHUNK=_CHUNK, B=ENTRIES)
    return out


def dequantize_4bit(
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    size: int,
    second: tuple[Tensor, Tensor, int, Tensor] | None,
    shape: torch.Size,
    dtype: torch.dtype,
    positions: CSR | None,
    values: Tensor | None,
) -> Tensor:
    """Return a dequantised 4-bit weight, with `values` at `positions`, newly made.

    Args:
        codes: uint8 with two codes each, the high half first, in row-major order.
        table: (16,) fp32, the number that each code represents.
        scales: one for each run of `size` entries: fp32, or uint8 codes where they are quantised themselves.
        size: a power of two that divides the length of a row.
        second: for quantised scales (double quantisation): their table (256,), their own scales, the number of scales
            that share one of these, and the offset that is added, all but the number fp32; else None.
        shape: (R, C).
        dtype: of the result; products are formed in fp32 and rounded once.
        positions: of the overlay; None for none.
        values: (k,) fp32; None with `positions`.

    Returns:
        (R, C) of `dtype`.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    rows, width = shape
    second_table, second_scales, second_size, offset = second or (None, None, 1, None)
    with torch.cuda.device_of(out):
        _four_bits[(rows,)](
            codes,
            table,
            scales,
            second_table,
            second_scales,
            offset,
            *_overlay_arguments(positions, values),
            out,
            width // size,
            SIZE=size,
            SECOND_SIZE=second_size,
            CHUNK=max(size, _CHUNK),
            B=ENTRIES,
            # A fused multiply-add rounds once, and would differ from the other ways to read an entry.
            enable_fp_fusion=False,
        )
    return out


def _overlay_arguments(positions: CSR | None, values: Tensor | None) -> tuple:
    return (None, None, None) if positions is None else (values.contiguous(), *positions)
