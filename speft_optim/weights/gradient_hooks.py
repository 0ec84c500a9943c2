"""Weight gradients without weights that require gradients: hooks on the use of a frozen weight.

A `GradientHook` watches one use of a frozen weight and hands what its gradient is made of to an accumulator.

For a linear layer that is the layer's input and its output gradient. An identity placed on the layer's *output* passes
both on. The layer's forward, class and weight stay as they are, so that the input gradient is that of a frozen layer
and the dense weight gradient is never formed. The input is saved before the matmul. Saved after it, non-reentrant
checkpointing would recompute the block's last matmul for nothing. Layers with one input save it once.

Any other weight is shadowed during its module's forward by an alias. Its backward hands over the dense gradient of that
one use, which is then freed.

A linear layer takes the way of the other weights too where somebody gave it another forward, or where verification
found that its output is changed before the hook sees it (see `weights/verification.py`, also for uses outside the
module).

Replacing the layer class (as LoRA libraries do) was rejected: it changes names, breaks quantised and custom layers, and
has to be undone before saving.
"""

import functools
import itertools
import logging
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from speft_optim.weights.gradient_nodes import Accumulator, hook_output, hook_weight, keep_input
from speft_optim.weights.targets import has_other_forward, is_product, is_transposed_linear
from speft_optim.weights.verification import agrees, is_paused, is_recorded

logger = logging.getLogger(__name__)


class _Use:
    """One call of a module between its hooks.

    Attributes:
        way: how the weight's gradient of this call is formed.
        shadowed: what stood before the module's parameter already, or None.
        alias: what this call put there, or None.
        kept: a linear layer's input, its version, and the alias that keeps it.
        factors: with `VERIFY`, the two factors of the gradient, from the output's node to the alias'.
        product: what the accumulator returned for them.
    """

    def __init__(self, hook: "GradientHook", way: "Way", shadowed: Tensor | None):
        self.hook, self.way, self.shadowed, self.alias = hook, way, shadowed, None
        self.kept: tuple[Tensor, int, Tensor] | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        self.product: Tensor | None = None

    def take(self, left: Tensor, right: Tensor) -> None:
        """Keep the factors for the comparison: the sum over a whole weight must not stand beside a dense gradient."""
        self.factors = left, right
        if self.hook.pending is None:
            self.product = self.hook.accumulator.sample(left, right)
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


class GradientHook:
    """Hooks on one module that feed the gradient of one of its frozen weights to an accumulator.

    Args:
        module: the module that uses the weight in its forward.
        attribute: the weight's name in the module.
        grad_anchor: a tensor that requires gradients; the hook does nothing while it does not. It makes the output
            require gradients, and its own gradient is what the accumulator returns.
        accumulator: receives the gradient, dense or as two factors.
        name: the weight's full name, for warnings.
        verify: whether the product of a linear layer is compared with autograd's own gradient first.
        pending: a list for accumulators that keep the gradient: after a comparison, (accumulator, factors) wait in it
            for `settle`. None for an accumulator that returns a gradient for `grad_anchor`.

    Attributes:
        warned: whether the user was told that the weight is used otherwise than as `x @ W.T`.
        verdict: (surroundings, whether the product is the whole gradient in them); None until that is known. The
            surroundings are the hooks that run before this one, see `_surroundings`.
    """

    def __init__(
        self,
        module: nn.Module,
        attribute: str,
        grad_anchor: Tensor,
        accumulator: Accumulator,
        name: str = "",
        verify: bool = False,
        pending: list | None = None,
    ):
        self.attribute, self.grad_anchor, self.accumulator, self.name, self.verify = (
            attribute,
            grad_anchor,
            accumulator,
            name,
            verify,
        )
        self.transposed = is_transposed_linear(module, attribute)
        self.is_product = is_product(module, attribute)
        self.pending = pending
        self.verdict: tuple[tuple, bool] | None = None
        self._found: tuple[tuple, bool] | None = None
        self.warned = False
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
    def is_needed(self) -> bool:
        """Whether a forward now leads to a gradient for the accumulator."""
        # Where not, as in the calibration of a model in training, a second derivative must not meet the hook either.
        return torch.is_grad_enabled() and self.grad_anchor.requires_grad

    def verify_again(self) -> None:
        """Compare the gradient of the next backward with autograd's own, as in the first."""
        self.verdict = None

    def promote(self) -> None:
        """Act on what backward found; between backwards, as a checkpointed block must be recomputed as it was."""
        if self._found is not None:
            self.verdict, self._found = self._found, None

    def way(self, module: nn.Module) -> Way:
        """How to form the gradient of a call that begins now."""
        if not self.is_needed:
            return Way.NONE
        if not self.is_product or has_other_forward(module, self.attribute):
            if self.is_product:
                self._tell("its module has another forward than its class had")
            return Way.DENSE
        if not self.verify:
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
            use.alias = hook_weight(weight.detach(), self.grad_anchor, take, other)
        elif use.way is Way.DENSE:
            use.alias = hook_weight(weight.detach(), self.grad_anchor, self.accumulator.from_dense)
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
        take = use.take if use.way is Way.VERIFY else self.accumulator.from_product
        return hook_output(output, x, self.grad_anchor, take, self.transposed)

    def _judge(self, use: _Use, surroundings: tuple, dense: Tensor) -> Tensor | None:
        """Feed the accumulator with the product if it is autograd's own gradient of the alias, and with that if not."""
        (factors, product), use.factors, use.product = (use.factors, use.product), None, None
        right = False if factors is None else agrees(dense, *factors)
        if right is not None and (self._found is None or self._found[1]):
            self._found = surroundings, right
        if right is False:
            self._tell("a hook, or other code, changes what its layer returns")
            return self.accumulator.from_dense(dense)
        if self.pending is not None:
            self.pending.append((self.accumulator, factors))
        else:
            self.accumulator.accumulate(*factors)
        return product

    def _tell(self, why: str) -> None:
        """Name the weight, once."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "%s is used otherwise than as x @ W.T: %s. Its gradient is formed densely, one weight at a time, which "
                "is right and takes longer.",
                self.name,
                why,
            )


@torch.no_grad()
def settle(pending: list) -> None:
    """Give accumulators the factors that waited for the dense gradient they were compared with to be freed."""
    while pending:
        accumulator, factors = pending.pop()
        accumulator.from_product(*factors)


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """A linear layer's input as its hooks see it, passed by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))
