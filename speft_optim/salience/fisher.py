"""The statistic of `fisher`: the mean over examples of the squared gradient of each example's own loss."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from speft_optim.distributed import average_, total
from speft_optim.kernels import product
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.batches import Batch, example_of, examples_in, labels_of
from speft_optim.salience.exchange import reached
from speft_optim.salience.first_order import Observed, backward_of, observing
from speft_optim.salience.losses import LossFunction, example_losses, is_nan, labelled_examples, loss_of, model_loss
from speft_optim.weights.hooked_call import settle
from speft_optim.weights.products import is_product


def squared_gradient(model: nn.Module, reader: BatchReader, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Average over examples the squared gradient of each example's own mean loss.

    One backward pass of the summed example losses serves every linear weight that is used once: `left[b].T @ right[b]`
    is the gradient of example b, and these are formed one at a time. Weights that are used several times or in other
    ways (tied or stacked ones, norms, and all weights if the loss is not a mean over labels) need a backward pass for
    each example. Gradients of several examples never exist at once.

    Processes that hold a sharded model have equally many backward passes, whose kind they agree on.

    Args:
        model: the model.
        reader: yields the calibration batches.
        group: the row slices whose accumulators are filled.
        loss: from model and batch to a scalar; None for the model's own loss.

    Raises:
        ValueError: no example has a label in the loss, a loss is not finite, or a weight is suddenly used in another
            way.
    """
    squares = {row_slice: _ExampleSquares(row_slice) for row_slice in group}
    examples = 0
    with (
        observing(group, squares, reader.used_otherwise) as observed,
        _counted_uses(squares.values()),
        reached(model, group),
        reader.together(model),
    ):
        for batch in reader:
            done, counting = [], None
            observed.promote()
            if loss is None:
                done, counting = _split_backward(model, batch, list(squares.values()), reader, observed)
            rest = [each for each in squares.values() if each not in done]
            if rest:
                counting = _backward_by_example(model, batch, counting, rest, loss or model_loss, reader, observed)
            examples += len(counting)
    examples = total(examples)
    if not examples:
        raise ValueError("No example of the calibration batches has a label that is in its loss; look at the labels.")
    average_([row_slice.accumulator for row_slice in group], examples)


