"""Calibration batches of any kind: checked, copied part by part, and cut into examples."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from speft_optim.checks import check_whole

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
