"""bitsandbytes linear layers as frozen linear layers with exact values laid over.

While a model is sparsified, the `forward` of each of its bitsandbytes linears is shadowed in the instance: the one
weight is dequantised to the compute dtype, the values are laid over it, `x @ W.T` is formed, and W is dropped; the same
again in backward for the input gradient. Nothing dense is kept between the two, and neither is x. The class, the codes
and the scales stay bitsandbytes' own. Its LLM.int8 product, which quantises activations too, is left out: measured at
twice the time of this, for no less memory.

The compute dtype is bitsandbytes': of a 4-bit layer the `bnb_4bit_compute_dtype` it was made with, else the dtype that
autocast asks for, else that of the input. The output has the dtype of the input.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from speft_optim.weights.bnb import LAYER_NAME, QuantizedWeight, quantized_linears
from speft_optim.weights.gradient_nodes import Accumulator, keep_input, take_saved_input
from speft_optim.weights.quantized_state import STATE_KEYS, load_entries, save_entries
from speft_optim.weights.scales import trained_entries
from speft_optim.weights.storage import frozen_weight


class _Product(torch.autograd.Function):
    """`x @ W.T`, or `x @ W`, with W made anew for each product; differentiable any number of times.

    `leaf` is None, or a tensor of W's shape that represents W in the graph and gets its gradient. Each of
    `grad_anchors` belongs to the accumulator at the same place, which receives W's gradient as its two factors; that
    way the product can be differentiated only once.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        leaf: Tensor | None,
        weight: QuantizedWeight,
        transposed: bool,
        accumulators: tuple[Accumulator, ...],
        *grad_anchors: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.transposed, ctx.accumulators = weight, transposed, accumulators
        ctx.saved_input = take_saved_input(x) if accumulators and leaf is None else None
        wanted = leaf is not None or accumulators and not ctx.saved_input
        ctx.save_for_backward(*((x, leaf) if wanted else ()))
        return _product(x, weight, transposed)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, leaf = (*ctx.saved_input.saved_tensors, None) if ctx.saved_input else ctx.saved_tensors or (None, None)
        left, right = (x, gradient) if ctx.transposed else (gradient, x)
        leaf_gradient = back = None
        if ctx.needs_input_grad[1]:
            leaf_gradient = (left.flatten(0, -2).t() @ right.flatten(0, -2)).to(leaf.dtype)
        fed = _feed(ctx.accumulators, ctx.needs_input_grad[5:], left, right)
        # Drop x first: under checkpointing this is its last reference, and the dense weight comes next.
        del x, left, right
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            back = _Product.apply(gradient, leaf, ctx.weight, not ctx.transposed, ())
        elif ctx.needs_input_grad[0]:
            back = _product(gradient, ctx.weight, not ctx.transposed)
        return back, leaf_gradient, None, None, None, *fed


def _feed(
    accumulators: tuple[Accumulator, ...], needed: tuple[bool, ...], left: Tensor, right: Tensor
) -> list[Tensor | None]:
    """What the accumulators that are asked make of a gradient `left.T @ right`."""
    if any(needed) and torch.is_grad_enabled():
        raise RuntimeError("The values of a quantised weight can be differentiated once only; leave create_graph out.")
    factors = [torch.atleast_2d(factor) for factor in (left, right)] if any(needed) else ()
    both = zip(accumulators, needed, strict=True)
    return [accumulator.from_product(*factors) if asked else None for accumulator, asked in both]


def _product(x: Tensor, weight: QuantizedWeight, transposed: bool) -> Tensor:
    dense = weight.dense(x.dtype)
    return x @ dense if transposed else nn.functional.linear(x, dense)


class FrozenForward:
    """Stands in for a bitsandbytes linear's forward, and brings its overlays into state dicts and out of them.

    What such a state dict holds is told in `quantized_state`.
    """

    def __init__(self, module: nn.Module, name: str = ""):
        self.module = module
        module.__dict__[LAYER_NAME] = name
        # accelerate wraps a forward to move inputs between devices; within its wrapper is the place of the layer's own.
        self.attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.before = module.__dict__.get(self.attribute)
        self.leaf: Tensor | None = None
        self.gradient_hooks: list[ProductHook] = []
        module.__dict__[self.attribute] = self
        module.__dict__.update(dict.fromkeys(STATE_KEYS, "in state_dict() only"))
        self.hooks = [
            module.register_state_dict_post_hook(save_entries),
            module.register_load_state_dict_pre_hook(load_entries),
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output, (..., out) in the dtype of `x`, for `x` (..., in)."""
        dtype = self.compute_dtype(x)
        hooks = self.gradient_hooks if torch.is_grad_enabled() else ()
        accumulators, grad_anchors = tuple(hook.accumulator for hook in hooks), (hook.grad_anchor for hook in hooks)
        operand = keep_input(x.to(dtype)) if hooks else x.to(dtype)
        weight = frozen_weight(self.module)
        # The model may have moved since it came in.
        weight.place_scales()
        output = _Product.apply(operand, self.leaf, weight, False, accumulators, *grad_anchors)
        if self.module.bias is not None:
            output = output + self.module.bias.to(dtype)
        return output.to(x.dtype)

    def __deepcopy__(self, memo: dict) -> "FrozenForward":
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # bitsandbytes copies an int8 weight without the note by which the compiler, if it comes first, finds the
        # trained entries.
        weight = copy.deepcopy(self.module._parameters["weight"], memo)
        if hasattr(weight, "SCB"):
            trained_entries(weight, "SCB")
        return made

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the product of the layer with `x` is formed in."""
        if getattr(self.module, "compute_type_is_set", False) and self.module.compute_dtype is not None:
            return self.module.compute_dtype
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def remove(self) -> None:
        """Give the layer its own forward back."""
        for hook in self.hooks:
            hook.remove()
        for name in (LAYER_NAME, *STATE_KEYS):
            self.module.__dict__.pop(name, None)
        del self.module.__dict__[self.attribute]
        if self.before is not None:
            self.module.__dict__[self.attribute] = self.before


class ProductHook:
    """Hands the two factors of a quantised layer's own product to an accumulator, as a `GradientHook` does.

    It is a part of the product, so that nothing can come between the two, and needs no verification.
    """

    # Never found to be used otherwise.
    warned = False

    def __init__(self, forward: FrozenForward, name: str, grad_anchor: Tensor, accumulator: Accumulator):
        self.forward, self.name, self.grad_anchor, self.accumulator = forward, name, grad_anchor, accumulator
        forward.gradient_hooks.append(self)

    def remove(self) -> None:
        """Hand over no more."""
        self.forward.gradient_hooks.remove(self)

    def promote(self) -> None:
        """Nothing waits for a verdict."""

    def verify_again(self) -> None:
        """There is nothing to verify."""


@contextmanager
def frozen_forwards(model: nn.Module) -> Iterator[None]:
    """The model's bitsandbytes linears compute meanwhile as they do once it is sparsified, also without gradients."""
    added = [FrozenForward(module) for _, module in quantized_linears(model) if forward_of(module) is None]
    try:
        yield
    finally:
        for forward in added:
            forward.remove()


def forward_of(module: nn.Module) -> FrozenForward | None:
    """What stands in for a layer's forward since `patch_model`."""
    found = (module.__dict__.get(attribute) for attribute in ("_old_forward", "forward"))
    return next((forward for forward in found if isinstance(forward, FrozenForward)), None)
