"""The call of a model whose weights are in host memory: inputs are moved to the device, the head is copied there.

Losses that form logits in chunks read the head's weight inside the model's call and do not call the module. So from the
return of the modules around the blocks, transformers' decoder, until the model's own return, a copy on the device
shadows the weight. It is not there before: blocks have the memory for themselves, and the copy is made beside them (see
`offload/head.py`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from speft_optim.offload.buffers import Site
from speft_optim.offload.calls import replace_call, without_checkpoints
from speft_optim.offload.host_parameter import HostParameter, on_device
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.lookup import sent
from speft_optim.offload.one_call import OneCall
from speft_optim.offload.quantized import HostQuantized
from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.replacement import Covered
from speft_optim.weights.verification import is_recorded


class HeldHead:
    """Shadows the weight of a model's head by a copy on the device, in the last part of each call of the model.

    Args:
        module: the module of the logits.
        weight: its weight.
    """

    def __init__(self, module: nn.Module, weight: HostWeight):
        self._module, self._weight = module, weight
        # It ends the shadowing with the call.
        self._call: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def during_call(self) -> Iterator[None]:
        """Let `hold` have an effect until the context ends, which is a call of the model."""
        if self._call is not None:
            yield  # The model calls itself.
            return
        with contextlib.ExitStack() as self._call:
            try:
                yield
            finally:
                self._call = None

    def hold(self) -> None:
        """Shadow the weight until the call of the model ends, if there is one; what reads it passes its gradient on."""
        if self._call is None or "weight" in self._module.__dict__:
            return
        parameter = self._weight.parameter
        is_watched = isinstance(parameter, HostParameter) and torch.is_grad_enabled() and is_recorded(parameter)
        copy = on_device(parameter) if is_watched else self._weight.lasting()
        self._call.enter_context(Covered(self._module, {"weight": copy}))


def run_model(
    model: nn.Module,
    blocks: list[nn.Module],
    head: tuple[nn.Module, HostWeight] | None,
    device: torch.device,
    one_call: OneCall,
    stack: contextlib.ExitStack,
) -> None:
    """Replace the calls of the model and of all modules around its blocks.

    Tensors among the model's arguments are moved to the device, wherever they are. While a module around the blocks is
    called transformers checkpoints no block: its older versions decide before the call of a block, where `run_by_block`
    is too late.

    Args:
        model: the model.
        blocks: its blocks.
        head: the module of the logits and its weight.
        device: the device that computes.
        one_call: what each call runs in.
        stack: undoes it.
    """
    held, parts = HeldHead(*head) if head is not None else None, {part for block in blocks for part in block.modules()}
    around = [part for part in model.modules() if part not in parts and not parts.isdisjoint(part.modules())]
    # A list of blocks is not called; a model that holds it itself, and has a head, has no decoder that returns first.
    has_decoder = any(part is not model and not isinstance(part, nn.ModuleList) for part in around)

    def make_around(present: Callable) -> Callable:
        def call(*args, **kwargs):
            with one_call:
                with without_checkpoints(blocks):
                    returned = present(*args, **kwargs)
                if held is not None:
                    held.hold()
                return returned

        return call

    def make(present: Callable) -> Callable:
        def call(*args, **kwargs):
            args, kwargs = tree_map_only(Tensor, lambda tensor: sent(tensor, device), (args, kwargs))
            with one_call, held.during_call() if held is not None else contextlib.nullcontext():
                if held is not None and not has_decoder:
                    held.hold()
                with without_checkpoints(blocks):
                    return present(*args, **kwargs)

        return call

    for module in around:
        if module is not model:
            replace_call(module, make_around, stack)
    replace_call(model, make, stack)


def head_of(
    model: nn.Module, weights: Mapping[Site, HostWeight | HostQuantized]
) -> tuple[nn.Module, HostWeight] | None:
    """Return what `head_module` returns with its weight."""
    head = head_module(model)
    weight = weights.get((head, "weight"))
    return None if weight is None else (head, weight)


def head_module(model: nn.Module) -> nn.Module | None:
    """Return the module of the model's logits, if transformers knows one and its weight is not quantised."""
    head = None
    # Some models have the method and raise in it.
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()
    is_dense = isinstance(head, nn.Module) and head._parameters.get("weight") is not None
    return head if is_dense and not is_quantized_linear(head) else None
