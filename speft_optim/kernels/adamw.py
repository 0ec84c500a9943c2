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
    """One AdamW step (Loshchilov & Hutter, Algorithm 2) on fp32 tensors of one shape, in place; `step` starts at 1.

    With a `mean` of `magnitudes.mean_power` each entry's rate is multiplied by `magnitudes.relative_rates`, that of
    the decay excepted.
    """
    if maximize:
        grad = -grad
    # Before they move.
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
    """One weight's part of an optimizer step; all tensors contiguous on one device.

    Attributes:
        values: (k,) fp32, updated.
        gradient: (k,) fp32.
        moments: first and second, (k,), updated: fp32, or uint8 codes.
        scales: (blocks,) fp32 scales of the two moments' codes, updated; empty for fp32 moments.
        step: number of this step, from 1.
        weight: the dense weight to write the new values into, or None.
        positions: where the values stand in `weight`.
        mean: fp32 scalar of `magnitudes.mean_power` for rates by magnitude, or None.
    """

    values: Tensor
    gradient: Tensor
    moments: list[Tensor]
    scales: list[Tensor]
    step: int
    weight: Tensor | None = None
    positions: CSR | None = None
    mean: Tensor | None = None

    @property
    def kind(self) -> tuple[torch.device, bool, torch.dtype | None, bool]:
        """What one launch has in common: device, 8-bit moments or not, the weight's dtype, one rate or several."""
        dtype = None if self.weight is None else self.weight.dtype
        return self.values.device, bool(self.scales), dtype, self.mean is not None

    def addresses(self) -> list[int]:
        """A row of the table that a launch reads."""
        row = [self.values.numel(), *(part.data_ptr() for part in (self.values, self.gradient, *self.moments))]
        row += [scale.data_ptr() for scale in self.scales] or [0, 0]
        if self.weight is None:
            return row + [0] * 5
        pointers, columns = self.positions
        rows, width = len(pointers) - 1, self.weight.shape[-1]
        return [*row, self.weight.data_ptr(), pointers.data_ptr(), columns.data_ptr(), rows, width]


def fused_adamw(updates: Iterable[Update], **options: float) -> Callable[[], None]:
    """Return a function that takes the step of `adamw_` on each update and writes the new values into the weights.

    The arguments are uploaded now, so that calling the function costs only one launch for each kind of update.

    Args:
        updates: the weights to step; all tensors lie where `launches` says that kernels run.
        **options: `lr`, `beta1`, `beta2`, `eps`, `weight_decay`, `maximize` and `magnitude_power` of `adamw_`.
    """
    from speft_optim.kernels import adamw_triton

    return adamw_triton.fused_adamw(updates, **options)
