"""Saves the trained entries of a quantised layer with its state dict, and loads them back.

A quantised weight has no place for trained entries, so `state_dict()` has them beside it, as `<layer>.trained_indices`
and `<layer>.trained_values`. The weight is then sealed: its shape gets a leading 1, the scales of an int8 weight get
another name, and a sentence is appended to the dtype noted in a packed 4-bit quantisation state. A model that does not
know of trained entries thus refuses the weight, instead of loading it without them. A sparsified model undoes the seal
and takes the saved entries to be all that were trained. It also loads states that were saved without a seal.

Of a weight that `fully_shard` divided, the state dict has the process's rows, as a DTensor, and all else whole.
bitsandbytes looks for scales on the parameter, which that is no longer, so they are saved and loaded here.

Loading also accepts a floating `<layer>.weight`, as in a merged checkpoint: the layer reads the values of its trained
entries from it, and the quantised weight stays.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_optim.kernels.entries import gather_entries
from speft_optim.masks.mask import Mask
from speft_optim.weights.four_bit import quantisation_state
from speft_optim.weights.int8 import Int8Weight
from speft_optim.weights.quantized_weight import QuantizedWeight
from speft_optim.weights.scales import plain_scales
from speft_optim.weights.sharded import is_sharded
from speft_optim.weights.storage import as_stored, frozen_weight

# Keys of state dicts that are no attributes of the layer; torch.distributed.checkpoint needs an attribute for each key.
STATE_KEYS = ("trained_indices", "trained_values", "SCB", "sealed_SCB", "weight_format")

# bitsandbytes looks up the noted dtype in torch by name, and the error of a failed look-up shows this sentence.
_SEAL = (
    " of a quantised weight with trained entries, which only a model that sparsify was called on can load. Write the "
    "merged model with export_merged(model, folder)"
)


def save_entries(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """State dict post-hook: add the layer's trained entries, and seal its quantised weight if it has any."""
    if is_sharded(module._parameters["weight"]):
        _add_quantisation(module, state, f"{prefix}weight.")
    for key, part in state.items():
        state[key] = plain_scales(part)
    mask, values = frozen_weight(module).entries()
    if len(mask):
        state[f"{prefix}trained_indices"], state[f"{prefix}trained_values"] = mask.indices, values
        _seal(state, prefix)


def _quantisation(module: nn.Module) -> dict[str, Tensor]:
    """Return the parts of a 4-bit layer's quantisation state by the names in state dicts; those of int8 are not there.

    bitsandbytes itself finds them with the weight only, where a sharded weight has none.
    """
    return quantisation_state(module).as_dict(packed=True) if hasattr(module, "quant_state") else {}


def _add_quantisation(module: nn.Module, state: dict, prefix: str) -> None:
    """Add the parts of a sharded weight's quantisation state to a state dict."""
    parameter, parts = module._parameters["weight"], _quantisation(module)
    state.update({prefix + key: part for key, part in parts.items()})
    if parts:
        # torch.distributed.checkpoint needs an attribute for each key.
        parameter.quant_state = quantisation_state(module)
        parameter.__dict__.update(dict.fromkeys((key for key in parts if "." not in key), "in state_dict() only"))


def load_entries(
    module: nn.Module,
    state: dict,
    prefix: str,
    metadata: dict,
    strict: bool,
    missing: list,
    unexpected: list,
    errors: list,
) -> None:
    """Load state dict pre-hook: set the layer's trained entries and leave in `state` what torch can load."""
    weight, name = frozen_weight(module), f"{prefix}weight"
    indices, values = (state.pop(f"{prefix}trained_{part}", None) for part in ("indices", "values"))
    quantised = module._parameters["weight"]
    try:
        saved = None if indices is None else _checked_mask(indices, values, weight.shape)
        if name in state and state[name].shape == (1, *quantised.shape):
            _check_sealed(weight, state, prefix, saved)
            _unseal(state, prefix)
    except (AttributeError, TypeError, ValueError) as error:
        # bitsandbytes' functions say by any of these that the packed quantisation state is damaged.
        errors.append(f"The trained entries of {name} cannot be loaded: {error}")
        return
    stored = state.get(name)
    if (scales := _scales_beside(module, weight, state, prefix)) is not None:
        weight.place_scales()
        weight.scales.copy_(scales)
    if stored is not None and (stored.shape, stored.dtype) == (quantised.shape, quantised.dtype):
        errors += _differences(module, state, name)
        _reset(weight, saved)
        # The parameter carries quantisation state, so only the stored numbers are copied, even with `assign=True`.
        quantised.detach().copy_(stored)
        state[name] = quantised
    if saved is not None:
        weight.put(saved, values)
    elif stored is not None and stored.is_floating_point() and _read_merged(module, weight, stored):
        state[name] = quantised


