"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed over it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the target's folder, flush it to disk, and rename it to `path`.

    Raises:
        ValueError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"Cannot write {path}: the folder {path.parent} does not exist; create it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically."""
    contiguous, memory = {}, set()
    for name, tensor in tensors.items():
        # The format refuses tensors that share memory, as one mask used for several weights does.
        shared = tensor.untyped_storage().data_ptr() in memory
        contiguous[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        memory.add(contiguous[name].untyped_storage().data_ptr())
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, dict(metadata)))


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """The file of each tensor in a folder's safetensors files, by the tensor's name.

    Raises:
        ValueError: the folder holds no safetensors file.
    """
    files: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ValueError(f"{folder} holds no safetensors file; pass a checkpoint's folder, saved as safetensors.")
    return files
