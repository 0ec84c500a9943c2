"""Scales of a quantised weight that carry its trained entries, so that all code that dequantises the weight gets them.

A quantised weight has no place for trained entries, but nothing can dequantise it without its scales. So the scales of
a bitsandbytes layer with trained entries (`quant_state.absmax`, `SCB`) are a tensor subclass, `TrainedScales`. With it,
bitsandbytes' functions that dequantise a weight or multiply with a 4-bit one give the result of the trained weight.
Moves and copies keep the entries, comparisons and shapes are those of the plain scales, and every other use raises an
error, since it would lose the entries.

Wrapping every place in transformers, peft and bitsandbytes that reads such a layer was rejected: there are some fifty,
and the next release will have others.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask

# The attribute of a `QuantState` or an `Int8Params` that has the entries for our own layers, and for a compiler, which
# cannot trace the tensor subclass.
TRAINED = "trained_entries"


class TrainedEntries:
    """The scales and the trained entries of a quantised weight.

    Attributes:
        scales: the plain scales.
        overlays: (mask, values (k,) fp32) pairs, a later one over earlier ones; the list is changed in place.
        layer: the layer's name, for messages.
    """

    def __init__(self, scales: Tensor, overlays: list[tuple[Mask, Tensor]], layer: str):
        self.scales, self.overlays, self.layer = scales, overlays, layer

    def overlay_(self, weight: Tensor) -> Tensor:
        """Write the entries into the dequantised `weight`, in place, and return it.

        Raises:
            RuntimeError: only a part of the weight was dequantised.
        """
        for mask, values in self.overlays:
            if weight.shape != mask.shape:
                raise self.lost(f"a part of shape {tuple(weight.shape)} being dequantised")
            overlay_(weight, mask.to(weight.device).positions, values.detach().to(weight.device))
        return weight

    def on(self, scales: Tensor) -> "TrainedScales":
        """Return another copy of the scales with the same entries.

        Raises:
            RuntimeError: the copy is on the meta device.
        """
        if scales.is_meta and self.overlays:
            raise self.lost("a move to the meta device, as for offloading or accelerate's cpu_ram_efficient_loading,")
        return TrainedScales(TrainedEntries(scales, self.overlays, self.layer))

    def lost(self, use: str) -> RuntimeError:
        """Return the error for a use of the scales that would lose the entries."""
        return RuntimeError(
            f"The quantised weight of {self.layer or 'a layer'} has trained entries beside it, which {use} would lose. "
            "Write the merged model with export_merged(model, folder) and use that, or remove the entries "
            "(unload_adapter, or load the base anew)."
        )


class TrainedScales(Tensor):
    """Scales of a quantised weight that carry its trained entries; see the module's docstring."""

    entries: TrainedEntries

    @staticmethod
    def __new__(cls, entries: TrainedEntries):  # noqa: D102
        scales = torch.Tensor._make_subclass(cls, entries.scales)
        scales.entries = entries
        return scales

    def __deepcopy__(self, memo: dict) -> "TrainedScales":
        if id(self) not in memo:
            memo[id(self)] = TrainedScales(copy.deepcopy(self.entries, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        return TrainedScales, (self.entries,)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None):
        return _answer(func, args, kwargs or {})

    # Where the class of another argument handles the call, as bitsandbytes' `Params4bit`, only this sees the scales.
    @classmethod
    def __torch_dispatch__(cls, func: Callable, types, args=(), kwargs=None):
        return _answer(func, args, kwargs or {})


def _answer(func: Callable, args: tuple, kwargs: dict):
    """Return the result of `func` for the trained weight whose scales are among its arguments, or refuse the call."""
    entries = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TrainedScales)).entries
    name, plain_args, plain_kwargs = _name_of(func), *tree_map(plain_scales, (args, kwargs))
    if not entries.overlays:
        return func(*plain_args, **plain_kwargs)
    if name in _DEQUANTISERS:
        return _DEQUANTISERS[name](entries, func, plain_args, plain_kwargs)
    if name in _KEEPING or name in _ADDING and _adds_a_number(args):
        return entries.on(func(*plain_args, **plain_kwargs))
    if name in _DESCRIBING or name == "copy_" and isinstance(args[0], TrainedScales):
        return func(*plain_args, **plain_kwargs)
    if name.endswith(".__get__") and not isinstance(found := func(*plain_args, **plain_kwargs), Tensor):
        return found
    raise entries.lost(f"{name} on its scales")


