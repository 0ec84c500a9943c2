"""Streaming estimation: scores of every targeted entry, in order and in bounded memory.

The targeted weights are cut into row slices and the row slices into groups whose accumulators fit the budget, beside the
temporaries of one chunk of scores and the best entries that the caller keeps. A group costs one pass over the batches.
Only the group's weights are observed, so backward stops below the lowest of them; when a group is done its scores are
handed on in chunks and its accumulators freed. Holding all gradients at once, the obvious way, takes twice the memory
of a bf16 model on top of it.

What a pass holds besides is one batch's, whatever the budget: its activations, a dense gradient or product at a time,
and the operands of such a product in fp32 where no kernel multiplies them as they are.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from speft_optim.distributed import together
from speft_optim.salience.accumulators import RowSlice, cut_into_groups
from speft_optim.salience.activation import squared_input
from speft_optim.salience.batches import Batches, BatchReader, LossFunction, check_batches
from speft_optim.salience.first_order import gradient
from speft_optim.salience.fisher import squared_gradient
from speft_optim.salience.grasp import GradientStore, hessian_gradient, warn_of_plain_attention
from speft_optim.salience.measures import MEASURES, Measure
from speft_optim.salience.model_state import calibrating
from speft_optim.salience.synflow import flow
from speft_optim.weights.targets import Target

# What fills the accumulators of a group; the other statistics need none.
_FILLS = {
    "gradient": gradient,
    "squared_gradient": squared_gradient,
    "squared_input": squared_input,
    "flow": flow,
    "hessian_gradient": hessian_gradient,
}


# What an entry of a chunk takes at most, from its weight to its place among the best: the weight in fp32 (4 bytes), the
# score in fp64 (8), the place of one that may enter (8), the buffer's end beyond the best, which `BestEntries.bytes`
# leaves out (16), and a cut (32), with a few comparisons of a byte each. Before that come 36: the drawing of random
# numbers (24) beside the weight and the scores of the chunk before; of a first-order score in fp64, it is 28.
_CHUNK_ENTRY_BYTES = 72


def default_memory_budget(device: torch.device) -> int:
    """Half of the memory that is free on `device` now, in bytes; of what this process may use of it."""
    if device.type == "cuda":
        used, (free, total) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        # What the allocator holds but nobody uses is as good as free.
        free += torch.cuda.memory_reserved(device) - used
        free = min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - used)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // 2


def stream_scores(
    model: nn.Module,
    batches: Batches | None,
    targets: Mapping[str, Target],
    measure: Measure,
    *,
    memory_budget: int,
    candidates: int = 0,
    loss: LossFunction | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, int, Tensor]]:
    """Score every entry of the targets.

    Args:
        model: the model; left as it was, also when the iteration is broken off.
        batches: an iterable of the dicts that the model takes, or of what `loss` takes, iterated once per group.
        targets: the weights to score.
        measure: the salience measure.
        memory_budget: bytes for accumulators, chunks and what the caller keeps of them.
        candidates: bytes of the latter.
        loss: from model and batch to a scalar; None for the `loss` of the model's own output.
        max_batches: how many of the batches to read in each iteration; None for all.
        seed: of the `random` measure.
        progress: whether to show a progress bar on a terminal.

    Yields:
        (name, first flat position, 1-D scores of consecutive positions), positions rising within a weight and weights
        in the order of `targets`.

    Raises:
        ValueError: batches are missing, hold no usable labels, or are an iterator needed more than once; a loss is not
            finite, or none can be differentiated.
    """
    second_order = measure.differentiates_twice
    fill, entry_bytes = _FILLS.get(measure.statistic), measure.entry_bytes
    # Long enough to keep a device busy; a short one takes a seventh of the budget.
    chunk = max(1, min(2**22, memory_budget // 512))
    # The accumulators get what a chunk and the candidates leave, and at least an eighth: where candidates need nearly
    # all of the budget, ever more passes would not make them fewer.
    room = max(memory_budget - _CHUNK_ENTRY_BYTES * chunk - candidates, memory_budget // 8)
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibrating(model))
        gradient_groups = []
        if second_order:
            store = stack.enter_context(GradientStore(targets, room // 2))
            room -= store.memory_bytes
            gradient_groups = cut_into_groups(targets.values(), room, MEASURES["gradient"].entry_bytes)
            entry_bytes += max(target.dtype.itemsize for target in targets.values())
        groups = cut_into_groups(targets.values(), room, entry_bytes)
        reader = None
        if measure.takes_batches:
            with together():
                check_batches(batches, len(gradient_groups) + len(groups))
            bar = stack.enter_context(tqdm(desc="calibration", unit="batch", disable=None if progress else True))
            device = next(iter(targets.values())).device
            keyed = loss is None
            reader = BatchReader(batches, device, bar, keyed and measure.labels, keyed, max_batches)
        if second_order:
            warn_of_plain_attention(model)
            for group in gradient_groups:
                gradient(model, reader, group, loss)
                for row_slice in group:
                    store.put(row_slice)
                    row_slice.accumulator = None
            with together():
                _check_differentiated(reader)
            fill = functools.partial(hessian_gradient, targets=targets, store=store, dense=reader.used_otherwise)
        for group in groups:
            if fill is not None:
                fill(model, reader, group, loss)
            while group:
                yield from _score(group.pop(0), measure, chunk, seed)
        if measure.labels and not second_order:
            with together():
                _check_differentiated(reader)


def _check_differentiated(reader: BatchReader) -> None:
    """Refuse scores that are all zero since no loss led back to a weight: the mask would be of the first positions.

    Asked of all groups together, as one of them may hold an expert that got no token, and nothing else.
    """
    if not reader.went_back:
        raise ValueError(
            "No calibration loss depends on a targeted weight, as far as autograd knows: made under torch.no_grad(), "
            "detached, or without these weights? Return the loss with its graph."
        )


def _score(row_slice: RowSlice, measure: Measure, chunk: int, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    for first, weight, statistic in row_slice.chunks(chunk):
        if measure.statistic == "random":
            statistic = random_draws(row_slice.target.name, first, weight.numel(), seed, weight.device)
        yield row_slice.target.name, first, measure.scores(row_slice.target.name, weight, statistic)


def random_draws(name: str, start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Uniform fp64 numbers in [0, 1) for `count` positions of a weight: the same on every device and in any cut."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)
    # SplitMix64 of (key + position), in wrapping int64 arithmetic; the masks make the shifts logical ones.
    state = torch.arange(start, start + count, dtype=torch.int64, device=device)
    state = state.mul_(-7046029254386353131).add_(key)
    state = (state ^ ((state >> 30) & (2**34 - 1))).mul_(-4658895280553007687)
    state = (state ^ ((state >> 27) & (2**37 - 1))).mul_(-7723592293110705685)
    state = state ^ ((state >> 31) & (2**33 - 1))
    return ((state >> 11) & (2**53 - 1)).double().div_(2**53)
