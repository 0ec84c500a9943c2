"""Adapters on a base: load, switch, mix, unload, merge.

An entry under the masks of adapters with shares s_i and values v_i is

    w = base * (1 - sum s_i) + sum s_i * v_i

over the adapters that have it: one adapter with share 1 gives its values, and shares of zero give the base, bit for
bit. The base's own entries there are kept on the CPU beside the adapters. Keeping differences instead was rejected,
since adding and subtracting them rounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.adapter_file import AdapterFile, read_adapter
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.checkpoint.save import LOADED, named_root
from speft_optim.integrations import patch_model, unpatch_model
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask, find
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.foreign import check_layers, check_parameters
from speft_optim.weights.mesh import check_divisions, reshard
from speft_optim.weights.sparse_weight import sparse_weights
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets
from speft_optim.weights.wrappers import unwrapped

# No sensible share is as large, and the sum with the base cannot overflow.
_LARGEST_SHARE = 1000


@dataclass
class Loaded:
    """The adapters of a model, and the base's entries under them.

    Attributes:
        adapters: the adapters by name, with tensors on the CPU.
        base: by weight name, the union of the adapters' masks and the base's own entries there.
        shares: the share of each adapter in the weights now.
        fingerprint: the fingerprint of the model outside `base`.
        saved: by weight name, the entries under `base` that are in a file, on the CPU. Other entries must not be
            overwritten.
    """

    adapters: dict[str, AdapterFile]
    base: dict[str, tuple[Mask, Tensor]]
    shares: dict[str, float]
    fingerprint: str
    saved: dict[str, Tensor] = field(default_factory=dict)

    def held(self, model: nn.Module) -> Iterator[tuple[str, tuple[Mask, Tensor]]]:
        """Yield for each weight the mask of `base` and the weight's entries there now."""
        targets = all_targets(model)
        for name, (mask, _) in self.base.items():
            weight = frozen_weight(*targets[name].sites[0])
            yield name, (mask, weight.gather(mask.indices.to(weight.device)))

    def note_saved(self, model: nn.Module, masks: Mapping[str, Mask] | None = None) -> None:
        """Note that the weights' entries at `masks` are now in a file; None for all entries."""
        for name, (mask, entries) in self.held(model):
            if masks is None:
                self.saved[name] = entries.cpu()
            elif name in masks:
                place, inside = find(mask.indices, masks[name].indices.to(mask.device))
                self.saved[name][place[inside]] = entries.cpu()[place[inside]]

    def check_saved(self, model: nn.Module) -> None:
        """Refuse to overwrite entries that were trained and not saved.

        Raises:
            ValueError: the weights' entries are in no file.
        """
        if not all(torch.equal(self.saved[name], entries.cpu()) for name, (_, entries) in self.held(model)):
            raise ValueError(
                "The adapters' entries were trained further and not saved, so that changing adapters would lose them; "
                "sparsify again and call save_adapter, or make them the model's own with merge_adapters(model)."
            )


def load_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> Masks:
    """Write an adapter's entries into the weights of the base it was trained on, in place of any other adapter's.

    Of a model under `fully_shard` all processes call it, and so they do with the other functions for adapters.

    Args:
        model: the base model. If it is sparsified, wrapped or not, its values get the entries too, and the adapter
            cannot be unloaded. If it is quantised, the entries are an overlay on its quantised weights from here on.
        path: a file or folder of `save_adapter`.
        name: the adapter's name for `use_adapters` and `unload_adapter`; a loaded adapter of that name is replaced.

    Returns:
        The adapter's masks, for `sparsify` if training goes on. Parameters that were trained as a whole are loaded too
        and have no mask; let them require gradients again if training goes on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not an adapter, belongs to another base (a name, a shape or any weight
            outside the masks differs), or holds values beyond the range of the weights' dtype; or an adapter loaded
            before was trained further and not saved. The model is then as it was.
        TypeError: `name` is not a string, or a weight of the model is of another quantiser than bitsandbytes.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, a {type(name).__name__}; pass a string to call the adapter by.")
    model = named_root(model)
    adapter = read_adapter(path)
    settle_storage(model)
    reshard(model)
    _check_fits(model, adapter, path)
    if weights := sparse_weights(model):
        for weight in weights:
            # Newer compact values must be written first, or they would overwrite the adapter's entries later.
            weight.synchronize()
        _check_base(model, adapter, path)
        _put(model, {key: (mask, adapter.values[key]) for key, mask in adapter.masks.items()})
        if LOADED in model.__dict__:
            model.__dict__[LOADED].note_saved(model, adapter.masks)
        return adapter.sparse_masks
    before = model.__dict__.get(LOADED) or Loaded({}, {}, {}, "")
    before.check_saved(model)
    # The weights' own entries are kept, not those of the adapters, which may have been trained further.
    held = dict(before.held(model))
    _restore_base(model, before)
    try:
        _check_base(model, adapter, path)
    except ValueError:
        _put(model, held)
        raise
    _remember(model, {**before.adapters, name: adapter})
    _use(model, model.__dict__[LOADED], {name: 1.0})
    return adapter.sparse_masks


def use_adapters(model: nn.Module, shares: Mapping[str, float]) -> None:
    """Switch to one loaded adapter, or mix several.

    Args:
        model: a model with loaded adapters.
        shares: from an adapter's name to its share of the difference from the base: {"math": 1.0} is that adapter,
            {"math": 0.5, "code": 0.5} is half of each, {} is the base.

    Raises:
        ValueError: a name is not loaded, a share is larger than 1000 in magnitude, or the model is sparsified, or was
            changed meanwhile and not saved.
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
    _restore_base(model, loaded)
    _use(model, loaded, {name: float(share) for name, share in shares.items()})


