"""The frozen weight behind one interface: a dense tensor, bitsandbytes int8 (LLM.int8 storage) or bitsandbytes 4-bit.

A dense weight holds its trained entries itself. Codes cannot, so a quantised weight carries a list of overlays, masks
with exact fp32 values, and *is* the dequantised codes with the overlays laid over; codes and scales are only read. The
overlays travel with the scales (see `weights/scales.py`), which every reader needs.

A read changes nothing. What bitsandbytes rearranged or left behind is put in order once, by `settle_storage`, where a
model first comes in, and by each forward of ours, since models move between devices in training too.

    int8    w = code * scale / 127, one fp32 scale a row
    4-bit   w = table[code] * scale, one scale for each run of `blocksize` flat positions, two codes in a byte; with
            double quantisation the scales are codes themselves

Each product is fp32 and rounded once to the dtype asked for, so that all ways to read an entry agree to the bit.
On a GPU one kernel of ours makes the whole weight, overlay and all. Elsewhere, and for rows of a length that it does
not take, bitsandbytes is imported for its kernel that dequantises a whole 4-bit weight; everything else is plain
PyTorch: the layout is small and stable, and no kernel reads single rows or positions.
"""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.dequantize import dequantize_4bit, dequantize_int8
from speft_optim.kernels.entries import scatter_entries_
from speft_optim.kernels.launch import launches
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask, find
from speft_optim.weights.scales import TRAINED, TrainedEntries, TrainedScales, trained_entries

_CHUNK = 2**22


# Under this name a layer that we compute knows its own name.
LAYER_NAME = "_name_in_model"


class QuantizedWeight:
    """The weight of a bitsandbytes linear layer: codes, scales, and overlays of exact values.

    Subclasses read the codes: `_launch` and `_dequantize` all, `_panel` of rows, `_at` flat positions. The scales are
    in `attribute` of `holder`, in bitsandbytes' own place.
    """

    # Of rows and entries, and of the gradient; what a product is formed in its input decides.
    dtype = torch.float32
    attribute: str

    def __init__(self, module: nn.Module, holder: object):
        self.module, self.holder = module, holder

    @property
    def overlays(self) -> list[tuple[Mask, Tensor]]:
        """(mask, values) pairs, later ones on top."""
        entries = trained_entries(self.holder, self.attribute)
        return [] if entries is None else entries.overlays

    @property
    def scales(self) -> Tensor:
        """The plain scales, on the device of the codes; a copy where they lie on another, see `place_scales`."""
        entries = trained_entries(self.holder, self.attribute)
        scales = getattr(self.holder, self.attribute) if entries is None else entries.scales
        return scales if scales.device == self.device else scales.to(self.device)

    def place_scales(self) -> None:
        """Move the scales to the codes for good: bitsandbytes leaves those of an int8 weight behind that moves."""
        entries = trained_entries(self.holder, self.attribute)
        before = getattr(self.holder, self.attribute) if entries is None else entries.scales
        if (scales := self.scales) is not before:
            kept = scales if entries is None else TrainedScales(TrainedEntries(scales, entries.overlays, entries.layer))
            setattr(self.holder, self.attribute, kept)

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        """Let the scales carry these overlays from now on, or be plain again without any."""
        held, entries = getattr(self.holder, self.attribute), trained_entries(self.holder, self.attribute)
        if entries is None:
            if overlays:
                name = self.module.__dict__.get(LAYER_NAME, "")
                setattr(self.holder, self.attribute, TrainedScales(TrainedEntries(held, overlays, name)))
        else:
            # In place, for copies of the scales on another device.
            entries.overlays[:] = overlays
            if not overlays:
                setattr(self.holder, self.attribute, entries.scales)
        trained_entries(self.holder, self.attribute)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in `dtype`, newly made."""
        overlays = [(mask.to(self.device), values.detach().to(self.device)) for mask, values in self.overlays]
        fused = bool(overlays) and isinstance(overlays[0][0].positions, CSR)
        weight = self._launch(dtype, *(overlays[0] if fused else (None, None)))
        if weight is None:
            weight, fused = self._dequantize(dtype), False
        for mask, values in overlays[fused:]:
            overlay_(weight, mask.positions, values)
        return weight

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in `dtype` as its codes give it, newly made."""
        return self._dequantize(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive) in fp32, newly made."""
        panel, columns = self._panel(first, last), self.shape[1]
        for mask, values in self.overlays:
            indices = mask.to(panel.device).indices
            bounds = torch.tensor([first * columns, last * columns], device=panel.device, dtype=indices.dtype)
            begin, end = torch.searchsorted(indices, bounds).tolist()
            inside = values.detach()[begin:end].to(panel.device)
            scatter_entries_(panel, indices[begin:end] - first * columns, inside)
        return panel

    def gather(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,), in fp32."""
        entries = self.gather_base(indices)
        for mask, values in self.overlays:
            place, inside = find(mask.to(indices.device).indices, indices)
            entries[inside] = values.detach().to(entries.device)[place[inside]]
        return entries

    def gather_base(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,) as the codes give them, in fp32."""
        return torch.cat([self._at(part.long()) for part in indices.split(_CHUNK)]) if len(indices) else self._none()

    def _none(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def attach(self, mask: Mask, values: Tensor) -> None:
        """From now on `values`, which may change in place, are the weight's entries at `mask`."""
        self._carry([*self.overlays, (mask, values)])

    def release(self, values: Tensor) -> None:
        """`values` will change no more and may be forgotten, the weight keeps what they are now."""
        mask, entries = self.entries()
        indices = mask.indices.to(self.device)
        moved = entries != self.gather_base(indices)
        # One overlay of all entries, so that re-selecting masks does not pile them up; none where nothing was trained.
        self._carry([(Mask(indices[moved], self.shape), entries[moved])] if bool(moved.any()) else [])

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """The attached values: codes have no say in them."""
        return values

    @torch.no_grad()
    def put(self, mask: Mask, values: Tensor) -> None:
        """Set entries for good, from outside: in the overlays that have them, in a new lowest one the rest."""
        indices, values = mask.indices.to(self.device), values.to(self.device, torch.float32)
        missing = torch.ones_like(indices, dtype=torch.bool)
        for own, held in self.overlays:
            place, inside = find(own.to(self.device).indices, indices)
            held[place[inside].to(held.device)] = values[inside].to(held.device)
            missing &= ~inside
        if bool(missing.any()):
            rest = (Mask(indices[missing], self.shape), values[missing])
            self._carry([rest, *self.overlays])

    def entries(self, mask: Mask | None = None) -> tuple[Mask, Tensor]:
        """What an adapter must hold for this weight: all entries that are not the codes'."""
        masks = [own for own, _ in self.overlays]
        if len(masks) != 1:
            parts = [own.indices.to(self.device) for own in masks]
            masks = [Mask(torch.cat(parts).unique() if parts else self._none().int(), self.shape)]
        return masks[0], self.gather(masks[0].indices.to(self.device))


