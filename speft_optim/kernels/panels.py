"""The sampled gradient on a card: dense panels by the vendor's matrix product, entries picked from them by a kernel."""

import torch
from torch import Tensor

from speft_optim.kernels.operands import Positions
from speft_optim.kernels.reference import PANEL_BYTES, panel_rows, product
from speft_optim.kernels.rows import pick_


def sampled_gradient(left: Tensor, right: Tensor, positions: Positions, panel_bytes: int = PANEL_BYTES) -> Tensor:
    """As `reference.sampled_gradient`, for packed positions; the host waits for nothing."""
    rows, columns = positions.shape
    step = panel_rows(columns, panel_bytes)
    out = torch.empty(len(positions.packed()["columns"]), dtype=torch.float32, device=left.device)
    for row in range(0, rows, step):
        pick_(out, product(left[:, row : row + step], right), positions, row)
    return out
