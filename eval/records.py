"""What runs and scores leave on disk: files and folders that appear whole or not at all, checksums, versions."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside the target and renames what it wrote, so that no half file is seen.

    Args:
        path: the target; its folder is made where it is missing.
        write: writes the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends; where it fails, `path` stays as it was.

    Args:
        path: the folder; its parent is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent) as temporary:
        new, before = Path(temporary) / "new", Path(temporary) / "before"
        new.mkdir()
        yield new
        if path.exists():
            # A folder cannot be renamed over one that holds files.
            os.replace(path, before)
        os.replace(new, path)


def write_json(record: dict, path: Path) -> None:
    """Writes a record as JSON; numbers that JSON does not know become null, and lists of numbers take one line."""
    text = json.dumps(_plain(record), indent=2, allow_nan=False)
    # Strings hold no raw newline, so none is touched.
    text = re.sub(r"\[\n[\d\s.,e+-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Reads a file with one JSON value a line, blank lines aside: what to call each line in an error, and its value.

    Raises:
        ValueError: there is no such file, or a line is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}; write one JSON object a line")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from error


def save_figure(figure, path: Path, *, dpi: int = 150) -> None:
    """Saves a figure of matplotlib as a PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the bytes of the files in this order; of one file it is what `sha256sum` prints."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def package_version(name: str) -> str | None:
    """The version of a package; None where it is missing or runs from a source tree that was never installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
