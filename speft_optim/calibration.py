"""Streaming passes over calibration batches: the signals that salience measures need, in bounded memory.

The targeted weights are cut into pieces (whole weights, or panels of rows of one that is larger than the budget) and
the pieces into groups whose fp32 accumulators fit the budget. A group costs one pass over the batches. Only the group's
weights
are tapped, so backward stops below the lowest of them; when a group is done its signals are handed on in chunks and
freed. Holding all gradients at once, the obvious way, takes twice the memory of a bf16 model on top of it.

The model is in eval mode meanwhile (no dropout, no activation checkpointing) and afterwards exactly as before.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from speft_optim.kernels import accumulate_product_
from speft_optim.linear import tap_target
from speft_optim.salience import Measure
from speft_optim.targets import Target

logger = logging.getLogger(__name__)

Batches = Iterable[Mapping[str, Any]]
LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass
class Piece:
    """Rows `first` to `last` (exclusive) of a weight seen as a matrix, and what is accumulated for them."""

    target: Target
    first: int
    last: int
    total: Tensor | None = None

    @property
    def entries(self) -> int:
        """Entries of the weight in this piece."""
        return (self.last - self.first) * self.target.matrix_shape[1]

    def weight_rows(self) -> Tensor:
        """The piece of the weight, flat, in its own dtype."""
        return self.target.parameter.detach().reshape(self.target.matrix_shape)[self.first : self.last].reshape(-1)

    def allocate(self) -> None:
        """Start an fp32 accumulator of zeros."""
        shape = (self.last - self.first, self.target.matrix_shape[1])
        self.total = torch.zeros(shape, dtype=torch.float32, device=self.target.parameter.device)

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add this piece's rows of `left.T @ right` in fp32."""
        accumulate_product_(self.total, left.flatten(0, -2)[:, self.first : self.last], right.flatten(0, -2))

    def from_dense(self, gradient: Tensor) -> None:
        """Add this piece's rows of a dense gradient in fp32."""
        self.total += gradient.reshape(self.target.matrix_shape)[self.first : self.last]


def default_memory_budget(device: torch.device) -> int:
    """Half of the memory that is free on `device` now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cut_into_groups(targets: Iterable[Target], budget: int) -> list[list[Piece]]:
    """Pieces in the order of `targets`, grouped so that each group's fp32 accumulators take at most `budget` bytes.

    A weight larger than the budget becomes panels of rows, each a group of its own, of at least one row.
    """
    groups: list[list[Piece]] = []
    room = 0
    for target in targets:
        rows, columns = target.matrix_shape
        panel = max(1, min(rows, budget // (4 * max(1, columns))))
        for first in range(0, rows, panel):
            piece = Piece(target, first, min(rows, first + panel))
            need = 4 * piece.entries
            if need > room or not groups:
                groups.append([])
                room = budget
            groups[-1].append(piece)
            room -= need
    return groups


def stream_scores(
    model: nn.Module,
    batches: Batches | None,
    targets: Mapping[str, Target],
    measure: Measure,
    *,
    memory_budget: int,
    loss: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, int, Tensor]]:
    """Scores of every entry of the targets, in order and in chunks.

    Args:
        model: the model; left as it was, also when the iteration is broken off.
        batches: an iterable of the dicts that the model takes, iterated once per group.
        targets: the weights to score.
        measure: the salience measure.
        memory_budget: bytes for accumulators and chunks.
        loss: from model and batch to a scalar; None for the `loss` of the model's own output.
        seed: of the `random` measure.
        progress: whether to show a progress bar on a terminal.

    Yields:
        (name, first flat position, 1-D scores of consecutive positions), positions rising within a weight and weights
        in the order of `targets`.

    Raises:
        ValueError: batches are missing, hold no usable labels, or are an iterator needed more than once; a loss is not
            finite.
    """
    chunk = max(1, min(2**22, memory_budget // 64))
    groups = cut_into_groups(targets.values(), memory_budget // 2)
    if measure.signal not in ("none", "random"):
        _check_batches(batches, len(groups))
        bar = tqdm(desc="calibration", unit="batch", disable=None if progress else True)
    else:
        bar = contextlib.nullcontext()
    with bar, calibrating(model):
        for number, group in enumerate(groups):
            if measure.signal == "gradient":
                bar.set_postfix_str(f"pass {number + 1}/{len(groups)}")
                _accumulate_gradients(model, batches, group, loss or model_loss, bar)
            while group:
                yield from _score(group.pop(0), measure, chunk, seed)


def _score(piece: Piece, measure: Measure, chunk: int, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    weight = piece.weight_rows()
    start = piece.first * piece.target.matrix_shape[1]
    for offset in range(0, piece.entries, chunk):
        w = weight[offset : offset + chunk].float()
        if measure.signal == "random":
            signal = random_draws(piece.target.name, start + offset, w.numel(), seed, w.device)
        else:
            signal = w if piece.total is None else piece.total.view(-1)[offset : offset + chunk]
        yield piece.target.name, start + offset, measure.score(w, signal)


def _accumulate_gradients(
    model: nn.Module, batches: Batches, group: list[Piece], loss: LossFunction, bar: tqdm
) -> None:
    """Leave the gradient averaged over the usable batches in the group's accumulators."""
    anchor = torch.zeros((), requires_grad=True)
    with contextlib.ExitStack() as stack:
        for piece in group:
            piece.allocate()
            for tap in tap_target(piece.target, anchor, piece):
                stack.callback(tap.remove)
        count = 0
        for batch in usable_batches(batches, model, bar):
            with torch.enable_grad():
                value = loss(model, batch)
            if not bool(torch.isfinite(value)):
                raise ValueError(
                    f"The loss of calibration batch {count + 1} is {float(value)}; find the bad sample or weight."
                )
            value.backward()
            count += 1
    for piece in group:
        piece.total /= count


