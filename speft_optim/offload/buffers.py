"""Buffers on the device that hold the weights of one block at a time, and how each is filled."""

from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.pages import PageCopies
from speft_optim.offload.quantized import HostQuantized

Site = tuple[nn.Module, str]


# Every weight starts at a multiple of this many bytes in a buffer, as an allocation of its own would.
_ALIGNMENT = 256


class Filling(NamedTuple):
    """How a buffer is filled with a block, which holds until a weight of the block changes in host memory.

    Attributes:
        weights: the copies of its weights in the buffer, by module and attribute.
        direct: the copies that the device makes by itself.
        staged: the other copies as pairs of (part of the buffer, host memory).
    """

    weights: dict[Site, Tensor]
    direct: PageCopies
    staged: list[tuple[Tensor, Tensor]]


class Buffer:
    """Memory on the device for the weights of one block.

    Attributes:
        memory: the memory, (bytes,) uint8.
        block: number of the block whose weights it holds.
        weights: the copies in this memory, by module and attribute.
        states: the states of the weights in host memory that were copied, see `HostWeight.state`.
        job: the work of the thread that queues the copies, or None where they are queued.
        filled: the event after which they are complete.
    """

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.weights: dict[Site, Tensor] = {}
        self.states: list[tuple] = []
        self.job: Future | None = None
        self.filled = None

    def wait_until_queued(self) -> None:
        """Wait for the thread that queues the copies, if there is one.

        Raises:
            Exception: what the thread raised; the buffer then holds no block.
        """
        if self.job is not None:
            try:
                self.job.result()
            except BaseException:
                self.block = None
                raise
            self.job = None


def bytes_of(weight: HostWeight | HostQuantized) -> int:
    """Return the bytes that a weight's copy takes in a buffer."""
    return sum(aligned(shape.numel() * dtype.itemsize) for shape, dtype in weight.forms)


def aligned(size: int) -> int:
    """Return a size with the gap before the next weight."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
