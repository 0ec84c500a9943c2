"""Streaming estimation: scores of every targeted entry, in order and in bounded memory.

The targeted weights are cut into row slices, and these are put into groups. The budget has to hold the accumulators of
one group, the temporaries of one chunk of scores, and the best entries that the caller keeps. Each group costs one pass
over the batches, in which only its weights are observed, so that backward stops below the lowest of them. After the
pass the scores of the group are yielded in chunks and its accumulators are freed. To hold all gradients at once in
fp32, the obvious way, would take twice the memory of a bf16 model beside it.

Beyond the budget a pass holds what one batch needs: its activations, one dense gradient or product at a time, and fp32
copies of that product's operands if no kernel multiplies them in their own dtype.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from speft_optim.distributed import together, world_size
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.activation import squared_input
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.batches import Batches, check_batches
from speft_optim.salience.first_order import gradient
from speft_optim.salience.fisher import squared_gradient
from speft_optim.salience.grasp import GradientStore, hessian_gradient, warn_of_plain_attention
from speft_optim.salience.groups import cut_into_groups
from speft_optim.salience.losses import LossFunction
from speft_optim.salience.measures import MEASURES, Measure
from speft_optim.salience.model_state import calibrating
from speft_optim.salience.synflow import flow
from speft_optim.weights.mesh import innermost_units, is_fully_sharded, reshard
from speft_optim.weights.targets import Target

# The functions that fill the accumulators of a group; other statistics need none.
_FILLS = {
    "gradient": gradient,
    "squared_gradient": squared_gradient,
    "squared_input": squared_input,
    "flow": flow,
    "hessian_gradient": hessian_gradient,
}


# The most bytes that each entry of a chunk takes. The peak is its selection: the weight in fp32 (4), the score in fp64
# (8), the position of a candidate (8), its place in the buffer that `BestEntries.bytes` does not count (16), and a cut
# of the buffer (32) with a few comparisons of a byte each. Scoring itself takes less, 28 to 36.
_CHUNK_ENTRY_BYTES = 72


def default_memory_budget(device: torch.device) -> int:
    """Return half of the memory that this process can still allocate on `device`, in bytes."""
    if device.type == "cuda":
        used, (free, total) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        # The allocator keeps freed memory for later tensors, so it counts as free.
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
    """Score every entry of the targeted weights.

    Args:
        model: the model; afterwards as before, also if the caller stops iterating early.
        batches: an iterable of dicts of the model's arguments, or of what `loss` takes; iterated once for each group.
        targets: the weights to score.
        measure: the salience measure.
        memory_budget: bytes for accumulators, chunks and candidates.
        candidates: bytes of the scores and positions that the caller keeps.
        loss: from model and batch to a scalar; None for the `loss` of the model's own output.
        max_batches: the largest number of batches to read in each iteration; None for all.
        seed: seed of the `random` measure.
        progress: whether to show a progress bar on a terminal.

    Yields:
        (name, first flat position, 1-D fp32 or fp64 scores of the positions from there on). Positions rise within a
        weight, and weights come in the order of `targets`.

    Raises:
        ValueError: batches are missing, hold no usable labels, or cannot be iterated again; a loss is not finite, or no
            loss depends on a targeted weight.
    """
    second_order = measure.differentiates_twice
    fill, entry_bytes = _FILLS.get(measure.statistic), measure.entry_bytes
    chunk, room = _divide(memory_budget, candidates)
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibrating(model))
        gradient_groups = []
        if second_order:
            store = stack.enter_context(GradientStore(targets, room // 2))
            room -= store.memory_bytes
            gradient_groups = cut_into_groups(targets.values(), room, MEASURES["gradient"].entry_bytes)
            entry_bytes += max(target.dtype.itemsize for target in targets.values())
        groups = cut_into_groups(targets.values(), room, entry_bytes, *_division(model, measure))
        reader = None
        if measure.takes_batches:
            with together():
                check_batches(batches, len(gradient_groups) + len(groups))
            bar = stack.enter_context(tqdm(desc="calibration", unit="batch", disable=None if progress else True))
            device, keyed = next(iter(targets.values())).device, loss is None
            labelled = keyed and measure.labels
            reader = BatchReader(batches, device, bar, labelled, keyed, max_batches, is_fully_sharded(model))
        if second_order:
            _store_gradient(model, reader, gradient_groups, loss, store)
            fill = functools.partial(hessian_gradient, targets=targets, store=store, dense=reader.used_otherwise)
        for group in groups:
            if fill is not None:
                fill(model, reader, group, loss)
            reshard(model)
            while group:
                yield from _score(group.pop(0), measure, chunk, seed)
        if measure.labels and not second_order:
            with together():
                _check_differentiated(reader)


def _divide(memory_budget: int, candidates: int) -> tuple[int, int]:
    """Return the entries of a chunk of scores, and the bytes that the budget leaves for accumulators."""
    # A chunk is long enough to keep a device busy. With a small budget its temporaries take a seventh of it.
    chunk = max(1, min(2**22, memory_budget // 512))
    # Accumulators get at least an eighth, since more passes do not shrink the candidates.
    return chunk, max(memory_budget - _CHUNK_ENTRY_BYTES * chunk - candidates, memory_budget // 8)


def _division(model: nn.Module, measure: Measure) -> tuple[int, Mapping[nn.Module, nn.Module] | None]:
    """Over how many processes accumulators are divided, and the blocks between which they exchange what is in them."""
    if not is_fully_sharded(model) or measure.statistic not in ("gradient", "flow"):
        # The squares of `fisher` are of whole gradients.
        return 1, None
    # The flow depends on no batch, so that each process computes all of it.
    return world_size(), innermost_units(model) if measure.statistic == "gradient" and world_size() > 1 else None


def _store_gradient(
    model: nn.Module,
    reader: BatchReader,
    groups: list[list[RowSlice]],
    loss: LossFunction | None,
    store: GradientStore,
) -> None:
    """Fill the store that `hessian_gradient` needs, in passes of their own."""
    warn_of_plain_attention(model)
    for group in groups:
        gradient(model, reader, group, loss)
        for row_slice in group:
            store.put(row_slice)
            row_slice.accumulator = None
    with together():
        _check_differentiated(reader)


def _check_differentiated(reader: BatchReader) -> None:
    """Refuse scores that are all zero because no loss depends on a weight: a mask would keep the first positions.

    This is checked after all groups, since a single group may hold nothing but an expert that got no token.
    """
    if not reader.went_back:
        raise ValueError(
            "No calibration loss depends on a targeted weight, as far as autograd knows: it was computed under "
            "torch.no_grad(), detached, or without these weights. Return the loss with its graph."
        )


def _score(row_slice: RowSlice, measure: Measure, chunk: int, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    for first, weight, statistic in row_slice.chunks(chunk):
        if measure.statistic == "random":
            statistic = random_draws(row_slice.target.name, first, weight.numel(), seed, weight.device)
        yield row_slice.target.name, first, measure.scores(row_slice.target.name, weight, statistic)


def random_draws(name: str, start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Draw uniform numbers in [0, 1), each by weight, position and seed alone: the same on any device, in any chunks.

    Args:
        name: the weight's name.
        start: the first flat position.
        count: how many positions.
        seed: the seed.
        device: the device of the result.

    Returns:
        (count,) fp64.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)
    # This is SplitMix64 of (key + position) in wrapping int64 arithmetic; the masks make the shifts logical.
    state = torch.arange(start, start + count, dtype=torch.int64, device=device)
    state = state.mul_(-7046029254386353131).add_(key)
    state = (state ^ ((state >> 30) & (2**34 - 1))).mul_(-4658895280553007687)
    state = (state ^ ((state >> 27) & (2**37 - 1))).mul_(-7723592293110705685)
    state = state ^ ((state >> 31) & (2**33 - 1))
    return ((state >> 11) & (2**53 - 1)).double().div_(2**53)
