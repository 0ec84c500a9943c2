"""Weights of a model's blocks on their way to the device: one block's at work there, the next one's under way.

Two buffers on the device hold them in turn, so that no more than two blocks' weights are ever there. A side stream
fills one buffer while work reads the other, straight from the host memory where the weights lie: its pages are locked
meanwhile, without which a copy neither runs beside the work nor reaches the bus's speed. Locking them in place leaves
every storage of the model as it is. A pinned copy of the model was rejected for it takes the host memory twice or puts
other storages into the model, and pinned staging buffers because the CPU would move every byte once more, at less than
the bus's speed.

Several batches for each visit of a block, with what lies between blocks kept on the host, would move less still. It
was rejected: batches that wait for each other need their forwards suspended at every block and autograd's backward cut
there, which no longer runs the user's model and loss as they are. Larger batches move less, too.
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


# So that every weight in a buffer starts where an allocation of its own could.
_ALIGNMENT = 256


class HostWeight(Protocol):
    """A weight that lies elsewhere."""

    shape: torch.Size
    dtype: torch.dtype

    def source(self) -> Tensor:
        """Return the weight in host memory, in any dtype."""


class _Buffer:
    """Room on the device for one block's weights, and those that are in it, or will be once `filled` has passed."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.weights: dict[Site, Tensor] = {}
        self.filled = None


class Prefetcher:
    """Brings the weights of a model's blocks to the device, each while its block is at work.

    Args:
        blocks: the weights of each block, by the (module, attribute) that holds them.
        device: where they are wanted.
        stack: takes the buffers away, once all work on them is done.

    Attributes:
        at_hand: the weights on the device of the block that is being visited.
    """

    def __init__(self, blocks: list[Mapping[Site, HostWeight]], device: torch.device, stack: contextlib.ExitStack):
        self.at_hand: dict[Site, Tensor] = {}
        self._blocks, self._device = blocks, device
        # `torch.cpu` has streams as well, whose methods do nothing: there a copy is over when the call returns.
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        size = max((sum(_aligned(_bytes(weight)) for weight in weights.values()) for weights in blocks), default=0)
        # The one at work last.
        self._buffers = [_Buffer(size, device) for _ in blocks[:2]]
        stack.callback(self._buffers.clear)
        stack.callback(self._backend.synchronize, device)

    @contextlib.contextmanager
    def visit(self, block: int, following: int) -> Iterator[None]:
        """Have a block's weights at hand while its work is queued, and send for those of the block that follows.

        Args:
            block: number of the block.
            following: number of the block that will be visited next, as far as one can tell; a wrong guess costs time.
        """
        assert not self.at_hand, "a block is visited inside another block"
        buffer = self._fetch(block)
        self._backend.current_stream(self._device).wait_event(buffer.filled)
        self._buffers.sort(key=lambda other: other is buffer)
        self._fetch(following)
        self.at_hand = buffer.weights
        try:
            yield
        finally:
            self.at_hand = {}

    def _fetch(self, block: int) -> _Buffer:
        """Return the buffer that holds the block, or the one not at work, which will."""
        for buffer in self._buffers:
            if buffer.block == block:
                return buffer
        self._fill(self._buffers[0], block)
        return self._buffers[0]

    @torch.no_grad()
    def _fill(self, buffer: _Buffer, block: int) -> None:
        # All work that reads what is in the buffer now was queued before this, in backward too: there autograd takes
        # the youngest node that is ready, so it is through with one block before the one below is computed again.
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
    """Let a CUDA device read the host memory of `tensors` by itself, until the stack closes; it stays where it is.

    Only pages that lie whole inside a tensor's storage: CUDA refuses a copy that runs over the edge of what is locked,
    so that none may be locked that holds a piece of something else, and `copy_pages_` stops at such edges. Where the
    system refuses, copies are as right and slower, and one warning says so.
    """
    cudart = torch.cuda.cudart()
    for first, last in _whole_pages(tensors):
        code = int(cudart.cudaHostRegister(first, last - first, 0))
        if code:
            logger.warning(
                "CUDA error %d: host memory cannot be locked (%d bytes); offload is slow.", code, last - first
            )
            # The runtime hands its last error to the next launch, so let one be spent on it.
            with contextlib.suppress(RuntimeError):
                torch.zeros((), device=device)
            return
        stack.callback(cudart.cudaHostUnregister, first)


def copy_pages_(out: Tensor, source: Tensor) -> None:
    """Copy host memory to contiguous `out`: the part before its first whole page, whole pages, and the rest."""
    source = source.contiguous().view(-1)
    before, pages = _pages(source.data_ptr(), source.nbytes)
    size = source.element_size()
    if before % size:
        # An element lies over the edge of a page, as in views of foreign buffers: by way of a copy.
        return copy_pages_(out, source.clone())
    cuts = [before // size, pages // size]
    cuts.append(source.numel() - sum(cuts))
    for part, piece in zip(out.view(-1).split(cuts), source.split(cuts), strict=True):
        part.copy_(piece, non_blocking=True)


def _whole_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Address ranges of the pages that lie whole inside the storages of `tensors`."""
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
    """Of `size` bytes from `address`: how many lie before the first page that is whole inside, and in whole pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    before = min(size, -address % page)
    return before, (size - before) // page * page


def _bytes(weight: HostWeight) -> int:
    return weight.shape.numel() * weight.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
