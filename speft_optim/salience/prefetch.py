"""A prefetcher of blocks' weights: while one block is computed, the weights of the next are copied to the device.

Two buffers on the device hold the weights in turn, so that no more than two blocks' are ever there. A side stream fills
one buffer while the device computes with the other. It reads host memory directly: the pages of the weights are locked
meanwhile, without which a copy would neither overlap with computation nor reach the bus's full speed. Locking leaves
every storage of the model as it is. A pinned copy of the model was rejected since it takes the host memory twice or
puts other storages into the model; pinned staging buffers since the CPU would copy every byte once more, slower than
the bus.

Passing several batches through a block each time that it is on the device would copy less. It was rejected: every
batch's forward would have to stop at every block and autograd's backward be cut there, so that the user's model and
loss would no longer run as they are. Larger batches save as much.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


Site = tuple[nn.Module, str]


# Every weight starts at a multiple of this many bytes in a buffer, as an allocation of its own would.
_ALIGNMENT = 256


class HostWeight(Protocol):
    """A weight that can be read in host memory."""

    shape: torch.Size
    dtype: torch.dtype

    def source(self) -> Tensor:
        """Return the weight in host memory, in any dtype."""


class _Buffer:
    """Memory on the device for the weights of one block.

    Attributes:
        block: number of the block whose weights it holds.
        weights: views of the memory, by module and attribute.
        filled: the event after which they are complete.
    """

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.weights: dict[Site, Tensor] = {}
        self.filled = None


class Prefetcher:
    """Copies the weights of a model's blocks to the device, each before its block is computed.

    Args:
        blocks: the weights of each block, by the (module, attribute) that holds them.
        device: the device that computes.
        stack: frees the buffers as it closes, after all work on them is done.

    Attributes:
        resident: the weights on the device of the block that is being computed.
    """

    def __init__(self, blocks: list[Mapping[Site, HostWeight]], device: torch.device, stack: contextlib.ExitStack):
        self.resident: dict[Site, Tensor] = {}
        self._blocks, self._device = blocks, device
        # `torch.cpu` has streams too, whose methods do nothing, since copies there end before the call returns.
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        size = max((sum(_aligned(_bytes(weight)) for weight in weights.values()) for weights in blocks), default=0)
        # The buffer in use comes last.
        self._buffers = [_Buffer(size, device) for _ in blocks[:2]]
        stack.callback(self._buffers.clear)
        stack.callback(self._backend.synchronize, device)

    @contextlib.contextmanager
    def holding(self, block: int, following: int) -> Iterator[None]:
        """Hold a block's weights in `resident` while the context lasts, and start to copy those of the next block.

        Args:
            block: number of the block.
            following: number of the block that is expected next; a wrong guess costs time only.
        """
        assert not self.resident, "a block is computed inside another block"
        buffer = self._fetch(block)
        self._backend.current_stream(self._device).wait_event(buffer.filled)
        self._buffers.sort(key=lambda other: other is buffer)
        self._fetch(following)
        self.resident = buffer.weights
        try:
            yield
        finally:
            self.resident = {}

    def _fetch(self, block: int) -> _Buffer:
        """Return the buffer with the block, which is the free one after a new copy if neither has it."""
        for buffer in self._buffers:
            if buffer.block == block:
                return buffer
        self._fill(self._buffers[0], block)
        return self._buffers[0]

    @torch.no_grad()
    def _fill(self, buffer: _Buffer, block: int) -> None:
        # All work that reads the buffer was queued before this. That holds in backward too: autograd runs the youngest
        # node that is ready, so it has queued one block's backward before it recomputes the block below.
        self._stream.wait_stream(self._backend.current_stream(self._device))
        buffer.block, buffer.weights, start = None, {}, 0
        with self._backend.stream(self._stream):
            for site, weight in self._blocks[block].items():
                room = buffer.memory[start : start + _bytes(weight)]
                buffer.weights[site] = room.view(weight.dtype).view(weight.shape)
                copy_pages_(buffer.weights[site], weight.source())
                start += _aligned(_bytes(weight))
        buffer.block, buffer.filled = block, self._stream.record_event()


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


def _bytes(weight: HostWeight) -> int:
    return weight.shape.numel() * weight.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
