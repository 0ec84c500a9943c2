"""An embedding in host memory, of which only the rows that a batch needs are copied to the device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from speft_optim.offload.host_parameter import OF_FORM
from speft_optim.offload.host_weight import HostWeight


class HostTable(Tensor):
    """Stands for the copy of an embedding's weight: rows are looked up in host memory, all else is done with a copy.

    Embeddings of many classes call `F.embedding` somewhere in their forward, so that is what is replaced.

    Attributes:
        host: the weight.
    """

    host: HostWeight

    @staticmethod
    def of(host: HostWeight) -> "HostTable":
        """Return the table of a weight in memory."""
        table = host.source().as_subclass(HostTable)
        table.host = host
        return table

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.host.device

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Look rows up, or call the function on a copy of the whole weight."""
        kwargs = kwargs or {}
        # A largest norm would be enforced on the weight itself.
        if function is F.embedding and isinstance(args[1], cls) and kwargs.get("max_norm") is None:
            return _rows(args[1].host, args[0])
        if function in OF_FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        args, kwargs = tree_map_only(HostTable, lambda table: table.host.whole(), (args, kwargs))
        return function(*args, **kwargs)


@torch.no_grad()
def _rows(host: HostWeight, ids: Tensor) -> Tensor:
    """Return (*ids.shape, width) rows on the device, in the weight's dtype."""
    source, places = host.source(), on_host(ids).reshape(-1)
    out = torch.empty(
        len(places), source.shape[1], dtype=source.dtype, pin_memory=host.device.type == "cuda", device=source.device
    )
    torch.index_select(source, 0, places, out=out)
    return out.to(host.device, host.dtype, non_blocking=True).view(*ids.shape, -1)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device; of one in CPU memory a copy, for which the CPU does not wait.

    CUDA has read pageable memory when the call returns, so that it may change then. Locked memory is read later, and so
    copied first.
    """
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    there = (tensor.clone() if tensor.is_pinned() else tensor).to(device, non_blocking=True)
    if not there.is_floating_point() and not there.is_inference() and not tensor.is_inference():
        # Token ids are looked up in host memory, and to fetch them from the device would wait for it.
        there._sent_from = tensor, _versions(tensor, there)
    return there


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in CPU memory: the one that it was sent from, if neither has changed since."""
    source, versions = getattr(tensor, "_sent_from", (None, None))
    return source if source is not None and versions == _versions(source, tensor) else tensor.cpu()


def _versions(*tensors: Tensor) -> list[int]:
    return [tensor._version for tensor in tensors]
