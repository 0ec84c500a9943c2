"""The definition of correct: each operation in plain PyTorch, on any device; a kernel must agree with it.

Flat positions are sorted, unique, row-major, int32 or int64. All arithmetic is fp32; casts happen once, at the store.
"""

import contextlib

import torch
from torch import Tensor

PANEL_BYTES = 64 * 2**20
_TILE = 128


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


def _exactly(device: str) -> contextlib.AbstractContextManager:
    """Backward may run inside the user's autocast block, which would round the operands."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` with an fp32 result, for (T, R) and (T, C) operands of one dtype."""
    with _exactly(left.device.type):
        if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
            return torch.mm(left.t(), right, out_dtype=torch.float32)
        return left.t().float() @ right.float()


def accumulate_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right` to `total` (R, C) fp32 in place, for (T, R) and (T, C) operands of one dtype."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        with _exactly(left.device.type):
            total.addmm_(left.t().float(), right.float())


def panel_rows(columns: int, panel_bytes: int = PANEL_BYTES) -> int:
    """Rows of an fp32 panel of so many columns and at most so many bytes, at least one; whole tiles of 128 if it can.

    Where a panel begins off the grid of a matrix product's tiles, cuBLAS falls back to slower kernels: on an H100 those
    of Llama-3-8B's down_proj took 46 ms a step instead of 19.
    """
    rows = max(1, panel_bytes // (4 * max(1, columns)))
    return rows // _TILE * _TILE or rows


def sampled_gradient(left: Tensor, right: Tensor, indices: Tensor, panel_bytes: int = PANEL_BYTES) -> Tensor:
    """Entries of `left.T @ right` at flat positions `indices`, without ever holding the whole product.

    The product is formed in panels of rows of at most `panel_bytes` in fp32 and gathered from. For nn.Linear `left`
    is the output gradient and `right` the input; for a transposed weight (GPT-2's Conv1D) they change places.

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
