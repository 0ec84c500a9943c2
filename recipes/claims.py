"""Claims of processes on pieces of work: the process that locks a file or folder has the piece.

The operating system releases the locks of a process that dies, so that its pieces can be claimed again. A file that is
created exclusively would also tell who came first, but it stays when its process dies, and two others might take it
over at once.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the claim while the context lasts; yield whether it is held.

    Args:
        path: a folder, or an empty file, which is created if it is missing and stays.
        wait: whether to wait until no other process holds the claim.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
