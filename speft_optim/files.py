"""Atomically written files and folders: they are written under a temporary name, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from speft_optim.checks import checked_path


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in the target's folder, flush it to disk, and rename it to `path`.

    Raises:
        ValueError: the folder of `path` does not exist.
    """
    path = checked_path(path)
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


@contextmanager
def whole_folder(out: str | Path, keep: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yield a temporary folder that replaces `out` when the block ends; if the block fails, `out` stays as it was.

    A folder cannot be renamed over one that holds files, so the old one is first renamed to `.NAME.before` beside it,
    and deleted last. A process that is killed between these two renames leaves it there, whole; the next call for the
    same `out` renames it back before anything else.

    Args:
        out: the folder; its parent must exist.
        keep: tells by name which files and folders of the old folder are kept, unless the new one has one of that name.

    Raises:
        ValueError: `out` cannot be made or replaced.
    """
    # If `out` is a link, its target is replaced.
    out = checked_path(out).resolve()
    _check_replaceable(out)
    before = out.with_name(f".{out.name}.before")
    if before.is_dir() and not out.exists():
        os.replace(before, out)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".tmp", dir=out.parent))
    try:
        new.chmod(out.stat().st_mode & 0o7777 if out.exists() else 0o755)
        yield new
        if out.exists():
            _carry_over(out, new, keep)
        _replace_folder(out, new, before)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"Cannot write {out}: the folder {out.parent} does not exist; create it first.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"Cannot write {out}: it is a file; name a folder.")
    working = Path.cwd()
    if out == working or out in working.parents:
        raise ValueError(f"Cannot write {out}: the process works in it ({working}); name a folder inside it.")
    if out.is_mount():
        raise ValueError(f"Cannot write {out}: a mounted folder cannot be replaced; name a folder inside it.")


def _carry_over(old: Path, new: Path, keep: Callable[[str], bool]) -> None:
    for entry in old.iterdir():
        if not keep(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file under another name, so that a log that is open for writing goes on; copy it if links fail."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _replace_folder(out: Path, new: Path, before: Path) -> None:
    if not out.exists():
        os.replace(new, out)
        return
    # A process that was killed while it deleted the old folder has left some of it.
    shutil.rmtree(before, ignore_errors=True)
    try:
        os.replace(out, before)
        os.replace(new, out)
    except BaseException:
        if not out.exists():
            os.replace(before, out)
        raise
    shutil.rmtree(before, ignore_errors=True)


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically; equal content gives equal bytes."""
    contiguous, memory = {}, set()
    for name, tensor in tensors.items():
        # safetensors refuses tensors that share memory, as those of one mask for several weights do.
        shared = tensor.untyped_storage().data_ptr() in memory
        contiguous[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        memory.add(contiguous[name].untyped_storage().data_ptr())

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, dict(metadata))
        _sort_metadata(temporary)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, since the library writes them in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The format allows spaces after the header.
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """Find the file of each tensor in a folder's safetensors files, by the tensor's name.

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
