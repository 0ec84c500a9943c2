"""The parameter that holds a weight's masked entries, and the link by which optimizers find that weight."""

import logging
from typing import TYPE_CHECKING
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class CompactValues(nn.Parameter):
    """A parameter that detects writes through its `.data`.

    Such a write, as by libraries that swap in averaged weights, does not advance the version counter. So `.data` always
    returns aliases of one tensor, whose own counter distinguishes writes from reads. Collectives of `torch.distributed`
    and NumPy write without any counter: after a read of `.data` the numbers themselves are compared.

    Attributes:
        looks: how often `.data` was read.
    """

    looks = 0
    _alias: Tensor | None = None
    _replaced = 0

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        self.looks += 1
        # What is made in inference mode would have no counter.
        with torch.inference_mode(False):
            held = Tensor.data.__get__(self)
            if self._alias is None or not self._alias.is_set_to(held):
                self._alias = held
            return self._alias.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        # Trainers cast what trains on a quantised model to 16 bits, meaning LoRA's parameters; our values stay exact.
        held = Tensor.data.__get__(self)
        alike = len(held) and (new.shape, new.device) == (held.shape, held.device)
        if not (alike and new.dtype != held.dtype and torch.equal(new, held.to(new))):
            Tensor.data.__set__(self, new)
            if new.data_ptr() != held.data_ptr():
                # Whoever keeps `new` writes by its counter.
                self._alias = None if new.is_inference() else new.detach()
                self._replaced += 1

    @property
    def writes(self) -> tuple[int, int]:
        """What changes with each replacement of the tensor and each write through `.data`."""
        return self._replaced, 0 if self._alias is None else self._alias._version

    def _refresh(self) -> None:
        """Bring the values up to date for a copy, which may be made before that of their weight."""
        _, reference = _weights.get(self, (None, lambda: None))
        # Those of a model that can no longer be trained can still be copied as they are.
        if (weight := reference()) is not None and weight.can_be_trained():
            weight.refresh()

    def __deepcopy__(self, memo: dict) -> "CompactValues":
        self._refresh()
        return super().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: int) -> tuple:
        self._refresh()
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict:
        return {name: part for name, part in vars(self).items() if name not in ("looks", "_alias", "_replaced")}


def version(tensor: Tensor) -> tuple:
    """Return what changes with each in-place operation on a tensor and each replacement of its storage or view."""
    # A weight in host memory would answer each of these by `__torch_function__`.
    with torch._C.DisableTorchFunctionSubclass():
        return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), getattr(tensor, "writes", None)


def exchange(values: nn.Parameter, entries: Tensor) -> None:
    """Replace the entries of the parameter; backward through a graph from before is refused from now on.

    A parameter's node in autograd knows the length, lives as long as any graph that leads to it, and would be used by
    the next graphs too, so it is replaced. DistributedDataParallel keeps the node for its hooks: with a process group,
    a parameter that keeps its length also keeps its node. Hooks of the parameter itself are not on the node and stay.

    Args:
        values: the parameter, fp32.
        entries: (k,) fp32, perhaps of another length.
    """
    values.grad = None
    if len(entries) != len(values) or not (dist.is_available() and dist.is_initialized()):
        if values.requires_grad:
            get_gradient_edge(values).node.register_prehook(_refuse_gradient)
        # Autograd makes a new node only when the data change dtype or device.
        values.data = entries.new_empty(0, dtype=torch.float16)
    values.data = entries


def _refuse_gradient(gradients: tuple) -> None:
    raise RuntimeError(
        "This loss was computed before a schedule or load_state_dict changed the trained entries, so its gradient is "
        "that of other entries; compute the loss again, and call backward before optimizer.step()."
    )


def leave_graph() -> None:
    """Make a compiler run the calling hook eagerly: a compiled graph cannot add to sums that outlive it."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()


_warned: WeakSet = WeakSet()


def link(values: nn.Parameter, weight: "SparseWeight") -> None:
    """Link `values` to their masked weight, for optimizers; the link keeps neither of them alive."""
    _weights[values] = (weight.name, ref(weight))


def unlink(values: Tensor) -> None:
    """Mark `values` as detached from their weight, so that `linked` refuses them."""
    _weights[values] = (_weights[values][0], lambda: None)


def linked(values: Tensor) -> "SparseWeight | None":
    """Return the masked weight that `values` belong to, or None for an ordinary parameter.

    Raises:
        ValueError: they belonged to a masked weight that is gone.
    """
    found = _weights.get(values)
    if found is None:
        return None
    name, reference = found
    weight = reference()
    if weight is None:
        raise ValueError(
            f"{name} is no longer sparsified (desparsify was called, its module was replaced, or nothing holds the "
            "model any more), so its old values would train nothing; build a new optimizer from sparsify(model, masks)."
        )
    return weight


def warn_if_built_before(optimizer: Optimizer) -> None:
    """Warn once if an optimizer holds masked weights instead of their compact values."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer in _warned or any(parameter in _weights for parameter in parameters):
        return
    held = {id(parameter) for parameter in parameters}
    behind = [weight() for _, weight in list(_weights.values())]
    # The weights are those last seen: a copy that broke off half-way has no module to ask.
    names = [weight.name for weight in behind if weight is not None and id(weight.seen) in held]
    if names:
        _warned.add(optimizer)
        logger.warning(
            "%s holds %d masked weights, e.g. %s, which sparsify froze, instead of the compact values that train them: "
            "it was built before sparsify, or from parameters listed before. Build it from sparsify(model, masks).",
            type(optimizer).__name__,
            len(names),
            names[0],
        )
