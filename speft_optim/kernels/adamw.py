"""One step of AdamW on compact values: the definition in PyTorch, and the fused launch for many weights at once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.magnitudes import relative_rates


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
    magnitude_power: float = 0.0,
    mean: Tensor | None = None,
) -> None:
    """Take one AdamW step (Loshchilov & Hutter, 2019, Algorithm 2), in place.

    Args:
        values: (k,) fp32, updated.
        grad: (k,) fp32.
        exp_avg: (k,) fp32, first moment, updated.
        exp_avg_sq: (k,) fp32, second moment, updated.
        step: number of this step, from 1.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; the values are multiplied by `1 - lr * weight_decay`.
        maximize: whether to ascend instead.
        magnitude_power: the power of `magnitudes.relative_rates`; read only with `mean`.
        mean: fp32 scalar of `magnitudes.mean_power`; each entry's learning rate is then multiplied by its relative
            rate, though not its weight decay. None for one rate.
    """
    if maximize:
        grad = -grad
    # The rates are those of the values before the step.
    rates = None if mean is None else relative_rates(values, mean, magnitude_power)
    # theta <- theta - lr * weight_decay * theta
    values.mul_(1 - lr * weight_decay)
    # m <- beta1 * m + (1 - beta1) * g;  v <- beta2 * v + (1 - beta2) * g^2
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # theta <- theta - lr * m_hat / (sqrt(v_hat) + eps)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    if rates is not None:
        denominator.div_(rates)
    values.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))


@dataclass
class Update:
    """One weight's part of an optimizer step; all tensors are contiguous and on one device.

    Attributes:
        values: (k,) fp32, updated.
        gradient: (k,) fp32.
        moments: first and second moment, (k,) each, updated: fp32, or quantised to uint8 by `quantize_blockwise`.
        scales: (blocks,) fp32 scales of the two quantised moments, updated; empty for fp32 moments.
        step: number of this step, from 1.
        weight: the dense weight to write the new values into, or some of its rows, or None.
        positions: the entries of the whole weight that the values belong to; None without `weight`.
        first_row: the row of the whole weight that is the first in `weight`; values of rows outside are not written.
        mean: fp32 scalar of `magnitudes.mean_power` for learning rates by magnitude, or None.
    """

    values: Tensor
    gradient: Tensor
    moments: list[Tensor]
    scales: list[Tensor]
    step: int
    weight: Tensor | None = None
    positions: CSR | None = None
    first_row: int = 0
    mean: Tensor | None = None

    @property
    def kind(self) -> tuple[torch.device, bool, torch.dtype | None, bool]:
        """The properties that one launch shares: device, whether moments are 8-bit, weight dtype, kind of rates."""
        dtype = None if self.weight is None else self.weight.dtype
        return self.values.device, bool(self.scales), dtype, self.mean is not None

    def addresses(self) -> list[int]:
        """Return this update's row of the table that a launch reads: sizes, and addresses of the tensors."""
        row = [self.values.numel(), *(part.data_ptr() for part in (self.values, self.gradient, *self.moments))]
        row += [scale.data_ptr() for scale in self.scales] or [0, 0]
        if self.weight is None:
            return row + [0] * 7
        pointers, columns = self.positions
        rows, width = len(pointers) - 1, self.weight.shape[-1]
        row += [self.weight.data_ptr(), pointers.data_ptr(), columns.data_ptr(), rows, width]
        return [*row, self.first_row, self.weight.numel() // width]


def fused_adamw(updates: Iterable[Update], **options: float) -> Callable[[], None]:
    """Return a function that takes the step of `adamw_` on each update and writes the new values into the weights.

    The arguments are uploaded now, so that calling the function costs only one launch for each kind of update.

    Args:
        updates: the weights to step; `launches` is true of all their tensors.
        **options: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `maximize` and `magnitude_power` of `adamw_`.
    """
    from speft_optim.kernels import adamw_triton

    return adamw_triton.fused_adamw(updates, **options)
