"""Weight gradients without weights that require gradients: taps on the use of a frozen weight.

A `Tap` watches one use of a frozen weight and hands what its gradient is made of to a sink. For a linear layer that is
the layer's input and its output gradient: an identity placed on the layer's *output* passes both on, and leaves the
layer's forward, class and weight alone, so that the input gradient is that of a frozen layer and the dense weight
gradient is never formed. The input is kept before the product, by a node beside the layer's own way: if the identity
kept it, a checkpointed block, whose recomputation ends with the last tensor that it has to bring back, would form its
last product once more for nothing. It is kept as it comes, by several layers in one piece, and without checkpointing
for as long as it takes to form the input gradient. Any other weight is shadowed during its module's forward by an alias
whose backward hands over the dense gradient of that one use, which is then free to go.

A use outside the module's forward is out of sight. Shadows that last for the whole model's forward would see it, but
not in the recomputation of a checkpointed block, which then no longer matches its forward.

Replacing the layer class (as LoRA libraries do) was rejected: it changes names, breaks quantised and custom layers, and
has to be undone before saving.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from speft_optim.targets import Target, is_product, is_transposed_linear


class Sink(Protocol):
    """What a tap feeds. Both methods return the gradient of the tap's anchor, or None where the sink keeps it."""

    def from_product(self, left: Tensor, right: Tensor) -> Tensor | None:
        """The weight's gradient is `left.T @ right` summed over all but the last dimension, operands in one dtype.

        Both have at least two dimensions.
        """

    def from_dense(self, gradient: Tensor) -> Tensor | None:
        """The weight's gradient is `gradient`, of the weight's shape and dtype."""


class _KeepInput(torch.autograd.Function):
    """An alias of a linear layer's input, which its node saves for the node of the layer's output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.is_free = True
        return x.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> Tensor | None:
        return gradient


def keep_input(x: Tensor) -> Tensor:
    """An alias of `x` whose node keeps it for `take_keeper`; `x` itself where autograd has no node for it."""
    # A compiler decides by itself what it keeps, and knows no nodes.
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x if getattr(x.grad_fn, "is_free", False) else _KeepInput.apply(x)


def take_keeper(x: Tensor) -> torch.autograd.graph.Node | None:
    """The node whose `saved_tensors` are `x` alone; None where nothing keeps it, or keeps it for another already.

    A node each, since a checkpointed tensor can be brought back once only.
    """
    if torch.compiler.is_compiling() or not getattr(x.grad_fn, "is_free", False):
        return None
    x.grad_fn.is_free = False
    return x.grad_fn


class _TapOutput(torch.autograd.Function):
    """Identity on a linear layer's output; its backward sees the layer's input and output gradient."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, anchor: Tensor, sink: Sink, transposed: bool) -> Tensor:
        ctx.sink, ctx.transposed, ctx.keeper = sink, transposed, take_keeper(x)
        ctx.save_for_backward(*(() if ctx.keeper else (x,)))
        # An alias that autograd does not take for a view: a view could not be changed in place, as by an in-place ReLU.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient: Tensor):
        (x,) = (ctx.keeper or ctx).saved_tensors
        anchor_gradient = None
        if ctx.needs_input_grad[2]:
            # The product is formed in the dtype the layer computes in, which under autocast is not that of its input.
            x = x.to(output_gradient.dtype)
            left, right = (x, output_gradient) if ctx.transposed else (output_gradient, x)
            anchor_gradient = ctx.sink.from_product(torch.atleast_2d(left), torch.atleast_2d(right))
        return output_gradient, None, anchor_gradient, None, None


