"""Inputs of checkpointed blocks, which recomputation needs, kept in host memory from forward to backward.

Copies in both directions run on a separate stream, in parallel with the computation: an input is copied to the host
during its block's forward, and back during the next block's backward. With torch's `save_on_cpu` the device waits for
both.
"""

import contextlib
from collections.abc import Iterable, Iterator
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostActivations:
    """Keeps tensors in host memory between forward and backward.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.backend = torch.get_device_module(device)
        self.stream = self.backend.Stream(device)
        self._latest: ref[_Kept] | None = None

    @contextlib.contextmanager
    def keeping(self, inputs: Iterable[object]) -> Iterator[None]:
        """Keep those of `inputs` that require gradients in host memory, if autograd saves them in this context.

        All others, such as positions and masks, which the blocks share, stay where they are.

        Raises:
            RuntimeError: one of them was changed in place meanwhile, perhaps before it was copied.
        """
        inputs = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        addresses, versions = {value.data_ptr() for value in inputs}, [value._version for value in inputs]

        def pack(tensor: Tensor) -> "Tensor | _Kept":
            return self._keep(tensor) if tensor.data_ptr() in addresses else tensor

        with saved_tensors_hooks(pack, _unpack):
            yield
        if [value._version for value in inputs] != versions:
            raise RuntimeError(
                "A block of the model changes its input in place, so that it cannot be recomputed; leave offload= out."
            )

    def _keep(self, tensor: Tensor) -> "_Kept":
        kept = _Kept(self, tensor, self._latest)
        self._latest = ref(kept)
        return kept


class _Kept:
    """A tensor in host memory, and its way back.

    Args:
        owner: has the stream.
        tensor: the tensor on the device.
        below: the tensor that was kept before, which backward needs next.
    """

    def __init__(self, owner: HostActivations, tensor: Tensor, below: "ref[_Kept] | None"):
        self._owner, self._below = owner, below
        self._copy: Tensor | None = None
        self._is_wanted = True
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        owner.stream.wait_stream(owner.backend.current_stream(owner.device))
        with owner.backend.stream(owner.stream):
            self._host.copy_(tensor, non_blocking=True)
        _outlive(tensor, owner.stream)

    def _fetch(self) -> None:
        """Begin to copy the tensor back."""
        if self._copy is None:
            with self._owner.backend.stream(self._owner.stream):
                self._copy = self._host.to(self._owner.device, non_blocking=True)
            self._back = self._owner.stream.record_event()

    def take(self) -> Tensor:
        """Return the tensor on the device, and begin to copy the next one back."""
        self._fetch()
        copy, self._copy, self._is_wanted = self._copy, None, False
        current = self._owner.backend.current_stream(self._owner.device)
        current.wait_event(self._back)
        _outlive(copy, current)
        below = self._below and self._below()
        if below is not None and below._is_wanted:
            below._fetch()
        return copy


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.take() if isinstance(kept, _Kept) else kept


def _outlive(tensor: Tensor, stream: torch.Stream) -> None:
    """Keep a GPU tensor's memory from being used again before a stream is done with it on which it was not made."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
