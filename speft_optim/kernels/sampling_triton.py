"""The sampled gradient on a GPU: entries picked from dense panels, or from the blocks of the product that contain them.

For a concentrated mask the rows are sorted by their number of entries and cut into blocks, and a block is multiplied
only with the columns in which one of its rows has an entry. The product of a block is small. Each entry is found in it
by binary search in the block's columns, so that a mask stores only the order of its rows and the columns of its blocks,
some tenths of a byte per entry.

A block reads all tokens of a feature side by side, so both operands are transposed first, one run of tokens at a time:
all tokens at once would take three times the memory of the dense panels that this replaces. A uniform mask has entries
in nearly all columns of each block; for it, and for small matrices, panels are faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.product import PANEL_BYTES, panel_rows, product
from speft_optim.kernels.sampling import COLUMNS, ROWS, TOKENS, RowBlocks, run_of_tokens

_ENTRIES = 128
_SIZE = 64


@triton.jit
def _pick(panel, row_pointers, columns, first_row, width, out, BLOCK: tl.constexpr):
    """Pick the entries of one row of a panel; one program takes one row."""
    row = first_row + tl.program_id(0)
    end = tl.load(row_pointers + row + 1)
    line = panel + tl.program_id(0).to(tl.int64) * width
    for first in range(tl.load(row_pointers + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(columns + entry, entry < end, other=0).to(tl.int32)
        tl.store(out + entry, tl.load(line + column, entry < end), entry < end)


def from_panels(left: Tensor, right: Tensor, positions: CSR, panel_bytes: int = PANEL_BYTES) -> Tensor:
    """Return entries of `left.T @ right` at `positions`, (k,) fp32, from dense panels; the host never waits.

    It is called in backward, where autograd has made the tensors' device the current one.
    """
    columns = right.shape[1]
    step = panel_rows(columns, panel_bytes)
    out = torch.empty(len(positions.columns), dtype=torch.float32, device=left.device)
    for row in range(0, left.shape[1], step):
        panel = product(left[:, row : row + step], right)
        _pick[(len(panel),)](panel, *positions, row, columns, out, BLOCK=_ENTRIES, num_warps=1)
    return out


def from_blocks(left: Tensor, right: Tensor, positions: CSR, blocks: RowBlocks) -> Tensor:
    """Return entries of `left.T @ right` at `positions`, (k,) fp32, from their `row_blocks`; the host never waits."""
    run, device = run_of_tokens(left, right), left.device
    products = torch.empty(ROWS * len(blocks.columns), dtype=torch.float32, device=device)
    out = torch.empty(len(positions.columns), dtype=torch.float32, device=device)
    operands = [torch.empty(side.shape[1], run, dtype=side.dtype, device=device) for side in (left, right)]
    filled = len(blocks.order)
    for first in range(0, len(left), run):
        transpose_(*operands, left[first : first + run], right[first : first + run])
        _multiply[(len(blocks.tiles),)](
            *operands, blocks.order, blocks.columns, blocks.starts, blocks.tiles, products, filled, run,
            FIRST=first == 0, ROWS=ROWS, COLUMNS=COLUMNS, TOKENS=TOKENS, num_warps=4, num_stages=4,
        )  # fmt: skip
    _pick_from_blocks[(filled,)](
        products, blocks.order, blocks.columns, blocks.starts, *positions, out,
        blocks.halvings, ROWS=ROWS, BLOCK=_ENTRIES, num_warps=1,
    )  # fmt: skip
    return out


def transpose_(left_out: Tensor, right_out: Tensor, left: Tensor, right: Tensor) -> None:
    """Transpose `left` and `right`, (T, N) each, into contiguous outs of at least T columns; the rest is zero."""
    tokens = left_out.shape[1]
    ends = [triton.cdiv(side.shape[1], _SIZE) for side in (left, right)]
    sides = (side for pair in ((left, left_out), (right, right_out)) for side in pair)
    strides = (*left.stride(), *right.stride())
    _transpose[(sum(ends), triton.cdiv(tokens, _SIZE))](
        *sides, *strides, left.shape[1], right.shape[1], ends[0], len(left), tokens, SIZE=_SIZE, num_warps=4
    )


@triton.jit
def _transpose(
    left, left_out, right, right_out, left_token_stride, left_stride, right_token_stride, right_stride,
    left_features, right_features, left_tiles, tokens, room, SIZE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < left_tiles:
        _transpose_tile(left, left_out, left_token_stride, left_stride, left_features, tile, tokens, room, SIZE)
    else:
        tile -= left_tiles
        _transpose_tile(right, right_out, right_token_stride, right_stride, right_features, tile, tokens, room, SIZE)


@triton.jit
def _transpose_tile(source, out, token_stride, stride, features, number, tokens, room, SIZE: tl.constexpr):
    feature = number * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    place = source + token.to(tl.int64)[:, None] * token_stride + feature.to(tl.int64)[None, :] * stride
    tile = tl.load(place, (token < tokens)[:, None] & (feature < features)[None, :], other=0.0)
    place = out + feature.to(tl.int64)[:, None] * room + token[None, :]
    tl.store(place, tl.trans(tile), (feature < features)[:, None] & (token < room)[None, :])


@triton.jit
def _multiply(
    left, right, order, columns, starts, tiles, products, filled, tokens,
    FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Form one tile of one block's product over a run of tokens, and add it to that of earlier runs."""
    block = tl.load(tiles + 2 * tl.program_id(0))
    column = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, COLUMNS)
    start = tl.load(starts + block)
    width = tl.load(starts + block + 1) - start
    row = block * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    # Rows and columns beyond the block's last are computed from row and column 0 of the operands, and not stored.
    left_feature = tl.load(order + row, row < filled, other=0).to(tl.int64)
    right_feature = tl.load(columns + start + column, column < width, other=0).to(tl.int64)
    left_place = left + left_feature[:, None] * tokens + token[None, :]
    right_place = right + right_feature[None, :] * tokens + token[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(0, tokens, TOKENS):
        total = tl.dot(tl.load(left_place), tl.load(right_place), total)
        left_place += TOKENS
        right_place += TOKENS
    place = products + start.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None] * width + column[None, :]
    inside = (row < filled)[:, None] & (column < width)[None, :]
    if not FIRST:
        total += tl.load(place, inside, other=0.0)
    tl.store(place, total, inside)


@triton.jit
def _pick_from_blocks(
    products, order, columns, starts, row_pointers, entry_columns, out, halvings,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pick the entries of one row, each found by binary search in its block's columns."""
    rank = tl.program_id(0)
    row = tl.load(order + rank)
    block = rank // ROWS
    start = tl.load(starts + block)
    width = tl.load(starts + block + 1) - start
    line = products + start.to(tl.int64) * ROWS + (rank % ROWS) * width
    end = tl.load(row_pointers + row + 1)
    for first in range(tl.load(row_pointers + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        wanted = tl.load(entry_columns + entry, entry < end, other=0).to(tl.int32)
        low = tl.zeros((BLOCK,), tl.int32)
        high = low + width - 1
        for _ in range(halvings):
            middle = (low + high) // 2
            beyond = tl.load(columns + start + middle).to(tl.int32) < wanted
            low = tl.where(beyond, middle + 1, low)
            high = tl.where(beyond, high, middle)
        tl.store(out + entry, tl.load(line + low, entry < end), entry < end)
