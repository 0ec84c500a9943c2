"""The adapter file: the trained entries of a model, with a fingerprint of the base that they belong to.

Values are stored in the weight's dtype, in which the model computes, and positions as `Mask.packed` gives them: at most
six bytes per entry for 16-bit weights. Values of a quantised base are stored in fp32, since its layers compute in the
dtype of their input.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from speft_optim.checkpoint.model_card import BASE_KEYS, model_card
from speft_optim.checks import checked_path
from speft_optim.files import write_atomically, write_safetensors
from speft_optim.masks.collection import UNREADABLE, Masks, parts_of
from speft_optim.masks.mask import Mask

_FORMAT = "speft_optim.adapter/2"


_FILE = "adapter.safetensors"


# The dtypes of values that a file can hold.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def fingerprint(self) -> str:
        """Return a hash of names, positions and values: sixteen hexadecimal digits."""
        digest = hashlib.sha256(self.sparse_masks.fingerprint().encode())
        for name, values in sorted(self.values.items()):
            digest.update(f"{name}{values.dtype}".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def write_adapter(adapter: AdapterFile, path: Path, notes: Mapping[str, Any]) -> None:
    """Write an adapter so that `read_adapter` reads it.

    Args:
        adapter: what to write, on the CPU.
        path: a file that ends in `.safetensors`, or a folder, which also gets a model card.
        notes: what file and card say about the adapter, see `model_card.notes_on`.
    """
    tensors = {f"{name}:values": values for name, values in adapter.values.items()}
    tensors.update(adapter.sparse_masks.parts())
    metadata = {
        "format": _FORMAT,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in adapter.masks.items()}),
        "whole": json.dumps(list(adapter.whole)),
        "base": json.dumps(adapter.base),
        "about": json.dumps(notes),
    }
    if path.suffix == ".safetensors":
        write_safetensors(tensors, path, metadata)
        return
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path / _FILE, metadata)
    card = model_card(adapter.base, notes)
    write_atomically(path / "README.md", lambda temporary: temporary.write_text(card, encoding="utf-8"))


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
            masks[name] = whole_mask(torch.Size(shape)) if name in whole else Mask.unpack(own, shape)
            _check_values(name, values[name], len(masks[name]))
        base = {key: str(base.get(key, "")) for key in BASE_KEYS}
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
    if values.shape != (entries,) or values.dtype not in DTYPES:
        raise ValueError(f"it holds {tuple(values.shape)} values of {values.dtype} for {entries} entries of {name}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"it holds values of {name} that are not finite")


def whole_mask(shape: torch.Size) -> Mask:
    """Return the mask of all entries of a parameter that was trained densely."""
    # int64 positions would take eight bytes an entry, more than any other tensor here.
    count = shape.numel()
    return Mask(torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64), shape)
