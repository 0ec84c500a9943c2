"""Forward and backward of the batches of a step: eagerly, or replayed as CUDA graphs.

A model whose kernels take less time than their launches is limited by the launches. `ReplayedPasses` captures forward
and backward for each batch shape as one CUDA graph, which needs one launch. Python code of a pass, such as hooks, runs
only during capture, so a graph is valid only as long as the trained entries are the same: when masks move, all graphs
are dropped. While gradients are summed to select the next masks, nothing is replayed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.batch_loss import device_of, summed_loss
from recipes.loss import is_known
from speft_optim import MaskSchedule

Batch = dict[str, Tensor | int]


class Passes:
    """Runs forward and backward of batches.

    Args:
        model: a causal language model of transformers, on its device.
        autocast: dtype of autocast, or None.

    Attributes:
        keeps_gradients: whether `.grad` must stay the same tensors, cleared by `zero_grad(set_to_none=False)`.
    """

    keeps_gradients = False

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        self.model, self.autocast = model, autocast
        self.device = device_of(model)

    def backward(self, batch: Batch, labels: float) -> Tensor:
        """Add the gradient of a batch's summed loss over `labels`; return the loss, a scalar."""
        return self._run(batch, labels)

    def after_step(self) -> None:
        """Note that an optimizer step was taken."""

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work on the stream of the passes while the context lasts."""
        yield

    def _run(self, batch: Batch, labels: float | Tensor) -> Tensor:
        # Autocast caches cast weights until its context ends, and after a step they would be stale.
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss, _ = summed_loss(self.model, batch)
        (loss / labels).backward()
        return loss.detach()


@dataclass
class _Recorded:
    """A graph with the tensors that it reads and writes.

    Attributes:
        graph: the graph.
        batch: the batch that it reads.
        labels: the scalar by which it divides the loss.
        loss: the loss that it writes, in memory that other graphs write too.
    """

    graph: torch.cuda.CUDAGraph
    batch: Batch
    labels: Tensor
    loss: Tensor


class ReplayedPasses(Passes):
    """Runs forward and backward of batches on a GPU, replayed where a batch of the same shape came before.

    Args:
        model: see `Passes`; of an architecture whose loss `recipes.loss` knows.
        autocast: see `Passes`.
        schedule: the schedule that moves the masks, if any.

    Raises:
        ValueError: the model is not on a GPU, or the GPU would have to be waited for in its loss.
    """

    keeps_gradients = True

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, schedule: MaskSchedule | None):
        super().__init__(model, autocast)
        check_replayable(model)
        self.schedule, self.selections = schedule, 0
        # Autograd adds a gradient on the stream that its node was made on, so that all passes run on one stream.
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        # While this graph is in the pool, the memory of dropped ones serves later ones; an empty pool takes no more.
        self.first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.first, pool=self.pool, stream=self.stream):
            torch.zeros((), device=self.device)
        # The first pass of a shape compiles its kernels, those of the first step make `.grad` and verify gradients.
        self.seen: set[tuple] = set()
        self.is_first_step = True
        self.recorded: dict[tuple, _Recorded] = {}

    def backward(self, batch: Batch, labels: float) -> Tensor:
        """Add the gradient of a batch's summed loss over `labels`; return the loss, a scalar."""
        shape = tuple((key, part.shape) for key, part in batch.items() if isinstance(part, Tensor))
        summing = self.schedule is not None and self.schedule.is_summing
        if shape not in self.seen or self.is_first_step or summing:
            self.seen.add(shape)
            return self._run(batch, labels)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(batch)
        recorded = self.recorded[shape]
        for key, part in recorded.batch.items():
            if isinstance(part, Tensor):
                part.copy_(batch[key])
        recorded.labels.fill_(labels)
        recorded.graph.replay()
        return recorded.loss.clone()

    def after_step(self) -> None:
        """Note that an optimizer step was taken; if masks moved in it, drop all graphs."""
        self.is_first_step = False
        if self.schedule is not None and len(self.schedule.history) != self.selections:
            self.selections, self.is_first_step = len(self.schedule.history), True
            self.recorded.clear()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work on the stream of the passes while the context lasts."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _record(self, batch: Batch) -> _Recorded:
        batch = {key: part.clone() if isinstance(part, Tensor) else part for key, part in batch.items()}
        labels, graph = torch.ones((), device=self.device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            loss = self._run(batch, labels)
        return _Recorded(graph, batch, labels, loss)


def check_replayable(model: nn.Module) -> None:
    """Refuse a model whose passes cannot be recorded.

    Raises:
        ValueError: it is not on a GPU, its blocks are checkpointed, or its loss waits for the GPU.
    """
    if next(model.parameters()).device.type != "cuda":
        raise ValueError("CUDA graphs need a model on a GPU; leave out --cuda-graphs")
    # The property of transformers that tells has two names in its versions; this is what it looks at.
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("checkpointed blocks read the random state, which no CUDA graph allows; leave one out")
    if not is_known(model):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"the loss of a {kind!r} model waits for the GPU in each step; leave out --cuda-graphs")
