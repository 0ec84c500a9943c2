"""What runs eagerly in front of a compiled model's graph."""

import torch
from torch import nn

from speft_optim.compact import sparse_weights


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a sparsified model: bring all weights and values into step."""
    for weight in sparse_weights(model):
        weight.refresh()
