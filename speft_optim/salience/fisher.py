"""The mean over examples of the squared gradient of each example's own loss."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from speft_optim.distributed import average_, together, total
from speft_optim.kernels import product
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batches import Batch, BatchReader, example_of, examples_in, labels_of
from speft_optim.salience.first_order import Observed, backward_of, observing
from speft_optim.salience.losses import LossFunction, example_losses, is_nan, labelled_examples, loss_of, model_loss
from speft_optim.weights.gradient_hooks import settle
from speft_optim.weights.targets import is_product


def squared_gradient(model: nn.Module, reader: BatchReader, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Average over examples the square of the gradient of the example's own mean loss.

    One backward of the summed example losses serves all linear weights used once: their example gradients are
    `left[b].T @ right[b]`, formed one at a time. Weights used several times or otherwise (tied or stacked ones,
    norms, and
    all weights under a loss that is no mean over labels) have their gradients added up per example, in a backward of
    their own; at no time is there a copy of the gradients per example.
    """
    sinks = {row_slice: _ExampleSquares(row_slice) for row_slice in group}
    examples = 0
    with observing(group, sinks, reader.used_otherwise) as observed, _counted_uses(sinks.values()), together():
        for batch in reader:
            done, counting = [], None
            observed.promote()
            if loss is None:
                done, counting = _split_backward(model, batch, list(sinks.values()), reader, observed)
            rest = [sink for sink in sinks.values() if sink not in done]
            if rest:
                counting = _backward_by_example(model, batch, counting, rest, loss or model_loss, reader, observed)
            examples += len(counting)
    examples = total(examples)
    if not examples:
        raise ValueError("No example of the calibration batches has a label that its loss counts; look at the labels.")
    average_([row_slice.accumulator for row_slice in group], examples)


class _ExampleSquares:
    """Sink of one row_slice: squares example gradients as they come, or adds up one example's over several uses."""

    def __init__(self, row_slice: RowSlice):
        self.row_slice = row_slice
        self.kinds: set[str] = set()
        # The squares of the first batch that is split, until it is known that products are all there is.
        self.first: Tensor | None = None
        self.is_proven = False
        self.uses: list[torch.Size | None] = []
        self.mode = "off"
        self.example: Tensor | None = None
        row_slice.allocate()

    def splits(self, examples: int) -> bool:
        """Tell whether this batch's use of the weight, just seen in forward, has one run of rows per example."""
        if not self.uses:
            return True
        (shape, *others), products_only = self.uses, "dense" not in self.kinds
        return products_only and not others and shape is not None and len(shape) > 2 and shape[0] == examples

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Square per example, or add to the present example's gradient."""
        row_slice = self.row_slice
        self.kinds.add("product")
        if self.mode == "example":
            self.example += product(left.flatten(0, -2)[:, row_slice.first : row_slice.last], right.flatten(0, -2))
        elif self.mode == "split":
            for one_left, one_right in zip(left.flatten(1, -2), right.flatten(1, -2), strict=True):
                gradient = product(one_left[:, row_slice.first : row_slice.last], one_right)
                (row_slice.accumulator if self.is_proven else self.first).addcmul_(gradient, gradient)

    def from_dense(self, gradient: Tensor) -> None:
        """Add to the present example's gradient.

        Raises:
            ValueError: the examples of the batch were to be told apart by products.
        """
        self.kinds.add("dense")
        if self.mode == "example":
            self.example += self.row_slice.rows_of(gradient)
        elif self.mode == "split" and self.is_proven:
            raise ValueError(
                f"{self.row_slice.target.name} is used in another way than in the first calibration batch, so that "
                "salience='fisher' cannot tell its examples apart; pass batches of one example, or leave it out."
            )

    def open_split(self) -> None:
        """From now on square each example's product."""
        self.mode = "split"
        if not self.is_proven:
            self.first = torch.zeros_like(self.row_slice.accumulator)

    def close_split(self) -> bool:
        """Tell whether the products were the whole gradients; if not, their squares are forgotten."""
        self.mode = "off"
        if not self.is_proven and "dense" not in self.kinds:
            self.row_slice.accumulator += self.first
            self.is_proven = "product" in self.kinds
        self.first = None
        return "dense" not in self.kinds

    def close_example(self) -> None:
        """Square the example's whole gradient into the total."""
        self.row_slice.accumulator.addcmul_(self.example, self.example)
        self.example.zero_()


@contextlib.contextmanager
def _counted_uses(sinks: Iterable[_ExampleSquares]) -> Iterator[None]:
    """Note in each sink the leading shape of every use of its weight in forward; None where it is no linear one."""
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            for module, attribute in sink.row_slice.target.sites:
                linear = is_product(module, attribute)

                def note(module, args, kwargs, output, uses=sink.uses, linear=linear):
                    uses.append(output.shape if linear else None)

                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield


def _split_backward(
    model: nn.Module, batch: Batch, sinks: list[_ExampleSquares], reader: BatchReader, observed: Observed
) -> tuple[list[_ExampleSquares], list[int] | None]:
    """Square the example gradients of the weights that one backward can tell apart.

    Returns:
        The sinks that are done, and the rows of the batch that count; None where the loss does not tell.
    """
    for sink in sinks:
        sink.uses.clear()
    output = model(**batch)
    value = loss_of(output, model)
    if not reader.takes(value):
        return [], []
    found = example_losses(getattr(output, "logits", None), batch["labels"], value)
    if found is None:
        return [], None
    losses, counted = found
    # Asked before backward, where recomputed blocks are seen once more.
    able = [sink for sink in sinks if sink.splits(len(batch["labels"]))]
    # An example without a label that counts adds nothing.
    total = losses.sum() if able else None
    if able and total.requires_grad:
        for sink in able:
            sink.open_split()
        reader.went_back = True
        total.backward()
        settle(observed.pending)
        able = [sink for sink in able if sink.close_split()]
    return able, counted.nonzero().squeeze(1).tolist()


def _backward_by_example(
    model: nn.Module,
    batch: Batch,
    counting: list[int] | None,
    rest: list,
    loss: LossFunction,
    reader: BatchReader,
    observed: Observed,
) -> list[int]:
    """One backward per example; the row slices in `rest` square the whole gradient of each.

    Args:
        model: the model.
        batch: the examples.
        counting: rows that count, None where that is not known.
        rest: sinks of the row slices.
        loss: from model and batch to a scalar.
        reader: whose last batch it is.
        observed: what feeds the sinks.

    Returns:
        The rows that counted.
    """
    size, labels = examples_in(batch), labels_of(batch)
    rows, unsure = counting, []
    if counting is None and labels is None:
        rows = range(size)
    elif counting is None:
        labelled, by_first_only = labelled_examples(labels)
        # The user's loss may count an example for other things than labels.
        rows = labelled.nonzero().squeeze(1).tolist() if loss is model_loss else range(size)
        unsure = (by_first_only if loss is model_loss else ~labelled | by_first_only).nonzero().squeeze(1).tolist()
    counted = []
    for sink in rest:
        sink.mode, sink.example = "example", torch.zeros_like(sink.row_slice.accumulator)
    for row in rows:
        value = loss(model, example_of(batch, row, size))
        if row in unsure and is_nan(value):
            # A mean over no label: the loss is a shifted one, for which this example has none.
            continue
        backward_of(value, reader, observed)
        counted.append(row)
        for sink in rest:
            sink.close_example()
    for sink in rest:
        sink.mode, sink.example = "off", None
    return counted
