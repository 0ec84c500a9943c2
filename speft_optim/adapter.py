"""The trained entries as one file: positions, values and a fingerprint of the base they belong to.

Values are stored in the weight's dtype, which is what the model computes with, and positions as `Mask` packs them: at
most six bytes an entry for 16-bit weights. On a quantised base they are stored in fp32, since its layers compute in the
dtype of whatever input comes.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speft_optim.files import write_safetensors
from speft_optim.frozen import frozen_weight
from speft_optim.masks import Mask, Masks
from speft_optim.quantized import take_over
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
    masks, tensors = Masks(), {}
    for weight in weights:
        weight.synchronize()
        mask, values = weight.base.entries(weight.mask)
        masks[weight.name] = mask
        tensors.update({f"{weight.name}:{key}": part for key, part in mask.to("cpu").packed().items()})
        tensors[f"{weight.name}:values"] = values.cpu()
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
        model: the base model; on a sparsified one the values follow. On a quantised one the entries are laid over its
            codes from here on.
        path: a file of `save_adapter`.

    Returns:
        The adapter's masks, ready for `sparsify` to go on training.

    Raises:
        ValueError: the file is damaged or no adapter, or belongs to another base (a name, a shape or any weight
            outside the masks differs); the model is then as it was.
    """
    masks, values, base = _read(path)
    for weight in sparse_weights(model):
        # Before and not after: values that are newer than the weight would win over the adapter's.
        weight.synchronize()
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
            f"{here}: weights outside the masks differ. Load the base it was trained on, in the same dtype."
        )
    take_over(model)
    for name, mask in masks.items():
        frozen_weight(*targets[name].sites[0]).put(mask, values[name])
    return masks


def fingerprint(model: nn.Module, masks: Masks) -> str:
    """Sixteen hexadecimal digits of the base under `masks`: names, shapes and a sample of the entries no mask trains.

    All weights of the model count, those without a mask too: they are part of what the adapter was trained on. Since
    entries outside the mask never change, it is the same before and after training.
    """
    digest = hashlib.sha256()
    compact = {id(weight.values) for weight in sparse_weights(model)}
    for name, target in all_targets(model).items():
        if id(target.parameter) not in compact:
            digest.update(f"{name}{tuple(target.shape)}".encode())
            digest.update(_probe(target, masks.get(name)).to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(target: Target, mask: Mask | None) -> Tensor:
    """Evenly spaced entries of a weight with the masked ones left out."""
    count = target.shape.numel()
    # An odd step, or all places would lie in one column of a matrix with 2^n columns, which the mask may fill.
    places = torch.arange(0, count, max(1, count // _PROBES) | 1, dtype=torch.int64)
    if mask is not None:
        places = places[~torch.isin(places, mask.indices.cpu().long(), assume_unique=True)]
    weight = frozen_weight(*target.sites[0])
    return weight.gather_base(places.to(weight.device))


def _read(path: str | Path) -> tuple[Masks, dict[str, Tensor], dict[str, str]]:
    """Masks, values and the base's name and fingerprint, all checked."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            shapes, base = json.loads(metadata["shapes"]), json.loads(metadata["base"])
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        masks = Masks({name: Mask.unpack(_parts_of(parts, name), shape) for name, shape in shapes.items()})
        values = {name: parts[f"{name}:values"] for name in shapes}
        base = {"name": str(base["name"]), "fingerprint": str(base["fingerprint"])}
        for name, mask in masks.items():
            if values[name].shape != (len(mask),) or not values[name].is_floating_point():
                found = f"{tuple(values[name].shape)} values of {values[name].dtype}"
                raise ValueError(f"it holds {found} for {len(mask)} entries of {name}")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no readable file of save_adapter: {type(error).__name__}: {error}.") from error
    return masks, values, base


def _parts_of(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}:"
    return {key.removeprefix(prefix): part for key, part in parts.items() if key.startswith(prefix)}
