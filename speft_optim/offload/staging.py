"""Copies host memory that a device cannot read directly, through small pinned buffers, in a separate thread.

A GPU reads pinned pages in parallel with its computation. For copies from other memory, such as a mapped checkpoint,
the CPU has to wait. So a thread copies such memory into one of two pinned buffers, from which the GPU reads it, while
the caller continues to launch the kernels of the previous block.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

_BYTES = 32 * 2**20


class Staging:
    """Two buffers in host memory, and the thread that fills them.

    Args:
        device: the device that computes.
        stream: the stream on which it takes copies.
    """

    def __init__(self, device: torch.device, stream: torch.Stream):
        self._device, self._stream = device, stream
        # The buffers are made when they are needed, in the thread. The next one to fill comes first, each with the
        # event after which the device has taken what was in it.
        self._buffers: list[tuple[Tensor, torch.Event | None]] = []
        self._thread = ThreadPoolExecutor(1, "speft_optim_staging")

    def submit(self, work: Callable[[], None]) -> Future:
        """Let the thread do some work after all that was submitted before."""
        return self._thread.submit(work)

    def copy_(self, out: Tensor, source: Tensor) -> None:
        """Copy host memory to contiguous `out` on the device, cast to its dtype; called in the thread."""
        if not self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers = [(torch.empty(_BYTES, dtype=torch.uint8, pin_memory=pinned), None) for _ in range(2)]
        length = _BYTES // out.itemsize
        parts = source.contiguous().view(-1).split(length)
        for target, part in zip(out.view(-1).split(length), parts, strict=True):
            memory, taken = self._buffers.pop(0)
            if taken is not None:
                taken.synchronize()
            staged = memory[: target.nbytes].view(out.dtype)
            staged.copy_(part)
            target.copy_(staged, non_blocking=True)
            self._buffers.append((memory, self._stream.record_event()))

    def close(self) -> None:
        """Wait for all submitted work, and end the thread."""
        self._thread.shutdown()