def plain_scales(scales):
    """Return scales without their trained entries; any other object is returned as it is."""
    return scales.entries.scales if isinstance(scales, TrainedScales) else scales


def trained_entries(holder: object, attribute: str) -> TrainedEntries | None:
    """Return the trained entries of the scales in an attribute of a `QuantState` or `Int8Params`, or None."""
    # A compiled graph reads the attribute set here, and is recompiled when it changes.
    if not torch.compiler.is_compiling():
        scales, noted = getattr(holder, attribute), holder.__dict__.get(TRAINED)
        entries = scales.entries if isinstance(scales, TrainedScales) else None
        if entries is None:
            holder.__dict__.pop(TRAINED, None)
        elif entries is not noted:
            holder.__dict__[TRAINED] = entries
    return getattr(holder, TRAINED, None)


def _name_of(func: Callable) -> str:
    """Return the name of a function, such as `to` (also of `aten.to.device`), `bitsandbytes.gemm_4bit.default`.

    A property is called as in `shape.__get__`.
    """
    if isinstance(func, torch._ops.OpOverload):
        return func._opname if func.namespace == "aten" else str(func)
    name = getattr(func, "__name__", str(func))
    return f"{func.__self__.__name__}.{name}" if name in ("__get__", "__set__") else name


def _adds_a_number(args: tuple) -> bool:
    """Return whether a sum adds one number to the scales, as double quantisation does with its offset."""
    return isinstance(args[0], TrainedScales) and (not isinstance(args[1], Tensor) or args[1].numel() == 1)


def _dequantised(entries: TrainedEntries, op: Callable, args: tuple, kwargs: dict) -> Tensor:
    return entries.overlay_(op(*args, **kwargs))


def _scales_dequantised(entries: TrainedEntries, op: Callable, args: tuple, kwargs: dict) -> Tensor:
    return entries.on(op(*args, **kwargs))


def _product_4bit(entries: TrainedEntries, op: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Return `x @ W.T + bias` with the dequantised and overlaid W, in place of bitsandbytes' fused 4-bit product."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    scales = given["absmax"]
    if (codes := given.get("absmax_8bit")) is not None:
        dequantise = torch.ops.bitsandbytes.dequantize_blockwise.default
        # bitsandbytes' fused product takes only scales that are themselves quantised in blocks of 256.
        scales = dequantise(codes, scales, given["absmax_code"], 256, torch.float32) + given["absmax_offset"]
    x, packed, shape, _, blocksize, kind = args[:6]
    dense = torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, blocksize, kind, shape, x.dtype)
    return nn.functional.linear(x, entries.overlay_(dense), given.get("bias"))


_DEQUANTISERS = {
    "bitsandbytes.dequantize_4bit.default": _dequantised,
    "bitsandbytes.dequantize_4bit.out": _dequantised,
    "bitsandbytes.int8_vectorwise_dequant.default": _dequantised,
    "bitsandbytes.dequantize_blockwise.default": _scales_dequantised,
    "bitsandbytes.gemm_4bit.default": _product_4bit,
}


# These functions copy or move the scales.
_KEEPING = {
    *("to", "_to_copy", "cpu", "cuda", "xpu", "detach", "clone", "contiguous", "float", "pin_memory", "data.__get__"),
}


_ADDING = {"add", "add_", "__add__", "__iadd__"}


# Functions that describe or compare the scales without returning them. Properties that are no tensors are allowed too.
_DESCRIBING = {
    *("__len__", "__repr__", "__format__", "__eq__", "__ne__", "eq", "ne", "equal", "allclose", "isclose"),
    *("dim", "size", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point", "get_device"),
    *("is_pinned", "is_shared", "storage_offset", "is_complex", "is_inference", "is_signed", "ndimension"),
}
