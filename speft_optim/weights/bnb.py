"""The linear layers of bitsandbytes whose weights are quantised: how they are found, and the weight of each.

A read of such a weight changes nothing. If bitsandbytes rearranges storage or leaves scales on another device,
`settle_storage` corrects this once, when a model is first used. Our forward places the scales again, since models also
move during training.

`fully_shard` replaces a weight by a plain DTensor, without the scales that bitsandbytes keeps as attributes of the
parameter. Those of a 4-bit weight are with its layer too; those of an int8 weight are after `settle_storage`.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from speft_optim.weights.four_bit import FourBitWeight, has_cpu_layout, quantisation_state, undo_cpu_layout, was_cast
from speft_optim.weights.int8 import Int8Weight
from speft_optim.weights.packed_rows import gather_as_bytes
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.sharded import is_sharded


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether the module is a bitsandbytes linear layer whose weight is quantised by now."""
    kind = _layer_kind(type(module))
    if kind == "Linear8bitLt":
        return not module.state.has_fp16_weights and module.weight.dtype == torch.int8
    return kind == "Linear4bit" and quantisation_state(module) is not None


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return names and modules of a model's bitsandbytes linear layers with quantised weights."""
    return ((name, module) for name, module in model.named_modules() if is_quantized_linear(module))


def quantized_weight(module: nn.Module) -> QuantizedWeight:
    """Return the weight of a layer of which `is_quantized_linear` is true; nothing is copied."""
    return Int8Weight(module) if _layer_kind(type(module)) == "Linear8bitLt" else FourBitWeight(module)


def needs_our_forward(module: nn.Module) -> bool:
    """Return whether bitsandbytes' own forward cannot compute the layer: it wants the parameter of an int8 weight."""
    return _layer_kind(type(module)) == "Linear8bitLt" and not hasattr(module.weight, Int8Weight.attribute)


@functools.cache
def _layer_kind(cls: type) -> str | None:
    """Return the linear layer of bitsandbytes that a class is or derives from, "Linear8bitLt", "Linear4bit" or None."""
    # The class is known by name, so that bitsandbytes is not imported; the cache is there since every forward asks.
    names = {parent.__name__ for parent in cls.__mro__ if parent.__module__.startswith("bitsandbytes")}
    return next((kind for kind in ("Linear8bitLt", "Linear4bit") if kind in names), None)


def settle_storage(model: nn.Module) -> None:
    """Bring the storage of a model's quantised weights into the form that is read; call it when a model comes in.

    It undoes the layout that bitsandbytes gives 4-bit weights for evaluation on CPUs with AVX512-BF16, and moves the
    scales of int8 weights to the device that the weights were moved to. Layers keep their scales for `fully_shard`,
    and where that was called, 4-bit weights are gathered as bytes.

    Raises:
        ValueError: see `settle_gathers`.
    """
    for _, module in quantized_linears(model):
        # What cannot be mended is refused by those who ask for `lost_by_sharding`.
        if is_sharded(module.weight) and lost_by_sharding(module):
            continue
        if _layer_kind(type(module)) == "Linear8bitLt":
            weight = Int8Weight(module)
            weight.place_scales()
            weight.settle()
        else:
            undo_cpu_layout(module)
            # They differ in a model that was copied.
            module.quant_state = quantisation_state(module)
    settle_gathers(model.modules())


def settle_gathers(modules: Iterable[nn.Module]) -> None:
    """Let FSDP gather the 4-bit weights of modules as bytes, where `fully_shard` was applied to them.

    Raises:
        ValueError: its `reshard_after_forward` is a number.
    """
    gather_as_bytes(modules, is_quantized_linear)


def lost_by_sharding(module: nn.Module) -> str | None:
    """Return what a layer of bitsandbytes lacks after `fully_shard` replaced its weight, and what to do; else None."""
    kind = _layer_kind(type(module))
    if kind == "Linear8bitLt" and module.weight.dtype == torch.int8 and module.state.SCB is None:
        return (
            "an int8 weight that lost its scales in fully_shard; call sparsify first, and fully_shard after it, or "
            "load the base with load_in_4bit=True and bnb_4bit_quant_storage"
        )
    if kind == "Linear4bit" and quantisation_state(module) is None:
        return "a 4-bit weight without its quantisation state; quantise the base before fully_shard"
    if kind == "Linear4bit" and was_cast(module):
        return f"a 4-bit weight that was cast to {module.weight.dtype}, which destroyed it; load the base anew"
    if kind == "Linear4bit" and has_cpu_layout(module):
        return "a 4-bit weight that bitsandbytes rearranged for evaluation on a CPU; call sparsify before evaluation"
    return None
