"""`save_adapter`: the trained entries of a model are collected and written to an adapter file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speft_optim.checkpoint.adapter_file import DTYPES, AdapterFile, whole_mask, write_adapter
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.checkpoint.model_card import check_details, notes_on
from speft_optim.checks import checked_path
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask, united
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.mesh import once, reshard
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets
from speft_optim.weights.wrappers import unwrapped

logger = logging.getLogger(__name__)


# The attribute under which a model keeps its loaded adapters (see `adapters/loaded.py`).
LOADED = "_loaded_adapters"


def save_adapter(model: nn.Module, path: str | Path, *, details: Mapping[str, Any] | None = None) -> None:
    """Write the trained entries of a sparsified model atomically to an adapter file.

    If a schedule changed the masks, the file holds all entries that were ever trained, and their number is logged at
    level INFO. If the model was trained with loaded adapters, the file includes their entries, so that it can be loaded
    into the base alone, and a warning is issued. Parameters without a mask that require gradients, such as a new
    classification head, are written whole.

    Under `fully_shard` all processes must call this function; rank 0 writes.

    Args:
        model: the sparsified model, or a wrapper around it; names in the file are those of the module that `sparsify`
            was called on.
        path: a file, if it ends in `.safetensors`; otherwise a folder, created if missing, for `adapter.safetensors`
            and a model card, `README.md`, which can be uploaded to the Hugging Face hub.
        details: strings and numbers to record in file and card, such as `{"measure": "gradient", "data": "gsm8k"}`.
            Names that are always recorded are reserved.

    Raises:
        ValueError: the model is not sparsified or holds two sparsified models, `details` has a reserved name, a value
            is not finite, or the folder of a file's `path` does not exist; nothing is written.
        TypeError: `details` is not a mapping, or holds something other than strings and numbers.
    """
    model, path = named_root(model), checked_path(path)
    reshard(model)
    weights = sparse_weights(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} is not sparsified; call sparsify(model, masks) before save_adapter.")
    check_details(details)
    adapter = _collect(model, weights)
    masks = adapter.sparse_masks
    notes = notes_on(masks, {name: len(adapter.masks[name]) for name in adapter.whole}) | dict(details or {})
    once(model, lambda: write_adapter(adapter, path, notes))
    trained, ever = (sum(map(len, kind)) for kind in zip(*((w.mask, w.ever_trained()) for w in weights), strict=True))
    if ever > trained:
        logger.info(
            "The adapter holds %s entries: the %s trained now, and %s that were trained before the masks moved.",
            f"{ever:,}",
            f"{trained:,}",
            f"{ever - trained:,}",
        )
    if masks.count > ever:
        logger.warning(
            "The adapter also holds %s entries of other adapters, with which the model was trained; load it by itself, "
            "and not beside these.",
            f"{masks.count - ever:,}",
        )
    if LOADED in model.__dict__:
        model.__dict__[LOADED].note_saved(model, adapter.masks)


def _collect(model: nn.Module, weights: list[SparseWeight]) -> AdapterFile:
    """Return what was trained, and what it was trained with, with tensors on the CPU."""
    masks, values, others, targets = Masks(), {}, _entries_of_loaded(model), all_targets(model)
    own = {weight.name: weight for weight in weights}
    for name in dict.fromkeys([*own, *others]):
        if name in own:
            own[name].synchronize()
            base, changed = own[name].base, [own[name].ever_trained(), *others.get(name, [])]
        else:
            base, changed = frozen_weight(*targets[name].sites[0]), others[name]
        masks[name], entries = base.entries(united(changed))
        values[name] = entries.cpu()
    _warn_of_statistics(model)
    whole = _trained_beside(model, masks)
    for name, target in whole.items():
        masks[name] = whole_mask(target.shape)
        values[name] = frozen_weight(*target.sites[0]).tensor.flatten().cpu()
    _check_finite(values)
    config = getattr(model, "config", None)
    base = {
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", "") or "",
        "fingerprint": fingerprint(model, masks),
    }
    return AdapterFile(masks, values, base, tuple(whole))


def _entries_of_loaded(model: nn.Module) -> dict[str, list[Mask]]:
    """Return by weight the masks of the loaded adapters that are mixed in: these entries are not the base's."""
    masks: dict[str, list[Mask]] = {}
    if LOADED in model.__dict__:
        loaded = model.__dict__[LOADED]
        for adapter in (loaded.adapters[key] for key, share in loaded.shares.items() if share):
            for name, mask in adapter.sparse_masks.items():
                masks.setdefault(name, []).append(mask)
    return masks


def _trained_beside(model: nn.Module, masks: Masks) -> dict[str, Target]:
    """Return the parameters without a mask that require gradients, by name; warn of dtypes that no file can hold."""
    loaded = model.__dict__[LOADED].adapters.values() if LOADED in model.__dict__ else ()
    # A parameter that a loaded adapter replaced is written too: it is not the base's.
    brought = {name for adapter in loaded for name in adapter.whole}
    found = {
        name: target for name, target in all_targets(model).items() if target.parameter.requires_grad or name in brought
    }
    found = {name: target for name, target in found.items() if name not in masks and target.shape.numel()}
    left_out = [name for name, target in found.items() if target.parameter.dtype not in DTYPES]
    if left_out:
        logger.warning(
            "%s requires gradients and is left out of the adapter, which can hold fp32, bf16 and fp16, but not %s; "
            "save the model too.",
            ", ".join(left_out),
            found[left_out[0]].parameter.dtype,
        )
    return {name: target for name, target in found.items() if name not in left_out}


def _check_finite(values: Mapping[str, Tensor]) -> None:
    """Refuse values that no adapter may hold, in the dtype of their weight."""
    for name, entries in values.items():
        if not bool(entries.isfinite().all()):
            raise ValueError(
                f"The trained values of {name} are inf or NaN in {entries.dtype}, and load_adapter would refuse the "
                "file; train at a lower learning rate, and load a base of fp16 in bfloat16."
            )


def _warn_of_statistics(model: nn.Module) -> None:
    """Warn of batch norms in training mode: their statistics move with it, and are no parameters."""
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.running_mean is not None
    ]
    if moving:
        logger.warning(
            "The running statistics of %d batch norms, e.g. %s, are left out of the adapter, which holds parameters "
            "only; call eval() on these modules in training to keep the base's, or save the state_dict() too.",
            len(moving),
            moving[0],
        )


def named_root(model: nn.Module) -> nn.Module:
    """Return the module whose names masks and adapters use.

    It is the module that `sparsify` was called on; for a model that is not sparsified, the model inside its wrappers.

    Raises:
        ValueError: the model holds several sparsified models.
    """
    roots = {weight.place.model for weight in sparse_weights(model)}
    if len(roots) > 1:
        names = [name for name, module in model.named_modules() if module in roots]
        raise ValueError(
            f"{type(model).__name__} holds {len(roots)} sparsified models, {names}, but an adapter or a schedule "
            "belongs to one; pass one of them."
        )
    return roots.pop() if roots else unwrapped(model)
