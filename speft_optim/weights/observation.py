"""How the gradient of a frozen weight is observed, dense or quantised, once or twice differentiated."""

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
    """Let the gradient of every use of a weight in a module that holds it go to an accumulator.

    A quantised layer must be computed by `frozen_forwards` or `patch_model`.

    Args:
        target: the weight.
        grad_anchor: stands for the accumulator in the graph, and gets the sum of what it returns.
        accumulator: takes the gradients.
        verify: as for `GradientHook`.
        pending: as for `GradientHook`.

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
    """A leaf for a weight in the graph, whose gradients are the weight's, also those of a gradient's gradient.

    It is the parameter itself, or for a quantised layer, which must be computed by `frozen_forwards` or `patch_model`,
    a tensor of the weight's shape that takes no memory.

    Args:
        target: the weight.
        take: gets each dense gradient, of the weight's shape and dtype, which is then freed.
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
