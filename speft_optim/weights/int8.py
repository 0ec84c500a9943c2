"""The weight of a bitsandbytes int8 layer (LLM.int8 storage): `w = code * scale / 127`, one fp32 scale for each row."""

import torch
from torch import Tensor, nn

from speft_optim.kernels.dequantize import dequantize_int8
from speft_optim.kernels.launch import launches
from speft_optim.masks.mask import Mask
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.scales import TRAINED


class Int8Weight(QuantizedWeight):
    """A weight of (out, in) int8 with one fp32 scale for each row.

    In its first forward, bitsandbytes moves the scales from the weight (`Int8Params`) to the layer's state.
    """

    attribute = "SCB"

    def __init__(self, module: nn.Module):
        weight = module.weight
        super().__init__(module, weight if _has_scales(weight) else module.state)
        self.codes = weight.detach()
        self.shape, self.device = self.codes.shape, self.codes.device

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        # Move the scales back to the weight, where they are before bitsandbytes' first forward, to move along with it.
        weight, state = self.module.weight, self.module.state
        if self.holder is state:
            weight.SCB, self.holder = state.SCB, weight
        weight.CB, state.CB, state.SCB = weight.data, None, None
        super()._carry(overlays)

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """Dequantise by a kernel, with an overlay whose mask is in row form; None where no kernel runs."""
        positions = None if mask is None else mask.positions
        return dequantize_int8(self.codes, self.scales, dtype, positions, values) if launches(self.codes) else None

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


def _has_scales(weight: Tensor) -> bool:
    """Return whether the scales of an int8 weight are with the weight, and not with its layer's state."""
    # A compiler cannot trace the tensor subclass of scales with trained entries.
    noted = torch.compiler.is_compiling() and getattr(weight, TRAINED, None) is not None
    return noted or getattr(weight, "SCB", None) is not None
