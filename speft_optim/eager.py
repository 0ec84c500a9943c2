"""What runs in front of a sparsified model's forward, eagerly also where the forward is compiled."""

import torch
from torch import nn

from speft_optim.sparsify import attached, first_forward
from speft_optim.verification import freeze_again, probe, processes


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
        compiled: whether it is compiled as a whole. A graph would give the dense gradients of all its weights at once,
            so that these are verified by a forward and backward of their own.
    """
    # Not by a search of the model, which each forward would pay for.
    weights = attached(model)
    for weight in weights:
        weight.refresh()
    first_forward(model).remove()
    verified = [weight for weight in weights if weight.verification is not None]
    due = [weight for weight in verified if weight.verification.due()]
    hidden = [weight for weight in due if compiled or weight.is_compiled()]
    # Where a reducer counts the gradients of a step, it must not see those of another backward.
    if hidden and processes() == 1:
        probe(model, args, kwargs, weights, hidden)
    for weight in verified:
        weight.verification.before_forward(arm=False if compiled else None)
    freeze_again(model, weights)
