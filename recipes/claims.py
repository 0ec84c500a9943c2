"""Claims of processes on pieces of work: the process that locks a file has the piece.

The operating system releases the locks of a process that dies, so that its pieces can be claimed again. A file that is
created exclusively would also tell who came first, but it stays when its process dies, and two others might take it
over at once.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the claim while the context lasts; yield whether it is held.

    Args:
        path: an empty file, which is created if it is missing and stays.
        wait: whether to wait until no other process holds the claim.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
