"""Records of runs and scores: JSON, plots, checksums and versions."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from speft_optim.files import write_atomically


def write_json(record: dict, path: Path) -> None:
    """Write a record as JSON; NaN and infinities become null, and lists of numbers take one line."""
    text = json.dumps(_plain(record), indent=2, allow_nan=False)
    # JSON strings hold no raw newline, so the pattern cannot match inside one.
    text = re.sub(r"\[\n[\d\s.,e+-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Read a file with one JSON value per line; yield a name of each line for errors, and its value. Skip blank lines.

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
    """Save a figure of matplotlib as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def hash_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the bytes of the files in this order; for one file it is what `sha256sum` prints."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def package_version(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
