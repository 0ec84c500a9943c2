"""Named tensors written into safetensors files of bounded size, one file in memory at a time."""

import json
import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speft_optim.checkpoint.names import Tensors
from speft_optim.weights.mesh import once

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(size: int | str) -> int:
    """Return the bytes of a number or a text such as "5GB".

    Raises:
        TypeError: it is neither.
        ValueError: the text is no size, or it is less than one byte or infinite.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"max_shard_size is {size!r}, a {type(size).__name__}; pass whole bytes, or a text like '5GB'.")
    if isinstance(size, str):
        text = size.strip().upper()
        unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), None)
        try:
            number = float(text.removesuffix(unit or "")) * _UNITS[unit]
        except (KeyError, ValueError):
            raise ValueError(f"max_shard_size={size!r} is no size; pass bytes, or a text like '5GB'.") from None
    else:
        number = size
    if not 1 <= number < math.inf:
        raise ValueError(f"max_shard_size={size!r} is less than one byte or infinite; pass such as '5GB'.")
    return int(number)


def write_shards(model: nn.Module, tensors: Tensors, folder: Path | None, dtype: torch.dtype, limit: int) -> None:
    """Write named tensors, made one at a time, into files of at most `limit` bytes; more than one file get an index.

    Args:
        model: the model whose tensors these are; if it is sharded, the first process writes.
        tensors: what to write.
        folder: the folder; None in processes that only give their rows.
        dtype: of the floating tensors.
        limit: bytes of the largest file.
    """
    shards, sizes = [[]], [0]
    for name, (shape, _) in tensors.items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    place = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        place.update(dict.fromkeys(names, file))
        if folder is None:
            # For the rows that the first process lacks.
            for name in names:
                tensors[name][1]()
            part = {}
        else:
            part = {name: _on_host(tensors[name][1](), dtype) for name in names}
        once(model, partial(_save, part, folder, file))
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], folder: Path, file: str) -> None:
    save_file(tensors, folder / file, {"format": "pt"})


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach()
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
