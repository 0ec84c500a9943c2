"""Host memory that a GPU reads directly: its pages are locked in place, and copies keep to whole pages."""

import contextlib
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def lock_pages(tensors: Iterable[Tensor], device: torch.device, stack: contextlib.ExitStack) -> None:
    """Lock the host memory of `tensors` in place until the stack closes, so that a CUDA device can read it directly.

    CUDA refuses a copy that crosses the edge of locked memory. So only pages that lie wholly inside a storage are
    locked, and `copy_pages_` copies the rest apart. If the system refuses to lock, copies are slower, and one warning
    says so.

    Args:
        tensors: tensors in CPU memory.
        device: a CUDA device.
        stack: unlocks the pages.
    """
    cudart = torch.cuda.cudart()
    for first, last in _whole_pages(tensors):
        code = int(cudart.cudaHostRegister(first, last - first, 0))
        if code:
            logger.warning(
                "CUDA error %d: %d bytes of host memory cannot be locked, so that offload is slow.", code, last - first
            )
            # The runtime reports its last error at the next launch, so this launch takes it.
            with contextlib.suppress(RuntimeError):
                torch.zeros((), device=device)
            return
        stack.callback(cudart.cudaHostUnregister, first)


def copy_pages_(out: Tensor, source: Tensor) -> None:
    """Copy host memory to contiguous `out` in three parts: before its first whole page, whole pages, and the rest."""
    source = source.contiguous().view(-1)
    before, pages = _pages(source.data_ptr(), source.nbytes)
    size = source.element_size()
    if before % size:
        # An element crosses the edge of a page, as it may in views of other libraries' buffers, so copy it first.
        return copy_pages_(out, source.clone())
    cuts = [before // size, pages // size]
    cuts.append(source.numel() - sum(cuts))
    for part, piece in zip(out.view(-1).split(cuts), source.split(cuts), strict=True):
        part.copy_(piece, non_blocking=True)


def _whole_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return the address ranges of the pages that lie whole inside the storages of `tensors`."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not tensor.is_pinned():
            storages[storage.data_ptr()] = storage.nbytes()
    ranges = []
    for address, size in storages.items():
        before, pages = _pages(address, size)
        if pages:
            ranges.append((address + before, address + before + pages))
    return ranges


def _pages(address: int, size: int) -> tuple[int, int]:
    """Return how many of `size` bytes from `address` lie before the first whole page, and how many in whole pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    before = min(size, -address % page)
    return before, (size - before) // page * page
