"""The frozen weight behind one interface: a dense tensor, or the quantised weight of a bitsandbytes layer (`bnb`)."""

import torch
from torch import Tensor, nn

from speft_optim.kernels.entries import gather_entries
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask
from speft_optim.weights.bnb import is_quantized_linear, quantized_weight
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.four_bit import FourBitWeight
from speft_optim.weights.int8 import Int8Weight
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.scales import trained_entries
from speft_optim.weights.sharded import ShardedWeight, is_sharded

# While a model is offloaded, a module's weights in host memory are in this attribute (see `offload/engine.py`).
STREAMED = "_streamed_weights"


class DenseWeight(FloatingWeight):
    """A floating parameter of a module.

    Args:
        module: the module.
        attribute: the parameter's name in it.
    """

    def __init__(self, module: nn.Module, attribute: str):
        self.tensor = module._parameters[attribute].detach()
        self.shape, self.dtype, self.device = self.tensor.shape, self.tensor.dtype, self.tensor.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight in `dtype`; the weight itself if it has that dtype."""
        return self.tensor.to(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of the first dimension by all others, in the weight's dtype."""
        rows = self.shape[0] if self.shape else 1
        return self.tensor.reshape(rows, self.shape.numel() // max(1, rows))[first:last]

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), (k,) in the weight's dtype."""
        return gather_entries(self.tensor, indices)

    def write(self, mask: Mask, values: Tensor) -> None:
        """Write `values` (k,) fp32 into the weight at `mask`, rounded to its dtype."""
        overlay_(self.tensor, mask.positions, values)

    def writable(self) -> tuple[Tensor, int]:
        """Return the whole weight, which begins with row 0."""
        return self.tensor, 0


FrozenWeight = DenseWeight | ShardedWeight | QuantizedWeight


def frozen_weight(module: nn.Module, attribute: str = "weight") -> FrozenWeight:
    """Return the weight of a module, dense or quantised, or what `offload` has in its place; nothing is copied.

    Args:
        module: the module that holds it.
        attribute: its name in the module.
    """
    if STREAMED in module.__dict__:
        return module.__dict__[STREAMED][attribute]
    if attribute == "weight" and is_quantized_linear(module):
        return quantized_weight(module)
    if is_sharded(module._parameters[attribute]):
        return ShardedWeight(module, attribute)
    return DenseWeight(module, attribute)


def keep_attached(weight: Tensor, mask: Mask, values: Tensor) -> None:
    """Attach the copied `values` to a copied quantised weight: bitsandbytes copied its scales with values of their own.

    Args:
        weight: the copied parameter.
        mask: the mask of its last overlay.
        values: (k,) fp32, the parameter that trains.
    """
    state = getattr(weight, "quant_state", None)
    holder, attribute = (weight, Int8Weight.attribute) if state is None else (state, FourBitWeight.attribute)
    if hasattr(holder, attribute) and (entries := trained_entries(holder, attribute)) is not None:
        entries.overlays[-1:] = [(mask, values)]


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """Convert a layer's weight (or bias) to the shape of checkpoints, or back; the result is a view.

    The shapes differ where transformers quantised a Conv1D (GPT-2): it quantises the transpose, and notes the replaced
    class on the layer. The class is known by name, since transformers is not imported here.
    """
    replaced = {cls.__name__ for cls in getattr(module, "source_cls", object).__mro__}
    return weight.t() if "Conv1D" in replaced and weight.dim() == 2 else weight
