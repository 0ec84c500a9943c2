"""Signals that a forward and at most one backward per batch give: gradient, squared example gradient, squared input.

Each function here fills the accumulators of a group of pieces in one pass over the batches.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_optim.batches import IGNORED_LABEL, Batch, BatchReader, LossFunction, check_loss, loss_of, model_loss
from speft_optim.distributed import average_, together, total
from speft_optim.kernels import product
from speft_optim.linear import Sink, input_of, tap_target
from speft_optim.pieces import Piece
from speft_optim.targets import is_product, is_transposed_linear


def gradient(model: nn.Module, reader: BatchReader, group: list[Piece], loss: LossFunction | None) -> None:
    """Average the gradient of the loss over the batches, with its sign."""
    for piece in group:
        piece.allocate()

    with tapped(group, {piece: piece for piece in group}), together():
        for batch in reader:
            backward(model, batch, loss or model_loss, reader.used)
    average_([piece.accumulator for piece in group], total(reader.used))


@contextlib.contextmanager
def tapped(group: list[Piece], sinks: dict[Piece, Sink]) -> Iterator[None]:
    """Feed the gradient of each piece's weight to its sink while this lasts."""
    anchor = torch.zeros((), requires_grad=True)
    with contextlib.ExitStack() as stack, torch.enable_grad():
        for piece in group:
            for tap in tap_target(piece.target, anchor, sinks[piece]):
                stack.callback(tap.remove)
        yield


def backward(model: nn.Module, batch: Batch, loss: LossFunction, number: int) -> None:
    """Run one batch forward and backward."""
    value = loss(model, batch)
    check_loss(value, number)
    # Where none of the tapped weights is used, as an expert without tokens, there is nothing to go back to.
    if value.requires_grad:
        value.backward()


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
    with tapped(group, sinks), _counted_uses(sinks.values()), together():
        for batch in reader:
            counting = _counting_examples(batch["labels"])
            examples += len(counting)
            done = _split_backward(model, batch, counting, list(sinks.values()), reader.used) if loss is None else []
            rest = [sink for sink in sinks.values() if sink not in done]
            if rest:
                _backward_by_example(model, batch, counting, rest, loss or model_loss, reader.used)
    average_([piece.accumulator for piece in group], total(examples))


class _ExampleSquares:
    """Sink of one piece: squares example gradients as they come, or adds up one example's over several uses."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.uses: list[torch.Size | None] = []
        self.mode = "off"
        self.example: Tensor | None = None
        piece.allocate()

    def splits(self, examples: int) -> bool:
        """Whether this batch's use of the weight, just seen in forward, has one run of rows per example."""
        if not self.uses:
            return True
        return (
            len(self.uses) == 1 and self.uses[0] is not None and len(self.uses[0]) > 2 and self.uses[0][0] == examples
        )

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Square per example, or add to the present example's gradient."""
        piece = self.piece
        if self.mode == "example":
            self.example += product(left.flatten(0, -2)[:, piece.first : piece.last], right.flatten(0, -2))
        elif self.mode == "split":
            for one_left, one_right in zip(left.flatten(1, -2), right.flatten(1, -2), strict=True):
                gradient = product(one_left[:, piece.first : piece.last], one_right)
                piece.accumulator.addcmul_(gradient, gradient)

    def from_dense(self, gradient: Tensor) -> None:
        """Add to the present example's gradient."""
        if self.mode == "example":
            self.example += self.piece.rows_of(gradient)

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
    model: nn.Module, batch: Batch, counting: list[int], sinks: list[_ExampleSquares], number: int
) -> list[_ExampleSquares]:
    """Square the example gradients of the weights that one backward can tell apart; return the sinks that are done."""
    for sink in sinks:
        sink.uses.clear()
    output = model(**batch)
    value = loss_of(output, model)
    check_loss(value, number)
    losses = example_losses(getattr(output, "logits", None), batch["labels"], value)
    # Asked before backward, where recomputed blocks are seen once more.
    able = [sink for sink in sinks if losses is not None and sink.splits(len(batch["labels"]))]
    total = losses[counting].sum() if able else None
    if able and total.requires_grad:
        for sink in able:
            sink.mode = "split"
        total.backward()
        for sink in able:
            sink.mode = "off"
    return able


def _backward_by_example(
    model: nn.Module, batch: Batch, counting: list[int], rest: list, loss: LossFunction, number: int
) -> None:
    """One backward per example; the pieces in `rest` square the whole gradient of each."""
    size = len(batch["labels"])
    for sink in rest:
        sink.mode, sink.example = "example", torch.zeros_like(sink.piece.accumulator)
    for row in counting:
        one = {
            key: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
            for key, value in batch.items()
        }
        backward(model, one, loss, number)
        for sink in rest:
            sink.close_example()
    for sink in rest:
        sink.mode, sink.example = "off", None


def _counting_examples(labels: Tensor) -> list[int]:
    """Rows of a batch with at least one label that counts; the first label of a causal sequence has no prediction."""
    counted = labels != IGNORED_LABEL
    if counted.dim() > 1:
        counted = counted.flatten(1)[:, 1:].any(1)
    return counted.nonzero().squeeze(1).tolist()


def example_losses(logits: Tensor | None, labels: Tensor, loss: Tensor) -> Tensor | None:
    """The mean loss of each example, (batch,) fp32, if the model's loss is a mean of cross-entropies over labels.

    Whether labels are shifted by one (causal models) is told from which way reproduces the model's own loss.

    Args:
        logits: (batch, length, classes) or (batch, classes).
        labels: (batch, length) or (batch,), ignored ones -100.
        loss: the model's own loss of the batch.

    Returns:
        The losses, with a graph to the logits, or None where neither way gives the model's loss.
    """
    if logits is None or logits.dim() != labels.dim() + 1 or logits.shape[: labels.dim()] != labels.shape:
        return None
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:] if labels.dim() > 1 else labels
    for candidate in (shifted, labels):
        each = nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), candidate.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(labels.shape)
        counts = (candidate != IGNORED_LABEL).float()
        mean = each.sum() / counts.sum()
        if torch.allclose(mean.detach(), loss.detach().float(), rtol=1e-3, atol=1e-5):
            axes = tuple(range(1, labels.dim()))
            return each.sum(axes) / counts.sum(axes).clamp(min=1) if axes else each
    return None


@dataclass
class _Attention:
    """The present batch's attention mask, for hooks."""

    mask: Tensor | None = None


def squared_input(model: nn.Module, reader: BatchReader, group: list[Piece], loss: LossFunction | None) -> None:
    """Sum the squares of each input feature over all tokens that are no padding; forward only.

    Raises:
        ValueError: a weight is no linear one, so that its entries have no input feature.
    """
    attention = _Attention()
    with contextlib.ExitStack() as stack, together(), torch.no_grad():
        for piece in group:
            _watch_inputs(piece, attention, stack)
        for batch in reader:
            attention.mask = batch.get("attention_mask")
            model(**batch)
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
