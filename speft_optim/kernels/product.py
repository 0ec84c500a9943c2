"""Products of activations and output gradients with fp32 results, in plain PyTorch on any device."""

import contextlib

import torch
from torch import Tensor

PANEL_BYTES = 64 * 2**20
_TILE = 128


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