class Int8Weight(QuantizedWeight):
    """Codes (out, in) int8 and one fp32 scale a row; bitsandbytes moves them from weight to state in first forward."""

    attribute = "SCB"

    def __init__(self, module: nn.Module):
        weight = module.weight
        super().__init__(module, weight if _has_scales(weight) else module.state)
        self.codes = weight.detach()
        self.shape, self.device = self.codes.shape, self.codes.device

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        # Back to where they are before bitsandbytes' first forward: with the weight, and so wherever that goes.
        weight, state = self.module.weight, self.module.state
        if self.holder is state:
            weight.SCB, self.holder = state.SCB, weight
        weight.CB, state.CB, state.SCB = weight.data, None, None
        super()._carry(overlays)

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """By a kernel, with `values` laid over at a packed `mask`; None where none runs."""
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


class FourBitWeight(QuantizedWeight):
    """Two codes in a byte, high half first, in flat row-major order; scales for runs of `blocksize` positions."""

    attribute = "absmax"

    def __init__(self, module: nn.Module):
        state, self._unpacked = _quantisation_state(module), None
        if _has_cpu_layout(state):
            state = copy.copy(state)
            self._unpacked = _unpack_cpu_layout_(module.weight.detach(), state)
        super().__init__(module, state)
        self.state = state
        self.shape, self.device = torch.Size(state.shape), module.weight.device

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        _settle_codes(self.module)
        self.state, self._unpacked = _quantisation_state(self.module), None
        self.holder = self.state
        super()._carry(overlays)
        if hasattr(self.module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            # The other layout for evaluation on some CPUs has no place for them.
            self.module.support_avx512bf16_for_cpu = not overlays and has_avx512bf16()

    @property
    def packed(self) -> Tensor:
        """The codes, two in a byte, in the shape in which bitsandbytes holds them."""
        return self.module.weight.detach() if self._unpacked is None else self._unpacked

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """By a kernel, with `values` laid over at a packed `mask`; None where none runs."""
        state, codes = self.state, self._bytes()
        if self.shape[1] % state.blocksize or not launches(codes):
            return None
        second = None
        if state.nested:
            twice = state.state2
            second = twice.code, twice.absmax, twice.blocksize, state.offset
        scales = codes, state.code, self.scales, state.blocksize, second
        return dequantize_4bit(*scales, self.shape, dtype, None if mask is None else mask.positions, values)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        count, size = self.shape.numel(), self.state.blocksize
        if count % size:
            return self._run(0, count).view(self.shape).to(dtype)
        from bitsandbytes.functional import dequantize_4bit as by_bitsandbytes

        # As if each block were a row: the CPU kernel is wrong where a row is no whole number of blocks.
        state = copy.copy(self.state)
        state.absmax, state.shape, state.dtype = self.scales, torch.Size((count // size, size)), dtype
        return by_bitsandbytes(self.packed, state).view(self.shape)

    def _panel(self, first: int, last: int) -> Tensor:
        return self._run(first * self.shape[1], last * self.shape[1]).view(last - first, self.shape[1])

    def _run(self, first: int, last: int) -> Tensor:
        """Entries at the consecutive flat positions `first` to `last` (exclusive)."""
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
        """Scales of the given blocks, (k,) fp32; the scales' own codes resolved under double quantisation."""
        scales, second = self.scales[blocks], getattr(self.state, "state2", None)
        if not self.state.nested:
            return scales.float()
        return second.code[scales.int()] * second.absmax[blocks // second.blocksize] + self.state.offset


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether the module is a bitsandbytes linear layer whose weight is stored as codes."""
    kind = layer_kind(type(module))
    if kind == "Linear8bitLt":
        return not module.state.has_fp16_weights and module.weight.dtype == torch.int8
    return kind == "Linear4bit" and _quantisation_state(module) is not None


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model's bitsandbytes linear layers."""
    return ((name, module) for name, module in model.named_modules() if is_quantized_linear(module))


@functools.cache
def layer_kind(cls: type) -> str | None:
    """Which layer of bitsandbytes a class is or derives from, if any."""
    # By name, so that the question does not import bitsandbytes; remembered, since every forward asks it.
    names = {parent.__name__ for parent in cls.__mro__ if parent.__module__.startswith("bitsandbytes")}
    return next((kind for kind in ("Linear8bitLt", "Linear4bit") if kind in names), None)


def _quantisation_state(module: nn.Module):
    """Scales, table and shape of a 4-bit layer; on the module alone where a copy or wrapper lost the weight's."""
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else module.quant_state


def _has_scales(weight: Tensor) -> bool:
    """Whether an int8 weight has its scales with it, and not its layer's state."""
    # A compiler cannot look at scales that carry entries.
    noted = torch.compiler.is_compiling() and getattr(weight, TRAINED, None) is not None
    return noted or getattr(weight, "SCB", None) is not None


def settle_storage(model: nn.Module) -> None:
    """Put the quantised weights of a model in the order in which they are read at no cost; call it where one comes in.

    4-bit weights leave the layout that bitsandbytes gives them in evaluation on CPUs with AVX512-BF16, and the scales
    of int8 weights follow their codes to the device that these were moved to.
    """
    for _, module in quantized_linears(model):
        if layer_kind(type(module)) == "Linear8bitLt":
            Int8Weight(module).place_scales()
        else:
            _settle_codes(module)


def _has_cpu_layout(state: object) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _settle_codes(module: nn.Module) -> None:
    state = _quantisation_state(module)
    if _has_cpu_layout(state):
        module.weight.data = _unpack_cpu_layout_(module.weight.data, state)


def _unpack_cpu_layout_(packed: Tensor, state: object) -> Tensor:
    """Undo the other layout in `state`, in place, and in the bytes of `packed`, newly made."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed, _ = _convert_weight_packed_for_cpu_inverse(packed, state)
    # bitsandbytes leaves scales that are not quantised themselves turned around, and all in the weight's dtype.
    if state.nested:
        state.offset, state.state2.dtype = state.offset.float(), torch.float32
    else:
        state.absmax = state.absmax.t().reshape(-1).float()
    return packed
