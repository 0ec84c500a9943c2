"""Estimation over several processes: each sees its own batches, all end with the same averages and the same masks."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def together(work: Callable[[], int]) -> int:
    """Run `work` in every process and sum what it returns; an error in one is an error in all, so that none hangs.

    Raises:
        RuntimeError: another process failed.
    """
    if not is_distributed():
        return work()
    error, count = None, 0
    try:
        count = work()
    except Exception as raised:  # noqa: BLE001 - handed on below, after the others know
        error = raised
    failed, total = _reduced([int(error is not None), count], dist.ReduceOp.SUM)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"Salience estimation failed in {failed} other processes; their messages say why.")
    return total


def smallest(number: int) -> int:
    """The least of the processes' numbers."""
    return _reduced([number], dist.ReduceOp.MIN)[0] if is_distributed() else number


def average_(accumulators: Iterable[Tensor], count: int) -> None:
    """Sum each accumulator over the processes and divide by `count`, in place."""
    for accumulator in accumulators:
        if is_distributed():
            dist.all_reduce(accumulator)
        accumulator /= count


def _reduced(numbers: list[int], operation) -> list[int]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=operation)
    return tensor.tolist()
