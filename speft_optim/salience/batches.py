"""Calibration batches: checked, moved to the device, cut into examples, and the same ones in each pass."""

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
from torch import Tensor
from tqdm.auto import tqdm

from speft_optim.checks import check_whole
from speft_optim.distributed import together, total, world_size
from speft_optim.salience.losses import IGNORED_LABEL, check_loss, is_nan, labelled_examples
from speft_optim.salience.model_state import RandomState

logger = logging.getLogger(__name__)


# A batch is a dict of the model's arguments or, with a loss function of the user's, whatever that function takes.
Batch = Any
Batches = Iterable[Batch]


def check_batches(batches: Batches | None, passes: int) -> None:
    """Refuse batches that cannot be iterated as often as needed.

    Args:
        batches: what the user passed.
        passes: how often they will be iterated.

    Raises:
        ValueError: batches are missing, or can be iterated only once though more passes are needed.
        TypeError: they cannot be iterated.
    """
    if batches is None:
        raise ValueError("This salience measure needs calibration batches; pass batches=[...] or a DataLoader.")
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | torch.Tensor | str):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of dicts or a DataLoader.")
    if isinstance(batches, Iterator) and passes > 1:
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be iterated only once, but {passes} passes are needed; "
            "pass a list or a DataLoader, or a larger memory_budget."
        )


def check_max_batches(max_batches: int | None) -> None:
    """Refuse a number of batches that is neither None nor at least 1.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is less than 1.
    """
    if max_batches is not None:
        check_whole("max_batches", max_batches, least=1, usual="64, or None for all")


def map_tensors(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """Return a copy of the batch with `change` applied to all that is not a container.

    Containers are mappings, lists, tuples (also named ones), dataclasses and namespaces; they keep their kind.
    """
    again = functools.partial(map_tensors, change=change)
    if isinstance(batch, Mapping):
        parts = {key: again(part) for key, part in batch.items()}
        if type(batch) is dict:
            return parts
        if not hasattr(batch, "__setitem__"):
            return parts
        # The mapping is copied, since the constructor of a BatchEncoding or a defaultdict does not take a dict alone.
        other = copy.copy(batch)
        for key, part in parts.items():
            other[key] = part
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(again, batch))
    if isinstance(batch, list | tuple):
        # A subclass becomes a plain list or tuple, since its constructor may take other arguments.
        whole = map(again, batch)
        return list(whole) if isinstance(batch, list) else tuple(whole)
    if isinstance(batch, SimpleNamespace) or dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        names = vars(batch) if isinstance(batch, SimpleNamespace) else [f.name for f in dataclasses.fields(batch)]
        for name in list(names):
            # A frozen dataclass refuses ordinary assignment.
            object.__setattr__(other, name, again(getattr(batch, name)))
        return other
    return change(batch)


def labels_of(batch: Batch) -> Tensor | None:
    """Return the tensor named `labels` in a batch, or None."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    return labels if isinstance(labels, Tensor) and labels.dim() else None


def examples_in(batch: Batch) -> int:
    """Count the examples of a batch: the length of its labels, or else the leading size that most of its tensors have.

    Raises:
        ValueError: the batch holds no tensor.
    """
    labels = labels_of(batch)
    if labels is not None:
        return len(labels)
    sizes = collections.Counter()
    map_tensors(batch, lambda part: sizes.update([len(part)]) if isinstance(part, Tensor) and part.dim() else None)
    if not sizes:
        raise ValueError(
            f"A calibration batch is a {type(batch).__name__} without a tensor, but this measure needs its single "
            "examples; pass batches of tensors, or choose another measure."
        )
    return sizes.most_common(1)[0][0]


def example_of(batch: Batch, row: int, examples: int) -> Batch:
    """Return a batch of one example: one row of each tensor with as many rows as there are examples, all else whole.

    Args:
        batch: the batch.
        row: number of the example.
        examples: how many there are.
    """

    def cut(part: Any) -> Any:
        whole = not isinstance(part, Tensor) or not part.dim() or len(part) != examples
        return part if whole else part[row : row + 1]

    return map_tensors(batch, cut)


def _move(part: Any, device: torch.device) -> Any:
    """Move a tensor, or another object that has a method `to`, to the device."""
    return part.to(device) if isinstance(part, Tensor) or callable(getattr(part, "to", None)) else part


class BatchReader:
    """Iterates over the batches that can be used, moved to the device.

    Every iteration starts from the same random state, so that a DataLoader that shuffles, or a collator that draws
    random numbers, yields the same batches in each pass.

    Args:
        batches: the user's batches.
        device: the device of the model's inputs.
        bar: progress bar, advanced by each batch that is read.
        labelled: whether the model computes the loss, for which batches need labels; batches whose labels are all
            ignored are then left out.
        keyed: whether batches are passed to the model as keyword arguments; else the user's loss function gets them.
        most: the largest number of batches to read; None for all.
        in_step: whether all processes have to read the next batch together, because they gather the weights of a
            sharded model together.

    Attributes:
        used: how many batches were used in the last iteration.
        went_back: whether the loss of any batch so far could be differentiated.
        used_otherwise: names of weights that were found in use outside the forward pass of their layers.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device,
        bar: tqdm,
        labelled: bool = True,
        keyed: bool = True,
        most: int | None = None,
        in_step: bool = False,
    ):
        self.in_step = in_step
        self.batches, self.device, self.bar = batches, device, bar
        self.labelled, self.keyed, self.most = labelled, keyed, most
        self.used = 0
        self.went_back = False
        self.used_otherwise: set[str] = set()
        self._warned = False
        # The labels of the last batch are kept to explain a loss that is NaN.
        self._labels: Tensor | None = None
        self._start: RandomState | None = None

    def _rewind(self) -> None:
        """Restore the random state of the first iteration."""
        if self._start is not None:
            self._start.restore()
            return
        owners = (self.batches, getattr(self.batches, "sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        generators = [generator for generator in generators if isinstance(generator, torch.Generator)]
        self._start = RandomState([self.device] if self.device.type == "cuda" else [], generators)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that can be used.

        Raises:
            ValueError: there is no batch, one has no labels, or all labels are ignored; or processes that read in step
                have different numbers of batches with labels.
            TypeError: the model takes the batches and one is not a mapping, or labels are not a tensor.
        """
        batches = self._counting()
        if not self.in_step:
            yield from batches
            return
        while True:
            with together():
                batch = next(batches, None)
            readers = total(batch is not None)
            if not readers:
                return
            if readers < world_size():
                raise ValueError(
                    f"Of {world_size()} processes {readers} have a calibration batch number {self.used or 'more'} "
                    "with labels that count, and the others have none; give each the same number, since they gather "
                    "the sharded weights together."
                )
            yield batch

    def _counting(self) -> Iterator[Batch]:
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
                f"All labels of all {seen} calibration batches are {IGNORED_LABEL}, or stand at the first position, "
                "which a causal model's loss leaves out; check whether the texts are cut before their answers."
            )
        if self.used < seen and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d calibration batches are left out: no label of theirs is in the loss.", seen - self.used, seen
            )

    def _check(self, batch: Batch, number: int) -> None:
        """Refuse a batch that the model cannot take, or cannot compute a loss for."""
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
            Whether the batch can be used: False if its loss is the mean over no labels.

        Raises:
            ValueError: the loss is not finite, or not a single number.
            TypeError: the loss is not a tensor.
        """
        if is_nan(loss) and self._labels is not None:
            labelled, by_first_only = labelled_examples(self._labels)
            if torch.equal(labelled, by_first_only):
                self.used -= 1
                return False
        check_loss(loss, self.used)
        return True
