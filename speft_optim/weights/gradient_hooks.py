"""Weight gradients without weights that require gradients: hooks on the use of a frozen weight.

A `GradientHook` watches one use of a frozen weight and hands what its gradient is made of to a sink. For a linear layer
that is the layer's input and its output gradient: an identity placed on the layer's *output* passes both on, and leaves
the layer's forward, class and weight alone, so that the input gradient is that of a frozen layer and the dense weight
gradient is never formed. The input is kept before the product, by a node beside the layer's own way: if the identity
kept it, a checkpointed block, whose recomputation ends with the last tensor that it has to bring back, would form its
last product once more for nothing. It is kept as it comes, by several layers in one piece, and without checkpointing
for as long as it takes to form the input gradient. Any other weight is shadowed during its module's forward by an alias
whose backward hands over the dense gradient of that one use, which is then free to go.

A linear layer takes the way of the other weights too where somebody gave it another forward, or where verification
found that its output is changed before the hook sees it (see `weights/verification.py`, also for uses outside the
module).

Replacing the layer class (as LoRA libraries do) was rejected: it changes names, breaks quantised and custom layers, and
has to be undone before saving.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from enum import Enum
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_forward_hooks

from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.targets import Target, has_other_forward, is_product, is_transposed_linear
from speft_optim.weights.verification import agrees, is_paused, is_recorded, warn_of_inputs

logger = logging.getLogger(__name__)


Trust = Literal["verified", "product", "always"]


class Sink(Protocol):
    """What a hook feeds. Both methods return the gradient of the hook's anchor, or None where the sink keeps it.

    A sink that is to be verified and has no `pending` also has the two parts of `from_product`: `sample`, which returns
    the anchor's gradient, and `accumulate`, which follows once the product is known to be right.
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


class _Use:
    """One call of a module between its hooks.

    Attributes:
        way: how the weight's gradient of this call is formed.
        shadowed: what stood before the module's parameter already, or None.
        alias: what this call put there, or None.
        kept: a linear layer's input, its version, and the alias that keeps it.
        factors: with `VERIFY`, the two factors of the gradient, from the output's node to the alias'.
        product: what the sink returned for them.
    """

    def __init__(self, hook: "GradientHook", way: "Way", shadowed: Tensor | None):
        self.hook, self.way, self.shadowed, self.alias = hook, way, shadowed, None
        self.kept: tuple[Tensor, int, Tensor] | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        self.product: Tensor | None = None

    def take(self, factors: tuple[Tensor, Tensor]) -> None:
        """Keep the factors for the comparison; what a sink makes of them must not stand beside a dense gradient."""
        self.factors = factors
        if self.hook.pending is None:
            self.product = self.hook.sink.sample(*factors)
        else:
            settle(self.hook.pending)


class Way(Enum):
    """How a hook forms the gradient of one call."""

    PRODUCT = "from input and output gradient"
    DENSE = "by autograd, of an alias"
    VERIFY = "both, compared"
    NONE = "not at all"


_numbers = itertools.count()


# The ways for which a node is placed on the layer's output.
_BY_OUTPUT = (Way.PRODUCT, Way.VERIFY)


class _HookOutput(torch.autograd.Function):
    """Identity on a linear layer's output; its backward sees the layer's input and output gradient."""

    @staticmethod
    def forward(
        ctx, output: Tensor, x: Tensor, anchor: Tensor, sink: Sink, transposed: bool, use: _Use | None
    ) -> Tensor:
        ctx.sink, ctx.transposed, ctx.use, ctx.saved_input = sink, transposed, use, take_saved_input(x)
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
            factors = torch.atleast_2d(left), torch.atleast_2d(right)
            if ctx.use is None:
                anchor_gradient = ctx.sink.from_product(*factors)
            else:
                ctx.use.take(factors)
        return output_gradient, None, anchor_gradient, None, None, None


