"""The gradient of the loss, averaged over the calibration batches in one pass for a group of row slices."""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from speft_optim.distributed import average_, together, total
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batches import BatchReader, LossFunction, model_loss
from speft_optim.weights.gradient_hooks import GradientHook, settle
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.observation import observe_gradient
from speft_optim.weights.quantized_linear import ProductHook
from speft_optim.weights.storage import DenseWeight, frozen_weight
from speft_optim.weights.targets import Target
from speft_optim.weights.verification import DenseGradient

logger = logging.getLogger(__name__)


def gradient(model: nn.Module, reader: BatchReader, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Average the gradient of the loss over the batches, with its sign."""
    for row_slice in group:
        row_slice.allocate()

    with observing(group, {row_slice: row_slice for row_slice in group}, reader.used_otherwise) as observed, together():
        for batch in reader:
            observed.promote()
            backward_of((loss or model_loss)(model, batch), reader, observed)
    average_([row_slice.accumulator for row_slice in group], total(reader.used))


class Observed:
    """The weights of a group while their gradients go to accumulators.

    Attributes:
        gradient_hooks: those on the modules that hold them.
        pending: products that wait for the dense gradient that they were compared with to be freed.
        used_outside: names of weights whose gradient came past the hooks.
    """

    def __init__(self):
        self.gradient_hooks: list[GradientHook | ProductHook] = []
        self.pending: list = []
        self.used_outside: set[str] = set()

    def promote(self) -> None:
        """Trust the hooks that backward verified; call between backwards."""
        for hook in self.gradient_hooks:
            hook.promote()

    @property
    def used_otherwise(self) -> set[str]:
        """Names of weights whose gradient is not, or not only, that of their layers' products."""
        return self.used_outside | {hook.name for hook in self.gradient_hooks if hook.told}

    def watch(self, row_slice: RowSlice, accumulator: Accumulator, stack: contextlib.ExitStack) -> None:
        """Give the accumulator the dense gradient of uses outside the modules too, while the stack is open."""
        parameter = row_slice.target.parameter

        def take(dense: Tensor) -> None:
            if row_slice.target.name not in self.used_otherwise:
                logger.warning(
                    "%s is used outside its module's forward, where no hook sees it: it is scored by the dense "
                    "gradient of these uses, one weight at a time.",
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
    """Let the gradient of each row slice's weight go to its accumulator while this lasts.

    Args:
        group: the row slices.
        accumulators: where their gradients go.
        used_otherwise: names of weights that were found to be used otherwise than as the products of their layers, so
            that each is told of once; gets those that are found now.
    """
    anchor, observed = torch.zeros((), requires_grad=True), Observed()
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for row_slice in group:
            to = accumulators[row_slice]
            observed.gradient_hooks += observe_gradient(row_slice.target, anchor, to, True, observed.pending)
            if _may_be_leaf(row_slice.target):
                observed.watch(row_slice, to, stack)
        for hook in observed.gradient_hooks:
            hook.told = hook.name in used_otherwise
            stack.callback(hook.remove)
        yield observed
        used_otherwise |= observed.used_otherwise


def _may_be_leaf(target: Target) -> bool:
    """Tell whether autograd can give the dense gradient of the weight itself: not of codes, or where it is streamed."""
    return isinstance(frozen_weight(*target.sites[0]), DenseWeight) and not target.parameter.is_meta


def backward_of(value: Tensor, reader: BatchReader, observed: Observed) -> None:
    """Check the loss of the reader's last batch and go back from it."""
    counts = reader.takes(value)
    # Where none of the observed weights is used, as an expert without tokens, there is nothing to go back to.
    if counts and value.requires_grad:
        reader.went_back = True
        value.backward()
        settle(observed.pending)
