"""Checks of an optimizer's options, and of what it trains at its first step."""

import logging
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from speft_optim.checks import check_flag
from speft_optim.kernels.magnitudes import POWERS
from speft_optim.optim.moments import STATE_BITS
from speft_optim.weights.sharded import ShardedWeight, is_sharded
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import DenseWeight

logger = logging.getLogger(__name__)


def check_gradients(weights: dict[Tensor, SparseWeight | None]) -> None:
    """Warn at the first step of compact values without a gradient.

    Args:
        weights: from each parameter to the masked weight behind it, or None.

    Raises:
        ValueError: the values of all masked weights are frozen.
    """
    compact = {parameter: weight.name for parameter, weight in weights.items() if weight is not None}
    frozen = [name for parameter, name in compact.items() if not parameter.requires_grad]
    remedy = (
        "were frozen after sparsify (requires_grad is False), as peft's get_peft_model and some trainers do with all "
        "parameters but their own; call requires_grad_(True) on the values that sparsify returned, or sparsify later."
    )
    if frozen and len(frozen) == len(compact):
        raise ValueError(f"The values of all {len(frozen)} masked weights {remedy}")
    if frozen:
        logger.warning(
            "The values of %d of %d masked weights, e.g. %s, %s", len(frozen), len(compact), frozen[0], remedy
        )
    missing = [name for parameter, name in compact.items() if parameter.grad is None and parameter.requires_grad]
    if missing:
        logger.warning(
            "%d masked weights have no gradient at the first step, e.g. %s: they were not used (a branch that was not "
            "taken, an expert without a token), or are in blocks under reentrant checkpointing whose inputs require "
            "no gradient (pass use_reentrant=False).",
            len(missing),
            missing[0],
        )


def refuse_step_in_backward(weights: Iterable[SparseWeight | None]) -> None:
    """Refuse a step that is taken within a backward, as by optimizers in hooks of their parameters.

    Values have their gradient before their layer forms that of its input, for which it needs the weight as it was. One
    that is quantised or in host memory has its trained entries beside it, and is read before.

    Raises:
        ValueError: a weight holds the trained entries itself.
    """
    for weight in weights:
        if weight is not None and isinstance(weight.base, DenseWeight | ShardedWeight):
            raise ValueError(
                f"step() was called within a backward, in which {weight.name} is still needed as it was, so that "
                "gradients would be wrong; call it after backward, or sparsify with offload= or on a quantised base."
            )


def refuse_quantised_rows(parameters: Iterable[tuple[Tensor, int]]) -> None:
    """Refuse moments of 8 bits for an ordinary parameter that `fully_shard` divided, of which blocks cross processes.

    Args:
        parameters: each with the `state_bits` of its group.

    Raises:
        ValueError: one of them would have such moments.
    """
    for parameter, bits in parameters:
        if bits == 8 and is_sharded(parameter) and parameter.grad is not None:
            raise ValueError(
                f"state_bits=8 is not possible for an ordinary parameter that fully_shard divided, here one of shape "
                f"{tuple(parameter.shape)}; put such parameters into a group of their own with state_bits=32."
            )


def warn_of_dense_training(weights: dict[Tensor, SparseWeight | None]) -> None:
    """Warn if whole matrices are trained and no compact values are."""
    dense = [parameter for parameter in weights if parameter.ndim >= 2 and parameter.grad is not None]
    if dense and not any(weights.values()):
        logger.warning(
            "SparseAdamW trains %d whole weights, as torch's AdamW does, and no compact values; to train masked "
            "entries, build it from sparsify(model, masks) and not from model.parameters().",
            len(dense),
        )


def check_others(options: dict[str, Any]) -> None:
    """Accept options that only torch's AdamW has if they are off, and refuse all others.

    Raises:
        TypeError: an option is known to neither optimizer.
        ValueError: an option is on; the message says why it is not supported.
    """
    for name, value in options.items():
        if name not in _LACKING:
            raise TypeError(
                f"SparseAdamW takes no {name}; choose from lr, betas, eps, weight_decay, maximize, state_bits, "
                "magnitude_power and on_nonfinite."
            )
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r}: {_LACKING[name]}; leave {name} out.")


_LACKING = {
    "fused": "SparseAdamW always uses fused kernels where they can run",
    "foreach": "SparseAdamW has one implementation, which does what foreach is for",
    "capturable": "SparseAdamW counts steps on the CPU and cannot be captured in a CUDA graph",
    "differentiable": "the step of SparseAdamW cannot be differentiated through",
    "amsgrad": "SparseAdamW has no AMSGrad variant, only AdamW",
}


def check_options(options: dict[str, Any]) -> None:
    """Refuse a parameter group whose options are out of range.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is out of range.
    """
    lr, eps, decay = options["lr"], options["eps"], options["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; pass a number or a tensor of one element.")
    betas = options["betas"]
    wrong_betas = f"betas={betas} must be two numbers in [0, 1), such as (0.9, 0.999)."
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(wrong_betas)
    check_flag("maximize", options["maximize"])
    numbers = [("lr", lr, 1e-3), ("eps", eps, 1e-8), ("weight_decay", decay, 1e-2)]
    for name, value, usual in (*numbers, ("betas", betas[0], 0.9), ("betas", betas[1], 0.999)):
        if not isinstance(value, Real | Tensor) or isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"{name}={value!r} is not a number; pass a float.")
        # Written this way round, the comparison refuses NaN too, and integers beyond the range of floats.
        if not 0.0 <= (float(value) if isinstance(value, Tensor) else value) <= sys.float_info.max:
            raise ValueError(f"{name}={value} is not a finite number of at least 0, such as {usual}.")
    if not isinstance(options["state_bits"], int) or options["state_bits"] not in STATE_BITS:
        raise ValueError(f"state_bits={options['state_bits']!r}; moments are kept in 8 or 32 bits.")
    power = options["magnitude_power"]
    if not isinstance(power, int | float) or power not in POWERS:
        raise ValueError(f"magnitude_power={power!r}; it is 0 for one rate, 0.5 or 1 for rates by magnitude.")
    if not all(float(beta) < 1.0 for beta in betas):
        raise ValueError(wrong_betas)