class _ExampleSquares:
    """Accumulator of one row slice, which squares the gradient of each example.

    In the mode "split" a product that arrives holds all examples of the batch, and the gradient of each is squared at
    once. In the mode "example" all that arrives is added to the gradient of one example, which `close_example` squares.
    The mode "off" ignores gradients.

    Attributes:
        uses: the output shape of each use of the weight in the last forward pass; None if the use is not a product.
    """

    def __init__(self, row_slice: RowSlice):
        self.row_slice = row_slice
        self.kinds: set[str] = set()
        # Squares of the first split batch are kept apart until all its gradients were seen to be products.
        self.first: Tensor | None = None
        self.is_proven = False
        self.uses: list[torch.Size | None] = []
        self.mode = "off"
        self.example: Tensor | None = None
        row_slice.allocate()

    def splits(self, examples: int) -> bool:
        """Tell whether the last forward pass used the weight once, in a product with examples as first dimension."""
        if not self.uses:
            return True
        (shape, *others), products_only = self.uses, "dense" not in self.kinds
        return products_only and not others and shape is not None and len(shape) > 2 and shape[0] == examples

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Square `left[b].T @ right[b]` for each example b, or add `left.T @ right` to the current example."""
        row_slice = self.row_slice
        self.kinds.add("product")
        if self.mode == "example":
            self.example += product(left.flatten(0, -2)[:, row_slice.first : row_slice.last], right.flatten(0, -2))
        elif self.mode == "split":
            for one_left, one_right in zip(left.flatten(1, -2), right.flatten(1, -2), strict=True):
                gradient = product(one_left[:, row_slice.first : row_slice.last], one_right)
                (row_slice.accumulator if self.is_proven else self.first).addcmul_(gradient, gradient)

    def from_dense(self, gradient: Tensor) -> None:
        """Add a dense gradient to the current example's.

        Raises:
            ValueError: the batch is split, but a dense gradient is the sum over its examples.
        """
        self.kinds.add("dense")
        if self.mode == "example":
            self.example += self.row_slice.rows_of(gradient)
        elif self.mode == "split" and self.is_proven:
            raise ValueError(
                f"{self.row_slice.target.name} is used in another way than in the first calibration batch, so that "
                "salience='fisher' cannot separate the examples; pass batches of one example, or leave the weight out."
            )

    def open_split(self) -> None:
        """Square the gradient of each example in the products that arrive from now on."""
        self.mode = "split"
        if not self.is_proven:
            self.first = torch.zeros_like(self.row_slice.accumulator)

    @property
    def is_split(self) -> bool:
        """Whether products were the whole gradient in the backward pass of a split batch."""
        return "dense" not in self.kinds

    def close_split(self, is_split: bool) -> None:
        """End the backward pass; squares of the first one are dropped if products were not the whole gradient."""
        self.mode = "off"
        if not self.is_proven and is_split:
            self.row_slice.accumulator += self.first
            self.is_proven = "product" in self.kinds
        self.first = None

    def close_example(self) -> None:
        """Add the square of the current example's gradient, and start the next one's at zero."""
        self.row_slice.accumulator.addcmul_(self.example, self.example)
        self.example.zero_()


@contextlib.contextmanager
def _counted_uses(squares: Iterable[_ExampleSquares]) -> Iterator[None]:
    """Note in `uses` every use of the weights in forward passes while the context lasts."""
    with contextlib.ExitStack() as stack:
        for each in squares:
            for module, attribute in each.row_slice.target.sites:
                linear = is_product(module, attribute)

                def note(module, args, kwargs, output, uses=each.uses, linear=linear):
                    uses.append(output.shape if linear else None)

                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield


def _split_backward(
    model: nn.Module, batch: Batch, squares: list[_ExampleSquares], reader: BatchReader, observed: Observed
) -> tuple[list[_ExampleSquares], list[int] | None]:
    """Square the example gradients of those weights for which one backward pass separates the examples.

    Returns:
        The accumulators that have their squares, and the rows of the batch with labels in the loss; None for the rows
        if the model's loss does not tell them.
    """
    for each in squares:
        each.uses.clear()
    output = model(**batch)
    value = loss_of(output, model)
    if not reader.takes(value):
        return [], []
    found = example_losses(getattr(output, "logits", None), batch["labels"], value)
    if not all(reader.agreed([found is not None])):
        return [], None
    losses, counted = found
    # Backward may recompute blocks and so count uses twice.
    able = _chosen(squares, reader.agreed([each.splits(len(batch["labels"])) for each in squares]))
    # The loss of an example without labels is 0 here and adds nothing.
    total = losses.sum() if able else None
    if able and total.requires_grad:
        for each in able:
            each.open_split()
        reader.went_back = True
        with reader.gathering():
            total.backward()
            settle(observed.pending)
        split = reader.agreed([each.is_split for each in able])
        for each, is_split in zip(able, split, strict=True):
            each.close_split(is_split)
        able = _chosen(able, split)
    return able, counted.nonzero().squeeze(1).tolist()


def _chosen(squares: list[_ExampleSquares], choice: list[bool]) -> list[_ExampleSquares]:
    return [each for each, is_chosen in zip(squares, choice, strict=True) if is_chosen]


def _backward_by_example(
    model: nn.Module,
    batch: Batch,
    counting: list[int] | None,
    rest: list,
    loss: LossFunction,
    reader: BatchReader,
    observed: Observed,
) -> list[int]:
    """Run a backward pass for each example, and square the whole gradient of each.

    Args:
        model: the model.
        batch: the examples.
        counting: rows of the examples with labels in the loss; None if that is not known.
        rest: the accumulators that take part.
        loss: from model and batch to a scalar.
        reader: the reader that yielded the batch.
        observed: the hooks that fill the accumulators.

    Returns:
        The rows of the examples whose gradients were squared.
    """
    size, counted = examples_in(batch), []
    rows, unsure = (counting, []) if counting is not None else _rows_to_try(labels_of(batch), size, loss)
    for each in rest:
        each.example = torch.zeros_like(each.row_slice.accumulator)
    # A process with fewer examples than others passes its first one back for their sake, and leaves it out.
    for number in range(reader.most_of_all(len(rows))):
        row = rows[number] if number < len(rows) else 0
        value = loss(model, example_of(batch, row, size))
        # The loss may shift labels, and the only label of this example be the first.
        counts = number < len(rows) and not (row in unsure and is_nan(value))
        if not counts and not reader.in_step:
            continue
        for each in rest:
            each.mode = "example" if counts else "off"
        backward_of(value, reader, observed, counts)
        if counts:
            counted.append(row)
            for each in rest:
                each.close_example()
    for each in rest:
        each.mode, each.example = "off", None
    return counted


def _rows_to_try(labels: Tensor | None, size: int, loss: LossFunction) -> tuple[Sequence[int], list[int]]:
    """Return the rows of a batch whose loss may count, and those of them whose loss may be the mean over no label."""
    if labels is None:
        return range(size), []
    labelled, by_first_only = labelled_examples(labels)
    if loss is model_loss:
        return labelled.nonzero().squeeze(1).tolist(), by_first_only.nonzero().squeeze(1).tolist()
    # The user's loss may use examples without labels.
    return range(size), (~labelled | by_first_only).nonzero().squeeze(1).tolist()
