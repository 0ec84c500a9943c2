"""Signals that a forward and at most one backward per batch give: gradient, squared example gradient, squared input.

Each function here fills the accumulators of a group of pieces in one pass over the batches.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_optim.batches import (
    IGNORED_LABEL,
    Batch,
    BatchReader,
    LossFunction,
    example_of,
    examples_in,
    is_nan,
    labelled_examples,
    labels_of,
    loss_of,
    model_loss,
)
from speft_optim.distributed import average_, together, total
from speft_optim.frozen import DenseWeight, frozen_weight
from speft_optim.kernels import product
from speft_optim.linear import Sink, Tap, Trust, input_of, settle, tap_target
from speft_optim.pieces import Piece
from speft_optim.targets import Target, is_product, is_transposed_linear
from speft_optim.verification import DenseGradient

logger = logging.getLogger(__name__)


def gradient(model: nn.Module, reader: BatchReader, group: list[Piece], loss: LossFunction | None) -> None:
    """Average the gradient of the loss over the batches, with its sign."""
    for piece in group:
        piece.allocate()

    with tapped(group, {piece: piece for piece in group}, reader.used_otherwise) as observed, together():
        for batch in reader:
            observed.promote()
            backward_of((loss or model_loss)(model, batch), reader, observed)
    average_([piece.accumulator for piece in group], total(reader.used))


class Observed:
    """The weights of a group while their gradients are fed to sinks.

    Attributes:
        taps: the hooks on the modules that hold them.
        pending: products that wait for the dense gradient that they were compared with to be freed.
        used_outside: names of weights whose gradient came past the hooks.
    """

    def __init__(self):
        self.taps: list[Tap] = []
        self.pending: list = []
        self.used_outside: set[str] = set()

    def promote(self) -> None:
        """Trust the hooks that backward verified; call between backwards."""
        for tap in self.taps:
            tap.promote()

    @property
    def used_otherwise(self) -> set[str]:
        """Names of weights whose gradient is not, or not only, that of their layers' products."""
        return self.used_outside | {tap.name for tap in self.taps if tap.told}

    def watch(self, piece: Piece, sink: Sink, stack: contextlib.ExitStack) -> None:
        """Feed the dense gradient of uses outside the modules to the sink too, while the stack is open."""
        parameter = piece.target.parameter

        def take(dense: Tensor) -> None:
            if piece.target.name not in self.used_otherwise:
                logger.warning(
                    "%s is used outside its module's forward, where no hook sees it: it is scored by the dense "
                    "gradient of these uses, one weight at a time.",
                    piece.target.name,
                )
            self.used_outside.add(piece.target.name)
            sink.from_dense(dense)

        leaf = DenseGradient(take)
        leaf.open(parameter)
        stack.callback(leaf.close)


@contextlib.contextmanager
def tapped(
    group: list[Piece], sinks: dict[Piece, Sink], used_otherwise: set[str], trust: Trust = "verified"
) -> Iterator[Observed]:
    """Feed the gradient of each piece's weight to its sink while this lasts.

    Args:
        group: the pieces.
        sinks: where their gradients go.
        used_otherwise: names of weights that were found to be used otherwise than as the products of their layers, so
            that each is told of once; gets those that are found now.
        trust: as for `linear.Tap`; with "verified" uses outside the weights' modules count too.
    """
    anchor, observed = torch.zeros((), requires_grad=True), Observed()
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for piece in group:
            observed.taps += tap_target(piece.target, anchor, sinks[piece], trust, observed.pending)
            if trust == "verified" and _may_be_leaf(piece.target):
                observed.watch(piece, sinks[piece], stack)
        for tap in observed.taps:
            tap.told = tap.name in used_otherwise
            stack.callback(tap.remove)
        yield observed
        used_otherwise |= observed.used_otherwise


def _may_be_leaf(target: Target) -> bool:
    """Whether autograd can give the dense gradient of the weight itself: not of codes, or where it is streamed."""
    return isinstance(frozen_weight(*target.sites[0]), DenseWeight) and not target.parameter.is_meta


