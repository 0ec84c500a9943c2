"""Reads calibration batches: those that can be used, on the device, and the same ones in each pass."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from speft_optim.distributed import check_equal, everywhere, keep_from_others, largest, together, total, world_size
from speft_optim.salience.batches import Batch, Batches, labels_of, map_tensors
from speft_optim.salience.losses import IGNORED_LABEL, check_loss, is_nan, labelled_examples
from speft_optim.salience.model_state import RandomState

logger = logging.getLogger(__name__)


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
        # Whether other processes may be in an exchange of FSDP's, in which they cannot hear of an error.
        self._gathers = False
        self.batches, self.device, self.bar = batches, device, bar
        self.labelled, self.keyed, self.most = labelled, keyed, most
        self.used = self._read = 0
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

    @contextmanager
    def together(self, model: nn.Module) -> Iterator[None]:
        """Re-raise an exception of any process in every process, as `together`, where the others can hear of it.

        From a batch to the end of the model's forward pass, and while it is `gathering`, processes that read in step
        gather sharded weights. An error there ends its own process, and says what it is.
        """
        with ExitStack() as stack, together():
            if self.in_step:
                stack.callback(model.register_forward_pre_hook(self._begin_to_gather).remove)
                stack.callback(model.register_forward_hook(self._end_to_gather).remove)
            try:
                yield
            except Exception as error:
                if self._gathers:
                    keep_from_others(error)
                raise
            finally:
                self._gathers = False

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Processes that read in step gather weights, or exchange gradients, while the context lasts."""
        self._gathers = self.in_step
        yield
        # An error that leaves the context is still one in which they do.
        self._gathers = False

    def _begin_to_gather(self, *_: object) -> None:
        self._gathers = True

    def _end_to_gather(self, *_: object) -> None:
        self._gathers = False

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
            self._gathers = False
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
            self._gathers = True
            yield batch

    def _counting(self) -> Iterator[Batch]:
        self._rewind()
        seen = self.used = 0
        for batch in itertools.islice(self.batches, self.most):
            seen += 1
            self._read = seen
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

    def takes(self, loss: Any, counts: bool = True) -> bool:
        """Check the loss of the last batch.

        Args:
            loss: the loss.
            counts: whether it is used; of processes that read in step some pass a loss back for the others' sake alone.

        Returns:
            Whether the batch can be used: False if its loss is the mean over no labels.

        Raises:
            ValueError: the loss is not finite, or not a single number; or processes that read in step cannot go back
                together.
            TypeError: the loss is not a tensor.
            RuntimeError: the loss of another process cannot be used.
        """
        if not self.in_step:
            return self._takes(loss)
        self._gathers = False
        with together():
            takes = not counts or self._takes(loss)
        outcome = "depends on the weights" if loss.requires_grad else "does not depend on the weights"
        check_equal(
            outcome if takes else "has no labels that count",
            f"The losses of calibration batches number {self._read}",
            "since processes gather the sharded weights together, each needs a batch that uses them and has labels "
            "after the first token, and a fully_shard of each block.",
        )
        return takes

    def agreed(self, choices: list[bool]) -> list[bool]:
        """Return which of these all processes that read in step chose."""
        return everywhere(choices) if self.in_step else choices

    def most_of_all(self, number: int) -> int:
        """Return the largest number of the processes that read in step."""
        return largest(number) if self.in_step else number

    def _takes(self, loss: Any) -> bool:
        if is_nan(loss) and self._labels is not None:
            labelled, by_first_only = labelled_examples(self._labels)
            if torch.equal(labelled, by_first_only):
                self.used -= 1
                return False
        check_loss(loss, self.used)
        return True


def _move(part: Any, device: torch.device) -> Any:
    """Move a tensor, or another object that has a method `to`, to the device."""
    return part.to(device) if isinstance(part, Tensor) or callable(getattr(part, "to", None)) else part
