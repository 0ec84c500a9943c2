"""The trained entries as one file: positions, values and a fingerprint of the base they belong to.

Values are stored in the weight's dtype, which is what the model computes with, and positions as `Mask` packs them: at
most six bytes an entry for 16-bit weights.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speft_optim.files import write_safetensors
from speft_optim.kernels import gather_entries, scatter_entries_
from speft_optim.masks import Mask, Masks
from speft_optim.sparsify import sparse_weights
from speft_optim.targets import Target, all_targets

_FORMAT = "speft_optim.adapter/1"
_PROBES = 4096


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the trained entries of a sparsified model to a safetensors file; it appears whole or not at all.

    Raises:
        ValueError: the model is not sparsified, or the folder of `path` does not exist.
    """
    weights = sparse_weights(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} is not sparsified; call sparsify(model, masks) before save_adapter.")
    masks = Masks({weight.name: weight.mask for weight in weights})
    tensors = {}
    for weight in weights:
        weight.synchronize()
        mask = weight.mask.to("cpu")
        tensors.update({f"{weight.name}:{key}": part for key, part in mask.packed().items()})
        tensors[f"{weight.name}:values"] = gather_entries(
            weight.weight, weight.mask.indices.to(weight.weight.device)
        ).cpu()
    config = getattr(model, "config", None)
    metadata = {
        "format": _FORMAT,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "base": json.dumps({"name": getattr(config, "_name_or_path", ""), "fingerprint": fingerprint(model, masks)}),
    }
    write_safetensors(tensors, path, metadata)


def load_adapter(model: nn.Module, path: str | Path) -> Masks:
    """Write an adapter's entries into the weights of the base it was trained on.

    Args:
        model: the base model; on a sparsified one the values follow.
        path: a file of `save_adapter`.

    Returns:
        The adapter's masks, ready for `sparsify` to go on training.

    Raises:
        ValueError: the file is damaged or no adapter, or belongs to another base (a name, a shape or the weights
            outside the mask differ); the model is then as it was.
    """
    masks, values, base = _read(path)
    targets = all_targets(model)
    for name, mask in masks.items():
        if name not in targets:
            raise ValueError(
                f"{path} was made for a model with a parameter {name}, which {type(model).__name__} lacks."
            )
        if targets[name].shape != mask.shape:
            shapes = f"{tuple(mask.shape)} there and {tuple(targets[name].shape)} here"
            raise ValueError(f"{path} was made for another base: {name} has shape {shapes}.")
    here = fingerprint(model, masks)
    if here != base["fingerprint"]:
        raise ValueError(
            f"{path} was trained on {base['name'] or 'a base'} with fingerprint {base['fingerprint']}, this model has "
            f"{here}: its weights outside the mask differ. Load the base it was trained on, in the same dtype."
        )
    with torch.no_grad():
        for name, mask in masks.items():
            weight = targets[name].parameter
            scatter_entries_(weight, mask.indices.to(weight.device), values[name].to(weight.device))
    return masks


def fingerprint(model: nn.Module, masks: Masks) -> str:
    """Sixteen hexadecimal digits of the base under `masks`: names, shapes and a sample of the entries no mask trains.

    Since entries outside the mask never change, it is the same before and after training.
    """
    digest = hashlib.sha256()
    targets = all_targets(model)
    for name, mask in masks.items():
        probed = _probe(targets[name], mask)
        digest.update(f"{name}{tuple(mask.shape)}".encode())
        digest.update(probed.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(target: Target, mask: Mask) -> Tensor:
    """Evenly spaced entries of a weight with the masked ones left out."""
    count = mask.shape.numel()
    places = torch.arange(0, count, max(1, count // _PROBES), dtype=torch.int64)
    places = places[~torch.isin(places, mask.indices.cpu().long(), assume_unique=True)]
    weight = target.parameter.detach()
    return gather_entries(weight, places.to(weight.device))


def _read(path: str | Path) -> tuple[Masks, dict[str, Tensor], dict[str, str]]:
    """Masks, values and the base's name and fingerprint, all checked."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} has format {metadata.get('format')!r}, not {_FORMAT!r}: no file of save_adapter."
                )
            shapes, base = json.loads(metadata["shapes"]), json.loads(metadata["base"])
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        masks = Masks({name: Mask.unpack(_parts_of(parts, name), shape) for name, shape in shapes.items()})
        values = {name: parts[f"{name}:values"] for name in shapes}
        base = {"name": str(base["name"]), "fingerprint": str(base["fingerprint"])}
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, json.JSONDecodeError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not a readable adapter: {error!r}.") from error
    for name, mask in masks.items():
        if values[name].shape != (len(mask),) or not values[name].is_floating_point():
            raise ValueError(
                f"{path} holds {values[name].shape} values of {values[name].dtype} for {len(mask)} entries of {name}."
            )
    return masks, values, base


def _parts_of(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}:"
    return {key.removeprefix(prefix): part for key, part in parts.items() if key.startswith(prefix)}
