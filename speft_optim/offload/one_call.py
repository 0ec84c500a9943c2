"""One call at a time of a model whose weights are in host memory: its copies on the device are those of one block.

A call holds the model for its thread, in which the model may call itself. A backward holds it from its first
recomputation to its end, on whichever thread autograd runs it, since each block's backward reads the copies that its
recomputation left. Calls within it, as of a hook or a reentrant checkpoint, belong to it, and so do backwards of what
they compute. A lock that lets others wait was rejected: a loss of one thread would still come between forward and
backward of another, whose order nobody would have chosen. On a GPU a gradient that is taken within a call of the model
is refused with the threads, since autograd computes it on another one.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from weakref import ref

from torch.autograd import Variable

from speft_optim.weights.gradient_nodes import present_backward

# Seconds that a call waits for a backward: the engine lets go of one that failed only after it has raised.
_PATIENCE = 0.2


class OneCall:
    """A context that a call of the model, or of a part of it, runs in; entered again by calls within it.

    Raises:
        RuntimeError: on entry, another thread calls the model, or another backward goes through it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._thread, self._depth = 0, 0
        # A backward within another one comes after it.
        self._backwards: list[ref[_Backward]] = []

    def __enter__(self) -> None:
        # No other thread writes this one's number, so that a call within one needs no lock.
        if self._thread == threading.get_ident():
            self._depth += 1
        else:
            self._enter(-1)

    def __exit__(self, *_) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            with self._lock:
                self._thread, self._depth = 0, 0

    @contextlib.contextmanager
    def again(self, made_in: int) -> Iterator[None]:
        """The context for a recomputation in a backward, which holds the model until it ends.

        Args:
            made_in: the `present_backward` of the forward that is recomputed.
        """
        self._enter(made_in)
        try:
            self._hold_for_backward()
            yield
        finally:
            self.__exit__()

    @property
    def is_in_backward(self) -> bool:
        """Whether a backward goes through the model; asked within the context."""
        with self._lock:
            return bool(self._running())

    def _enter(self, made_in: int) -> None:
        until = None
        while not self._take(made_in):
            until = until or time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                raise _refusal("another backward goes through it")
            time.sleep(0.001)

    def _take(self, made_in: int) -> bool:
        """Return whether the model is taken for this thread, which it is not while another backward holds it."""
        thread = threading.get_ident()
        with self._lock:
            if self._depth and self._thread != thread:
                raise _refusal("another thread calls it")
            running = [] if self._depth else self._running()
            if running and not any(one.number in (present_backward(), made_in) for one in running):
                return False
            self._thread, self._depth = thread, self._depth + 1
            return True

    def _running(self) -> list["_Backward"]:
        """The backwards that go on."""
        found = [(reference, reference()) for reference in self._backwards]
        found = [(reference, one) for reference, one in found if one is not None and not one.is_over]
        self._backwards = [reference for reference, _ in found]
        return [one for _, one in found]

    def _hold_for_backward(self) -> None:
        number = present_backward()
        with self._lock:
            if number != -1 and all(one.number != number for one in self._running()):
                running = _Backward(number)
                Variable._execution_engine.queue_callback(running)
                self._backwards.append(ref(running))


class _Backward:
    """A running backward. Only autograd's engine holds it, and calls it at the end; after an error it is freed."""

    def __init__(self, number: int):
        self.number, self.is_over = number, False

    def __call__(self) -> None:
        self.is_over = True


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(
        f"This model's weights are in host memory (offload=), so that it can be called once at a time, and {reason}; "
        "let threads take turns with a lock around forward and backward, or give each thread a model of its own."
    )
