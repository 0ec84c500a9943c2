"""What runs in front of a sparsified model's forward, eagerly also where the forward is compiled."""

import torch
from torch import nn

from speft_optim.sparsify import attached, first_forward
from speft_optim.verification import freeze_again, probe


def before_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a sparsified model."""
    # A compiler takes the question for a constant, and calls what is disabled for it as it stands.
    refresh_all(model, args, kwargs, torch.compiler.is_compiling())


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple, kwargs: dict, compiled: bool) -> None:
    """Bring all weights and values into step, and see to it that gradients are verified.

    Args:
        model: the sparsified model.
        args: of the forward that follows.
        kwargs: of it.
        compiled: whether it is compiled as a whole. A graph would give the dense gradients of all weights at once, so
            that there the verification is a forward and backward of its own.
    """
    # Not by a search of the model, which each forward would pay for.
    weights = attached(model)
    for weight in weights:
        weight.refresh() if compiled else weight.before_forward()
    first_forward(model).remove()
    if compiled:
        probe(model, args, kwargs, weights)
    freeze_again(model, weights)