def backward_of(value: Tensor, reader: BatchReader, observed: Observed) -> None:
    """Check the loss of the reader's last batch and go back from it."""
    counts = reader.takes(value)
    # Where none of the tapped weights is used, as an expert without tokens, there is nothing to go back to.
    if counts and value.requires_grad:
        reader.went_back = True
        value.backward()
        settle(observed.pending)


def squared_gradient(model: nn.Module, reader: BatchReader, group: list[Piece], loss: LossFunction | None) -> None:
    """Average over examples the square of the gradient of the example's own mean loss.

    One backward of the summed example losses serves all linear weights used once: their example gradients are
    `left[b].T @ right[b]`, formed one at a time. Weights used several times or otherwise (tied or stacked ones,
    norms, and
    all weights under a loss that is no mean over labels) have their gradients added up per example, in a backward of
    their own; at no time is there a copy of the gradients per example.
    """
    sinks = {piece: _ExampleSquares(piece) for piece in group}
    examples = 0
    with tapped(group, sinks, reader.used_otherwise) as observed, _counted_uses(sinks.values()), together():
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
    average_([piece.accumulator for piece in group], examples)


class _ExampleSquares:
    """Sink of one piece: squares example gradients as they come, or adds up one example's over several uses."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.kinds: set[str] = set()
        # The squares of the first batch that is split, until it is known that products are all there is.
        self.first: Tensor | None = None
        self.is_proven = False
        self.uses: list[torch.Size | None] = []
        self.mode = "off"
        self.example: Tensor | None = None
        piece.allocate()

    def splits(self, examples: int) -> bool:
        """Whether this batch's use of the weight, just seen in forward, has one run of rows per example."""
        if not self.uses:
            return True
        (shape, *others), products_only = self.uses, "dense" not in self.kinds
        return products_only and not others and shape is not None and len(shape) > 2 and shape[0] == examples

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Square per example, or add to the present example's gradient."""
        piece = self.piece
        self.kinds.add("product")
        if self.mode == "example":
            self.example += product(left.flatten(0, -2)[:, piece.first : piece.last], right.flatten(0, -2))
        elif self.mode == "split":
            for one_left, one_right in zip(left.flatten(1, -2), right.flatten(1, -2), strict=True):
                gradient = product(one_left[:, piece.first : piece.last], one_right)
                (piece.accumulator if self.is_proven else self.first).addcmul_(gradient, gradient)

    def from_dense(self, gradient: Tensor) -> None:
        """Add to the present example's gradient.

        Raises:
            ValueError: the examples of the batch were to be told apart by products.
        """
        self.kinds.add("dense")
        if self.mode == "example":
            self.example += self.piece.rows_of(gradient)
        elif self.mode == "split" and self.is_proven:
            raise ValueError(
                f"{self.piece.target.name} is used in another way than in the first calibration batch, so that "
                "salience='fisher' cannot tell its examples apart; pass batches of one example, or leave it out."
            )

    def open_split(self) -> None:
        """From now on square each example's product."""
        self.mode = "split"
        if not self.is_proven:
            self.first = torch.zeros_like(self.piece.accumulator)

    def close_split(self) -> bool:
        """Whether the products were the whole gradients; if not, their squares are forgotten."""
        self.mode = "off"
        if not self.is_proven and "dense" not in self.kinds:
            self.piece.accumulator += self.first
            self.is_proven = "product" in self.kinds
        self.first = None
        return "dense" not in self.kinds

    def close_example(self) -> None:
        """Square the example's whole gradient into the total."""
        self.piece.accumulator.addcmul_(self.example, self.example)
        self.example.zero_()


