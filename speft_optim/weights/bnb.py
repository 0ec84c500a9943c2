"""The frozen weight of a bitsandbytes layer, int8 (LLM.int8 storage) or 4-bit, and its overlays of trained entries.

A dense weight holds its trained entries itself. Quantised storage cannot, so a quantised weight has a list of overlays,
each a mask with exact fp32 values. The model computes with the dequantised weight on which the overlays are written;
the quantised values and the scales are only read. The overlays are attached to the scales (see `weights/scales.py`),
which everything that dequantises needs.

A read changes nothing. Where bitsandbytes rearranges storage or leaves scales on another device, `settle_storage` mends
that once, when a model first comes in. Our forward places the scales again, since models also move during training.

    int8    w = code * scale / 127, one fp32 scale for each row
    4-bit   w = table[code] * scale, one scale for each run of `blocksize` flat positions, two codes in a byte; with
            double quantisation the scales are quantised to codes themselves

Each product is formed in fp32 and rounded once to the dtype asked for, so that all ways to read an entry agree to the
bit. On a GPU one kernel of ours makes the whole weight with an overlay. Elsewhere, and where it does not support the
length of the rows, bitsandbytes' kernel dequantises a whole 4-bit weight. Everything else is plain PyTorch: the layout
is small and stable, and bitsandbytes has no kernel that reads single rows or positions.
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


# The attribute in which a layer with our forward has its own name, for messages.
LAYER_NAME = "_name_in_model"


class QuantizedWeight:
    """The weight of a bitsandbytes linear layer: quantised values, scales, and overlays of exact values.

    Subclasses dequantise: `_launch` and `_dequantize` the whole weight, `_panel` rows, `_at` flat positions. The scales
    are where bitsandbytes has them, in `attribute` of `holder`.

    Args:
        module: the layer.
        holder: the object of bitsandbytes that has the scales.
    """

    # The dtype of rows, entries and the gradient; that of a product is decided by its input.
    dtype = torch.float32
    attribute: str

    def __init__(self, module: nn.Module, holder: object):
        self.module, self.holder = module, holder

    @property
    def overlays(self) -> list[tuple[Mask, Tensor]]:
        """The overlays as (mask, values (k,) fp32) pairs; a later one is written over earlier ones."""
        entries = trained_entries(self.holder, self.attribute)
        return [] if entries is None else entries.overlays

    @property
    def scales(self) -> Tensor:
        """The plain scales on the weight's device; a copy where they are on another one, see `place_scales`."""
        entries = trained_entries(self.holder, self.attribute)
        scales = getattr(self.holder, self.attribute) if entries is None else entries.scales
        return scales if scales.device == self.device else scales.to(self.device)

    def place_scales(self) -> None:
        """Move the scales to the weight's device: bitsandbytes leaves them behind when an int8 weight moves."""
        entries = trained_entries(self.holder, self.attribute)
        before = getattr(self.holder, self.attribute) if entries is None else entries.scales
        if (scales := self.scales) is not before:
            kept = scales if entries is None else TrainedScales(TrainedEntries(scales, entries.overlays, entries.layer))
            setattr(self.holder, self.attribute, kept)

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        """Attach these overlays to the scales in place of the present ones; without any, the scales are plain again."""
        held, entries = getattr(self.holder, self.attribute), trained_entries(self.holder, self.attribute)
        if entries is None:
            if overlays:
                name = self.module.__dict__.get(LAYER_NAME, "")
                setattr(self.holder, self.attribute, TrainedScales(TrainedEntries(held, overlays, name)))
        else:
            # The list is changed in place, since copies of the scales on another device share it.
            entries.overlays[:] = overlays
            if not overlays:
                setattr(self.holder, self.attribute, entries.scales)
        trained_entries(self.holder, self.attribute)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight with its overlays, (out, in) in `dtype`, newly made."""
        overlays = [(mask.to(self.device), values.detach().to(self.device)) for mask, values in self.overlays]
        fused = bool(overlays) and isinstance(overlays[0][0].positions, CSR)
        weight = self._launch(dtype, *(overlays[0] if fused else (None, None)))
        if weight is None:
            weight, fused = self._dequantize(dtype), False
        for mask, values in overlays[fused:]:
            overlay_(weight, mask.positions, values)
        return weight

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight without its overlays, (out, in) in `dtype`, newly made."""
        return self._dequantize(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) with their overlays, in fp32, newly made."""
        panel, columns = self._panel(first, last), self.shape[1]
        for mask, values in self.overlays:
            indices = mask.to(panel.device).indices
            bounds = torch.tensor([first * columns, last * columns], device=panel.device, dtype=indices.dtype)
            begin, end = torch.searchsorted(indices, bounds).tolist()
            inside = values.detach()[begin:end].to(panel.device)
            scatter_entries_(panel, indices[begin:end] - first * columns, inside)
        return panel

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) with the overlays, (k,) fp32."""
        entries = self.gather_base(indices)
        for mask, values in self.overlays:
            place, inside = find(mask.to(indices.device).indices, indices)
            entries[inside] = values.detach().to(entries.device)[place[inside]]
        return entries

    def gather_base(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) without the overlays, (k,) fp32."""
        return torch.cat([self._at(part.long()) for part in indices.split(_CHUNK)]) if len(indices) else self._none()

    def _none(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def attach(self, mask: Mask, values: Tensor) -> None:
        """Overlay the weight at `mask` with `values` (k,) fp32, which may change in place from now on."""
        self._carry([*self.overlays, (mask, values)])

    def release(self, values: Tensor) -> None:
        """Detach `values`, which need not be kept any longer; the entries keep their present values in an overlay."""
        mask, entries = self.entries()
        indices = mask.indices.to(self.device)
        moved = entries != self.gather_base(indices)
        # All entries go into one overlay, so that selecting masks again does not pile overlays up; unchanged ones go.
        self._carry([(Mask(indices[moved], self.shape), entries[moved])] if bool(moved.any()) else [])

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return the attached values: quantised storage, unlike a dense weight, cannot have changed them."""
        return values

    @torch.no_grad()
    def put(self, mask: Mask, values: Tensor) -> None:
        """Set the entries at `mask` to `values` (k,): in the overlays that have them, the rest in a new lowest one."""
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
        """Return what an adapter must hold for this weight: the mask of all overlaid entries, and their values, fp32.

        `mask` is not used: it is for dense weights, which have no overlays.
        """
        masks = [own for own, _ in self.overlays]
        if len(masks) != 1:
            parts = [own.indices.to(self.device) for own in masks]
            masks = [Mask(torch.cat(parts).unique() if parts else self._none().int(), self.shape)]
        return masks[0], self.gather(masks[0].indices.to(self.device))


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


