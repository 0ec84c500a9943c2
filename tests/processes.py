"""Scenarios that several processes run together, all in the same ones, since starting a process takes seconds.

On the CPU they talk through gloo, on GPUs, one for each process, through NCCL alone, which takes no tensor of the CPU.
"""

import contextlib
import datetime
import os
import signal
import socket
import traceback

import conftest
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

# Its last is where all processes find the same files.
FOLDER: list[str] = []

_SKIPPED = "skipped: "


def on_two_gpus(test):
    """Mark of a test whose processes have a GPU each."""
    enough = dist.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= 2
    return pytest.mark.gpu(pytest.mark.skipif(not enough, reason="needs two CUDA devices and NCCL")(test))


def _use_gpu(rank):
    """Let this process compute on its GPU, twice the same to the last bit: torch's attention in parts would not."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for backend in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    conftest.DEVICE.append(torch.device("cuda", rank))


def run_all(rank, count, port, folder, scenarios, kind):
    """Run scenarios in one of `count` processes until one fails, and leave in files how far it came and what failed."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank)
    )
    # accelerate would let each process compute with as many threads as it finds free, if this were not set.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if kind == "cuda":
        _use_gpu(rank)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # A process that waits for another in vain is a failure and not a test that never ends.
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    FOLDER.append(folder)
    ends = {}
    for scenario in scenarios:
        torch.save((scenario.__name__, ends), f"{folder}/{rank}.pt")
        try:
            scenario(rank)
        except pytest.skip.Exception as skipped:
            ends[scenario.__name__] = f"{_SKIPPED}{skipped}"
        except BaseException:
            ends[scenario.__name__] = traceback.format_exc()
            torch.save((scenario.__name__, ends), f"{folder}/{rank}.pt")
            # What is still on its way to other processes is not waited for.
            os._exit(1)
    torch.save((None, ends), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # How the libraries of a GPU are taken down is not looked at.
    os._exit(0)


def failures_of(scenarios, folder, start_method, count=2, kind="cpu"):
    """What went wrong in each of `count` processes, by the scenario's name; `assert_passed` reads it.

    A failure leaves the processes out of step, so that those that are left run in new ones.
    """
    failures, rest = [{} for _ in range(count)], [scenario.__name__ for scenario in scenarios]
    while rest:
        codes = _run(scenarios[-len(rest) :], folder, start_method, count, kind)
        reports = [_report(folder, rank, code) for rank, code in enumerate(codes)]
        failed = [name for ends in reports for name, end in ends.items() if not end.startswith(_SKIPPED)]
        if any(codes) and not failed:
            raise RuntimeError(f"processes ended with codes {codes} after their last scenario")
        # Of a later scenario, in which another process waited in vain, nothing is known.
        over = rest[: 1 + min(map(rest.index, failed))] if failed else rest
        for found, ends in zip(failures, reports, strict=True):
            found.update((name, end) for name, end in ends.items() if name in over)
        rest = rest[len(over) :]
    return failures


def _report(folder, rank, code):
    """How scenarios that did not pass ended in one process, by name; that of a process that was ended is one end."""
    running, ends = torch.load(folder / f"{rank}.pt")
    if running is not None:
        ends.setdefault(running, f"the process ended with {signal.Signals(-code).name if code < 0 else code}")
    return ends


def _run(scenarios, folder, start_method, count, kind):
    """Start processes, wait for them, and return their exit codes, negative for signals."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(count):
        (folder / f"{rank}.pt").unlink(missing_ok=True)
    arguments = count, port, str(folder), scenarios, kind
    context = torch.multiprocessing.start_processes(run_all, arguments, count, join=False, start_method=start_method)
    with contextlib.suppress(ProcessExitedException):
        # When one has failed the others have a moment to fail too, and say so, before they are ended.
        while not context.join(grace_period=10):
            pass
    return [process.exitcode for process in context.processes]


def assert_passed(failures, scenario):
    """Fail with what any process reports of the scenario, or skip the test for the reason for which they skipped it."""
    reports = {rank: failed[scenario] for rank, failed in enumerate(failures) if scenario in failed}
    if reports and all(report.startswith(_SKIPPED) for report in reports.values()):
        pytest.skip(reports.popitem()[1].removeprefix(_SKIPPED))
    assert not reports, "\n".join(f"rank {rank}: {report}" for rank, report in reports.items())
