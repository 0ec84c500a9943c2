"""The weight of a bitsandbytes 4-bit layer: `w = table[code] * scale`, two codes in a byte.

Each run of `blocksize` flat positions has a scale. With double quantisation the scales are quantised themselves.
"""

import copy

import torch
from torch import Tensor, nn

from speft_optim.kernels.dequantize import dequantize_4bit
from speft_optim.kernels.launch import launches
from speft_optim.masks.mask import Mask
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.sharded import device_of, whole


class FourBitWeight(QuantizedWeight):
    """A weight of two codes in a byte, high half first, in flat order, with a scale for each run of `blocksize`.

    Attributes:
        state: its `QuantState`, which bitsandbytes keeps with the weight, and with the layer when that is sharded.
    """

    attribute = "absmax"

    def __init__(self, module: nn.Module):
        state, self._stored = quantisation_state(module), module.weight
        if _has_cpu_layout(state):
            state = copy.copy(state)
            self._stored = _unpack_cpu_layout_(self._stored.detach(), state)
        super().__init__(module, state)
        self.state = state
        self.shape, self.device = torch.Size(state.shape), device_of(module.weight)

    @property
    def is_current(self) -> bool:
        """Whether the layer still has the weight and the state that this reads."""
        weight = self.module.weight
        return self._stored is weight and self.state is _state_of(weight, self.module)

    @property
    def parts(self) -> list[Tensor]:
        """The quantised values, the scales and, under double quantisation, the scales' own scales."""
        return [self._stored, self.scales, *([self.state.state2.absmax] if self.state.nested else [])]

    @property
    def packed(self) -> Tensor:
        """The quantised weight, two codes in a byte, in bitsandbytes' shape; all processes ask for a sharded one."""
        return whole(self._stored)

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        undo_cpu_layout(self.module)
        self.state, self._stored = quantisation_state(self.module), self.module.weight
        self.holder = self.state
        super()._carry(overlays)
        if hasattr(self.module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            # Turn off the other layout, for evaluation on some CPUs, which has no place for the overlays.
            self.module.support_avx512bf16_for_cpu = not overlays and has_avx512bf16()

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """Dequantise by a kernel, with an overlay whose mask is in row form; None where no kernel runs."""
        state = self.state
        if self.shape[1] % state.blocksize or not launches(self._stored):
            return None
        second = None
        if state.nested:
            twice = state.state2
            second = twice.code, twice.absmax, twice.blocksize, state.offset
        scales = self._bytes(), state.code, self.scales, state.blocksize, second
        return dequantize_4bit(*scales, self.shape, dtype, None if mask is None else mask.positions, values)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        count, size = self.shape.numel(), self.state.blocksize
        if count % size:
            return self._run(0, count).view(self.shape).to(dtype)
        from bitsandbytes.functional import QuantState
        from bitsandbytes.functional import dequantize_4bit as by_bitsandbytes

        # Each block is passed as a row: the CPU kernel is wrong for rows that are not a whole number of blocks.
        rows, state = torch.Size((count // size, size)), self.state
        second = dict(offset=state.offset, state2=state.state2) if state.nested else {}
        state = QuantState(self.scales, rows, state.code, size, state.quant_type, dtype, **second)
        return by_bitsandbytes(self.packed, state).view(self.shape)

    def _panel(self, first: int, last: int) -> Tensor:
        return self._run(first * self.shape[1], last * self.shape[1]).view(last - first, self.shape[1])

    def _run(self, first: int, last: int) -> Tensor:
        """Return the entries at flat positions `first` to `last` (exclusive), fp32."""
        size, table = self.state.blocksize, self.state.code.to(self.device, torch.float32)
        start = first // size * size
        codes = self._bytes()[start // 2 : (last + 1) // 2].int()
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
        run = pairs[codes].view(-1)[: last - start]
        scales, whole = self._scales(torch.arange(start // size, -(-last // size), device=self.device)), run.numel()
        whole -= whole % size
        run[:whole].view(-1, size).mul_(scales[: whole // size, None])
        if whole < run.numel():
            run[whole:].mul_(scales[-1])
        return run[first - start :]

    def _at(self, indices: Tensor) -> Tensor:
        byte = self._bytes()[indices // 2]
        code = torch.where(indices % 2 == 0, byte >> 4, byte & 15)
        table = self.state.code.to(self.device, torch.float32)
        return table[code.int()] * self._scales(indices // self.state.blocksize)

    def _bytes(self) -> Tensor:
        # bitsandbytes can store the bytes under another dtype (`bnb_4bit_quant_storage`).
        return self.packed.reshape(-1).view(torch.uint8)

    def _scales(self, blocks: Tensor) -> Tensor:
        """Return the scales of blocks (k,), (k,) fp32, dequantised under double quantisation."""
        scales, second = self.scales[blocks], getattr(self.state, "state2", None)
        if not self.state.nested:
            return scales.float()
        return second.code[scales.int()] * second.absmax[blocks // second.blocksize] + self.state.offset


def quantisation_state(module: nn.Module):
    """Return the `QuantState` of a 4-bit weight, from its layer where a copy or wrapper of the weight lost it."""
    return _state_of(module.weight, module)


def _state_of(weight: Tensor, module: nn.Module):
    state = getattr(weight, "quant_state", None)
    return state if state is not None else module.quant_state


def _has_cpu_layout(state: object) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def has_cpu_layout(module: nn.Module) -> bool:
    """Return whether a 4-bit weight has the layout that bitsandbytes gives it for evaluation on some CPUs."""
    return _has_cpu_layout(quantisation_state(module))


def was_cast(module: nn.Module) -> bool:
    """Return whether a 4-bit weight has another number of bytes than its entries need, as after a cast."""
    weight, entries = module.weight, torch.Size(quantisation_state(module).shape).numel()
    return round(2 * weight.numel() * weight.itemsize / max(1, entries)) != 1


def undo_cpu_layout(module: nn.Module) -> None:
    """Undo the layout that bitsandbytes gives a 4-bit weight for evaluation on some CPUs, if it has it."""
    state = quantisation_state(module)
    if _has_cpu_layout(state):
        module.weight.data = _unpack_cpu_layout_(module.weight.data, state)


def _unpack_cpu_layout_(packed: Tensor, state: object) -> Tensor:
    """Undo bitsandbytes' layout for CPUs: in `state` in place, and of the bytes `packed` in a new tensor."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed, _ = _convert_weight_packed_for_cpu_inverse(packed, state)
    # bitsandbytes leaves all scales in the weight's dtype, and those that are not quantised themselves transposed.
    if state.nested:
        state.offset, state.state2.dtype = state.offset.float(), torch.float32
    else:
        state.absmax = state.absmax.t().reshape(-1).float()
    return packed
