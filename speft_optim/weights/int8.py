"""The weight of a bitsandbytes int8 layer (LLM.int8 storage): `w = code * scale / 127`, one fp32 scale for each row."""

import torch
from torch import Tensor, nn

from speft_optim.kernels.dequantize import dequantize_int8
from speft_optim.kernels.launch import launches
from speft_optim.masks.mask import Mask
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.scales import TRAINED
from speft_optim.weights.sharded import device_of, whole


class Int8Weight(QuantizedWeight):
    """A weight of (out, in) int8 with one fp32 scale for each row.

    In its first forward, bitsandbytes moves the scales from the weight (`Int8Params`) to the layer's state. Of a weight
    that `fully_shard` replaced they are in the layer's state alone.
    """

    attribute = "SCB"

    def __init__(self, module: nn.Module):
        weight = module.weight
        super().__init__(module, _holder_of_scales(module))
        self._stored = weight
        self.shape, self.device = weight.shape, device_of(weight)

    @property
    def is_current(self) -> bool:
        """Whether the layer still has the weight that this reads, and its scales in the same place."""
        return self._stored is self.module.weight and self.holder is _holder_of_scales(self.module)

    @property
    def parts(self) -> list[Tensor]:
        """The quantised values and the scales."""
        return [self._stored, self.scales]

    @property
    def codes(self) -> Tensor:
        """The quantised weight, (out, in) int8; all processes ask for a sharded one."""
        return whole(self._stored)

    def settle(self) -> None:
        """Keep the scales with the weight, to move along with it, and with the layer, for `fully_shard`."""
        weight, state = self.module.weight, self.module.state
        # What replaces the weight in `fully_shard` has no place for them.
        if hasattr(weight, "SCB"):
            if self.holder is state:
                weight.SCB, self.holder = state.SCB, weight
            # This is their place before bitsandbytes' first forward, which moves them to the layer by itself.
            weight.CB, state.CB, state.SCB = weight.data, None, weight.SCB

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        self.settle()
        super()._carry(overlays)
        self.settle()

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """Dequantise by a kernel, with an overlay whose mask is in row form; None where no kernel runs."""
        positions = None if mask is None else mask.positions
        return dequantize_int8(self.codes, self.scales, dtype, positions, values) if launches(self._stored) else None

    def _row_scales(self) -> Tensor:
        return self.scales.float() * (1 / 127)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        # One kernel that multiplies in fp32 and stores in dtype; no fp32 copy of the weight exists on CUDA.
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        return torch.mul(self.codes, self._row_scales()[:, None], out=out)

    def _panel(self, first: int, last: int) -> Tensor:
        return self.codes[first:last] * self._row_scales()[first:last, None]

    def _at(self, indices: Tensor) -> Tensor:
        return self.codes.reshape(-1)[indices] * self._row_scales()[indices // self.shape[1]]


def _holder_of_scales(module: nn.Module) -> object:
    """Return what has the scales of an int8 weight: the weight, or else its layer's state."""
    weight = module.weight
    # A compiler cannot trace the tensor subclass of scales with trained entries.
    noted = torch.compiler.is_compiling() and getattr(weight, TRAINED, None) is not None
    return weight if noted or getattr(weight, "SCB", None) is not None else module.state
