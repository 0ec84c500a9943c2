"""Scenarios that several processes run together, all in the same ones, since starting a process takes seconds."""

import datetime
import os
import socket
import traceback

import torch
import torch.distributed as dist

# Its last is where all processes find the same files.
FOLDER: list[str] = []


def run_all(rank, count, port, folder, scenarios):
    """Run every scenario in one of `count` processes and leave what went wrong in a file."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank)
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    # A process that waits for another in vain is a failure and not a test that never ends.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    FOLDER.append(folder)
    failures = {}
    for scenario in scenarios:
        try:
            scenario(rank)
        except BaseException:
            failures[scenario.__name__] = traceback.format_exc()
    torch.save(failures, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def failures_of(scenarios, folder, start_method, count=2):
    """What went wrong in each of `count` processes, by the scenario's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = count, port, str(folder), scenarios
    torch.multiprocessing.start_processes(run_all, arguments, nprocs=count, start_method=start_method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