class _TapWeight(torch.autograd.Function):
    """A differentiable alias of a frozen weight; its backward sees the dense gradient of one use."""

    @staticmethod
    def forward(ctx, weight: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        if not ctx.needs_input_grad[1]:
            return None, None, None
        # Embeddings made with sparse=True give a sparse one.
        return None, ctx.sink.from_dense(gradient.to_dense() if gradient.is_sparse else gradient), None


class Tap:
    """Hooks on one module that feed the gradient of one of its frozen weights to a sink.

    Args:
        module: the module that uses the weight in its forward.
        attribute: the weight's name in the module.
        anchor: a tensor that requires gradients, else the tap rests; it makes the output require them, and gets what
            the sink returns.
        sink: where the gradient's parts go.
    """

    def __init__(self, module: nn.Module, attribute: str, anchor: Tensor, sink: Sink):
        self.attribute, self.anchor, self.sink = attribute, anchor, sink
        self.transposed = is_transposed_linear(module, attribute)
        # The input at hand, its version, and the alias that keeps it.
        self.kept: tuple[Tensor, int, Tensor] | None = None
        if is_product(module, attribute):
            hooks = [
                module.register_forward_pre_hook(self.before_product, with_kwargs=True),
                # First among the forward hooks: it must see what the layer itself returned. Also after an exception, as
                # a recomputation ends with: the input at hand must not wait for the next forward.
                module.register_forward_hook(self.tap_output, prepend=True, with_kwargs=True, always_call=True),
            ]
        else:
            hooks = [
                module.register_forward_pre_hook(self.shadow_weight),
                module.register_forward_hook(self.unshadow_weight, always_call=True),
            ]
        self.hooks = hooks

    def remove(self) -> None:
        """Take the hooks off the module."""
        for hook in self.hooks:
            hook.remove()

    @property
    def feeds(self) -> bool:
        """Whether a forward now leads to a gradient for the sink."""
        # Where not, as in the calibration of a model in training, a second derivative must not meet the tap either.
        return torch.is_grad_enabled() and self.anchor.requires_grad

    def before_product(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of linear layers."""
        if (args or kwargs) and self.feeds:
            x = input_of(args, kwargs)
            if (kept := keep_input(x)) is not x:
                self.kept = x, x._version, kept

    def tap_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | None) -> Tensor | None:
        """Forward hook of linear layers; without an output after an exception."""
        kept = None
        if not torch.compiler.is_compiling():
            kept, self.kept = self.kept, None
        if output is None or not self.feeds:
            return None
        x = input_of(args, kwargs)
        # Another hook may have changed the input since, or put another one in its place.
        if kept is not None and kept[0] is x and kept[1] == x._version:
            x = kept[2]
        return _TapOutput.apply(output, x, self.anchor, self.sink, self.transposed)

    def shadow_weight(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of other modules: an instance attribute is found before the registered parameter."""
        if self.feeds:
            # Not from `_parameters`: the weight may be shadowed already, by a copy on another device.
            weight = getattr(module, self.attribute)
            module.__dict__[self.attribute] = _TapWeight.apply(weight, self.anchor, self.sink)

    def unshadow_weight(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of other modules, called also after an exception."""
        module.__dict__.pop(self.attribute, None)


def tap_target(target: Target, anchor: Tensor, sink: Sink) -> list[Tap]:
    """Tap every use of a weight; their gradients add up in the anchor or in the sink."""
    return [Tap(module, attribute, anchor, sink) for module, attribute in target.sites]


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """A linear layer's input as its hooks see it, passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def shadow(
    module: nn.Module,
    make: Callable[[], Mapping[str, Tensor]],
    stack: contextlib.ExitStack,
    *,
    prepend: bool = False,
) -> None:
    """While the stack is open, let tensors newly made for each forward stand before the module's own of these names.

    Args:
        module: the module.
        make: from nothing to tensors by attribute; called before each forward.
        stack: undoes it.
        prepend: before hooks that are there already, which then see the shadows.
    """
    shadows: list[str] = []

    def before(module: nn.Module, args: tuple) -> None:
        made = make()
        shadows[:] = made
        module.__dict__.update(made)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        for name in shadows:
            module.__dict__.pop(name, None)

    stack.callback(module.register_forward_pre_hook(before, prepend=prepend).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def replace_method(module: nn.Module, name: str, method: Callable, stack: contextlib.ExitStack) -> None:
    """While the stack is open, let `method` stand in for the module's own of this name, as an instance attribute."""
    before = module.__dict__.get(name)
    module.__dict__[name] = method
    if before is None:
        stack.callback(module.__dict__.pop, name)
    else:
        stack.callback(module.__dict__.__setitem__, name, before)
