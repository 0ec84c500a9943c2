"""Host memory that a GPU reads directly: its pages are pinned (page-locked) in place, and whole pages are copied."""

import contextlib
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from speft_optim.offload.host_memory import available_bytes, mapped_ranges

logger = logging.getLogger(__name__)

# Tensors of up to so many bytes are copied whole through locked memory: in one part rather than by pages and two edges.
_SMALL = 2**14


def lock_pages(tensors: Iterable[Tensor], device: torch.device, stack: contextlib.ExitStack) -> set[int]:
    """Lock the host memory of `tensors` in place until the stack closes, so that a CUDA device can read it directly.

    CUDA refuses a copy that crosses the edge of locked memory. So only pages that lie wholly inside a storage are
    locked, and `copy_pages_` copies the rest apart. Memory that is mapped from files, as `from_pretrained` leaves it,
    is read when it is locked, and so locked only where there is room for it. If some memory is not locked, copies of it
    are slower, and one warning says so.

    Args:
        tensors: tensors in CPU memory.
        device: a CUDA device.
        stack: unlocks the pages.

    Returns:
        The addresses of the storages that the device reads directly.
    """
    # Locked memory cannot be given back under need, so an eighth is left to others.
    mapped, room = mapped_ranges(), 7 / 8 * available_bytes()
    direct, left, reason = set(), 0, ""
    for address, (first, size) in _whole_pages(tensors).items():
        taken = size if any(first in run for run in mapped) else 0
        if taken > room:
            problem = "memory-mapped from files, and larger than the memory left"
        else:
            problem = _lock(first, size, device, stack)
        if problem:
            left, reason = left + size, reason or problem
        else:
            room -= taken
            direct.add(address)
    if left:
        logger.warning(
            "%d bytes of host memory cannot be pinned (%s); the CPU copies them via pinned buffers, which is slower.",
            left,
            reason,
        )
    return direct


def _lock(first: int, size: int, device: torch.device, stack: contextlib.ExitStack) -> str:
    """Lock `size` bytes from address `first` on until the stack closes; return why not, or nothing."""
    cudart = torch.cuda.cudart()
    if not size:
        return ""
    if code := int(cudart.cudaHostRegister(first, size, 0)):
        # The runtime reports its last error at the next launch, so this launch takes it.
        with contextlib.suppress(RuntimeError):
            torch.zeros((), device=device)
        return f"CUDA error {code}"
    stack.callback(cudart.cudaHostUnregister, first)
    return ""


def copy_pages_(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy host memory to a device once, see `PageCopies`."""
    PageCopies(copies).queue()


class PageCopies:
    """Copies of host memory to a device: whole pages directly, edges and small tensors through other locked memory.

    From memory that is not locked CUDA copies, by its documentation, only when all work before on the stream is done.
    So edges and small tensors are joined in locked memory, travel in one copy, and are put in their places on the
    device: each copy from the host costs the CPU some microseconds. What is to be copied from where is found out once,
    so that the same copies can be queued at little cost again.

    Args:
        copies: contiguous tensors on the device, each with the tensor in host memory that it is a copy of.
    """

    def __init__(self, copies: Iterable[tuple[Tensor, Tensor]]):
        whole, edges = [], []
        for out, source in copies:
            out, source = _bytes_of(out), _bytes_of(source.to(out.dtype))
            before, pages = _pages(source.data_ptr(), len(source)) if len(source) > _SMALL else (len(source), 0)
            cuts = [before, pages, len(source) - before - pages]
            first, middle, last = zip(out.split(cuts), source.split(cuts), strict=True)
            whole += [middle] if pages else []
            edges += [pair for pair in (first, last) if len(pair[1])]
        self._outs, self._sources = [list(side) for side in zip(*whole, strict=True)] or [[], []]
        self._places, self._edges = [list(side) for side in zip(*edges, strict=True)] or [[], []]
        self._taken = None
        if edges:
            self._sizes = [len(piece) for piece in self._edges]
            self._locked = torch.empty(sum(self._sizes), dtype=torch.uint8, pin_memory=self._places[0].is_cuda)

    @torch.no_grad()
    def queue(self) -> None:
        """Queue the copies of what is in host memory now on the current stream."""
        if self._outs:
            torch._foreach_copy_(self._outs, self._sources, non_blocking=True)
        if not self._edges:
            return
        if self._taken is not None:
            # The device may not have taken yet what was queued last.
            self._taken.synchronize()
        torch.cat(self._edges, out=self._locked)
        arrived = self._locked.to(self._places[0].device, non_blocking=True)
        torch._foreach_copy_(self._places, arrived.split(self._sizes))
        if arrived.is_cuda:
            self._taken = torch.cuda.current_stream(arrived.device).record_event()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _whole_pages(tensors: Iterable[Tensor]) -> dict[int, tuple[int, int]]:
    """Return by the addresses of the storages of `tensors` the first whole page inside and the bytes of all of them."""
    runs = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not tensor.is_pinned():
            before, pages = _pages(storage.data_ptr(), storage.nbytes())
            runs[storage.data_ptr()] = storage.data_ptr() + before, pages
    return runs


def _pages(address: int, size: int) -> tuple[int, int]:
    """Return how many of `size` bytes from `address` lie before the first whole page, and how many in whole pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    before = min(size, -address % page)
    return before, (size - before) // page * page
