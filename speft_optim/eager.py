"""Code that runs eagerly before the graph of a compiled model or layer: it synchronises weights and values.

A graph cannot read version counters. The hook of the whole model and the calls of layers that were compiled in place
(`layer.compile()`) come before their graphs. A graph that begins elsewhere, such as that of `torch.compile(layer)`
called by itself, breaks at each masked layer, which is correct but slower.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from speft_optim.integrations import refuse_to_save_rows
from speft_optim.weights.attached import record_of
from speft_optim.weights.averaging import GradientAverage, average_gradients, is_under_fsdp
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.wrappers import check_averaged


class _Now:
    """Whether weights and values were brought into step before the call that runs now."""

    is_refreshed = False


_now = _Now()


def end_call(model: nn.Module, args: tuple, output: object) -> None:
    """Note that a call has ended that began with `refresh_all`; a forward hook of the same modules."""
    _now.is_refreshed = False


@torch.compiler.assume_constant_result
def _is_refreshed() -> bool:
    return _now.is_refreshed


@torch.compiler.disable(recursive=True)
def _refresh(weight: SparseWeight) -> None:
    weight.refresh()


def refresh_in_graph(weight: SparseWeight) -> None:
    """Bring a weight and its values into step, unless the graph that is compiled now belongs to a call that did."""
    # The compiler asks once and keeps the answer, so that checkpointed blocks are recomputed by the graph of forward.
    if not _is_refreshed():
        _refresh(weight)


class RefreshedCompile:
    """Replaces the `compile` of a module inside a sparsified model, whose compiled call then refreshes its weights.

    Args:
        module: the module, which may be compiled already.
        weights: the masked weights that its forward uses.
    """

    def __init__(self, module: nn.Module, weights: list[SparseWeight]):
        self.module, self.weights = module, weights
        module.__dict__["compile"] = self
        self._refresh_calls()

    def __call__(self, *args, **kwargs) -> None:
        """Compile the module in place, as `nn.Module.compile` does."""
        type(self.module).compile(self.module, *args, **kwargs)
        self._refresh_calls()

    def _refresh_calls(self) -> None:
        if (compiled := self.module._compiled_call_impl) is not None:
            self.module._compiled_call_impl = _RefreshedCall(self.weights, compiled)

    def remove(self) -> None:
        """Restore the module's own `compile`, and its compiled call if it was compiled."""
        del self.module.__dict__["compile"]
        if isinstance(call := self.module._compiled_call_impl, _RefreshedCall):
            self.module._compiled_call_impl = call.compiled


class _RefreshedCall:
    def __init__(self, weights: list[SparseWeight], compiled: Callable):
        self.weights, self.compiled = weights, compiled

    def __call__(self, *args, **kwargs) -> object:
        for weight in self.weights:
            weight.refresh()
        before, _now.is_refreshed = _now.is_refreshed, True
        try:
            return self.compiled(*args, **kwargs)
        finally:
            _now.is_refreshed = before


@torch.compiler.disable(recursive=True)
def refresh_all(model: nn.Module, args: tuple) -> None:
    """Bring weights and values into step; a forward pre-hook of a sparsified model.

    Raises:
        ValueError: a transform of torch.func differentiates the model, or DistributedDataParallel does not average its
            gradients.
    """
    if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "torch.func (grad, vmap, jvp) cannot differentiate masked weights, whose gradients come from hooks; call "
            "backward as usual, or desparsify(model) first."
        )
    # The weights are listed, since searching the model would cost time in each forward.
    weights = record_of(model).weights
    check_averaged(weight.values for weight in weights)
    for weight in weights:
        weight.refresh()
    _now.is_refreshed = True
    _average_where_sharded(model, weights)


def _average_where_sharded(model: nn.Module, weights: list[SparseWeight]) -> GradientAverage | None:
    """Average gradients over processes from now on if one of the weights is under FSDP; return what is new for that."""
    if not (dist.is_available() and dist.is_initialized() and any(map(is_under_fsdp, weights))):
        return None
    if (average := average_gradients(model)) is not None:
        refuse_to_save_rows(model)
    return average


def average_in_backward(weight: SparseWeight) -> None:
    """Average gradients over processes, of which the first one arrives now, though the model was never called.

    FSDP also gathers weights for methods other than forward (`register_fsdp_forward_method`), which call no hook.
    """
    if not weight.uses.is_averaged and (average := _average_where_sharded(weight.place.model, [weight])) is not None:
        average.queue(weight.values)


class RefreshDecoder:
    """Forward pre-hook of a decoder, for losses that call it without the model around it.

    A compiled block cannot see whether its values changed. This is an object and not a closure, so that a copy of the
    model refreshes its own weights.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        """Bring weights and values into step, unless the graph that is compiled now belongs to a call that did."""
        if not (torch.compiler.is_compiling() and _is_refreshed()):
            refresh_all(self.model, args)


def refresh_before_forward(model: nn.Module, weights: list[SparseWeight], prepend: bool = False) -> list:
    """Hook the model, and its decoder if it has `get_decoder`; return the handles of the hooks.

    Args:
        model: a sparsified model.
        weights: its masked weights.
        prepend: whether to place the hooks in front of existing ones.
    """
    for weight in weights:
        # The weights cannot import them: the marks for the compiler load that, and averages know of weights.
        weight.refresh_in_graph, weight.average_in_backward = refresh_in_graph, average_in_backward
    called = {model: refresh_all}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module) and decoder is not model:
        called[decoder] = RefreshDecoder(model)
    hooks = [module.register_forward_pre_hook(hook, prepend=prepend) for module, hook in called.items()]
    return hooks + [module.register_forward_hook(end_call, always_call=True) for module in called]


def refresh_compiled_layers(model: nn.Module, weights: list[SparseWeight]) -> list[RefreshedCompile]:
    """Let each module inside the model that is, or will be, compiled in place refresh the weights that it uses."""
    own: dict[nn.Module, list[SparseWeight]] = {}
    for weight in weights:
        for module in dict.fromkeys(module for module, _ in weight.place.target.sites):
            own.setdefault(module, []).append(weight)
    found: dict[nn.Module, dict[SparseWeight, None]] = {}
    _find_used(model, own, found)
    return [RefreshedCompile(module, list(used)) for module, used in found.items() if used and module is not model]


def _find_used(module: nn.Module, own: dict, found: dict) -> dict[SparseWeight, None]:
    """Return the weights in `own` of a module and all inside it, and note in `found` those of each of these."""
    if module not in found:
        found[module] = used = dict.fromkeys(own.get(module, ()))
        for child in module.children():
            used.update(_find_used(child, own, found))
    return found[module]