def usable_batches(batches: Batches, model: nn.Module, bar: tqdm) -> Iterator[Mapping[str, Any]]:
    """Batches on the model's device; those whose labels are all ignored are left out, with one warning at the end.

    Raises:
        ValueError: there is no batch, one is no dict or has no labels, or none has a label that counts.
        TypeError: a batch is no mapping.
    """
    device = next(model.parameters()).device
    seen = skipped = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"Calibration batch {seen + 1} is a {type(batch).__name__}; pass the dicts that the model takes."
            )
        if batch.get("labels") is None:
            raise ValueError(
                f"Calibration batch {seen + 1} has no labels (keys {sorted(batch)}); this measure needs a loss."
            )
        seen += 1
        bar.update()
        if bool((batch["labels"] == IGNORED_LABEL).all()):
            skipped += 1
            continue
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if seen == 0:
        raise ValueError("There are no calibration batches; pass at least one dict with input_ids and labels.")
    if seen == skipped:
        raise ValueError(
            f"All labels of all {seen} calibration batches are {IGNORED_LABEL}; is the prompt longer than the limit?"
        )
    if skipped:
        logger.warning("%d of %d calibration batches have no label that counts and were left out.", skipped, seen)


IGNORED_LABEL = -100


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself returns for a batch.

    Raises:
        ValueError: it returns none.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for its batch; pass loss=function of (model, batch).")
    return loss


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without cache and with nothing that requires gradients; all as before afterwards."""
    training = [module for module in model.modules() if module.training]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            for parameter in required:
                parameter.requires_grad_(False)
            if use_cache is not None:
                config.use_cache = False
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in required:
                parameter.requires_grad_(True)
            if use_cache is not None:
                config.use_cache = use_cache


def _check_batches(batches: Batches | None, passes: int) -> None:
    if batches is None:
        raise ValueError("This salience measure needs calibration batches; pass batches=[...] or a DataLoader.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of dicts or a DataLoader.")
    if isinstance(batches, Iterator) and passes > 1:
        raise ValueError(
            f"batches can be iterated once, but {passes} passes are needed; pass a list or a DataLoader, or a larger "
            "memory_budget."
        )


def random_draws(name: str, start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Uniform fp64 numbers in [0, 1) for `count` positions of a weight: the same on every device and in any cut."""
    state = torch.arange(start, start + count, dtype=torch.int64, device=device)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)
    # The finaliser of SplitMix64, in wrapping int64 arithmetic; the masked shifts make them logical ones.
    state = (state * -7046029254386353131).add_(key)
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -4658895280553007687
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -7723592293110705685
    state = state ^ ((state >> 31) & (2**33 - 1))
    return ((state >> 11) & (2**53 - 1)).double() / 2**53
