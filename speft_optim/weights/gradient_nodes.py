"""Autograd nodes that observe the gradient of a frozen weight, and the accumulators that receive it."""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from speft_optim.weights.verification import warn_of_inputs


def present_backward() -> int:
    """Return the number of the backward that autograd runs on this thread now, -1 for none."""
    return torch._C._current_graph_task_id()


class Accumulator(Protocol):
    """Receives the gradient of a frozen weight.

    The accumulator is represented in the graph by a tensor that requires gradients, the `grad_anchor`. Both methods
    return the gradient of that tensor, or None where the accumulator keeps what it received. Under a hook that
    verifies products and has no `pending` list (see `gradient_hooks.GradientHook`), an accumulator also needs the two
    parts of `from_product`: `sample(left, right)`, which returns the anchor's gradient, and `accumulate(left, right)`,
    which is called once the product is known to be right.
    """

    def from_product(self, left: Tensor, right: Tensor) -> Tensor | None:
        """Receive the gradient as two factors: it is `left.T @ right`, summed over all but the last dimension.

        Args:
            left: (..., rows), at least two dimensions, a floating dtype.
            right: (..., columns), the same leading dimensions and dtype.
        """

    def from_dense(self, gradient: Tensor) -> Tensor | None:
        """Receive the dense gradient, of the weight's shape and dtype."""


class _KeepInput(torch.autograd.Function):
    """Makes an alias of a linear layer's input, whose node saves the input for the node of the layer's output."""

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
    """Return an alias of `x` whose node saves it for `take_saved_input`; `x` itself where autograd records nothing."""
    # A compiler decides by itself what to save, and cannot trace nodes.
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x if getattr(x.grad_fn, "is_free", False) else _KeepInput.apply(x)


def take_saved_input(x: Tensor) -> torch.autograd.graph.Node | None:
    """Return the node of `keep_input` that saves `x`, to be used once; None where there is none, or it is in use.

    A node serves one reader, since a checkpoint gives a saved tensor back only once.
    """
    if torch.compiler.is_compiling() or not getattr(x.grad_fn, "is_free", False):
        return None
    x.grad_fn.is_free = False
    return x.grad_fn


def hook_output(
    output: Tensor, x: Tensor, grad_anchor: Tensor, take: Callable[[Tensor, Tensor], Tensor | None], transposed: bool
) -> Tensor:
    """Return an alias of a linear layer's output whose backward passes on the two factors of the weight's gradient.

    Args:
        output: (..., out).
        x: (..., in), the layer's input.
        grad_anchor: a tensor that requires gradients.
        take: called with the factors as `Accumulator.from_product` is; returns the gradient of `grad_anchor`.
        transposed: whether the weight is (in, out).
    """
    return _HookOutput.apply(output, x, grad_anchor, take, transposed)


def hook_weight(
    weight: Tensor, grad_anchor: Tensor, take: Callable[[Tensor], Tensor | None], other: Tensor | None = None
) -> Tensor:
    """Return an alias of a frozen weight whose backward passes on the dense gradient of the alias.

    Args:
        weight: the weight, detached.
        grad_anchor: a tensor that requires gradients.
        take: called with the gradient, of the weight's shape and dtype; returns that of `grad_anchor`.
        other: a leaf whose gradient nobody names. A backward with `inputs=` does not reach it, by which such a backward
            is detected and warned of.
    """
    return _HookWeight.apply(weight, grad_anchor, take, other)


_TWICE = (
    b"The gradient of masked weights cannot be differentiated again, as create_graph=True and penalties on gradients "
    b"do; leave that term out of the loss, or call desparsify(model) and train with a dense optimizer."
)


def _differentiable_once(backward: Callable) -> Callable:
    """Make differentiating the results of a `backward` raise an error that says what to do.

    torch's `once_differentiable` does the same with a message that names neither cause nor remedy.
    """

    @functools.wraps(backward)
    def wrapper(ctx, gradient: Tensor):
        with torch.no_grad():
            outputs = backward(ctx, gradient)
        if not (torch.is_grad_enabled() and gradient.requires_grad):
            return outputs
        leaves = [None if output is None else output.detach().requires_grad_() for output in outputs]
        return torch._C._functions.DelayedError(_TWICE, len(leaves))(*leaves)

    return wrapper


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
        # Detached, the alias is no view for autograd: an in-place ReLU could not change a view of a custom function.
        return output.detach()

    @staticmethod
    @_differentiable_once
    def backward(ctx, output_gradient: Tensor):
        (x,) = (ctx.saved_input or ctx).saved_tensors
        anchor_gradient = None
        if ctx.needs_input_grad[2]:
            # The product is formed in the dtype of the layer's matmul, which under autocast is not that of its input.
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
        # Detached as above: an embedding with max_norm changes its weight in place.
        return weight.detach()

    @staticmethod
    @_differentiable_once
    def backward(ctx, gradient: Tensor):
        if ctx.has_other and not torch._C._will_engine_execute_node(ctx.next_functions[-1][0]):
            warn_of_inputs()
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        # An embedding with sparse=True has a sparse gradient.
        return None, ctx.take(gradient.to_dense() if gradient.is_sparse else gradient), None, None