@contextlib.contextmanager
def _counted_uses(sinks: Iterable[_ExampleSquares]) -> Iterator[None]:
    """Note in each sink the leading shape of every use of its weight in forward; None where it is no linear one."""
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            for module, attribute in sink.piece.target.sites:
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
    """One backward per example; the pieces in `rest` square the whole gradient of each.

    Args:
        model: the model.
        batch: the examples.
        counting: rows that count, None where that is not known.
        rest: sinks of the pieces.
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
        sink.mode, sink.example = "example", torch.zeros_like(sink.piece.accumulator)
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


def example_losses(logits: Tensor | None, labels: Tensor, loss: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean loss of each example, if the model's loss is a mean of cross-entropies over labels.

    Whether labels are shifted by one (causal models) is told from which way comes nearer to the model's own loss. Where
    logits are nearly uniform both come near it, and a loss rounded to bf16 cannot tell them apart.

    Args:
        logits: (batch, length, classes) or (batch, classes).
        labels: (batch, length) or (batch,), ignored ones -100.
        loss: the model's own loss of the batch.

    Returns:
        The losses, (batch,) fp32 with a graph to the logits, 0 for examples without labels; and which have labels that
        count, (batch,) bool. None where neither way gives the model's loss, or both do.
    """
    if logits is None or logits.dim() != labels.dim() + 1 or logits.shape[: labels.dim()] != labels.shape:
        return None
    if labels.is_floating_point() or not bool(((labels < logits.shape[-1]) & (labels >= 0) | _ignored(labels)).all()):
        return None
    candidates = [labels]
    if labels.dim() > 1:
        candidates.append(nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:])
    own = loss.detach().float()
    log_probabilities = nn.functional.log_softmax(logits.flatten(0, -2).float(), -1)
    found = []
    for candidate in candidates:
        each = nn.functional.nll_loss(
            log_probabilities, candidate.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(labels.shape)
        mean = each.detach().sum() / (~_ignored(candidate)).sum()
        # NaN where no label is left.
        found.append(((mean - own).abs().nan_to_num(torch.inf).item(), candidate, each))
    (off, candidate, each), *other = sorted(found, key=lambda one: one[0])
    if off > 1e-5 + 1e-3 * own.abs().item():
        return None
    # What the rounding of the model's own loss may come to.
    if other and other[0][0] <= max(1e-5, torch.finfo(loss.dtype).eps) * own.abs().item():
        return None
    counts = (~_ignored(candidate)).view(len(labels), -1).sum(1)
    return each.view(len(labels), -1).sum(1) / counts.clamp(min=1), counts > 0


def _ignored(labels: Tensor) -> Tensor:
    return labels == IGNORED_LABEL


@dataclass
class _Attention:
    """The attention mask of the present forward, for hooks."""

    mask: Tensor | None = None

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model."""
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) else None


def squared_input(model: nn.Module, reader: BatchReader, group: list[Piece], loss: LossFunction | None) -> None:
    """Sum the squares of each input feature over all tokens that are no padding; forward only.

    Which tokens are padding tells the attention mask that the model is called with, by whomever.

    Raises:
        ValueError: a weight is no linear one, so that its entries have no input feature.
    """
    attention = _Attention()
    with contextlib.ExitStack() as stack, together(), torch.no_grad():
        for piece in group:
            _watch_inputs(piece, attention, stack)
        # A loss of the user's may leave the head out and call what is below it.
        for part in {model, getattr(model, "base_model", model)}:
            stack.callback(part.register_forward_pre_hook(attention.see, with_kwargs=True).remove)
        for batch in reader:
            attention.mask = None
            model(**batch) if loss is None else loss(model, batch)
    average_([piece.accumulator for piece in group], 1)


def _watch_inputs(piece: Piece, attention: _Attention, stack: contextlib.ExitStack) -> None:
    """Hook every use of the piece's weight: each forward adds to its accumulator, which columns or rows share."""
    for module, attribute in piece.target.sites:
        if not is_product(module, attribute):
            raise ValueError(
                f"salience='activation' needs linear weights, {piece.target.name} is none; choose targets=[...]."
            )
    # Of a transposed weight the rows are the input features, and the piece holds some of them.
    transposed = is_transposed_linear(module, attribute)
    features = slice(piece.first, piece.last) if transposed else slice(None)
    count = piece.last - piece.first if transposed else piece.columns
    sums = torch.zeros(count, dtype=torch.float32, device=piece.target.device)
    piece.accumulator = sums[:, None] if transposed else sums[None]

    def add(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = input_of(args, kwargs).detach()[..., features].float()
        if attention.mask is not None and x.shape[:-1] == attention.mask.shape:
            x = x * attention.mask.unsqueeze(-1)
        sums.add_(x.flatten(0, -2).square().sum(0))

    for module, _ in piece.target.sites:
        stack.callback(module.register_forward_hook(add, with_kwargs=True).remove)
