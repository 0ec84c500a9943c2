"""A prefetcher of blocks' weights: while one block is computed, the weights of the next are copied to the device.

Two buffers on the device hold the weights in turn, so that there are never weights of more than two blocks on the
device, besides resident blocks. These have their own buffers, which are filled once, and again when a weight in host
memory has changed. A side stream fills one of the two buffers while the device computes with the other, or both during
a resident block. It reads host memory directly: the pages of the weights are pinned, without which a copy would neither
overlap with computation nor reach the bus's full speed. Pinning in place does not change the model's storages. A pinned
copy of the model was rejected since it needs the host memory twice or replaces the model's storages. Memory that is not
pinned, mainly mapped checkpoints, is copied through small pinned buffers (`offload/staging.py`), for which the CPU
copies every byte once more.

Passing several batches through a block each time that it is on the device would copy less. It was rejected: every
batch's forward would have to stop at every block and autograd's backward be cut there, so that the user's model and
loss would no longer run as they are. Larger batches save as much.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import wait
from functools import partial
from itertools import islice
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from speft_optim.offload.buffers import Buffer, Filling, Site, aligned, bytes_of
from speft_optim.offload.head import HeadCopy
from speft_optim.offload.host_parameter import plainly
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.one_call import OneCall
from speft_optim.offload.pages import PageCopies
from speft_optim.offload.quantized import HostQuantized
from speft_optim.offload.staging import Staging
from speft_optim.weights.values_in_forward import ValuesInForward


class Following(NamedTuple):
    """What is expected after a block; a wrong guess costs time only.

    Attributes:
        blocks: numbers of the blocks, in their order.
        before_head: how many blocks come before the model's head in this forward; None in backward.
    """

    blocks: tuple[int, ...]
    before_head: int | None


class Held(NamedTuple):
    """How a block was held in its forward, as it must be in its recomputations.

    Attributes:
        buffer: where its weights were; a quantised product goes back to the copy that it was formed with. Nothing keeps
            the memory for a loss that outlives `desparsify`.
        values: by weight what was attached to it.
    """

    buffer: ref[Buffer]
    values: list[ValuesInForward]


class Prefetcher:
    """Copies the weights of a model's blocks to the device, each before its block is computed.

    Args:
        blocks: the weights of each block, by the (module, attribute) that holds them.
        device: the device that computes.
        stack: frees the buffers as it closes, after all work on them is done.
        direct: the addresses of storages in host memory that the device reads directly; others are staged.
        staying: numbers of the blocks whose weights stay on the device, see `staying_blocks`.
        head: the module of the logits and its weight, which comes with the last blocks of a forward; or None.

    Attributes:
        resident: the weights on the device of the block that is being computed.
        nbytes: the bytes of device memory that the buffers take.
        one_call: what each call of the model or of a part of it runs in.
    """

    def __init__(
        self,
        blocks: list[Mapping[Site, HostWeight | HostQuantized]],
        device: torch.device,
        stack: contextlib.ExitStack,
        direct: Set[int],
        staying: Set[int] = frozenset(),
        head: tuple[nn.Module, HostWeight] | None = None,
    ):
        self.resident: dict[Site, Tensor] = {}
        # The block that was recomputed last, and its buffer.
        self._computed_again: tuple[int, ref[Buffer]] | None = None
        self.one_call = OneCall()
        self._blocks, self._device, self._direct = blocks, device, direct
        # `torch.cpu` has streams too, whose methods do nothing, since copies there end before the call returns.
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        sizes = [sum(map(bytes_of, weights.values())) for weights in blocks]
        streamed = [size for block, size in enumerate(sizes) if block not in staying]
        # The buffer that was used last comes last.
        self._buffers = [Buffer(max(streamed), device) for _ in streamed[:2]]
        # The buffers of blocks that stay, by their numbers.
        self._own = {block: Buffer(sizes[block], device) for block in sorted(staying)}
        for buffer in (*self._buffers, *self._own.values()) if device.type == "cuda" else ():
            # A model may be given up while copies are under way.
            buffer.memory.record_stream(self._stream)
        self.nbytes = sum(max(streamed) for _ in self._buffers) + sum(sizes[block] for block in self._own)
        # By block the states of its weights, and how each buffer is filled with them.
        self._fillings: dict[int, tuple[list[tuple], dict[Buffer, Filling]]] = {}
        self._staging = Staging(device, self._stream)
        self._head = None
        if head is not None and all(self._is_direct(source, source) for source in head[1].sources()):
            self._head = HeadCopy(*head, self._stream, len(blocks), stack)
        stack.callback(self._buffers.clear)
        stack.callback(self._own.clear)
        stack.callback(self._fillings.clear)
        stack.callback(self._backend.synchronize, device)
        stack.callback(self._staging.close)

    @contextlib.contextmanager
    def holding(self, block: int, following: Following, in_forward: Held | None = None) -> Iterator[Held]:
        """Hold a block's weights in `resident` while the context lasts, and start to copy those of the next blocks.

        Args:
            block: number of the block.
            following: what is expected after it.
            in_forward: for a recomputation, what the context of the forward gave.

        Raises:
            RuntimeError: values attached to the block have changed since its forward.
        """
        is_again = in_forward is not None
        buffer = self._bring(block, in_forward.buffer() if is_again else None)
        self._buffers.sort(key=lambda other: other is buffer)
        self._prefetch(block, following.blocks)
        if self._head is not None:
            self._head.approach(following.before_head)
        overlaid = zip(self._blocks[block].values(), self._overlay(block, buffer), strict=True)
        if is_again:
            for before, (_, values) in zip(in_forward.values, overlaid, strict=True):
                before.check(values)
            self._computed_again = block, in_forward.buffer
        else:
            in_forward = Held(ref(buffer), [ValuesInForward(weight.name, values) for weight, values in overlaid])
        self.resident = buffer.weights
        try:
            yield in_forward
        finally:
            self.resident = {}
            if not is_again and self.one_call.is_in_backward:
                self._restore()

    def _restore(self) -> None:
        """Bring back the block whose backward a call within it, as of a hook, may have interrupted."""
        block, buffer = self._computed_again
        if (buffer := buffer()) is not None and buffer.block != block:
            self._overlay(block, self._bring(block, buffer))

    def _bring(self, block: int, place: Buffer | None) -> Buffer:
        """Return the buffer with the block, in the stream of the computation."""
        buffer = self._fetch(block, place)
        buffer.wait_until_queued()
        self._backend.current_stream(self._device).wait_event(buffer.filled)
        return buffer

    def _overlay(self, block: int, buffer: Buffer) -> list[list[Tensor]]:
        """Write the trained entries of now, which an optimizer may have changed since the copy began; return them."""
        return [weight.overlay_(buffer.weights[site]) for site, weight in self._blocks[block].items()]

    def _prefetch(self, block: int, following: Iterable[int]) -> None:
        """Start to copy the next block, and as many of those that do not stay as buffers are not in use."""
        following = [other for other in dict.fromkeys(following) if other != block]
        free = len(self._buffers) - (block not in self._own)
        streamed = islice((other for other in following if other not in self._own), free)
        wanted = dict.fromkeys((*(other for other in following[:1] if other in self._own), *streamed))
        for other in wanted:
            buffer = self._buffer_of(other)
            buffer = buffer or next(one for one in self._buffers if one.block not in (block, *wanted))
            if buffer.block != other:
                # Whether a weight has changed since it was copied last is found out when the block is computed.
                self._fill(buffer, other, self._fillings[other][0] if other in self._fillings else self._states(other))

    def _buffer_of(self, block: int) -> Buffer | None:
        """Return the buffer that is the block's own or that holds it, if there is one."""
        return self._own.get(block) or next((buffer for buffer in self._buffers if buffer.block == block), None)

    def _states(self, block: int) -> list[tuple]:
        """Return the states of the block's weights in host memory."""
        return plainly(lambda: [weight.state() for weight in self._blocks[block].values()])

    def _fetch(self, block: int, place: Buffer | None) -> Buffer:
        """Return the buffer with the block as it is now, after a new copy if none has it.

        Args:
            block: number of the block.
            place: the buffer that it must be in; None for any.
        """
        if not self._buffers and not self._own:
            raise RuntimeError(
                "This loss was computed before desparsify, and its backward needs weights that are no longer copied to "
                f"{self._device}; call backward before desparsify, or compute the loss again."
            )
        states = self._states(block)
        # A block that changed in host memory is copied into its own buffer again.
        buffer = self._buffer_of(block)
        if place not in (None, buffer):
            if buffer is not None:
                buffer.block = None
            buffer = place
        elif buffer is None:
            buffer = self._buffers[0]
        if buffer.block != block or buffer.states != states:
            self._fill(buffer, block, states)
        return buffer

    # What is made in inference mode could not be used in training.
    @torch.inference_mode(False)
    def _fill(self, buffer: Buffer, block: int, states: list[tuple]) -> None:
        if buffer.job is not None:
            # It still queues copies of a block that was expected and did not come.
            wait([buffer.job])
        # All work that reads the buffer was queued before this. That holds in backward too: autograd runs the youngest
        # node that is ready, so it has queued one block's backward before it recomputes the block below.
        self._stream.wait_stream(self._backend.current_stream(self._device))
        buffer.block = None
        if block not in self._fillings or self._fillings[block][0] != states:
            # What the other buffer has is of former weights too.
            self._fillings[block] = states, {}
        fillings = self._fillings[block][1]
        if buffer not in fillings:
            fillings[buffer] = self._filling(buffer.memory, block)
        filling = fillings[buffer]
        buffer.weights = filling.weights
        copy = partial(self._copy, buffer, filling)
        buffer.job = self._staging.submit(copy) if filling.staged else None
        if buffer.job is None:
            copy()
        buffer.block, buffer.states = block, states

    def _filling(self, memory: Tensor, block: int) -> Filling:
        """Cut a buffer's memory into the weights of a block."""
        weights, direct, staged, start = {}, [], [], 0
        for site, weight in self._blocks[block].items():
            sources = weight.sources()
            parts = []
            for shape, dtype in weight.forms:
                size = shape.numel() * dtype.itemsize
                parts.append(memory.narrow(0, start, size).view(dtype).view(shape))
                start += aligned(size)
            weights[site] = weight.assemble(parts)
            for part, source in zip(parts, sources, strict=True):
                (direct if self._is_direct(part, source) else staged).append((part, source))
        return Filling(weights, PageCopies(direct), staged)

    @torch.no_grad()
    def _copy(self, buffer: Buffer, filling: Filling) -> None:
        """Queue the copies on the side stream."""
        with self._backend.stream(self._stream):
            filling.direct.queue()
            for part, source in filling.staged:
                self._staging.copy_(part, source)
        buffer.filled = self._stream.record_event()

    def _is_direct(self, part: Tensor, source: Tensor) -> bool:
        """Return whether the device can copy the source as it is, and need not wait for that."""
        if source.dtype != part.dtype or not source.is_contiguous():
            return False
        return source.untyped_storage().data_ptr() in self._direct or source.is_pinned()


def staying_blocks(count: int, staying: int) -> set[int]:
    """Return the numbers of `staying` of `count` blocks, with the others spread evenly between them.

    So each copy overlaps with the same amount of computation: that of the resident blocks between two others. Keeping
    the last blocks, which backward needs first, was rejected, since the two buffers hold these anyway.
    """
    streamed = count - staying
    return set(range(count)) - {(2 * part + 1) * count // (2 * streamed) for part in range(streamed)}