def _checked_mask(indices: Tensor, values: Tensor, shape: torch.Size) -> Mask:
    """Return the mask of saved entries.

    Raises:
        TypeError: the positions are no tensor of integers.
        ValueError: they are outside a weight of this shape, not increasing, or not one for each value.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.is_meta:
        raise ValueError("trained_values is missing or no tensor of floating-point numbers.")
    if values.shape != getattr(indices, "shape", None) or indices.is_meta:
        raise ValueError(f"trained_values has shape {tuple(values.shape)}, and there is not one position for each.")
    mask = Mask(indices, shape)
    if not torch.equal(mask.indices.long(), indices.long()):
        raise ValueError("trained_indices does not increase, so that values would get to other positions.")
    return mask


def _check_sealed(weight: QuantizedWeight, state: dict, prefix: str, saved: Mask | None) -> None:
    """Refuse a sealed weight without what was saved beside it.

    Raises:
        ValueError: the trained entries are not in the state, or the scales of an int8 weight.
    """
    needed = {"trained_indices": saved is not None}
    if isinstance(weight, Int8Weight):
        needed["sealed_SCB"] = isinstance(state.get(f"{prefix}sealed_SCB"), Tensor)
    if missing := [key for key, there in needed.items() if not there]:
        raise ValueError(f"it was saved with trained entries, but {prefix}{missing[0]} is not in the state.")


def _scales_beside(module: nn.Module, weight: QuantizedWeight, state: dict, prefix: str) -> Tensor | None:
    """Take the scales of a sharded int8 weight out of `state`; bitsandbytes loads them only into its own parameter."""
    is_beside = isinstance(weight, Int8Weight) and not hasattr(module._parameters["weight"], Int8Weight.attribute)
    return state.pop(f"{prefix}SCB", None) if is_beside else None


def _read_merged(module: nn.Module, weight: QuantizedWeight, stored: Tensor) -> bool:
    """Set the trained entries to those of a floating weight; return False if it has another shape."""
    merged = as_stored(module, stored)
    if merged.shape != weight.shape:
        return False
    mask, values = weight.entries()
    entries = gather_entries(merged.to(values.device), mask.indices)
    # A value that the file holds in rounded form stays exact.
    weight.put(mask, torch.where(entries == values.to(entries.dtype), values, entries.float()))
    return True


def _seal(state: dict, prefix: str) -> None:
    """Seal the weight, in the state dict but not in the model's tensors.

    Each change stops one loader. torch checks the shape of a weight, strict or not. transformers does not check the
    shape of a quantised weight, but it needs the scales of an int8 one, and the dtype noted for a 4-bit one.
    """
    state[f"{prefix}weight"] = state[f"{prefix}weight"].unsqueeze(0)
    _rename(state, f"{prefix}SCB", f"{prefix}sealed_SCB")
    _change_noted_dtype(state, prefix, lambda dtype: dtype + _SEAL)


def _unseal(state: dict, prefix: str) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].squeeze(0)
    _rename(state, f"{prefix}sealed_SCB", f"{prefix}SCB")
    _change_noted_dtype(state, prefix, lambda dtype: dtype.removesuffix(_SEAL))


def _rename(state: dict, key: str, other: str) -> None:
    if key in state:
        state[other] = state.pop(key)


def _change_noted_dtype(state: dict, prefix: str, change: Callable[[str], str]) -> None:
    """Change the dtype noted in the packed quantisation state of a 4-bit weight; an int8 weight has no such state."""
    for key in [key for key in state if key.startswith(f"{prefix}weight.quant_state.")]:
        from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

        noted = unpack_tensor_to_dict(state[key])
        state[key] = pack_dict_to_tensor({**noted, "dtype": change(noted["dtype"])}).to(state[key].device)


def _differences(module: nn.Module, state: dict, name: str) -> list[str]:
    """Return an error for each part of the saved quantisation state that differs from the layer's own.

    The parts are removed from `state`, since torch would report them as unexpected.
    """
    own = _quantisation(module)
    found = {key: state.pop(f"{name}.{key}", None) for key in own}
    if missing := [key for key, part in found.items() if not isinstance(part, Tensor) or part.is_meta]:
        # A state without any of them has the stored numbers alone, as other tools write it.
        return [] if len(missing) == len(own) else [f"{name} was saved without its {missing[0]}; save it again."]
    return [
        f"{name} was quantised otherwise than this model's: its {key} differs; load it into the base it was saved with."
        for key, part in found.items()
        if not torch.equal(part.to(own[key].device), own[key])
    ]


def _reset(weight: QuantizedWeight, saved: Mask | None) -> None:
    """Reset trained entries that are not among the saved ones, which are all that were trained, to the base's."""
    own, _ = weight.entries()
    indices = own.indices.to(weight.device)
    if saved is not None:
        indices = indices[~torch.isin(indices, saved.indices.to(indices.device), assume_unique=True)]
    if len(indices):
        weight.put(Mask(indices, weight.shape), weight.gather_base(indices))
