"""Gradient hooks: they observe the gradient of a frozen weight, which itself requires no gradient.

A `GradientHook` is attached to one module and passes the gradient of one of its weights to an accumulator.

For a linear layer it passes the two factors of the gradient: the layer's input and its output gradient. An identity
node on the layer's *output* has both in backward. The layer's forward, class and weight stay as they are, so that the
input gradient is that of a frozen layer and the dense weight gradient is never formed. The input is saved before the
matmul. Saved after it, non-reentrant checkpointing would recompute the block's last matmul for nothing. Layers that
share an input save it once.

Any other weight is replaced by an alias during its module's forward. In backward the alias passes on the dense gradient
of this one use, which is then freed.

A linear layer is treated like these other weights if its forward was replaced, or if verification found that its output
is changed before the hook sees it. `weights/verification.py` explains this verification, and how gradients of uses
outside the module are collected.

Replacing the layer class (as LoRA libraries do) was rejected: it changes names, breaks quantised and custom layers, and
has to be undone before saving.
"""

import functools
import itertools
import logging

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from speft_optim.weights.gradient_nodes import Accumulator, hook_output, hook_weight, keep_input
from speft_optim.weights.hooked_call import Use, Way
from speft_optim.weights.products import has_other_forward, is_product, is_transposed_linear
from speft_optim.weights.verification import agrees, is_paused, is_recorded

logger = logging.getLogger(__name__)


_numbers = itertools.count()

# The ways that need a node on the layer's output.
_BY_OUTPUT = (Way.PRODUCT, Way.VERIFY)


class GradientHook:
    """Hooks on one module that pass the gradient of one of its frozen weights to an accumulator.

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
        self.attribute, self.grad_anchor, self.accumulator = attribute, grad_anchor, accumulator
        self.name, self.verify, self.pending = name, verify, pending
        self.is_product, self.transposed = is_product(module, attribute), is_transposed_linear(module, attribute)
        self.verdict: tuple[tuple, bool] | None = None
        self._found: tuple[tuple, bool] | None = None
        self.warned = False
        # A module holds its unfinished calls under this name. A DataParallel replica, on another thread, has its own.
        self._key = f"_uses_of_{attribute}_{next(_numbers)}"
        before = module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        # The hook is first among the forward hooks, since it must see what the layer itself returned. It is called even
        # after an exception, with which a checkpoint's recomputation ends, to remove the alias before the next forward.
        after = module.register_forward_hook(
            self.after_forward, prepend=self.is_product, with_kwargs=True, always_call=True
        )
        self.hooks = [before, after]
        # A compiler can compare a number, but not a handle.
        self._after_id = after.id

    def remove(self) -> None:
        """Take the hooks off the module."""
        for hook in self.hooks:
            hook.remove()

    @property
    def is_needed(self) -> bool:
        """Whether a forward that begins now leads to a gradient for the accumulator."""
        # Calibration of a model in training turns this off, so that second derivatives do not reach the hook either.
        return torch.is_grad_enabled() and self.grad_anchor.requires_grad

    def promote(self) -> None:
        """Adopt the verdict of the last backward; called between steps, as recomputed blocks must not change midway."""
        if self._found is not None:
            self.verdict, self._found = self._found, None

    def way(self, module: nn.Module) -> Way:
        """Return how to form the gradient for a call that begins now."""
        if not self.is_needed:
            return Way.NONE
        if not self.is_product or has_other_forward(module, self.attribute):
            if self.is_product:
                self._warn("its module has another forward than its class had")
            return Way.DENSE
        if not self.verify:
            return Way.PRODUCT
        surroundings = self._surroundings(module)
        if torch.compiler.is_compiling():
            # Nothing can be compared inside a compiled graph. Without surroundings the product is all the hook sees.
            return Way.DENSE if surroundings else Way.PRODUCT
        if self.verdict is None or self.verdict[0] != surroundings:
            return Way.VERIFY
        return Way.PRODUCT if self.verdict[1] else Way.DENSE

    def _surroundings(self, module: nn.Module) -> tuple:
        """Return the keys of what may change the layer's output before this hook sees it; usually empty."""
        first = [*module._forward_hooks][:1]
        if first == [self._after_id] and not _global_forward_hooks and "forward" not in module.__dict__:
            return ()
        ahead = itertools.takewhile(lambda key: key != self._after_id, module._forward_hooks)
        return tuple(ahead), tuple(_global_forward_hooks), id(module.__dict__.get("forward"))

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Forward pre-hook: hide the parameter by an alias, as an instance attribute, which Python finds first.

        Raises:
            ValueError: another module was put in the place of this one and given its hooks.
        """
        if kwargs is None:
            # torch.ao.quantization registers the hooks again, without their option `with_kwargs`.
            raise ValueError(
                f"The module of {self.name} was replaced by a {type(module).__name__} that has its hooks, as by "
                "torch.ao.quantization; call desparsify(model) before such a conversion."
            )
        uses = module.__dict__.setdefault(self._key, [])
        if not torch.is_grad_enabled():
            # Nothing is recorded, as in generation, but `after_forward` expects an entry for each call.
            uses.append(None)
            return
        # `getattr` finds a copy on another device that already hides the parameter; `_parameters` would not.
        weight = getattr(module, self.attribute)
        use = Use(self, self.way(module), module.__dict__.get(self.attribute))
        # The use is noted before autograd saves anything: there a recomputation may end early, in `after_forward`.
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
        """Forward hook: remove the alias and observe the output; after an exception `output` is None."""
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
            # Restore the alias of an outer call, or a replica's copy. Any other attribute ends with this call too.
            if use.shadowed is not None and (uses or getattr(module, "_is_replica", False)):
                module.__dict__[self.attribute] = use.shadowed
        use.alias = None
        if use.way not in _BY_OUTPUT or output is None:
            return None
        x, kept = input_of(args, kwargs), use.kept
        # The saved alias is used only if no other hook has changed or replaced the input since.
        if kept is not None and kept[0] is x and kept[1] == x._version:
            x = kept[2]
        use.kept = None
        take = use.take if use.way is Way.VERIFY else self.accumulator.from_product
        return hook_output(output, x, self.grad_anchor, take, self.transposed)

    def _judge(self, use: Use, surroundings: tuple, dense: Tensor) -> Tensor | None:
        """Pass on the product if it equals `dense`, autograd's own gradient of the alias; else pass on `dense`."""
        (factors, product), use.factors, use.product = (use.factors, use.product), None, None
        right = False if factors is None else agrees(dense, *factors)
        if right is not None and (self._found is None or self._found[1]):
            self._found = surroundings, right
        if right is False:
            self._warn("a hook, or other code, changes what its layer returns")
            return self.accumulator.from_dense(dense)
        if self.pending is not None:
            self.pending.append((self.accumulator, factors))
        else:
            self.accumulator.accumulate(*factors)
        return product

    def _warn(self, why: str) -> None:
        """Warn once for this weight."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "%s is used otherwise than as x @ W.T: %s. Its gradient is formed densely, one weight at a time, which "
                "is correct but slower.",
                self.name,
                why,
            )


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """Return a linear layer's input from a hook's arguments, whether it was passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))
