"""The sampled gradient of a concentrated mask on a card: only blocks of the product in which entries lie are formed.

Masks chosen by gradients lie in few rows and columns. So the rows are sorted by how many entries they have and cut into
blocks, and a block is multiplied with those columns alone in which one of its rows has an entry. What comes of it is
small; each entry finds its own there by a search in the block's columns, so that at rest a mask takes nothing but the
order of its rows and the columns of its blocks, some tenths of a byte an entry.

Features are gathered where each one's tokens lie side by side, so both operands are transposed first, a run of tokens
at a time: all of them at once would take thrice the memory of the dense panels that this replaces. A uniform mask has
entries in nearly all columns of each block; for it, and for small matrices, the panels are faster.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from speft_optim.kernels.operands import Positions, row_starts_of
from speft_optim.kernels.rows import ENTRIES, row_start

_ROWS = 64
_COLUMNS = 128
_TOKENS = 64
_SIZE = 64
# Of the transposed operands, and of the blocks' products; together half as much again as a dense panel may take.
_OPERAND_BYTES = 64 * 2**20
_PRODUCT_BYTES = 32 * 2**20
# Of the dense product's; what is left pays for more launches.
_LARGEST_COST = 0.75
# Fewer tokens than this a run, and reading and writing the products costs more than forming them.
_LEAST_TOKENS = 512


@dataclass
class RowBlocks:
    """Blocks of rows with alike numbers of entries, and the columns that each of them needs.

    Attributes:
        order: rows by falling number of entries, (rows with entries,) int32; block b has those from 64 b on.
        columns: the columns of the blocks one after the other, rising in each, (sum of their numbers,) uint16.
        starts: where each block's columns begin, (blocks + 1,) int32.
        tiles: block, and first of at most 128 of its columns, of each tile that a program forms, (tiles, 2) int32.
        halvings: after so many a search in the columns of any block has ended.
    """

    order: Tensor
    columns: Tensor
    starts: Tensor
    tiles: Tensor
    halvings: int

    @property
    def nbytes(self) -> int:
        """Bytes this takes at rest."""
        return sum(part.nbytes for part in (self.order, self.columns, self.starts, self.tiles))


def row_blocks(positions: Positions) -> RowBlocks | None:
    """The blocks of packed positions; None where all of the product is formed sooner, or they would be large.

    Measured on an H100, at 4096 tokens: a part of the product takes 4 times as long in blocks as in dense panels, to
    transpose the operands takes as long as `T * (R + C) * 640` multiplications, and what launches cost is covered by a
    quarter of the whole: of Llama-3-8B at 1 %, gate_proj takes 0.47 ms instead of 0.69, q_proj 0.25 instead of 0.20.
    """
    _, _, columns, _ = row_starts_of(positions)
    width = positions.shape[-1]
    rows = positions.shape.numel() // width
    # So dense a mask leaves out little, and its pairs of block and column would take much memory.
    if not 0 < len(columns) < rows * width // 16:
        return None
    rows_of = positions.indices // width
    counts = torch.bincount(rows_of, minlength=rows)
    order = counts.argsort(descending=True, stable=True)
    blocks_of = torch.empty_like(order)
    blocks_of[order] = torch.arange(rows, device=order.device) // _ROWS
    # One number for a block and a column of it, in the order in which they are kept.
    pairs = (blocks_of[rows_of] * width + columns.long()).unique()
    share = _ROWS * len(pairs) / (rows * width)
    if 4 * share + 640 * (rows + width) / (rows * width) > _LARGEST_COST or 4 * _ROWS * len(pairs) > _PRODUCT_BYTES:
        return None
    filled = int((counts > 0).sum())
    blocks = -(-filled // _ROWS)
    bounds = torch.arange(blocks + 1, device=pairs.device) * width
    starts = torch.searchsorted(pairs, bounds)
    widths = starts.diff()
    tiles_of = (widths + _COLUMNS - 1) // _COLUMNS
    block = torch.arange(blocks, device=pairs.device).repeat_interleave(tiles_of)
    number = torch.arange(len(block), device=pairs.device) - (tiles_of.cumsum(0) - tiles_of)[block]
    return RowBlocks(
        order=order[:filled].to(torch.int32),
        columns=(pairs % width).to(torch.uint16),
        starts=starts.to(torch.int32),
        tiles=torch.stack([block, number * _COLUMNS], dim=1).to(torch.int32),
        halvings=(int(widths.max()) - 1).bit_length(),
    )


def suit(left: Tensor, right: Tensor) -> bool:
    """Whether the operands, (T, R) and (T, C), are such as blocks are formed of: in 16 bits, and of many tokens."""
    sixteen = left.dtype in (torch.float16, torch.bfloat16)
    return sixteen and min(len(left), _run(left, right)) >= _LEAST_TOKENS


def _run(left: Tensor, right: Tensor) -> int:
    """Tokens that are transposed at a time, of nearly equal runs."""
    most = max(1, _OPERAND_BYTES // ((left.shape[1] + right.shape[1]) * left.element_size() * _TOKENS))
    steps = -(-len(left) // _TOKENS)
    return -(-steps // -(-steps // most)) * _TOKENS


def sampled_gradient(left: Tensor, right: Tensor, positions: Positions, blocks: RowBlocks) -> Tensor:
    """As `reference.sampled_gradient`, for packed positions and their `row_blocks`; the host waits for nothing."""
    run, device = _run(left, right), left.device
    products = torch.empty(_ROWS * len(blocks.columns), dtype=torch.float32, device=device)
    out = torch.empty(len(positions.packed()["columns"]), dtype=torch.float32, device=device)
    operands = [torch.empty(side.shape[1], run, dtype=side.dtype, device=device) for side in (left, right)]
    filled = len(blocks.order)
    for first in range(0, len(left), run):
        transpose_(*operands, left[first : first + run], right[first : first + run])
        _multiply[(len(blocks.tiles),)](
            *operands, blocks.order, blocks.columns, blocks.starts, blocks.tiles, products, filled, run,
            FIRST=first == 0, ROWS=_ROWS, COLUMNS=_COLUMNS, TOKENS=_TOKENS, num_warps=4, num_stages=4,
        )  # fmt: skip
    _pick_from_blocks[(filled,)](
        products, blocks.order, blocks.columns, blocks.starts, *row_starts_of(positions), out,
        blocks.halvings, ROWS=_ROWS, BLOCK=ENTRIES, num_warps=1,
    )  # fmt: skip
    return out


def transpose_(left_out: Tensor, right_out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write (T, N) `left` and `right` to contiguous outs (N, at least T each); tokens beyond theirs are zero."""
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
    """One tile of one block's product over a run of tokens, added to what earlier runs gave."""
    block = tl.load(tiles + 2 * tl.program_id(0))
    column = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, COLUMNS)
    start = tl.load(starts + block)
    width = tl.load(starts + block + 1) - start
    row = block * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    # Rows and columns beyond the block's last are formed from its first ones and not stored.
    ours = tl.load(order + row, row < filled, other=0).to(tl.int64)
    theirs = tl.load(columns + start + column, column < width, other=0).to(tl.int64)
    left_place = left + ours[:, None] * tokens + token[None, :]
    right_place = right + theirs[None, :] * tokens + token[:, None]
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
    products, order, columns, starts, group_starts, row_starts, entry_columns, group, out, halvings,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entries of one row, each found by halving its block's columns."""
    rank = tl.program_id(0)
    row = tl.load(order + rank)
    block = rank // ROWS
    start = tl.load(starts + block)
    width = tl.load(starts + block + 1) - start
    line = products + start.to(tl.int64) * ROWS + (rank % ROWS) * width
    end = row_start(group_starts, row_starts, row + 1, group)
    for first in range(row_start(group_starts, row_starts, row, group), end, BLOCK):
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
