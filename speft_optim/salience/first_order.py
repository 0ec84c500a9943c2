"""The statistic of first-order measures: the gradient of the loss, averaged over the calibration batches."""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from speft_optim.distributed import total
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.exchange import Exchange
from speft_optim.salience.losses import LossFunction, model_loss
from speft_optim.weights.gradient_hooks import GradientHook
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.hooked_call import settle
from speft_optim.weights.observation import observe_gradient
from speft_optim.weights.quantized_linear import ProductHook
from speft_optim.weights.storage import DenseWeight, frozen_weight
from speft_optim.weights.targets import Target
from speft_optim.weights.verification import DenseGradient

logger = logging.getLogger(__name__)


def gradient(model: nn.Module, reader: BatchReader, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Fill the accumulators of a group with the gradient of the loss, with its sign, averaged over the batches.

    Args:
        model: the model.
        reader: yields the calibration batches.
        group: the row slices.
        loss: from model and batch to a scalar; None for the model's own loss.

    Raises:
        ValueError: a loss is missing or not finite.
    """
    for row_slice in group:
        row_slice.allocate()

    exchange = Exchange(group)
    with (
        observing(group, exchange.accumulators, reader.used_otherwise) as observed,
        exchange.watching(model, observed.pending),
        reader.together(model),
    ):
        for batch in reader:
            observed.promote()
            backward_of((loss or model_loss)(model, batch), reader, observed)
            with reader.gathering():
                exchange.end_pass()
    exchange.average_(total(reader.used))


class Observed:
    """The weights of a group while their gradients go to accumulators.

    Attributes:
        gradient_hooks: the hooks on the modules that hold the weights.
        pending: products that are accumulated once the dense gradient that they were compared with is freed.
        used_outside: names of weights that got a gradient which the hooks did not see.
    """

    def __init__(self):
        self.gradient_hooks: list[GradientHook | ProductHook] = []
        self.pending: list = []
        self.used_outside: set[str] = set()

    def promote(self) -> None:
        """Trust the hooks that the last backward pass verified; call between two passes."""
        for hook in self.gradient_hooks:
            hook.promote()

    @property
    def used_otherwise(self) -> set[str]:
        """Names of weights that are used in other ways than in their layers' products."""
        return self.used_outside | {hook.name for hook in self.gradient_hooks if hook.warned}

    def watch(self, row_slice: RowSlice, accumulator: Accumulator, stack: contextlib.ExitStack) -> None:
        """Accumulate the gradients of uses outside the weight's modules too, until the stack closes."""
        parameter = row_slice.target.parameter

        def take(dense: Tensor) -> None:
            if row_slice.target.name not in self.used_otherwise:
                logger.warning(
                    "%s is also used outside its module's forward, where hooks do not see it; its scores include the "
                    "dense gradient of these uses, formed for one weight at a time.",
                    row_slice.target.name,
                )
            self.used_outside.add(row_slice.target.name)
            accumulator.from_dense(dense)

        leaf = DenseGradient(take)
        leaf.open(parameter)
        stack.callback(leaf.close)


@contextlib.contextmanager
def observing(
    group: list[RowSlice], accumulators: Mapping[RowSlice, Accumulator], used_otherwise: set[str]
) -> Iterator[Observed]:
    """Accumulate the gradients of the row slices' weights while the context lasts.

    Args:
        group: the row slices.
        accumulators: the accumulator of each.
        used_otherwise: names of weights known to be used in other ways than in their layers' products, about which
            the user was warned; names found now are added.
    """
    grad_anchor, observed = torch.zeros((), requires_grad=True), Observed()
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for row_slice in group:
            to = accumulators[row_slice]
            observed.gradient_hooks += observe_gradient(row_slice.target, grad_anchor, to, True, observed.pending)
            if _may_be_leaf(row_slice.target):
                observed.watch(row_slice, to, stack)
        for hook in observed.gradient_hooks:
            hook.warned = hook.name in used_otherwise
            stack.callback(hook.remove)
        yield observed
        used_otherwise |= observed.used_otherwise


def _may_be_leaf(target: Target) -> bool:
    """Tell whether the weight can require a gradient itself: a quantised or streamed one cannot."""
    return isinstance(frozen_weight(*target.sites[0]), DenseWeight) and not target.parameter.is_meta


def backward_of(value: Tensor, reader: BatchReader, observed: Observed, counts: bool = True) -> None:
    """Check the loss of the reader's last batch, if it counts, and run its backward pass."""
    # The loss requires no gradient if it uses no observed weight, such as that of an expert without tokens.
    if reader.takes(value, counts) and value.requires_grad:
        reader.went_back = True
        with reader.gathering():
            value.backward()
            settle(observed.pending)
