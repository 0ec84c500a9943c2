"""The next step of each parameter, prepared while it is not yet known whether all gradients are finite."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speft_optim.kernels.adamw import Update, adamw_, fused_adamw
from speft_optim.kernels.blockwise import blocks_in
from speft_optim.kernels.launch import launches
from speft_optim.kernels.magnitudes import mean_power
from speft_optim.optim.moments import new_moments_, store_moments_, stored_moments, unpack_moments
from speft_optim.optim.state import has_moments
from speft_optim.weights.sharded import is_sharded
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
        written = {} if weight is None else weight.writable()
        step = int(state["step"]) + 1
        update = Update(parameter.detach(), parameter.grad, moments, scales, step, **written, mean=mean)
        return cls(parameter, weight, state, update, mean)


def planned(
    group: dict[str, Any], weights: dict[Tensor, SparseWeight | None], states: dict[Tensor, dict[str, Any]]
) -> Callable[[], None]:
    """Return a function that takes the step of a group. Nothing changes before; a call costs only the launch.

    Args:
        group: a parameter group.
        weights: from each parameter to the masked weight behind it, or None.
        states: the optimizer's state, by parameter.
    """
    options = dict(
        lr=group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"],
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=group["maximize"],
        magnitude_power=float(group["magnitude_power"]),
    )
    means = _mean_powers(group, weights)
    trained = [parameter for parameter in group["params"] if parameter.grad is not None]
    prepared = [
        Prepared.of(
            parameter,
            weights[parameter],
            states.get(parameter),
            group["state_bits"],
            None if weights[parameter] is None else means.get(parameter.device),
        )
        for parameter in trained
    ]
    updates = [one.update for one in prepared if one.update is not None]
    launch = fused_adamw(updates, **{**options, "lr": float(options["lr"])}) if updates else None
    return partial(_take, prepared, states, options, launch)


def _take(
    prepared: list[Prepared],
    states: dict[Tensor, dict[str, Any]],
    options: dict[str, Any],
    launch: Callable[[], None] | None,
) -> None:
    """Take the step, in one launch for all parameters that kernels can update, and one by one for the others."""
    if launch is not None:
        launch()
    for one in prepared:
        states[one.parameter] = one.state
    if prepared:
        torch._foreach_add_([one.state["step"] for one in prepared], 1)
    for one in prepared:
        if one.update is None:
            exp_avg, exp_avg_sq = unpack_moments(one.state)
            step, gradient = int(one.state["step"]), one.parameter.grad
            if one.state["exp_avg"] is not exp_avg:
                # Moments of 8 bits are dequantised to fp32, whatever the dtype of the parameter.
                gradient = gradient.float()
            adamw_(one.parameter, gradient, exp_avg, exp_avg_sq, step=step, mean=one.mean, **options)
            store_moments_(one.state, exp_avg, exp_avg_sq)
        if one.weight is not None:
            one.weight.write() if one.update is None or one.update.weight is None else one.weight.written()


def _mean_powers(group: dict[str, Any], weights: dict[Tensor, SparseWeight | None]) -> dict[torch.device, Tensor]:
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
    if not launches(parameter) or is_sharded(parameter):
        return False
    device, kind = parameter.device, torch.uint8 if scales else torch.float32
    for dtype, parts in ((torch.float32, (parameter, parameter.grad, *scales)), (kind, moments)):
        for part in parts:
            if part.dtype != dtype or part.device != device or not part.is_contiguous():
                return False
    fit = all(part.shape == parameter.shape for part in (parameter.grad, *moments))
    return fit and all(len(part) == blocks_in(parameter.numel()) for part in scales)
