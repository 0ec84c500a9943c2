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
