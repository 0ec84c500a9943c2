"""What runs eagerly in front of a compiled model's graph."""

import torch
from torch import nn

from speft_optim.weights.averaging import average_gradients
from speft_optim.weights.sparse_weight import attached


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a sparsified model: bring weights and values into step."""
    # Not by a search of the model, which each forward would pay for.
    for weight in attached(model):
        weight.refresh()
    if any(weight.is_sharded for weight in attached(model)):
        average_gradients(model)
