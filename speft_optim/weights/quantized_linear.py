"""The forward of bitsandbytes linear layers while their model is sparsified: a frozen product with overlaid values.

The `forward` of each bitsandbytes linear is replaced in the instance. The new one dequantises the weight W to the
compute dtype, overlays the values, forms `x @ W.T` and drops W. Backward does the same again for the input gradient.
No dense weight is kept between the two, and x only for the values' gradient. The class, the quantised weight and the
scales stay bitsandbytes' own. Its LLM.int8 product, which quantises activations too, is not used: it was measured at
twice the time of ours, for no less memory.

The compute dtype is bitsandbytes': for a 4-bit layer the `bnb_4bit_compute_dtype` that it was made with, else the dtype
of autocast, else that of the input. The output has the dtype of the input.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from speft_optim.weights.bnb import quantized_linears, quantized_weight
from speft_optim.weights.gradient_nodes import Accumulator, keep_input, take_saved_input
from speft_optim.weights.quantized_state import STATE_KEYS, load_entries, save_entries
from speft_optim.weights.quantized_weight import LAYER_NAME, QuantizedWeight
from speft_optim.weights.scales import trained_entries
from speft_optim.weights.values_in_forward import ValuesInForward


class _Product(torch.autograd.Function):
    """Forms `x @ W.T`, or `x @ W`, with W dequantised again for each product; differentiable any number of times.

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
        ctx.values = None
        # A compiled graph computes its backward with what it saved.
        if any(ctx.needs_input_grad) and not torch.compiler.is_compiling():
            ctx.values = ValuesInForward(weight.module.__dict__.get(LAYER_NAME, ""), weight.attached)
        ctx.saved_input = take_saved_input(x) if accumulators and leaf is None else None
        wanted = leaf is not None or accumulators and not ctx.saved_input
        ctx.save_for_backward(*((x, leaf) if wanted else ()))
        return _product(x, weight, transposed)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if ctx.values is not None:
            ctx.values.check(ctx.weight.attached)
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
    """Pass a gradient `left.T @ right` to the accumulators that are asked for it, and return what they return."""
    if any(needed) and torch.is_grad_enabled():
        raise RuntimeError("The values of a quantised weight can be differentiated once only; leave create_graph out.")
    factors = [torch.atleast_2d(factor) for factor in (left, right)] if any(needed) else ()
    both = zip(accumulators, needed, strict=True)
    return [accumulator.from_product(*factors) if asked else None for accumulator, asked in both]


def _product(x: Tensor, weight: QuantizedWeight, transposed: bool) -> Tensor:
    dense = weight.dense(x.dtype)
    return x @ dense if transposed else nn.functional.linear(x, dense)


class FrozenForward:
    """The replaced forward of a bitsandbytes linear, with hooks that save and load its overlays with state dicts.

    `quantized_state` describes such a state dict.

    Args:
        module: the layer, whose forward is replaced until `remove`.
        name: the layer's name in the model, for messages.

    Attributes:
        leaf: a tensor of the weight's shape that gets its dense gradient, see `observation.differentiable`; else None.
        gradient_hooks: the hooks whose accumulators receive the weight's gradient.
    """

    def __init__(self, module: nn.Module, name: str = ""):
        self.module = module
        module.__dict__[LAYER_NAME] = name
        # It is looked up here, since older compilers cannot trace the names of base classes.
        self.kind, self._stored_as = type(quantized_weight(module)), module.weight.dtype
        # accelerate wraps the forward to move inputs between devices, and keeps the layer's own as `_old_forward`.
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
        """Return the layer's output, (..., out) in the dtype of `x`, for `x` (..., in)."""
        self._check_storage()
        dtype = self.compute_dtype(x)
        hooks = self.gradient_hooks if torch.is_grad_enabled() else ()
        accumulators, grad_anchors = tuple(hook.accumulator for hook in hooks), (hook.grad_anchor for hook in hooks)
        operand = keep_input(x.to(dtype)) if hooks else x.to(dtype)
        # Under offload it reads the copy that hides the layer's weight.
        weight = self.kind(self.module)
        # The model may have moved to another device since the last forward.
        weight.place_scales()
        output = _Product.apply(operand, self.leaf, weight, False, accumulators, *grad_anchors)
        if self.module.bias is not None:
            output = output + self.module.bias.to(dtype)
        return output.to(x.dtype)

    def _check_storage(self) -> None:
        """Refuse a quantised weight whose numbers were cast: it is no longer what its scales are for.

        Raises:
            ValueError: its dtype is another one than before.
        """
        if (dtype := self.module.weight.dtype) != self._stored_as:
            raise ValueError(
                f"The quantised weight of {self.module.__dict__.get(LAYER_NAME) or 'a layer'} is stored in "
                f"{self._stored_as} and was cast to {dtype}, as by half() or bfloat16(), which destroys it; load the "
                "base anew, in the dtype that it computes in."
            )

    def __deepcopy__(self, memo: dict) -> "FrozenForward":
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # bitsandbytes copies an int8 weight without the attribute in which a compiler finds the trained entries;
        # `trained_entries` sets it again.
        weight = copy.deepcopy(self.module._parameters["weight"], memo)
        if hasattr(weight, "SCB"):
            trained_entries(weight, "SCB")
        return made

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which the layer's product with `x` is formed."""
        if getattr(self.module, "compute_type_is_set", False) and self.module.compute_dtype is not None:
            return self.module.compute_dtype
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def remove(self) -> None:
        """Restore the layer's own forward and remove the state dict hooks."""
        for hook in self.hooks:
            hook.remove()
        for name in (LAYER_NAME, *STATE_KEYS):
            self.module.__dict__.pop(name, None)
        del self.module.__dict__[self.attribute]
        if self.before is not None:
            self.module.__dict__[self.attribute] = self.before


class ProductHook:
    """Passes the two factors of a quantised layer's gradient to an accumulator, as a `GradientHook` does.

    It is part of the layer's product, so it needs no verification: nothing can change the output in between.

    Args:
        forward: the layer's replaced forward.
        name: the weight's full name.
        grad_anchor: a tensor that requires gradients; its gradient is what the accumulator returns.
        accumulator: receives the gradient.
    """

    # A `GradientHook` says by this that it warned of another use; here there is none.
    warned = False

    def __init__(self, forward: FrozenForward, name: str, grad_anchor: Tensor, accumulator: Accumulator):
        self.forward, self.name, self.grad_anchor, self.accumulator = forward, name, grad_anchor, accumulator
        forward.gradient_hooks.append(self)

    def remove(self) -> None:
        """Stop passing gradients on."""
        self.forward.gradient_hooks.remove(self)

    def promote(self) -> None:
        """Do nothing: there is no verification whose verdict could be adopted."""


@contextmanager
def frozen_forwards(model: nn.Module) -> Iterator[None]:
    """Give the model's bitsandbytes linears the forward of a sparsified model while the context lasts."""
    added = [FrozenForward(module) for _, module in quantized_linears(model) if forward_of(module) is None]
    try:
        yield
    finally:
        for forward in added:
            forward.remove()


def forward_of(module: nn.Module) -> FrozenForward | None:
    """Return the replaced forward of a layer, or None if the layer has its own."""
    found = (module.__dict__.get(attribute) for attribute in ("_old_forward", "forward"))
    return next((forward for forward in found if isinstance(forward, FrozenForward)), None)
