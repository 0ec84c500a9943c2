"""Autograd nodes that see the gradient of a frozen weight, and what takes it from them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speft_optim.weights.verification import warn_of_inputs


class Accumulator(Protocol):
    """Receives the gradient of a frozen weight.

    The accumulator is represented in the graph by a tensor that requires gradients, the `grad_anchor`. Both methods
    return the gradient of that tensor, or None where the accumulator keeps what it received. Under a hook that
    verifies products and has no `pending` list (see `gradient_hooks.GradientHook`), an accumulator also needs the two
    parts of `from_product`: `sample(left, right)`, which returns the anchor's gradient, and `accumulate(left, right)`,
    which is called once the product is known to be right.
    """

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
    """An alias of `x` whose node keeps it for `take_saved_input`; `x` itself where autograd has no node for it."""
    # A compiler decides by itself what it keeps, and knows no nodes.
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x if getattr(x.grad_fn, "is_free", False) else _KeepInput.apply(x)


def take_saved_input(x: Tensor) -> torch.autograd.graph.Node | None:
    """The node whose `saved_tensors` are `x` alone; None where nothing keeps it, or keeps it for another already.

    A node each, since a checkpointed tensor can be brought back once only.
    """
    if torch.compiler.is_compiling() or not getattr(x.grad_fn, "is_free", False):
        return None
    x.grad_fn.is_free = False
    return x.grad_fn


def hook_output(
    output: Tensor, x: Tensor, grad_anchor: Tensor, take: Callable[[Tensor, Tensor], Tensor | None], transposed: bool
) -> Tensor:
    """A linear layer's output, whose backward hands over the two factors of the weight's gradient.

    Args:
        output: (..., out).
        x: (..., in), the layer's input.
        grad_anchor: a tensor that requires gradients.
        take: gets the factors as `Accumulator.from_product` does; returns the gradient of `grad_anchor`.
        transposed: whether the weight is (in, out).
    """
    return _HookOutput.apply(output, x, grad_anchor, take, transposed)


def hook_weight(
    weight: Tensor, grad_anchor: Tensor, take: Callable[[Tensor], Tensor | None], other: Tensor | None = None
) -> Tensor:
    """An alias of a frozen weight, whose backward hands over the dense gradient of its uses.

    Args:
        weight: without a graph.
        grad_anchor: a tensor that requires gradients.
        take: gets the gradient, of the weight's shape and dtype; returns that of `grad_anchor`.
        other: a leaf that nobody asks the gradient of. A backward that was told its inputs does not reach it, which is
            how such a backward is found out and warned of.
    """
    return _HookWeight.apply(weight, grad_anchor, take, other)


class _HookOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        output: Tensor,
        x: Tensor,
        grad_anchor: Tensor,
        take: Callable[[Tensor, Tensor], Tensor | None],
        transposed: bool,
    ) -> Tensor:
        ctx.take, ctx.transposed, ctx.saved_input = take, transposed, take_saved_input(x)
        ctx.save_for_backward(*(() if ctx.saved_input else (x,)))
        # An alias that autograd does not take for a view: a view could not be changed in place, as by an in-place ReLU.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient: Tensor):
        (x,) = (ctx.saved_input or ctx).saved_tensors
        anchor_gradient = None
        if ctx.needs_input_grad[2]:
            # The product is formed in the dtype the layer computes in, which under autocast is not that of its input.
            x = x.to(output_gradient.dtype)
            left, right = (x, output_gradient) if ctx.transposed else (output_gradient, x)
            anchor_gradient = ctx.take(torch.atleast_2d(left), torch.atleast_2d(right))
        return output_gradient, None, anchor_gradient, None, None


class _HookWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, weight: Tensor, grad_anchor: Tensor, take: Callable[[Tensor], Tensor | None], other: Tensor | None
    ) -> Tensor:
        ctx.take, ctx.has_other = take, other is not None
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        if ctx.has_other and not torch._C._will_engine_execute_node(ctx.next_functions[-1][0]):
            warn_of_inputs()
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        # Embeddings made with sparse=True give a sparse one.
        return None, ctx.take(gradient.to_dense() if gradient.is_sparse else gradient), None, None
