"""The adapter file: the trained entries of a model, with a fingerprint of the base that they belong to.

Values are stored in the weight's dtype, in which the model computes, and positions as `Mask.packed` gives them: at most
six bytes per entry for 16-bit weights. Values of a quantised base are stored in fp32, since its layers compute in the
dtype of their input.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from speft_optim.checks import checked_path
from speft_optim.files import write_atomically, write_safetensors
from speft_optim.masks.collection import UNREADABLE, Masks, parts_of
from speft_optim.masks.mask import Mask, places_outside
from speft_optim.version import __version__
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.mesh import once, reshard
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets
from speft_optim.weights.wrappers import unwrapped

logger = logging.getLogger(__name__)


_FORMAT = "speft_optim.adapter/2"


_FILE = "adapter.safetensors"


_PROBES = 4096


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The attribute under which a model keeps its loaded adapters (see `adapters.py`).
LOADED = "_loaded_adapters"


_BASE = ("name", "revision", "fingerprint")


@dataclass
class AdapterFile:
    """The checked content of an adapter file.

    Attributes:
        masks: the entries that the adapter sets, by parameter name; all entries of the parameters in `whole`.
        values: (k,) for each mask, in the dtype that they were stored in.
        base: name, revision and fingerprint of the base; the first two are empty where unknown.
        whole: names of the parameters that were trained densely, such as a new classification head.
    """

    masks: Masks
    values: dict[str, Tensor]
    base: dict[str, str]
    whole: tuple[str, ...] = ()

    @property
    def sparse_masks(self) -> Masks:
        """The masks without the parameters that were trained densely."""
        return Masks({name: mask for name, mask in self.masks.items() if name not in self.whole})


def save_adapter(model: nn.Module, path: str | Path, *, details: Mapping[str, Any] | None = None) -> None:
    """Write the trained entries of a sparsified model to a file that appears whole or not at all.

    If a schedule changed the masks, the file holds all entries that were ever trained, and the log says at level INFO
    how many these are. Parameters without a mask that require gradients, such as a new classification head, are written
    whole.

    Under `fully_shard` all processes call it, and the first one writes.

    Args:
        model: the sparsified model, or a wrapper around it: the file is for the module that `sparsify` was called on.
        path: a file, if it ends in `.safetensors`; else a folder, created if missing, which gets `adapter.safetensors`
            and a model card, `README.md`, and can be pushed to a hub as it is.
        details: strings and numbers to note in file and card, such as `{"measure": "gradient", "data": "gsm8k"}`. Names
            of what is always noted there are refused.

    Raises:
        ValueError: the model is not sparsified or holds two sparsified models, `details` has a reserved name, or the
            folder of a file's `path` does not exist.
        TypeError: `details` is no mapping, or holds something other than strings and numbers.
    """
    model, path = named_root(model), checked_path(path)
    reshard(model)
    weights = sparse_weights(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} is not sparsified; call sparsify(model, masks) before save_adapter.")
    _check_details(details)
    masks, tensors = Masks(), {}
    for weight in weights:
        weight.synchronize()
        mask, values = weight.base.entries(weight.ever_trained())
        masks[weight.name] = mask
        tensors[f"{weight.name}:values"] = values.cpu()
    tensors.update(masks.parts())
    whole = _trained_beside(model, masks)
    for name, target in whole.items():
        tensors[f"{name}:values"] = frozen_weight(*target.sites[0]).tensor.flatten().cpu()
    everything = Masks({**masks, **{name: _whole_mask(target.shape) for name, target in whole.items()}})
    config = getattr(model, "config", None)
    base = {
        "name": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", "") or "",
        "fingerprint": fingerprint(model, everything),
    }
    about = _about(masks, whole) | dict(details or {})
    metadata = {
        "format": _FORMAT,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in everything.items()}),
        "whole": json.dumps(list(whole)),
        "base": json.dumps(base),
        "about": json.dumps(about),
    }
    card = _card(base, about)
    once(model, lambda: _write(path, tensors, metadata, card))
    trained = sum(len(weight.mask) for weight in weights)
    if masks.count > trained:
        logger.info(
            "The adapter holds %s entries: the %s trained now, and %s that were trained before the masks moved.",
            f"{masks.count:,}",
            f"{trained:,}",
            f"{masks.count - trained:,}",
        )
    if LOADED in model.__dict__:
        model.__dict__[LOADED].note_saved(model, everything)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], card: str) -> None:
    """Write one file, or a folder with a card."""
    if path.suffix == ".safetensors":
        write_safetensors(tensors, path, metadata)
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_safetensors(tensors, path / _FILE, metadata)
        write_atomically(path / "README.md", lambda temporary: temporary.write_text(card, encoding="utf-8"))


def _trained_beside(model: nn.Module, masks: Masks) -> dict[str, Target]:
    """Return the parameters without a mask that require gradients, by name; warn of dtypes that no file can hold."""
    loaded = model.__dict__[LOADED].adapters.values() if LOADED in model.__dict__ else ()
    # A parameter that a loaded adapter replaced is written too: it is not the base's.
    brought = {name for adapter in loaded for name in adapter.whole}
    found = {
        name: target for name, target in all_targets(model).items() if target.parameter.requires_grad or name in brought
    }
    found = {name: target for name, target in found.items() if name not in masks and target.shape.numel()}
    left_out = [name for name, target in found.items() if target.parameter.dtype not in _DTYPES]
    if left_out:
        logger.warning(
            "%s requires gradients and is left out of the adapter, which can hold fp32, bf16 and fp16, but not %s; "
            "save the model too.",
            ", ".join(left_out),
            found[left_out[0]].parameter.dtype,
        )
    return {name: target for name, target in found.items() if name not in left_out}


def _whole_mask(shape: torch.Size) -> Mask:
    # int64 positions would take eight bytes an entry, more than any other tensor here.
    count = shape.numel()
    return Mask(torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64), shape)


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


def _about(masks: Masks, whole: Mapping[str, Target] | None = None) -> dict[str, Any]:
    """Return the notes that a file holds about itself, for people and tools."""
    sizes = {name: target.shape.numel() for name, target in (whole or {}).items()}
    beside = {"trained whole": ", ".join(f"{name} ({size:,})" for name, size in sizes.items())} if whole else {}
    return {
        "entries": masks.count,
        "density": masks.density,
        "masks": masks.fingerprint(),
        "speft_optim": __version__,
        "torch": torch.__version__,
        **beside,
    }


def _check_details(details: Mapping[str, Any] | None) -> None:
    if details is None:
        return
    if not isinstance(details, Mapping):
        raise TypeError(
            f"details is a {type(details).__name__}; pass a dict of strings and numbers, such as {{'data': 'gsm8k'}}."
        )
    for key, value in details.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise TypeError(f"details holds {key!r}: {value!r}; it takes strings and numbers by name.")
    reserved = [*_about(Masks()), "trained whole", *(f"base {key}" for key in _BASE)]
    if taken := [key for key in details if key in reserved]:
        raise ValueError(f"details names {taken}, but {reserved} are always written; choose other names.")


def fingerprint(model: nn.Module, masks: Masks) -> str:
    """Return a hash of the base, sixteen hexadecimal digits: names, shapes, and a sample of the untrained entries.

    All weights of the model count, those without a mask too: they are part of what the adapter was trained on. Since
    entries outside the masks never change, the hash is the same before and after training.

    Args:
        model: the model, sparsified or not.
        masks: the entries that training changes, which are left out of the sample.
    """
    digest = hashlib.sha256()
    for name, target in all_targets(model).items():
        digest.update(f"{name}{tuple(target.shape)}".encode())
        digest.update(_probe(target, masks.get(name)).to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(target: Target, mask: Mask | None) -> Tensor:
    """Return evenly spaced entries of a weight, the masked ones left out."""
    places = places_outside(mask, target.shape.numel(), _PROBES)
    weight = frozen_weight(*target.sites[0])
    # Overlays count, as they do in a dense weight: an overlaid entry outside the mask is not the base's.
    return weight.gather(places.to(weight.device))


def read_adapter(path: str | Path) -> AdapterFile:
    """Read a file or folder that `save_adapter` wrote, and check all that is in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or `save_adapter` did not write it.
    """
    path = checked_path(path)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter {path}; pass a file or folder that save_adapter wrote.")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            shapes, base = json.loads(metadata["shapes"]), json.loads(metadata["base"])
            whole = json.loads(metadata.get("whole", "[]"))
            if not isinstance(whole, list) or not set(whole) <= set(shapes):
                raise ValueError(f"it names the whole parameters {whole!r}, but has no shapes for all of them")
            parts = {key: file.get_tensor(key) for key in file.keys()}
        masks, values = Masks(), {}
        for name, shape in shapes.items():
            own, shape = parts_of(name, parts), _checked_shape(name, shape)
            values[name] = own.pop("values")
            if name in whole and values[name].numel() != math.prod(shape):
                raise ValueError(f"it holds {values[name].numel():,} values of {name} with shape {shape}")
            masks[name] = _whole_mask(torch.Size(shape)) if name in whole else Mask.unpack(own, shape)
            _check_values(name, values[name], len(masks[name]))
        base = {key: str(base.get(key, "")) for key in _BASE}
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is no readable file of save_adapter ({type(error).__name__}: {error}); pass another file."
        ) from error
    return AdapterFile(masks, values, base, tuple(name for name in masks if name in whole))


def _checked_shape(name: str, shape: object) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name} has shape {shape!r}, which is no list of positive sizes")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"{name} has shape {shape!r}, which is too large for any weight")
    return shape


def _check_values(name: str, values: Tensor, entries: int) -> None:
    if values.shape != (entries,) or values.dtype not in _DTYPES:
        raise ValueError(f"it holds {tuple(values.shape)} values of {values.dtype} for {entries} entries of {name}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"it holds values of {name} that are not finite")


def _card(base: dict[str, str], about: dict[str, Any]) -> str:
    """Return the model card of an adapter's folder: front matter for model hubs, a table, and how to load it."""
    front = ["library_name: speft_optim", "tags: [sparse-fine-tuning, adapter]"]
    # Only a name on a hub is noted: a local folder means nothing to others.
    if base["name"].count("/") == 1 and not base["name"].startswith((".", "/", "~")):
        front.insert(0, f"base_model: {json.dumps(base['name'])}")
    rows = {f"base {key}": value for key, value in base.items() if value}
    rows.update({key: f"{value:,}" if isinstance(value, int) else value for key, value in about.items()})
    beside = f" {about['trained whole']} was trained whole beside them." if "trained whole" in about else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{chr(10).join(front)}
---

# Sparse adapter

{about["entries"]:,} entries ({about["density"]:.3%} of the weights they lie in) to write into the base's
weights.{beside}

```python
from speft_optim import load_adapter, unload_adapter

load_adapter(model, "path/of/this/folder")  # the base it was trained on; any other is refused
unload_adapter(model)  # the base again, bit for bit
```

| | |
|---|---|
{table}
"""
