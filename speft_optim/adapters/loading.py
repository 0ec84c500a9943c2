"""`load_adapter`: checks an adapter's entries and writes them into the base that it was trained on."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_optim.adapters.loaded import Loaded, mix, put, remember, restore_base
from speft_optim.checkpoint.adapter_file import AdapterFile, read_adapter
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.checkpoint.save import LOADED, named_root
from speft_optim.distributed import check_equal, together
from speft_optim.masks.collection import Masks
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.foreign import check_layers, check_parameters
from speft_optim.weights.mesh import check_divisions, is_fully_sharded, reshard
from speft_optim.weights.targets import Target, all_targets


def load_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> Masks:
    """Write an adapter's entries into the weights of the base it was trained on, replacing any active adapter.

    Under `fully_shard` all processes must call this function and the other functions for adapters.

    Args:
        model: the base model, with or without wrappers. If it is sparsified, its values get the entries too, and the
            adapter cannot be unloaded. If it is quantised, the entries become an overlay on its quantised weights.
        path: a file or folder written by `save_adapter`.
        name: the adapter's name for `use_adapters` and `unload_adapter`; a loaded adapter of that name is replaced.

    Returns:
        The adapter's masks, to pass to `sparsify` for further training. Densely trained parameters are loaded too and
        have no mask; for further training set their `requires_grad` again.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not an adapter, belongs to another base (a name, a shape or any weight
            outside the masks differs), or holds values beyond the range of the weights' dtype; or a previously loaded
            adapter was trained further and not saved; or, under `fully_shard`, adapters differ between processes. The
            model is then unchanged.
        TypeError: `name` is not a string, or a weight of the model is quantised by another library than bitsandbytes.
        RuntimeError: under `fully_shard`, another process failed; the model is unchanged.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, a {type(name).__name__}; pass a string.")
    model = named_root(model)
    is_sharded = is_fully_sharded(model)
    with together() if is_sharded else nullcontext():
        adapter = read_adapter(path)
        settle_storage(model)
        reshard(model)
        _check_fits(model, adapter, path)
    if is_sharded:
        check_equal(adapter.fingerprint(), "The adapters", "load the same file in all of them.")
    if weights := sparse_weights(model):
        for weight in weights:
            # Newer compact values must be written first, or they would overwrite the adapter's entries later.
            weight.synchronize()
        _check_base(model, adapter, path)
        put(model, {key: (mask, adapter.values[key]) for key, mask in adapter.masks.items()})
        for weight in weights:
            if weight.name in adapter.masks:
                # Entries outside the weight's mask belong into the next adapter too.
                weight.note_trained(adapter.masks[weight.name])
        if LOADED in model.__dict__:
            model.__dict__[LOADED].note_saved(model, adapter.masks)
        return adapter.sparse_masks
    before = model.__dict__.get(LOADED) or Loaded({}, {}, {}, "")
    before.check_saved(model)
    # The weights' own entries are kept, not those of the adapters, which may have been trained further.
    held, was_written = dict(before.held(model)), before.is_written
    restore_base(model, before)
    try:
        _check_base(model, adapter, path)
    except ValueError:
        put(model, held)
        before.is_written = was_written
        raise
    remember(model, {**before.adapters, name: adapter})
    mix(model, model.__dict__[LOADED], {name: 1.0})
    return adapter.sparse_masks


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