class FourBitWeight(QuantizedWeight):
    """A weight of two codes in a byte, high half first, in flat order, with a scale for each run of `blocksize`."""

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
        _undo_cpu_layout(self.module)
        self.state, self._unpacked = _quantisation_state(self.module), None
        self.holder = self.state
        super()._carry(overlays)
        if hasattr(self.module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            # Turn off the other layout, for evaluation on some CPUs, which has no place for the overlays.
            self.module.support_avx512bf16_for_cpu = not overlays and has_avx512bf16()

    @property
    def packed(self) -> Tensor:
        """The quantised weight, two codes in a byte, in bitsandbytes' shape."""
        return self.module.weight.detach() if self._unpacked is None else self._unpacked

    def _launch(self, dtype: torch.dtype, mask: Mask | None, values: Tensor | None) -> Tensor | None:
        """Dequantise by a kernel, with an overlay whose mask is in row form; None where no kernel runs."""
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

        # Each block is passed as a row: the CPU kernel is wrong for rows that are not a whole number of blocks.
        state = copy.copy(self.state)
        state.absmax, state.shape, state.dtype = self.scales, torch.Size((count // size, size)), dtype
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


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether the module is a bitsandbytes linear layer whose weight is quantised by now."""
    kind = layer_kind(type(module))
    if kind == "Linear8bitLt":
        return not module.state.has_fp16_weights and module.weight.dtype == torch.int8
    return kind == "Linear4bit" and _quantisation_state(module) is not None


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return names and modules of a model's bitsandbytes linear layers with quantised weights."""
    return ((name, module) for name, module in model.named_modules() if is_quantized_linear(module))


@functools.cache
def layer_kind(cls: type) -> str | None:
    """Return the linear layer of bitsandbytes that a class is or derives from, "Linear8bitLt", "Linear4bit" or None."""
    # The class is known by name, so that bitsandbytes is not imported; the cache is there since every forward asks.
    names = {parent.__name__ for parent in cls.__mro__ if parent.__module__.startswith("bitsandbytes")}
    return next((kind for kind in ("Linear8bitLt", "Linear4bit") if kind in names), None)


def _quantisation_state(module: nn.Module):
    """Return the `QuantState` of a 4-bit weight, from its layer where a copy or wrapper of the weight lost it."""
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else module.quant_state


def _has_scales(weight: Tensor) -> bool:
    """Return whether the scales of an int8 weight are with the weight, and not with its layer's state."""
    # A compiler cannot trace the tensor subclass of scales with trained entries.
    noted = torch.compiler.is_compiling() and getattr(weight, TRAINED, None) is not None
    return noted or getattr(weight, "SCB", None) is not None


def settle_storage(model: nn.Module) -> None:
    """Bring the storage of a model's quantised weights into the form that is read; call it when a model comes in.

    It undoes the layout that bitsandbytes gives 4-bit weights for evaluation on CPUs with AVX512-BF16, and moves the
    scales of int8 weights to the device that the weights were moved to.
    """
    for _, module in quantized_linears(model):
        if layer_kind(type(module)) == "Linear8bitLt":
            Int8Weight(module).place_scales()
        else:
            _undo_cpu_layout(module)


def _has_cpu_layout(state: object) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _undo_cpu_layout(module: nn.Module) -> None:
    state = _quantisation_state(module)
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
