"""How much memory the host has free for the weights of a model that is trained from there."""

from pathlib import Path

import psutil

# A container's own limit; the host's memory is larger, and taking more than the limit ends the process.
_LIMIT, _TAKEN = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def free_bytes() -> int:
    """Return the bytes that can be taken without swapping, within the container's limit if there is one."""
    free = psutil.virtual_memory().available
    try:
        return min(free, int(_LIMIT.read_text()) - int(_TAKEN.read_text()))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return free


def shortage(needed: int) -> str | None:
    """Explain that the host lacks so many bytes; None if it has them."""
    if (free := free_bytes()) >= needed:
        return None
    return (
        f"the base takes {needed / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free; take a smaller "
        "model, fewer bits, or a host with more memory"
    )
