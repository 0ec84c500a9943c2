"""Free host memory for the weights of an offloaded model."""

import os
from pathlib import Path

_HOST = Path("/proc/meminfo")
# The limits of a container, which is ended if it takes more, are in this folder.
_CONTAINER = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Return the bytes that can be taken without swapping, within the container's limit if there is one."""
    try:
        free = 1024 * _number(_HOST, "MemAvailable:")
    except OSError:  # other systems do not tell, so that all of their memory is taken for free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit, taken = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return free
    # Files that the system keeps in memory make room when memory is needed; those of file systems in memory do not.
    dropped = sum(_number(_CONTAINER / "memory.stat", name) for name in ("inactive_file", "active_file"))
    return min(free, limit - taken + dropped)


def _number(path: Path, name: str) -> int:
    """Return the number behind a name at the beginning of a line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return int(next(words[1] for words in lines if words[0] == name))


def shortage(needed: int) -> str | None:
    """Explain that the host lacks so many bytes; None if it has them."""
    if (free := free_bytes()) >= needed:
        return None
    return (
        f"the base takes {needed / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free; take a smaller "
        "model, fewer bits, or a host with more memory"
    )
