"""Calibration batches: which of them count, their losses, and a model put in order for them and back.

The model is in eval mode meanwhile, without dropout. Afterwards it is exactly as before.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from speft_optim.checks import check_whole
from speft_optim.salience.model_state import RandomState

logger = logging.getLogger(__name__)


# What the model takes by name, or with a loss function whatever that takes.
Batch = Any


Batches = Iterable[Batch]


LossFunction = Callable[[nn.Module, Batch], Tensor]


IGNORED_LABEL = -100


def check_batches(batches: Batches | None, passes: int) -> None:
    """Refuse what cannot be iterated as often as needed.

    Raises:
        ValueError: there are none, or they can be iterated only once but `passes` are needed.
        TypeError: they cannot be iterated.
    """
    if batches is None:
        raise ValueError("This salience measure needs calibration batches; pass batches=[...] or a DataLoader.")
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | torch.Tensor | str):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of dicts or a DataLoader.")
    if isinstance(batches, Iterator) and passes > 1:
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be iterated once, but {passes} passes are needed; "
            "pass a list or a DataLoader, or a larger memory_budget."
        )


def check_max_batches(max_batches: int | None) -> None:
    """Refuse a limit that is none.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than 1.
    """
    if max_batches is not None:
        check_whole("max_batches", max_batches, least=1, usual="64, or None for all")


def map_tensors(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """Return a copy of the batch with `change` applied to each of its tensors and other leaves, in the same containers.

    Containers are mappings, lists, tuples (named ones too), dataclasses and namespaces.
    """
    again = functools.partial(map_tensors, change=change)
    if isinstance(batch, Mapping):
        parts = {key: again(part) for key, part in batch.items()}
        if type(batch) is dict:
            return parts
        if not hasattr(batch, "__setitem__"):
            return parts
        # Not made anew, since a BatchEncoding or a defaultdict takes other arguments than a dict.
        other = copy.copy(batch)
        for key, part in parts.items():
            other[key] = part
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(again, batch))
    if isinstance(batch, list | tuple):
        # A subclass, as a PackedSequence's, may take other arguments.
        whole = map(again, batch)
        return list(whole) if isinstance(batch, list) else tuple(whole)
    if isinstance(batch, SimpleNamespace) or dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        names = vars(batch) if isinstance(batch, SimpleNamespace) else [f.name for f in dataclasses.fields(batch)]
        for name in list(names):
            # As a frozen dataclass does it itself.
            object.__setattr__(other, name, again(getattr(batch, name)))
        return other
    return change(batch)


def labels_of(batch: Batch) -> Tensor | None:
    """Return the tensor of labels in a batch, if it has one under that name."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    return labels if isinstance(labels, Tensor) and labels.dim() else None


def examples_in(batch: Batch) -> int:
    """How many examples a batch has: the length of its labels, else the leading size that most of its tensors have.

    Raises:
        ValueError: it holds no tensor.
    """
    labels = labels_of(batch)
    if labels is not None:
        return len(labels)
    sizes = collections.Counter()
    map_tensors(batch, lambda part: sizes.update([len(part)]) if isinstance(part, Tensor) and part.dim() else None)
    if not sizes:
        raise ValueError(
            f"A calibration batch is a {type(batch).__name__} without a tensor, so that it cannot be cut into the "
            "examples that this measure looks at; pass tensors, or choose another measure."
        )
    return sizes.most_common(1)[0][0]


def example_of(batch: Batch, row: int, examples: int) -> Batch:
    """Return the batch of one example: `row` of each tensor that is as long as the batch, the others whole."""

    def cut(part: Any) -> Any:
        whole = not isinstance(part, Tensor) or not part.dim() or len(part) != examples
        return part if whole else part[row : row + 1]

    return map_tensors(batch, cut)


def _move(part: Any, device: torch.device) -> Any:
    """Return a tensor, or what else moves as one, on the device."""
    return part.to(device) if isinstance(part, Tensor) or callable(getattr(part, "to", None)) else part


