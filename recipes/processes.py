"""Several processes of one run, one for each GPU, as `torchrun` and `accelerate launch` start them.

Each process has the whole model and computes its share of the micro-batches of a step; gradients of trained values are
averaged once per step, 4 bytes per masked entry. So a run of several processes equals a run of one, up to rounding.
Only the first process prints and writes files.

DistributedDataParallel was rejected here: it waits for ever if a process has no batch in the short last window of an
epoch.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Others wait this long for the first one, which may be scoring a checkpoint. The launcher ends all if one fails.
_PATIENCE = datetime.timedelta(days=1)


def count() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def number() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Return whether this process is the one that prints and writes files."""
    return number() == 0


def share(items: Sequence) -> Sequence:
    """Return this process's share of the items: every n-th of n processes."""
    return items[number() :: count()]


def device() -> torch.device:
    """Return the GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check(accumulation: int) -> None:
    """Refuse a run whose processes could not share its work.

    Args:
        accumulation: forward passes in one optimizer step, of all processes together.

    Raises:
        ValueError: processes cannot share the passes evenly, or there is no GPU for each.
    """
    if accumulation % count():
        raise ValueError(
            f"--accumulation {accumulation} forward passes in a step cannot be shared evenly by {count()} processes; "
            f"make it a multiple of {count()}"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count())), torch.cuda.device_count()
    if gpus and here > gpus:
        raise ValueError(f"{here} processes were started for {gpus} GPUs; start one process a GPU")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of the run, if there are any, while the context lasts."""
    if count() == 1:
        yield
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process finish before the others begin, so that they find the files that it wrote."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def agreed(value: int) -> int:
    """Return the first process's value in all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=device())
    return values[0]


def add(tensors: Sequence[Tensor]) -> None:
    """Add up tensors over the processes, in place."""
    if count() > 1:
        for sent in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            sent.wait()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of parameters over the processes; one that is None counts as zeros."""
    if count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    add(gradients)
    torch._foreach_div_(gradients, count())
