"""The next step of each parameter, prepared while it is not yet known whether all gradients are finite."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speft_optim.kernels.adamw import Update
from speft_optim.kernels.launch import launches
from speft_optim.kernels.magnitudes import mean_power
from speft_optim.optim.moments import new_moments_, stored_moments
from speft_optim.optim.state import has_moments
from speft_optim.weights.sparse_weight import SparseWeight


@dataclass
class Prepared:
    """A parameter's next step, prepared and not taken.

    Attributes:
        parameter: the parameter, which the step updates in place.
        weight: the masked weight behind it, or None.
        state: its optimizer state, with moments.
        update: the arguments of the kernel, or None if no kernel can update it.
        mean: the mean of the entries' magnitudes, a scalar for learning rates in proportion to them, or None.
    """

    parameter: Tensor
    weight: SparseWeight | None
    state: dict[str, Any]
    update: Update | None
    mean: Tensor | None

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        weight: SparseWeight | None,
        state: dict[str, Any] | None,
        state_bits: int,
        mean: Tensor | None,
    ) -> "Prepared":
        """Prepare the next step of a parameter, with zero moments if it has none."""
        if not has_moments(state):
            state = {**(state or {}), "step": torch.zeros((), dtype=torch.float32)}
            new_moments_(state, parameter, state_bits)
        moments, scales = stored_moments(state)
        if not _can_launch(parameter, moments, scales):
            return cls(parameter, weight, state, None, mean)
        writable = None if weight is None else weight.writable()
        positions = None if writable is None else weight.mask.positions
        step = int(state["step"]) + 1
        update = Update(parameter.detach(), parameter.grad, moments, scales, step, writable, positions, mean)
        return cls(parameter, weight, state, update, mean)


def mean_powers(group: dict[str, Any], weights: dict[Tensor, SparseWeight | None]) -> dict[torch.device, Tensor]:
    """Return the mean of abs(entry)^power over the masked entries of a group.

    Args:
        group: a parameter group, with its `magnitude_power`.
        weights: from each parameter to the masked weight behind it, or None.

    Returns:
        The same scalar on each device that has masked entries; empty if the power is 0.
    """
    power = float(group["magnitude_power"])
    values = [parameter.detach() for parameter in group["params"] if weights[parameter] is not None]
    if not power or not any(map(len, values)):
        return {}
    mean = mean_power(values, power)
    return {device: mean.to(device) for device in {part.device for part in values}}


def _can_launch(parameter: Tensor, moments: list[Tensor], scales: list[Tensor]) -> bool:
    """Tell whether the kernel, which gets bare addresses, may update the parameter: its tensors must fit."""
    if not launches(parameter):
        return False
    device, kind = parameter.device, torch.uint8 if scales else torch.float32
    for dtype, parts in ((torch.float32, (parameter, parameter.grad, *scales)), (kind, moments)):
        for part in parts:
            if part.dtype != dtype or part.device != device or not part.is_contiguous():
                return False
    return True
