"""Gradients of a sharded model, of which each process accumulates some rows of each weight: the sum over processes.

The gradient of a weight, of a process's own batch, is computed as a whole and sent to the processes that accumulate its
rows. Each adds what it receives in the order of ranks. So the sums equal those of one process that reads all batches in
turn, the first of each process before the second of any, bit for bit if its products do.

Not every process may form a gradient of every weight, since an expert can be without a token. So gradients are not sent
as they come, but those of a block together, when the backward pass has left it; what comes later, and what lies outside
the blocks, at the end of the pass.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from speft_optim.distributed import average_
from speft_optim.salience.accumulators import RowSlice
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.hooked_call import settle
from speft_optim.weights.mesh import innermost_units


class BatchGradient:
    """The gradient of one row slice in one backward pass, until it is sent to the processes that accumulate its rows.

    Args:
        row_slice: the row slice, divided over the processes.
    """

    def __init__(self, row_slice: RowSlice):
        self.row_slice = row_slice
        self._whole: RowSlice | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no gradient came since the last exchange."""
        return self._whole is None

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right`."""
        self._allocated().from_product(left, right)

    def from_dense(self, gradient: Tensor) -> None:
        """Add a dense gradient."""
        self._allocated().from_dense(gradient)

    def exchange(self) -> None:
        """Send each process its rows, and add to the own rows those of all processes; all of them call this."""
        whole, self._whole = self._allocated().accumulator, None
        own, sizes = self.row_slice.accumulator, self.row_slice.division
        received = own.new_empty(len(sizes) * len(own), self.row_slice.columns)
        dist.all_to_all_single(received, whole, [len(own)] * len(sizes), sizes)
        for part in received.view(len(sizes), *own.shape):
            own += part

    def _allocated(self) -> RowSlice:
        if self._whole is None:
            self._whole = RowSlice(self.row_slice.target, self.row_slice.first, self.row_slice.last)
            self._whole.allocate()
        return self._whole


class Exchange:
    """The accumulators of a group of row slices, and the exchanges that fill them where these are divided.

    Args:
        group: the row slices, all divided or none.

    Attributes:
        accumulators: for each row slice what receives its gradients: itself, if it is not divided.
    """

    def __init__(self, group: list[RowSlice]):
        self.is_divided = group[0].processes > 1
        self.accumulators: dict[RowSlice, Accumulator] = {
            row_slice: BatchGradient(row_slice) if self.is_divided else row_slice for row_slice in group
        }
        # Gradients of the block that the backward pass is in, and products that wait to be accumulated.
        self._present: list[BatchGradient] = []
        self._pending: list = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module, pending: list) -> Iterator[None]:
        """Exchange the gradients of each block when a backward pass has left it, while the context lasts.

        Args:
            model: the model.
            pending: products that wait to be accumulated, see `Observed`.
        """
        with contextlib.ExitStack() as stack:
            if self.is_divided:
                self._pending = pending
                stack.enter_context(reached(model, list(self.accumulators)))
                for unit, row_slices in _by_unit(model, self.accumulators).items():
                    gradients = [self.accumulators[row_slice] for row_slice in row_slices]
                    stack.callback(unit.register_forward_hook(self._watch_output(gradients)).remove)
            yield

    def _watch_output(self, gradients: list[BatchGradient]) -> Callable:
        """A forward hook that detects when the backward pass enters a block: it has then left the next one."""

        def enter(_: Tensor) -> None:
            self._leave()
            self._present = gradients

        def watch(unit: nn.Module, args: tuple, output: object) -> None:
            first = next((leaf for leaf in tree_leaves(output) if _is_differentiated(leaf)), None)
            if first is not None:
                first.register_hook(enter)

        return watch

    @torch.no_grad()
    def _leave(self) -> None:
        settle(self._pending)
        for gradient in self._present:
            gradient.exchange()
        self._present = []

    @torch.no_grad()
    def end_pass(self) -> None:
        """Exchange the gradients that are left after a backward pass, in any process; all of them call this."""
        if not self.is_divided:
            return
        self._present, gradients = [], list(self.accumulators.values())
        device = gradients[0].row_slice.target.device
        came = torch.tensor([not gradient.is_empty for gradient in gradients], dtype=torch.int32, device=device)
        dist.all_reduce(came)
        for gradient, count in zip(gradients, came.tolist(), strict=True):
            if count:
                gradient.exchange()

    def average_(self, count: int) -> None:
        """Divide the sums over all batches of all processes by their number."""
        accumulators = [row_slice.accumulator for row_slice in self.accumulators]
        if not self.is_divided:
            average_(accumulators, count)
            return
        for accumulator in accumulators:
            accumulator /= count


@contextlib.contextmanager
def reached(model: nn.Module, group: list[RowSlice]) -> Iterator[None]:
    """Let backward passes of a sharded model reach the group's blocks in every process, while the context lasts.

    FSDP gathers a block's weights for its backward in all processes together, also if one of them has no token for any
    observed weight of it.
    """
    with contextlib.ExitStack() as stack:
        for unit in _by_unit(model, group):
            stack.callback(unit.register_forward_pre_hook(_attach_input, with_kwargs=True).remove)
        yield


def _by_unit(model: nn.Module, group: Iterable[RowSlice]) -> dict[nn.Module, list[RowSlice]]:
    """The row slices in each block that FSDP gathers at once."""
    units, found = innermost_units(model), {}
    for row_slice in group:
        if (unit := units.get(row_slice.target.sites[0][0])) is not None:
            found.setdefault(unit, []).append(row_slice)
    return found


def _is_differentiated(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _attach_input(unit: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Make a block's input, its first floating argument, require a gradient if none does."""
    named = [*enumerate(args), *kwargs.items()]
    floating = [(key, x) for key, x in named if isinstance(x, Tensor) and x.is_floating_point()]
    if not torch.is_grad_enabled() or not floating or any(x.requires_grad for _, x in floating):
        return None
    key, x = floating[0]
    attached = x.detach().requires_grad_()
    if isinstance(key, int):
        return (*args[:key], attached, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: attached}
