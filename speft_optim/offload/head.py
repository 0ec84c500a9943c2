"""The weight of the model's head, copied to the device while the last blocks of a forward are computed.

The head is the largest weight of most models, and only the loss needs it. If it were copied when the loss needs it, the
device would wait: 20 ms for the 1 GB of Llama-3-8B. So it is copied in pieces, one during each of the last blocks, so
that the copies of the blocks' own weights are not delayed much. It is not on the device in backward.

This needs memory for head and block together, so it is done only if there is room for a head beyond the peak so far.
Otherwise the head is copied when the loss needs it.
"""

import contextlib

import torch
from torch import Tensor, nn

from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.pages import copy_pages_

# By count the copy of an NF4 block takes about half of the time of its forward, and the rest of so many blocks is
# enough for the head of Llama-3-8B.
_PIECES = 8


class HeadCopy:
    """Copies the head's weight ahead of its use, once for each forward.

    Args:
        module: the module of the logits.
        weight: its weight, in host memory that the device reads directly.
        stream: the stream on which the device takes copies.
        blocks: the number of blocks.
        stack: frees the copy, if one is there, as it closes.
    """

    def __init__(
        self, module: nn.Module, weight: HostWeight, stream: torch.Stream, blocks: int, stack: contextlib.ExitStack
    ):
        self._module, self._weight, self._stream = module, weight, stream
        self._backend = torch.get_device_module(weight.device)
        self._count = min(_PIECES, blocks, weight.shape[0])
        self._copy: Tensor | None = None
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._state: tuple = ()
        self._filled: torch.Event | None = None
        weight.ahead = self
        stack.callback(setattr, weight, "ahead", None)
        stack.callback(self.drop)

    def approach(self, blocks_before: int | None) -> None:
        """Queue the copies of pieces that should be under way by now.

        Args:
            blocks_before: how many blocks are computed between the present one and the head; None if a block is
                recomputed in backward, after which no head comes.
        """
        if blocks_before is None or blocks_before >= self._count:
            # A forward that did not use the head must not leave a copy.
            self.drop()
        elif self._is_wanted():
            if blocks_before == self._count - 1:
                self._begin()
            self._queue(max(0, len(self._pieces) - blocks_before))

    def _is_wanted(self) -> bool:
        """Whether the loss will ask for a copy: none is there yet, for the rest of the model's call or for good."""
        return "weight" not in self._module.__dict__ and not self._weight.keeps_copy

    # What is made in inference mode could not be used in training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin(self) -> None:
        self.drop()
        source, self._state = self._weight.source(), self._weight.state()
        if not _has_room(self._weight.device, source.nbytes):
            return
        self._copy = torch.empty(source.shape, dtype=source.dtype, device=self._weight.device)
        both = (tensor.tensor_split(self._count) for tensor in (self._copy, source))
        self._pieces = list(zip(*both, strict=True))
        # The memory of the copy may have been another tensor's until now.
        self._stream.wait_stream(self._backend.current_stream(self._weight.device))

    @torch.no_grad()
    def _queue(self, count: int) -> None:
        """Queue the copies of the next `count` pieces."""
        for _ in range(count):
            with self._backend.stream(self._stream):
                copy_pages_([self._pieces.pop(0)])
            self._filled = self._stream.record_event()

    def take(self) -> Tensor | None:
        """Return and release the copy if it is complete and current; it lacks the trained values."""
        is_whole = self._copy is not None and not self._pieces and self._state == self._weight.state()
        if not is_whole:
            self.drop()
            return None
        copy, self._copy = self._copy, None
        self._wait()
        return copy

    def drop(self) -> None:
        """Free a copy that was not used."""
        if self._copy is not None:
            # The memory may be another tensor's from now on.
            self._wait()
            self._copy, self._pieces = None, []

    def _wait(self) -> None:
        if self._filled is not None:
            self._backend.current_stream(self._weight.device).wait_event(self._filled)


def _has_room(device: torch.device, nbytes: int) -> bool:
    """Return whether a device has so many bytes beyond the most that tensors took so far."""
    if device.type != "cuda":
        return True
    held, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(held + free, allowed) >= torch.cuda.max_memory_allocated(device) + nbytes
