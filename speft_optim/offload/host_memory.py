"""Memory information from Linux: how much is free, and which of the process's memory is mapped from files."""

import math
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | float:
    """Return the bytes that the process can still take, those of files that can be dropped included.

    Returns:
        The smaller one of what the machine and what a container has left; infinity where the system does not tell.
    """
    machine = _numbers(Path("/proc/meminfo")).get("MemAvailable", math.inf) * 1024
    limit = _number(_GROUP / "memory.max")
    files = _numbers(_GROUP / "memory.stat")
    dropped = files.get("inactive_file", 0) + files.get("active_file", 0)
    return min(machine, limit - _number(_GROUP / "memory.current", 0) + dropped)


def mapped_ranges() -> list[range]:
    """Return the addresses of the process's memory that are mapped from files on disk."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, _, _, file, *path = line.split(maxsplit=5)
        if file != "0" and path and not path[0].startswith(("/dev/", "/memfd:")):
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append(range(first, last))
    return found


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as `name: number unit`, by their names."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _number(path: Path, default: float = math.inf) -> int | float:
    try:
        text = path.read_text().strip()
    except OSError:
        return default
    return int(text) if text.isdigit() else default
