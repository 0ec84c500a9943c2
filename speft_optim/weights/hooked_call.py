"""One call of a module that has a gradient hook: how its gradient is formed, and what is kept from forward to backward.

`gradient_hooks.GradientHook` makes a `Use` for each call. Factors that are compared with the dense gradient wait in the
hook's `pending` list until `settle` gives them to their accumulators.
"""

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from speft_optim.weights.gradient_hooks import GradientHook


class Way(Enum):
    """How a hook forms the gradient of one call."""

    PRODUCT = "from input and output gradient"
    DENSE = "by autograd, of an alias"
    VERIFY = "both, compared"
    NONE = "not at all"


class Use:
    """The state of one call of a module, from its forward pre-hook to the end of its backward.

    Attributes:
        way: how the weight's gradient is formed for this call.
        shadowed: the instance attribute that hid the module's parameter before this call, or None.
        alias: the instance attribute that hides it during this call, or None.
        kept: a linear layer's input, the input's version, and its alias whose node saves it.
        factors: with `VERIFY`, the two factors of the gradient, between the backwards of the output and of the alias.
        product: with `VERIFY`, what the accumulator returned for them.
    """

    def __init__(self, hook: "GradientHook", way: Way, shadowed: Tensor | None):
        self.hook, self.way, self.shadowed, self.alias = hook, way, shadowed, None
        self.kept: tuple[Tensor, int, Tensor] | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        self.product: Tensor | None = None

    def take(self, left: Tensor, right: Tensor) -> None:
        """Keep the factors for the comparison with the dense gradient, which autograd forms next.

        Without `pending` the accumulator samples them now. With it, earlier factors are settled now, before the dense
        gradient is formed: their sum over a whole weight is large too.
        """
        self.factors = left, right
        if self.hook.pending is None:
            self.product = self.hook.accumulator.sample(left, right)
        else:
            settle(self.hook.pending)


@torch.no_grad()
def settle(pending: list) -> None:
    """Give accumulators the factors that waited until the dense gradient of their comparison was freed."""
    while pending:
        accumulator, factors = pending.pop()
        accumulator.from_product(*factors)