class _HookWeight(torch.autograd.Function):
    """A differentiable alias of a frozen weight; its backward sees the dense gradient of one use."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, anchor: Tensor, take: Callable[[Tensor], Tensor | None], other: Tensor | None = None
    ) -> Tensor:
        # `other` is a leaf that nobody asks the gradient of.
        ctx.take, ctx.has_other = take, other is not None
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        # A backward that was told its inputs goes on to no other leaf.
        if ctx.has_other and not torch._C._will_engine_execute_node(ctx.next_functions[-1][0]):
            warn_of_inputs()
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        # Embeddings made with sparse=True give a sparse one.
        return None, ctx.take(gradient.to_dense() if gradient.is_sparse else gradient), None, None


class GradientHook:
    """Hooks on one module that feed the gradient of one of its frozen weights to a sink.

    Args:
        module: the module that uses the weight in its forward.
        attribute: the weight's name in the module.
        anchor: a tensor that requires gradients, else the hook rests; it makes the output require them, and gets what
            the sink returns.
        sink: where the gradient's parts go.
        name: the weight's full name, for warnings.
        trust: "verified" compares the product of a linear layer with autograd's own gradient first, "product" takes it
            for what the layer computes, "always" does so even where the layer has another forward.
        pending: of sinks that keep what they get, where (sink, factors) wait for `settle` after a comparison.

    Attributes:
        told: whether the weight was named as one that is used otherwise.
        verdict: whether the product is right, under hooks that stood before this hook's own; None until that is known.
    """

    def __init__(
        self,
        module: nn.Module,
        attribute: str,
        anchor: Tensor,
        sink: Sink,
        name: str = "",
        trust: Trust = "product",
        pending: list | None = None,
    ):
        self.attribute, self.anchor, self.sink, self.name, self.trust = attribute, anchor, sink, name, trust
        self.transposed = is_transposed_linear(module, attribute)
        self.is_product = is_product(module, attribute)
        self.pending = pending
        self.verdict: tuple[tuple, bool] | None = None
        self._found: tuple[tuple, bool] | None = None
        self.told = False
        # Under this name a module holds its calls that have begun; a replica of it, on another thread, its own.
        self._key = f"_uses_of_{attribute}_{next(_numbers)}"
        before = module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        # First among the forward hooks: it must see what the layer itself returned. Also after an exception, as a
        # recomputation ends with: what stands before the weight must not wait for the next forward.
        after = module.register_forward_hook(
            self.after_forward, prepend=self.is_product, with_kwargs=True, always_call=True
        )
        self.hooks = [before, after]
        # A compiler takes a number, but no handle.
        self._after_id = after.id

    def remove(self) -> None:
        """Take the hooks off the module."""
        for hook in self.hooks:
            hook.remove()

    @property
    def feeds(self) -> bool:
        """Whether a forward now leads to a gradient for the sink."""
        # Where not, as in the calibration of a model in training, a second derivative must not meet the hook either.
        return torch.is_grad_enabled() and self.anchor.requires_grad

    def promote(self) -> None:
        """Act on what backward found; between backwards, as a checkpointed block must be recomputed as it was."""
        if self._found is not None:
            self.verdict, self._found = self._found, None

    def way(self, module: nn.Module) -> Way:
        """How to form the gradient of a call that begins now."""
        if not self.feeds:
            return Way.NONE
        if not self.is_product or self.trust != "always" and has_other_forward(module, self.attribute):
            if self.is_product:
                self._tell("its module has another forward than its class had")
            return Way.DENSE
        if self.trust != "verified":
            return Way.PRODUCT
        surroundings = self._surroundings(module)
        if torch.compiler.is_compiling():
            # Nothing can be compared inside a graph; but there the layer's product is all that the hook sees.
            return Way.DENSE if surroundings else Way.PRODUCT
        if self.verdict is None or self.verdict[0] != surroundings:
            return Way.VERIFY
        return Way.PRODUCT if self.verdict[1] else Way.DENSE

    def _surroundings(self, module: nn.Module) -> tuple:
        """What may change the layer's output before this hook sees it; empty in the usual case."""
        first = [*module._forward_hooks][:1]
        if first == [self._after_id] and not _global_forward_hooks and "forward" not in module.__dict__:
            return ()
        ahead = itertools.takewhile(lambda key: key != self._after_id, module._forward_hooks)
        return tuple(ahead), tuple(_global_forward_hooks), id(module.__dict__.get("forward"))

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: let an instance attribute, which is found first, stand before the registered parameter."""
        uses = module.__dict__.setdefault(self._key, [])
        if not torch.is_grad_enabled():
            # Nothing is recorded, as in generation; what ends this call must find an entry all the same.
            uses.append(None)
            return
        # Not from `_parameters`: the weight may be shadowed already, by a copy on another device.
        weight = getattr(module, self.attribute)
        use = _Use(self, self.way(module), module.__dict__.get(self.attribute))
        # Before anything that autograd sees: a recomputation that has all it needs ends there, in `after_forward`.
        uses.append(use)
        if use.way is Way.VERIFY:
            take = functools.partial(self._judge, use, self._surroundings(module))
            other = torch.zeros((), requires_grad=True)
            use.alias = _HookWeight.apply(weight.detach(), self.anchor, take, other)
        elif use.way is Way.DENSE:
            use.alias = _HookWeight.apply(weight.detach(), self.anchor, self.sink.from_dense)
        elif is_recorded(weight) and not (use.way is Way.NONE and is_paused(weight)):
            use.alias = weight.detach()
        if use.alias is not None:
            module.__dict__[self.attribute] = use.alias
        if use.way in _BY_OUTPUT and (args or kwargs):
            x = input_of(args, kwargs)
            if (kept := keep_input(x)) is not x:
                use.kept = x, x._version, kept

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        """Forward hook, called without an output after an exception."""
        uses = module.__dict__.get(self._key)
        if not uses:
            return None
        use = uses.pop()
        if not uses:
            del module.__dict__[self._key]
        if use is None:
            return None
        if use.alias is not None:
            module.__dict__.pop(self.attribute, None)
            # Of a call around this one, or of a replica. Else whatever stood there ends with this call too.
            if use.shadowed is not None and (uses or getattr(module, "_is_replica", False)):
                module.__dict__[self.attribute] = use.shadowed
        use.alias = None
        if use.way not in _BY_OUTPUT or output is None:
            return None
        x, kept = input_of(args, kwargs), use.kept
        # Another hook may have changed the input since, or put another one in its place.
        if kept is not None and kept[0] is x and kept[1] == x._version:
            x = kept[2]
        use.kept = None
        compared = use if use.way is Way.VERIFY else None
        return _HookOutput.apply(output, x, self.anchor, self.sink, self.transposed, compared)

    def _judge(self, use: _Use, surroundings: tuple, dense: Tensor) -> Tensor | None:
        """Feed the sink with the product if it is autograd's own gradient of the alias, and with that if not."""
        (factors, product), use.factors, use.product = (use.factors, use.product), None, None
        right = False if factors is None else agrees(dense, *factors)
        if right is not None and (self._found is None or self._found[1]):
            self._found = surroundings, right
        if right is False:
            self._tell("a hook, or other code, changes what its layer returns")
            return self.sink.from_dense(dense)
        if self.pending is not None:
            self.pending.append((self.sink, factors))
        else:
            self.sink.accumulate(*factors)
        return product

    def _tell(self, why: str) -> None:
        """Name the weight, once."""
        if not self.told:
            self.told = True
            logger.warning(
                "%s is used otherwise than as x @ W.T: %s. Its gradient is formed densely, one weight at a time, which "
                "is right and takes longer.",
                self.name,
                why,
            )


@torch.no_grad()
def settle(pending: list) -> None:
    """Give the sinks the factors that waited for the dense gradient they were compared with to be freed."""
    while pending:
        sink, factors = pending.pop()
        sink.from_product(*factors)


def hook_target(
    target: Target, anchor: Tensor, sink: Sink, trust: Trust = "product", pending: list | None = None
) -> list[GradientHook]:
    """Hook every use of a weight in a module that holds it; their gradients add up in the anchor or in the sink."""
    gradient_hooks = []
    for module, attribute in target.sites:
        # A quantised layer computes from codes, in a forward of ours.
        own = attribute == "weight" and is_quantized_linear(module)
        gradient_hooks.append(
            GradientHook(module, attribute, anchor, sink, target.name, "always" if own else trust, pending)
        )
    return gradient_hooks


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """A linear layer's input as its hooks see it, passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
