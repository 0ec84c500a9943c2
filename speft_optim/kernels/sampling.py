"""Masked entries of a weight's gradient, `left.T @ right`: the definition in PyTorch, and the choice of the kernel.

For nn.Linear `left` is the output gradient and `right` the input; for a transposed weight (GPT-2's Conv1D) they change
places. The dense gradient is never held whole. On a GPU the entries of a uniform mask are picked from dense panels of
rows. Masks chosen by gradients are concentrated in few rows and columns: for them, only the blocks of the product that
contain entries are formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from speft_optim.kernels.csr import CSR, flat_positions
from speft_optim.kernels.launch import launches
from speft_optim.kernels.product import PANEL_BYTES, panel_rows, product

ROWS = 64
COLUMNS = 128
TOKENS = 64
# Limits for the transposed operands and the products of blocks. Together they are 1.5 times a dense panel.
OPERAND_BYTES = 64 * 2**20
PRODUCT_BYTES = 32 * 2**20
# Blocks are used only below 75 % of the dense product's cost; the rest covers launch overhead.
LARGEST_COST = 0.75
# In shorter runs of tokens, reading and writing the products costs more than forming them.
LEAST_TOKENS = 512


def sampled_gradient(left: Tensor, right: Tensor, positions: CSR | Tensor, blocks: "RowBlocks | None" = None) -> Tensor:
    """Return the entries of `left.T @ right` at `positions`.

    Args:
        left: (T, R), a floating dtype.
        right: (T, C), the same dtype.
        positions: in row form, or flat and row-major, (k,).
        blocks: `row_blocks` of the positions; None to form dense panels.

    Returns:
        (k,) fp32.
    """
    if not isinstance(positions, CSR) or not launches(positions.columns):
        return from_panels(left, right, flat_positions(positions, right.shape[1]))
    from speft_optim.kernels import sampling_triton

    if blocks is not None:
        return sampling_triton.from_blocks(left, right, positions, blocks)
    return sampling_triton.from_panels(left, right, positions)


def from_panels(left: Tensor, right: Tensor, indices: Tensor, panel_bytes: int = PANEL_BYTES) -> Tensor:
    """Return entries of `left.T @ right` at flat positions, from panels of rows formed one at a time: the definition.

    Args:
        left: (T, R), a floating dtype.
        right: (T, C), the same dtype.
        indices: (k,) sorted flat positions in the (R, C) product.
        panel_bytes: largest panel, in bytes; at least one row is formed at a time.

    Returns:
        (k,) fp32.
    """
    rows, columns = left.shape[1], right.shape[1]
    step = panel_rows(columns, panel_bytes)
    if step >= rows:
        return product(left, right).view(-1).index_select(0, indices)
    starts = torch.arange(0, rows + step, step, device=indices.device).clamp_(max=rows)
    bounds = torch.searchsorted(indices, (starts * columns).to(indices.dtype)).tolist()
    out = torch.empty(indices.numel(), dtype=torch.float32, device=left.device)
    for panel, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first == last:
            continue
        row = panel * step
        dense = product(left[:, row : row + step], right).view(-1)
        out[first:last] = dense.index_select(0, indices[first:last] - row * columns)
    return out


@dataclass
class RowBlocks:
    """Blocks of 64 rows with similar numbers of entries, and the columns that each block needs.

    Attributes:
        order: (rows with entries,) int32, the rows sorted by number of entries, most first; block b is the 64 rows from
            place 64 b on.
        columns: (sum over blocks,) uint16, the columns in which a block has entries, ascending, block after block.
        starts: (blocks + 1,) int32, the place in `columns` at which each block's columns begin.
        tiles: (tiles, 2) int32, for each tile that a program forms: its block, and the first of its up to 128 columns,
            counted among the block's.
        halvings: the number of halvings after which a binary search in the columns of any block has ended.
    """

    order: Tensor
    columns: Tensor
    starts: Tensor
    tiles: Tensor
    halvings: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (self.order, self.columns, self.starts, self.tiles))


def row_blocks(positions: CSR, width: int) -> RowBlocks | None:
    """Cut the rows of a mask into blocks, or return None where dense panels are faster or the blocks would be large.

    The costs were measured on an H100 with 4096 tokens: an entry of the product takes 4 times as long in blocks as in
    dense panels, and transposing the operands takes as long as `T * (R + C) * 640` multiplications. A quarter of the
    dense cost is set aside for launches. In Llama-3-8B at 1 %, gate_proj takes 0.47 ms in blocks and 0.69 ms in panels,
    q_proj 0.25 and 0.20 ms.

    Args:
        positions: the masked entries.
        width: number of columns of the matrix.
    """
    columns, rows = positions.columns, len(positions.row_pointers) - 1
    # A denser mask leaves little out, and its pairs of block and column would take much memory.
    if not 0 < len(columns) < rows * width // 16:
        return None
    counts = positions.row_pointers.diff()
    rows_of = torch.arange(rows, device=counts.device).repeat_interleave(counts, output_size=len(columns))
    order = counts.argsort(descending=True, stable=True)
    blocks_of = torch.empty_like(order)
    blocks_of[order] = torch.arange(rows, device=order.device) // ROWS
    # A pair of block and column is one number, so that sorting gives the order in which columns are kept.
    pairs = (blocks_of[rows_of] * width + columns.long()).unique()
    share = ROWS * len(pairs) / (rows * width)
    if 4 * share + 640 * (rows + width) / (rows * width) > LARGEST_COST or 4 * ROWS * len(pairs) > PRODUCT_BYTES:
        return None
    filled = int((counts > 0).sum())
    blocks = -(-filled // ROWS)
    bounds = torch.arange(blocks + 1, device=pairs.device) * width
    starts = torch.searchsorted(pairs, bounds)
    widths = starts.diff()
    tiles_of = (widths + COLUMNS - 1) // COLUMNS
    block = torch.arange(blocks, device=pairs.device).repeat_interleave(tiles_of)
    number = torch.arange(len(block), device=pairs.device) - (tiles_of.cumsum(0) - tiles_of)[block]
    return RowBlocks(
        order=order[:filled].to(torch.int32),
        columns=(pairs % width).to(torch.uint16),
        starts=starts.to(torch.int32),
        tiles=torch.stack([block, number * COLUMNS], dim=1).to(torch.int32),
        halvings=(int(widths.max()) - 1).bit_length(),
    )


def suits_blocks(left: Tensor, right: Tensor, positions: CSR | Tensor) -> bool:
    """Return whether blocks can be used for operands (T, R) and (T, C): 16 bits, many tokens, and kernels run."""
    # While a compiler traces this, the positions have no data.
    if torch.compiler.is_compiling() or not isinstance(positions, CSR) or not launches(positions.columns):
        return False
    sixteen = left.dtype in (torch.float16, torch.bfloat16)
    return sixteen and min(len(left), run_of_tokens(left, right)) >= LEAST_TOKENS


def run_of_tokens(left: Tensor, right: Tensor) -> int:
    """Return how many tokens to transpose at a time, within `OPERAND_BYTES` and in runs of nearly equal length."""
    most = max(1, OPERAND_BYTES // ((left.shape[1] + right.shape[1]) * left.element_size() * TOKENS))
    steps = -(-len(left) // TOKENS)
    return -(-steps // -(-steps // most)) * TOKENS
