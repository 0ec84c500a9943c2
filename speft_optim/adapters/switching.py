"""Switches, mixes, unloads and merges loaded adapters."""

from collections.abc import Mapping

from torch import nn

from speft_optim.adapters.loaded import Loaded, mix, remember, restore_base
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.checkpoint.save import LOADED
from speft_optim.integrations import unpatch_model
from speft_optim.masks.collection import Masks
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.mesh import reshard
from speft_optim.weights.wrappers import unwrapped

# No sensible share is as large, and the sum with the base cannot overflow.
_LARGEST_SHARE = 1000


def use_adapters(model: nn.Module, shares: Mapping[str, float]) -> None:
    """Switch to one loaded adapter, or mix several.

    Args:
        model: a model with loaded adapters.
        shares: a factor for each adapter's difference from the base, by adapter name: {"math": 1.0} is that adapter,
            {"math": 0.5, "code": 0.5} is half of each, {} is the base.

    Raises:
        ValueError: no adapter of a name is loaded, a share is larger than 1000 in magnitude, or the model is
            sparsified, or was trained since and not saved.
        TypeError: `shares` is not a mapping.
    """
    model = unwrapped(model)
    loaded = _loaded(model)
    if not isinstance(shares, Mapping):
        raise TypeError(f"shares is a {type(shares).__name__}; pass a dict from names to shares, such as {{'a': 1.0}}.")
    for name, share in shares.items():
        if name not in loaded.adapters:
            raise ValueError(f"No adapter {name!r} is loaded; loaded are {list(loaded.adapters)}.")
        if isinstance(share, bool) or not isinstance(share, int | float) or not abs(share) <= _LARGEST_SHARE:
            raise ValueError(
                f"The share of {name!r} is {share!r}; pass a number of at most {_LARGEST_SHARE} in magnitude, 1.0 for "
                "all of the adapter."
            )
    restore_base(model, loaded)
    mix(model, loaded, {name: float(share) for name, share in shares.items()})


def unload_adapter(model: nn.Module, name: str | None = None) -> None:
    """Unload one adapter, or all; without adapters the model is the base again, bit for bit.

    Args:
        model: a model with loaded adapters.
        name: the adapter's name; None for all.

    Raises:
        ValueError: the adapter is not loaded, or the model is sparsified, or was trained since and not saved.
    """
    model = unwrapped(model)
    loaded = _loaded(model)
    if name is not None and name not in loaded.adapters:
        raise ValueError(f"No adapter {name!r} is loaded; loaded are {sorted(loaded.adapters)}.")
    restore_base(model, loaded)
    remember(model, {} if name is None else {key: part for key, part in loaded.adapters.items() if key != name})
    if LOADED in model.__dict__:
        mix(model, model.__dict__[LOADED], {key: share for key, share in loaded.shares.items() if key != name})
    else:
        unpatch_model(model)


def merge_adapters(model: nn.Module) -> None:
    """Keep the current weights, and drop the stored adapters and base entries, so that nothing can be unloaded.

    Raises:
        ValueError: no adapter is loaded.
    """
    model = unwrapped(model)
    if LOADED not in model.__dict__:
        raise ValueError(f"No adapter is loaded on this {type(model).__name__}; there is nothing to merge.")
    del model.__dict__[LOADED]


def _loaded(model: nn.Module) -> Loaded:
    if LOADED not in model.__dict__:
        raise ValueError(f"No adapter is loaded on this {type(model).__name__}; call load_adapter(model, path) first.")
    if sparse_weights(model):
        raise ValueError("The model is being trained; call save_adapter and desparsify before its adapters change.")
    settle_storage(model)
    reshard(model)
    loaded = model.__dict__[LOADED]
    if fingerprint(model, Masks({name: mask for name, (mask, _) in loaded.base.items()})) != loaded.fingerprint:
        raise ValueError(
            "Weights outside the adapters' masks have changed since these were loaded, so that the base is lost; load "
            "it again, or keep the weights as they are with merge_adapters(model)."
        )
    loaded.check_saved(model)
    return loaded
