"""The parameter that holds a weight's masked entries, and how optimizers find the weight behind it."""

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
    """A parameter that counts how often its `.data` was taken.

    What is written through `.data`, as by the swaps of several libraries for averaged weights, passes the version
    counter by.
    """

    taken = 0

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        self.taken += 1
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        # Trainers cast what trains on a quantised base to 16 bits, meaning adapters; that would round exact values.
        held = Tensor.data.__get__(self)
        alike = len(held) and (new.shape, new.device) == (held.shape, held.device)
        if not (alike and new.dtype != held.dtype and torch.equal(new, held.to(new))):
            Tensor.data.__set__(self, new)


def exchange(values: nn.Parameter, entries: Tensor) -> None:
    """Let the parameter hold other entries; a graph of before can no longer go backward into it.

    A parameter's node in autograd lives as long as any graph that leads to it, knows the length, and would serve the
    next graphs too. DistributedDataParallel keeps it for its own hooks, so that with a process group a parameter that
    keeps its length keeps it as well. The parameter's own hooks are not the node's and stay.
    """
    values.grad = None
    if len(entries) != len(values) or not (dist.is_available() and dist.is_initialized()):
        if values.requires_grad:
            get_gradient_edge(values).node.register_prehook(_refuse_gradient)
        # Autograd makes a new node only for data of another dtype or device.
        values.data = entries.new_empty(0, dtype=torch.float16)
    values.data = entries


def _refuse_gradient(gradients: tuple) -> None:
    raise RuntimeError(
        "This loss was computed before the trained entries were chosen anew or restored, so that its gradient is of "
        "other entries; compute it again, and call backward before optimizer.step()."
    )


def leave_graph() -> None:
    """Let a compiler run the hook that called this eagerly: a graph has no place for sums that outlive it."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()


_told: WeakSet = WeakSet()


def link(values: nn.Parameter, weight: "SparseWeight") -> None:
    """Tell optimizers which masked weight stands behind `values`; the link keeps neither alive."""
    _weights[values] = (weight.name, ref(weight))


def unlink(values: Tensor) -> None:
    """Let optimizers that still hold `values` say that no weight stands behind them any more."""
    _weights[values] = (_weights[values][0], lambda: None)


def linked(values: Tensor) -> "SparseWeight | None":
    """The masked weight behind `values`, or None for an ordinary parameter.

    Raises:
        ValueError: there was a masked weight, but it is gone.
    """
    found = _weights.get(values)
    if found is None:
        return None
    name, reference = found
    weight = reference()
    if weight is None:
        raise ValueError(
            f"{name} is no longer sparsified (desparsify was called, or its module was replaced), so that its old "
            "values would train nothing; build a new optimizer from sparsify(model, masks)."
        )
    return weight


def warn_if_built_before(optimizer: Optimizer) -> None:
    """Say once that an optimizer holds masked weights in place of their compact values."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer in _told or any(parameter in _weights for parameter in parameters):
        return
    held = {id(parameter) for parameter in parameters}
    behind = [weight() for _, weight in list(_weights.values())]
    names = [weight.name for weight in behind if weight is not None and id(weight.weight) in held]
    if names:
        _told.add(optimizer)
        logger.warning(
            "%s holds %d masked weights, e.g. %s, which sparsify froze, and not the compact values that train them: "
            "it was built before sparsify, or from parameters listed before. Build it from sparsify(model, masks).",
            type(optimizer).__name__,
            len(names),
            names[0],
        )
