"""Hooks that run eagerly, before the graph of a compiled model: they bring weights and values into step."""

import torch
import torch.distributed as dist
from torch import nn

from speft_optim.weights.attached import record_of
from speft_optim.weights.averaging import average_gradients, is_under_fsdp


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple) -> None:
    """Bring weights and values into step; a forward pre-hook of a sparsified model.

    Raises:
        ValueError: a transform of torch.func differentiates the model.
    """
    if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "torch.func (grad, vmap, jvp) cannot differentiate masked weights, whose gradients hooks form; call "
            "backward as usual, or desparsify(model) first."
        )
    # The weights are listed, since searching the model would cost time in each forward.
    weights = record_of(model).weights
    for weight in weights:
        weight.refresh()
    if dist.is_available() and dist.is_initialized() and any(map(is_under_fsdp, weights)):
        average_gradients(model)


class RefreshDecoder:
    """Forward pre-hook of a decoder, for losses that call it without the model around it.

    A compiled block cannot see whether its values changed. This is an object and not a closure, so that a copy of the
    model refreshes its own weights.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        """Bring weights and values into step; inside a graph there is nothing to do, since it was done before it."""
        if not torch.compiler.is_compiling():
            refresh_all(self.model, args)


def refresh_before_forward(model: nn.Module, prepend: bool = False) -> list:
    """Hook the model, and its decoder if it has `get_decoder`; return the handles of the hooks.

    Args:
        model: a sparsified model.
        prepend: whether to place the hooks in front of existing ones.
    """
    hooks = [model.register_forward_pre_hook(refresh_all, prepend=prepend)]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module) and decoder is not model:
        hooks.append(decoder.register_forward_pre_hook(RefreshDecoder(model), prepend=prepend))
    return hooks
