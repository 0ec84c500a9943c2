"""The definition of correct: each operation in plain PyTorch, on any device; a kernel must agree with it.

Flat positions are sorted, unique, row-major, int32 or int64. All arithmetic is fp32; casts happen once, at the store.
"""

import torch
from torch import Tensor

PANEL_BYTES = 128 * 2**20


def gather_entries(weight: Tensor, indices: Tensor) -> Tensor:
    """Entries of `weight` (any shape and strides) at flat positions `indices` (k,), in its dtype, shape (k,)."""
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, indices)
    return weight[torch.unravel_index(indices.long(), weight.shape)]


def scatter_entries_(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Write `values` (k,), rounded to the weight's dtype, at flat positions `indices` (k,) of `weight`, in place."""
    values = values.to(weight.dtype)
    if weight.is_contiguous():
        weight.view(-1).index_copy_(0, indices.long(), values)
    else:
        weight.index_put_(torch.unravel_index(indices.long(), weight.shape), values)
    return weight


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` with an fp32 result, for (T, R) and (T, C) operands of one dtype."""
    # Backward may run inside the user's autocast block, which would round the operands.
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
            return torch.mm(left.t(), right, out_dtype=torch.float32)
        return left.t().float() @ right.float()


def accumulate_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right` to `total` (R, C) fp32 in place, for (T, R) and (T, C) operands of one dtype."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        with torch.autocast(left.device.type, enabled=False):
            total.addmm_(left.t().float(), right.float())


def sampled_gradient(left: Tensor, right: Tensor, indices: Tensor, panel_bytes: int = PANEL_BYTES) -> Tensor:
    """Entries of `left.T @ right` at flat positions `indices`, without ever holding the whole product.

    The product is formed in panels of rows of at most `panel_bytes` in fp32 and gathered from. On a CPU only the rows
    and columns that have entries are multiplied: less than half of the work of a gradient mask at 1 % density, whose
    entries lie close together. For nn.Linear `left` is the output gradient and `right` the
    input; for a transposed weight (GPT-2's Conv1D) they change places.

    Args:
        left: (T, R), a floating dtype.
        right: (T, C), the same dtype.
        indices: (k,) sorted flat positions in the (R, C) product.
        panel_bytes: largest panel, in bytes; at least one row is formed at a time.

    Returns:
        (k,) fp32.
    """
    rows, columns = left.shape[1], right.shape[1]
    panel_rows = max(1, panel_bytes // (4 * max(1, columns)))
    # Which rows and columns these are has to be known on the host: a wait for a card, and no part of a compiled graph.
    select = not left.is_cuda and not torch.compiler.is_compiling()
    entries_of = _entries_where_needed if select else _entries_of_product
    if panel_rows >= rows:
        return entries_of(left, right, indices)
    starts = torch.arange(0, rows + panel_rows, panel_rows, device=indices.device).clamp_(max=rows)
    bounds = torch.searchsorted(indices, (starts * columns).to(indices.dtype)).tolist()
    out = torch.empty(indices.numel(), dtype=torch.float32, device=left.device)
    for panel, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first == last:
            continue
        row = panel * panel_rows
        part, local = left[:, row : row + panel_rows], indices[first:last] - row * columns
        out[first:last] = entries_of(part, right, local)
    return out


def _entries_of_product(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Entries of `left.T @ right` at flat positions, from the whole product."""
    return product(left, right).view(-1).index_select(0, indices)


def _entries_where_needed(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Entries of `left.T @ right` at flat positions, from the rows and columns that have entries alone."""
    rows, row_of = _used(indices // right.shape[1], left.shape[1])
    columns, column_of = _used(indices % right.shape[1], right.shape[1])
    block = product(left.index_select(1, rows), right.index_select(1, columns))
    return block.view(-1).index_select(0, row_of * len(columns) + column_of)


def _used(coordinates: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rising coordinates that occur, and the place of each given one among them."""
    occurs = torch.zeros(size, dtype=torch.bool, device=coordinates.device)
    occurs[coordinates.long()] = True
    return occurs.nonzero().squeeze(1), (occurs.cumsum(0) - 1)[coordinates.long()]


def adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One AdamW step (Loshchilov & Hutter, Algorithm 2) on fp32 tensors of one shape, in place; `step` starts at 1."""
    if maximize:
        grad = -grad
    # theta <- theta - lr * weight_decay * theta
    values.mul_(1 - lr * weight_decay)
    # m <- beta1 * m + (1 - beta1) * g;  v <- beta2 * v + (1 - beta2) * g^2
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # theta <- theta - lr * m_hat / (sqrt(v_hat) + eps)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))
