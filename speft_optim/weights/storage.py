"""The frozen weight behind one interface: a dense tensor, or what `bnb` makes of bitsandbytes' layers."""

import torch
from torch import Tensor, nn

from speft_optim.kernels.entries import gather_entries
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask
from speft_optim.weights.bnb import FourBitWeight, Int8Weight, QuantizedWeight, is_quantized_linear, layer_kind
from speft_optim.weights.scales import trained_entries
from speft_optim.weights.sharded import ShardedWeight, is_sharded

# Under this name a module holds its weights that lie elsewhere while a model is streamed (see `salience/offload.py`).
STREAMED = "_streamed_weights"


class DenseWeight:
    """A floating parameter of a module."""

    # It holds its trained entries itself.
    overlays: tuple[()] = ()

    def __init__(self, module: nn.Module, attribute: str):
        self.tensor = module._parameters[attribute].detach()
        self.shape, self.dtype, self.device = self.tensor.shape, self.tensor.dtype, self.tensor.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in `dtype`."""
        return self.tensor.to(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), the first dimension by all others, in the weight's dtype."""
        rows = self.shape[0] if self.shape else 1
        return self.tensor.reshape(rows, self.shape.numel() // max(1, rows))[first:last]

    def gather(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,), in the weight's dtype."""
        return gather_entries(self.tensor, indices)

    def gather_base(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,) as the base has them, trained ones aside."""
        return self.gather(indices)

    def attach(self, mask: Mask, values: Tensor) -> None:
        """From now on `values`, which may change in place, are the weight's entries at `mask`."""

    def release(self, values: Tensor) -> None:
        """`values` will change no more and may be forgotten, the weight keeps what they are now."""

    def write(self, mask: Mask, values: Tensor) -> None:
        """Bring what the weight holds at `mask` up to the attached `values`."""
        overlay_(self.tensor, mask.positions, values)

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """What attached `values` have to be, given what the weight holds: where it is their rounding, they stand."""
        entries = self.gather(indices)
        return torch.where(entries == values.to(entries.dtype), values, entries.to(values.dtype))

    def put(self, mask: Mask, values: Tensor) -> None:
        """Set entries for good, from outside."""
        self.write(mask.to(self.device), values.to(self.device))

    def entries(self, mask: Mask) -> tuple[Mask, Tensor]:
        """What an adapter must hold for this weight when `mask` is trained."""
        return mask, self.gather(mask.indices.to(self.device))


FrozenWeight = DenseWeight | ShardedWeight | QuantizedWeight


def frozen_weight(module: nn.Module, attribute: str = "weight") -> FrozenWeight:
    """The weight of a module, whatever holds it.

    Raises:
        ValueError: a bitsandbytes layer that has not quantised its weight yet.
    """
    if STREAMED in module.__dict__:
        return module.__dict__[STREAMED][attribute]
    if is_sharded(module._parameters[attribute]):
        return ShardedWeight(module, attribute)
    if attribute != "weight" or not is_quantized_linear(module):
        return DenseWeight(module, attribute)
    return Int8Weight(module) if layer_kind(type(module)) == "Linear8bitLt" else FourBitWeight(module)


def keep_attached(weight: Tensor, mask: Mask, values: Tensor) -> None:
    """Let a copied weight follow the copied `values` of its top overlay: bitsandbytes copies scales on their own."""
    state = getattr(weight, "quant_state", None)
    holder, attribute = (weight, Int8Weight.attribute) if state is None else (state, FourBitWeight.attribute)
    if hasattr(holder, attribute) and (entries := trained_entries(holder, attribute)) is not None:
        entries.overlays[-1:] = [(mask, values)]


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight (or bias) as checkpoints store it, or one of a checkpoint's as the layer does; always a view.

    Both differ where transformers quantised a Conv1D (GPT-2): it does so to the transpose, and notes on the layer what
    it replaced. Known by name, since transformers is not imported here.
    """
    replaced = {cls.__name__ for cls in getattr(module, "source_cls", object).__mro__}
    return weight.t() if "Conv1D" in replaced and weight.dim() == 2 else weight
