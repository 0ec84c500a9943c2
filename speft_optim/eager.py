"""What runs eagerly in front of a compiled model's graph."""

import torch
import torch.distributed as dist
from torch import nn

from speft_optim.weights.averaging import average_gradients, is_under_fsdp
from speft_optim.weights.sparse_weight import attached


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a sparsified model: bring weights and values into step."""
    # Not by a search of the model, which each forward would pay for.
    for weight in attached(model):
        weight.refresh()
    if dist.is_available() and dist.is_initialized() and any(map(is_under_fsdp, attached(model))):
        average_gradients(model)


class RefreshDecoder:
    """Forward pre-hook of a decoder that is called without the model around it, as losses in chunks do.

    A compiled block cannot see whether its values changed. An object and not a closure, so that a copy of the model
    looks after its own weights.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        """Bring weights and values into step, unless the call is part of a graph, in front of which this was done."""
        if not torch.compiler.is_compiling():
            refresh_all(self.model, args)


def refresh_before_forward(model: nn.Module, prepend: bool = False) -> list:
    """Hook the model, and its decoder where it tells which that is; the handles of the hooks.

    Args:
        model: a sparsified model.
        prepend: in front of hooks that are there already.
    """
    hooks = [model.register_forward_pre_hook(refresh_all, prepend=prepend)]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module) and decoder is not model:
        hooks.append(decoder.register_forward_pre_hook(RefreshDecoder(model), prepend=prepend))
    return hooks