def unload_adapter(model: nn.Module, name: str | None = None) -> None:
    """Unload an adapter; without any the model is the base again, bit for bit.

    Args:
        model: a model with loaded adapters.
        name: the adapter's name; None for all.

    Raises:
        ValueError: it is not loaded, or the model is sparsified, or was changed meanwhile and not saved.
    """
    model = unwrapped(model)
    loaded = _loaded(model)
    if name is not None and name not in loaded.adapters:
        raise ValueError(f"No adapter {name!r} is loaded; loaded are {sorted(loaded.adapters)}.")
    _restore_base(model, loaded)
    _remember(model, {} if name is None else {key: part for key, part in loaded.adapters.items() if key != name})
    if LOADED in model.__dict__:
        _use(model, model.__dict__[LOADED], {key: share for key, share in loaded.shares.items() if key != name})
    else:
        unpatch_model(model)


def merge_adapters(model: nn.Module) -> None:
    """Keep the weights as they are now, and drop the adapters and the base's entries.

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


def _remember(model: nn.Module, adapters: dict[str, AdapterFile]) -> None:
    """Keep the adapters and the entries under them of the model, which is the plain base now."""
    model.__dict__.pop(LOADED, None)
    if not adapters:
        return
    targets, base = all_targets(model), {}
    for name in dict.fromkeys(name for adapter in adapters.values() for name in adapter.masks):
        masks = [adapter.masks[name] for adapter in adapters.values() if name in adapter.masks]
        union = Mask(torch.cat([mask.indices for mask in masks]).unique(), masks[0].shape)
        weight = frozen_weight(*targets[name].sites[0])
        base[name] = (union, weight.gather_base(union.indices.to(weight.device)).cpu())
    outside = fingerprint(model, Masks({name: mask for name, (mask, _) in base.items()}))
    model.__dict__[LOADED] = Loaded(adapters, base, {}, outside)


def _restore_base(model: nn.Module, loaded: Loaded) -> None:
    _put(model, loaded.base)
    targets = all_targets(model)
    for name, (mask, entries) in loaded.base.items():
        if len(mask):
            frozen_weight(*targets[name].sites[0]).release(entries)


def _use(model: nn.Module, loaded: Loaded, shares: dict[str, float]) -> None:
    """Mix adapters into the model, which is the plain base now."""
    mixed = {}
    for name, (union, base) in loaded.base.items():
        rest, total = torch.ones(len(union)), torch.zeros(len(union))
        touched = torch.zeros(len(union), dtype=torch.bool)
        for key, share in shares.items():
            adapter = loaded.adapters[key]
            if share and name in adapter.masks:
                places, _ = find(union.indices, adapter.masks[name].indices)
                rest[places] -= share
                total[places] += share * adapter.values[name].float()
                touched[places] = True
        entries = torch.where(rest == 0, total, base.float() * rest + total)
        mixed[name] = (Mask(union.indices[touched], union.shape), entries[touched].to(base.dtype))
    _put(model, mixed)
    loaded.shares = shares
    loaded.note_saved(model)


def _put(model: nn.Module, entries: Mapping[str, tuple[Mask, Tensor]]) -> None:
    if entries:
        patch_model(model)
    targets = all_targets(model)
    for name, (mask, values) in entries.items():
        if len(mask):
            frozen_weight(*targets[name].sites[0]).put(mask, values)


def _check_fits(model: nn.Module, adapter: AdapterFile, path: str | Path) -> None:
    check_parameters(model)
    check_divisions(model)
    targets = all_targets(model)
    for name, mask in adapter.masks.items():
        if name not in targets:
            check_layers(model, name.removesuffix(".weight"))
            raise ValueError(
                f"{path} was made for a model with a parameter {name}, which {type(model).__name__} lacks."
            )
        if targets[name].shape != mask.shape:
            shapes = f"{tuple(mask.shape)} there and {tuple(targets[name].shape)} here"
            raise ValueError(f"{path} was made for another base: {name} has shape {shapes}.")
        _check_range(targets[name], adapter.values[name], path)


def _check_range(target: Target, values: Tensor, path: str | Path) -> None:
    """Refuse values beyond the range of the weight's dtype, in which they would be inf."""
    dtype = target.dtype
    if not bool(values.to(dtype).isfinite().all()):
        raise ValueError(
            f"{path} holds values of {target.name} up to {float(values.abs().max()):.3g}, and the weight is in {dtype} "
            f"here, whose largest is {torch.finfo(dtype).max:.3g}; load the adapter on a base in {values.dtype}."
        )


def _check_base(model: nn.Module, adapter: AdapterFile, path: str | Path) -> None:
    here, base = fingerprint(model, adapter.masks), adapter.base
    if here != base["fingerprint"]:
        raise ValueError(
            f"{path} was trained on {base['name'] or 'a base'} with fingerprint {base['fingerprint']}, this model has "
            f"{here}: weights outside the masks differ. Load the base it was trained on, in the same dtype."
        )
