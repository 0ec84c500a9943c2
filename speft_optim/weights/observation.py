"""The way to observe the gradient of a frozen weight, dense or quantised, in first and second derivatives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from speft_optim.weights.gradient_hooks import GradientHook
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.quantized_linear import ProductHook, forward_of
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target
from speft_optim.weights.verification import DenseGradient


def observe_gradient(
    target: Target, grad_anchor: Tensor, accumulator: Accumulator, verify: bool = False, pending: list | None = None
) -> list[GradientHook | ProductHook]:
    """Pass the gradient of a weight to an accumulator, for every use in a module that holds the weight.

    A quantised layer must have the forward of `frozen_forwards` or `patch_model`.

    Args:
        target: the weight.
        grad_anchor: a tensor that requires gradients; its gradient is the sum of what the accumulator returns.
        accumulator: receives the gradients.
        verify: see `GradientHook`; quantised layers need no verification.
        pending: see `GradientHook`.

    Returns:
        One hook for each module, to be removed by the caller.
    """
    hooks = []
    for module, attribute in target.sites:
        forward = forward_of(module) if attribute == "weight" else None
        if forward is not None:
            hooks.append(ProductHook(forward, target.name, grad_anchor, accumulator))
        else:
            hooks.append(GradientHook(module, attribute, grad_anchor, accumulator, target.name, verify, pending))
    return hooks


@contextmanager
def differentiable(target: Target, take: Callable[[Tensor], None]) -> Iterator[Tensor]:
    """Make a weight differentiable any number of times while the context lasts, and yield its leaf in the graph.

    The leaf is the parameter itself or, for a quantised layer, a tensor of the weight's shape that takes no memory. A
    quantised layer must have the forward of `frozen_forwards` or `patch_model`.

    Args:
        target: the weight.
        take: called with each dense gradient, of the weight's shape and dtype, which is then freed.
    """
    module, attribute = target.sites[0]
    forward = forward_of(module) if attribute == "weight" else None
    leaf = module._parameters[attribute]
    if forward is not None:
        weight = frozen_weight(module)
        forward.leaf = leaf = torch.zeros((), device=weight.device).expand(weight.shape).requires_grad_()
    gradient = DenseGradient(take)
    gradient.open(leaf)
    try:
        yield leaf
    finally:
        gradient.close()
        if forward is not None:
            forward.leaf = None
