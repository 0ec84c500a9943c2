"""Modes of the benchmark in separate processes, so that their peaks of memory are independent.

On several GPUs a mode has one process a GPU. If one of them fails, the others wait for it in a collective, or at the
end of the process group. So the first error of a mode is written to torchrun's store, which all its processes check.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

_BENCHMARK = Path(__file__).with_name("benchmark.py")


def run_apart(mode: str, words: list[str], environment: dict[str, str] | None = None) -> dict:
    """Run one mode in a new process; an error becomes a row, and others still run."""
    command = [sys.executable, str(_BENCHMARK), *words, "--modes", mode, "--in-process"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode < 0:  # as by the system, if the host is out of memory
        return {"mode": mode, "error": f"ended by {signal.Signals(-done.returncode).name}"}
    return {"mode": mode, "error": (done.stderr.strip() or "no message").splitlines()[-1][:300]}


def run_together(mode: str, words: list[str]) -> dict:
    """Run one mode in a new process for each GPU; the first error of any is that of all."""
    row = run_apart(mode, words)
    if "error" in row and distributed.is_torchelastic_launched():
        # A process that was killed has left no error itself.
        row["error"] = _first_error(_failures(mode), row["error"])
    return row


@contextlib.contextmanager
def ending_together(mode: str) -> Iterator[Callable[[str], NoReturn]]:
    """End this process with an error as soon as the process of any GPU fails in a mode, on which it would wait in vain.

    Args:
        mode: the mode.

    Yields:
        A function that ends all processes of the mode with a message. An exception ends them too. The message of the
        first that fails is the last line on stderr of each.
    """
    # A connection of its own: the process group blocks the one that it has while it waits for other processes.
    store = _failures(mode)
    ended = threading.Event()

    def end(message: str) -> NoReturn:
        print(_first_error(store, message), file=sys.stderr, flush=True)
        # Neither a collective that runs on the GPU nor `destroy_process_group` would return.
        os._exit(1)

    def watch() -> None:
        while not ended.wait(0.5):
            if store.check(["message"]):
                end("another process failed")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield end
    except Exception as error:  # whatever it is, the other processes cannot go on
        end("out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}")
    ended.set()
    watcher.join()


def _failures(mode: str) -> distributed.Store:
    """Connect to torchrun's store, which outlives the processes of all modes, for the error of one mode."""
    return distributed.PrefixStore(f"{mode} failed", next(rendezvous("env://"))[0])


def _first_error(store: distributed.Store, message: str) -> str:
    """Return the first error of the mode, which is this one if there was none."""
    return store.compare_set("message", "", message.partition("\n")[0][:300]).decode()
