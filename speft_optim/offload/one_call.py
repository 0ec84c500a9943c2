"""One call at a time of a model whose weights are in host memory: its copies on the device are those of one block.

A call holds the model for its thread, in which the model may call itself. A backward holds it from its first
recomputation to its end, on whichever thread autograd runs it, since each block's backward reads the copies that its
recomputation left. A lock that lets others wait was rejected: a loss of one thread would still come between forward and
backward of another, whose order nobody would have chosen.
"""

import threading
import time
from weakref import ref

import torch
from torch.autograd import Variable

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
        self._backward: ref[_Backward] | None = None

    def __enter__(self) -> None:
        until = None
        while not self._take():
            until = until or time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                raise _refusal("a backward goes through it")
            time.sleep(0.001)

    def _take(self) -> bool:
        """Return whether the model is taken for this thread, which it is not while another backward holds it."""
        thread, task = threading.get_ident(), torch._C._current_graph_task_id()
        with self._lock:
            if self._depth and self._thread != thread:
                raise _refusal("another thread calls it")
            running = None if self._backward is None else self._backward()
            if running is not None and not running.is_over and running.task != task:
                return False
            self._thread, self._depth = thread, self._depth + 1
            return True

    def __exit__(self, *_) -> None:
        with self._lock:
            self._depth -= 1

    def until_backward_ends(self) -> None:
        """Hold the model for the present backward, if there is one; called within the context."""
        task = torch._C._current_graph_task_id()
        running = None if self._backward is None else self._backward()
        if task != -1 and (running is None or running.task != task):
            running = _Backward(task)
            Variable._execution_engine.queue_callback(running)
            self._backward = ref(running)


class _Backward:
    """A backward that goes on. Only the engine keeps it: until its end, of which it is told, or until an error."""

    def __init__(self, task: int):
        self.task, self.is_over = task, False

    def __call__(self) -> None:
        self.is_over = True


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(
        f"This model's weights are in host memory (offload=), so that it can be called once at a time, and {reason}; "
        "let threads take turns with a lock around forward and backward, or give each thread a model of its own."
    )
