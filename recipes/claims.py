"""Claims of several processes on pieces of work: who holds the lock of a file has the piece.

The operating system gives up the locks of a process that dies, however it dies, so that what it had claimed can be
claimed again. A file that is created exclusively says who came first as well, but stays behind a dead process; who
takes it over may meet another who does the same.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the claim within the block, and say whether it is held.

    Args:
        path: a file of no content; it is made where it is missing, and stays.
        wait: wait for whoever holds the claim.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
