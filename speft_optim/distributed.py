"""Communication between the processes of a group: each reads its own batches; all get the same averages and masks.

A process that fails no longer takes part in communication, and the others would hang until a timeout, whose message
does not name the error. So errors are communicated too.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask


def is_distributed() -> bool:
    """Tell whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def together() -> Iterator[None]:
    """Re-raise an exception of any process in every process, so that none hangs.

    The block inside must exchange nothing between processes but by blocks of the same kind and by the functions of this
    module that exchange numbers, choices and texts. A process that fails meets the others in the next one of these, in
    which it is an error in all of them; such an error is known to all processes, and outer blocks let it pass. So they
    do with one that was given to `keep_from_others`.

    Raises:
        RuntimeError: another process failed; the message has its rank and its error.
    """
    error = None
    try:
        yield
    except Exception as raised:
        if not is_distributed() or getattr(raised, "passes_together", False):
            raise
        error = raised
    if error is None:
        _by_rank("")
        return
    _gather(_Failure(f"{type(error).__name__}: {error}"))
    error.passes_together = True
    raise error


def keep_from_others(error: Exception) -> None:
    """Let an error pass `together` unsent, since the others exchange something else now and would take it for that.

    They are left to the launcher, which ends them when this process ends, or to the timeout of the group.
    """
    error.passes_together = True


class _Failure(str):
    """What a process that failed sends in the place of what the others exchange."""


def check_equal(text: str, what: str, remedy: str) -> None:
    """Refuse a text that differs between processes.

    Args:
        text: the text of this process.
        what: what the text describes, for the message; a plural.
        remedy: what to do about a difference, for the message.

    Raises:
        ValueError: the texts of the processes differ.
    """
    texts = _by_rank(text)
    if len(set(texts)) > 1:
        raise ValueError(f"{what} differ between processes (by rank: {', '.join(texts)}); {remedy}")


def check_equal_masks(masks: Mapping[str, Mask], *, may_be_divided: bool = False) -> None:
    """Refuse masks that differ between processes, since their gradients would be averaged over different entries.

    Args:
        masks: from weight names to masks.
        may_be_divided: whether processes may also have no weight in common, as under `ZeroRedundancyOptimizer`.

    Raises:
        ValueError: the masks differ.
    """
    if may_be_divided and is_distributed():
        by_rank = _by_rank("\n".join(masks))
        names = [name for of_one in by_rank for name in of_one.split("\n") if name]
        if len(set(names)) == len(names):
            return
    remedy = (
        "select them once and share the file (Masks.save, Masks.load), or let all processes calibrate on the same "
        "batches and seed. Stages of a pipeline, which have weights of their own, cannot be sparsified."
    )
    check_equal(Masks(masks).fingerprint() if is_distributed() else "", "The masks", remedy)


def smallest(number: int) -> int:
    """Return the smallest of the processes' numbers."""
    return min(_by_rank(number))


def largest(number: int) -> int:
    """Return the largest of the processes' numbers."""
    return max(_by_rank(number))


def total(number: int) -> int:
    """Return the sum of the processes' numbers."""
    return sum(_by_rank(number))


def everywhere(choices: list[bool]) -> list[bool]:
    """Return for each choice whether all processes made it."""
    return [all(of_one) for of_one in zip(*_by_rank(choices), strict=True)]


def average_(accumulators: Iterable[Tensor], count: int) -> None:
    """Sum each accumulator over the processes and divide by `count`, in place."""
    for accumulator in accumulators:
        if is_distributed():
            dist.all_reduce(accumulator)
        accumulator /= count


def total_of(numbers: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the scalars of all processes, fp32 on `device`."""
    total = sum((number.to(device, torch.float32) for number in numbers), torch.zeros((), device=device))
    if is_distributed():
        dist.all_reduce(total)
    return total


def from_owners_(entries: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Sum fp32 entries that are zero in all processes but one, in place and without rounding, and return them.

    Args:
        entries: contiguous, fp32.
        group: the processes; None for all.
    """
    # The sum of their bits is exact, for -0.0 and NaN too.
    dist.all_reduce(entries.view(torch.int32), group=group)
    return entries


def _by_rank(thing: int | str | list[bool]) -> list:
    """Return what each process passed, by rank.

    Raises:
        RuntimeError: another process failed, and sent its error instead; it is known to all processes.
    """
    if not is_distributed():
        return [thing]
    things = _gather(thing)
    for rank, message in enumerate(things):
        if isinstance(message, _Failure):
            error = RuntimeError(f"Process {rank} failed, so that this one cannot go on. {message}")
            error.passes_together = True
            raise error
    return things


def _gather(thing: object) -> list:
    things: list = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things