class BatchReader:
    """Iterates the batches that count, on the device that computes.

    All iterations start from the same state of random numbers, so that a DataLoader that shuffles, or a collator that
    draws, gives every pass the same batches.

    Args:
        batches: the user's batches.
        device: where the model wants them.
        bar: shows each batch read.
        labelled: whether the model computes the loss, for which batches need labels; those with none that counts are
            then left out.
        keyed: whether the model takes the batches, by the names in them; else a loss function of the user's does.
        most: read no more than so many of the batches; None for all.

    Attributes:
        used: batches handed out in the last iteration.
        went_back: whether the loss of any batch so far could be differentiated.
        used_otherwise: names of weights that were found to be used otherwise than as the products of their layers.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device,
        bar: tqdm,
        labelled: bool = True,
        keyed: bool = True,
        most: int | None = None,
    ):
        self.batches, self.device, self.bar = batches, device, bar
        self.labelled, self.keyed, self.most = labelled, keyed, most
        self.used = 0
        self.went_back = False
        self.used_otherwise: set[str] = set()
        self._warned = False
        # Of the last batch.
        self._labels: Tensor | None = None
        self._start: RandomState | None = None

    def _rewind(self) -> None:
        """Let random numbers begin where they did in the first iteration."""
        if self._start is not None:
            self._start.restore()
            return
        owners = (self.batches, getattr(self.batches, "sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        generators = [generator for generator in generators if isinstance(generator, torch.Generator)]
        self._start = RandomState([self.device] if self.device.type == "cuda" else [], generators)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that count.

        Raises:
            ValueError: there is no batch, one has no labels, or no label of any counts.
            TypeError: the model takes the batches and one is no mapping, or labels are no tensor.
        """
        self._rewind()
        seen = self.used = 0
        for batch in itertools.islice(self.batches, self.most):
            seen += 1
            self.bar.update()
            self._check(batch, seen)
            self._labels = labels_of(batch)
            if self.labelled and bool((self._labels == IGNORED_LABEL).all()):
                continue
            self.used += 1
            yield map_tensors(batch, lambda part: _move(part, self.device))
        if not seen:
            raise ValueError("There are no calibration batches; pass at least one dict with input_ids and labels.")
        if not self.used:
            raise ValueError(
                f"All labels of all {seen} calibration batches are {IGNORED_LABEL}, or first ones that a shifted loss "
                "leaves out; are prompts cut too short?"
            )
        if self.used < seen and not self._warned:
            self._warned = True
            logger.warning("%d of %d calibration batches have no label that counts; left out.", seen - self.used, seen)

    def _check(self, batch: Batch, number: int) -> None:
        """Refuse what the model cannot take, or give a loss for."""
        if self.keyed and not isinstance(batch, Mapping):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}; pass dicts that the model takes, or "
                "loss=function of (model, batch)."
            )
        if not self.labelled:
            return
        if batch.get("labels") is None:
            keys = ", ".join(map(str, batch))
            raise ValueError(
                f"Calibration batch {number} has no labels (only {keys}), without which the model returns no loss; add "
                "them, or pass loss=function of (model, batch)."
            )
        if labels_of(batch) is None:
            raise TypeError(
                f"The labels of calibration batch {number} are a {type(batch['labels']).__name__}; pass tensors with "
                "one row an example, as a collator with return_tensors='pt' makes them."
            )

    def takes(self, loss: Any) -> bool:
        """Check the loss of the last batch.

        Returns:
            Whether the batch counts: it does not where the loss is a mean over no label.

        Raises:
            ValueError: it is not finite, or not a single number.
            TypeError: it is no tensor.
        """
        if is_nan(loss) and self._labels is not None:
            labelled, by_first_only = labelled_examples(self._labels)
            if torch.equal(labelled, by_first_only):
                self.used -= 1
                return False
        _check_loss(loss, self.used)
        return True


def labelled_examples(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which examples have a label that counts, and which of them none but the first; both (batch,) bool.

    For the latter a shifted loss, as of causal models, is a mean over no label, and NaN.
    """
    counted = (labels != IGNORED_LABEL).reshape(len(labels), -1)
    labelled = counted.any(1)
    # Of a single label none can be shifted away.
    by_first_only = labelled & ~counted[:, 1:].any(1) if counted.shape[1] > 1 else torch.zeros_like(labelled)
    return labelled, by_first_only


def is_nan(loss: Any) -> bool:
    """Tell whether a loss is a tensor of nothing but NaN."""
    return isinstance(loss, Tensor) and bool(loss.detach().isnan().all())


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that the model itself returns for a batch.

    Raises:
        ValueError: it returns none.
    """
    return loss_of(model(**batch), model)


def loss_of(output: Any, model: nn.Module) -> Tensor:
    """Return the loss in a model's output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for its batch; pass loss=function of (model, batch).")
    return loss


def _check_loss(value: Any, number: int) -> None:
    """Refuse a loss that would make every score NaN, or that is none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"The loss of calibration batch {number} is a {type(value).__name__}; return a scalar tensor.")
    if value.numel() != 1:
        raise ValueError(f"The loss of calibration batch {number} has shape {tuple(value.shape)}; return its mean.")
    if not bool(torch.isfinite(value.detach())):
        raise ValueError(f"The loss of calibration batch {number} is {value.item()}; look for a bad sample or weight.")
