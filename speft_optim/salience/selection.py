"""From scores and a budget to masks.

Local scope keeps a share of every weight, global scope the best entries over all weights together. Both use one running
selection of the best k that sees scores in chunks: no tensor of all scores exists at any time, and the outcome equals
that of one `topk` over everything. Ties go to the earlier position, and to the earlier weight.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from speft_optim.checks import check_callable, check_choice, check_flag, check_whole, is_whole
from speft_optim.distributed import check_equal, largest, smallest, together
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask
from speft_optim.salience.amounts import candidate_bytes, check_amount, check_shares, share_out
from speft_optim.salience.batches import Batches, check_max_batches
from speft_optim.salience.calibration import default_memory_budget, stream_scores
from speft_optim.salience.losses import LossFunction
from speft_optim.salience.measures import Measure, measure_of
from speft_optim.salience.offload import streaming
from speft_optim.salience.topk import BestEntries
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.provenance import note_weights
from speft_optim.weights.targets import Target, Targets, check_differentiable, find_targets
from speft_optim.weights.wrappers import unwrapped

logger = logging.getLogger(__name__)


def select_masks(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    salience: str | Callable[[Tensor, Tensor], Tensor] = "gradient",
    density: float | None = None,
    budget: int | Mapping[str, int] | None = None,
    scope: Literal["local", "global"] = "local",
    targets: Targets = None,
    memory_budget: int | None = None,
    loss: LossFunction | None = None,
    max_batches: int | None = None,
    offload: str | torch.device | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Masks:
    """Choose which entries to train (SPEFT, Sections 3.1 to 3.3).

    Load the weights first: masks chosen on others fit them no better than random ones. A pass takes the memory of a
    forward and backward as the model is set up now. Trainers turn activation checkpointing on only when they begin to
    train, so where memory is short call `model.gradient_checkpointing_enable()` before; and autocast, which a trainer
    adds too, takes effect with `with torch.autocast("cuda", torch.bfloat16):` around this call.

    Args:
        model: the model; exactly as before afterwards, also after an error.
        batches: calibration data: an iterable of the dicts the model takes, with labels, or of whatever `loss` takes (a
            list or a DataLoader; the paper uses 64 batches of 16 examples). Not needed by `magnitude`, `random` and
            `synflow`. The data that is trained on, since the entries are chosen for it.
        salience: name of the measure, see `speft_optim.salience.measures`; or a function `salience(weight, gradient)`
            that scores runs of a weight's entries and must not mix them. Both arguments are fp32 of shape (entries,),
            the gradient being the mean over the batches with its sign; it returns floating scores of that shape, of
            which the highest are kept.
        density: share of the targeted entries to keep, in (0, 1]; per weight in local scope, rounded to whole entries.
        budget: number of entries to keep over all targets, instead of `density`; local scope shares it out by size, or
            takes a number for each target by name.
        scope: "local" keeps a share of each weight, "global" the best entries over all weights.
        targets: which weights; see `find_targets`. Default: the linear weights of the decoder blocks.
        memory_budget: bytes that estimation may hold beyond the model and one batch; default half of the free memory.
            Less memory costs more passes over the batches, never another mask. The candidates for the masks count in
            it: about 10 bytes an entry that is kept, over all targets in global scope. However many these are, an
            eighth of the budget goes to what a pass accumulates, and at least one row of a weight, so that a budget
            too small for the candidates is exceeded by them.
        loss: from (model, batch) to a scalar; default the loss that the model returns. With it a batch may be of any
            kind, without labels too: its tensors are moved to the model's device wherever they stand in dicts, lists,
            tuples and dataclasses. It gets the model without wrappers, so that none exchanges gradients. `fisher`
            calls it with one example at a time: one row of each tensor that is as long as the labels, or without
            labels as most tensors of the batch are.
        max_batches: how many of the batches to read, the same ones in each pass; None for all. A DataLoader would else
            be read whole.
        offload: device to compute on while the weights stay in CPU memory and visit it block by block, for a model that
            does not fit there; the masks are those of a resident model. Not for `grasp`.
        base: with `offload`, folder of the checkpoint whose safetensors hold the weights of a model on the meta device.
        seed: of the `random` measure.
        progress: show a progress bar (on terminals only).

    Returns:
        The masks by parameter name, in the model's order. A weight whose share rounds to nothing has an empty mask.
        They remember a few entries of the weights: a warning tells where training begins with others.

    Raises:
        ValueError: an argument is out of range, the data cannot be used, or scores are not finite.
        TypeError: an argument is of the wrong kind.
        RuntimeError: another process of the group failed.
    """
    model = unwrapped(model)
    with contextlib.ExitStack() as stack:
        with together():
            measure = check_together(salience, scope, offload, base)
            check_differentiable(model)
            check_max_batches(max_batches)
            check_callable("loss", loss, "(model, batch)")
            if offload is not None:
                # The graph of `synflow` keeps no weights, and its mode does not reach into a recomputation.
                stack.enter_context(streaming(model, offload, base, by_block=measure.takes_batches))
            settle_storage(model)
            found = find_targets(model, targets)
            sizes = {name: target.shape.numel() for name, target in found.items()}
            if isinstance(budget, Mapping):
                check_shares(budget, sizes, scope, density)
            else:
                check_amount(density, budget, sum(sizes.values()))
            if memory_budget is None:
                memory_budget = default_memory_budget(next(iter(found.values())).device)
            check_whole("memory_budget", memory_budget, least=1, usual="2 * 2**30 bytes")
            check_whole("seed", seed, usual=0)
            check_flag("progress", progress)
        # What numpy counted may be of a width in which its products overflow.
        memory_budget = int(memory_budget)
        budget = int(budget) if is_whole(budget) else budget
        density = None if density is None else float(density)
        # Processes that measure other things, or cut the weights into other groups, would exchange what does not match.
        choice = f"{measure.name} of {sum(sizes.values()):,} entries in {len(sizes)} weights"
        check_equal(choice, "The arguments of select_masks", "pass the same in all of them.")
        memory_budget = smallest(memory_budget)
        shares = share_out(sizes, density, budget) if scope == "local" else None
        total = sum(shares.values()) if shares else budget or round(density * sum(sizes.values()))
        # All cut the weights alike, even if some were asked for other numbers of entries.
        candidates = largest(candidate_bytes(sizes, shares, total, measure.score_bytes))
        options = dict(memory_budget=memory_budget, candidates=candidates, loss=loss, max_batches=max_batches)
        options.update(seed=seed, progress=progress)
        scores = stream_scores(model, batches, found, measure, **options)
        # Closed here and not by the garbage collector: an error's traceback would keep it open, and the model changed.
        stack.enter_context(contextlib.closing(scores))
        # Runs long enough to keep a device busy, and short enough that their temporaries are few.
        longest = 2**22 if next(iter(found.values())).device.type == "cuda" else 2**20
        step = max(2**10, min(longest, memory_budget // 512))
        if scope == "local":
            masks = _select_local(scores, found, shares, step)
        else:
            masks = _select_global(scores, found, total, step)
    if measure.statistic != "random":
        note_weights(masks, found)
    return masks


def check_together(
    salience: str | Callable[[Tensor, Tensor], Tensor],
    scope: str,
    offload: str | torch.device | None = None,
    base: str | Path | None = None,
) -> Measure:
    """Refuse what `select_masks` does not know, or not together.

    Returns:
        The measure.

    Raises:
        ValueError: a name is not known, or two arguments exclude each other.
        TypeError: the measure is neither a name nor a function.
    """
    measure = measure_of(salience)
    check_choice("scope", scope, ("local", "global"))
    if offload is None and base is not None:
        raise ValueError("base is read only with offload; pass offload='cuda' too, or load the model.")
    if offload is not None and measure.differentiates_twice:
        raise ValueError(f"salience={salience!r} differentiates twice, which offload does not support; choose another.")
    return measure


def _select_local(
    scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], shares: Mapping[str, int], step: int
) -> Masks:
    # A weight without entries has no scores either, but a mask as in global scope.
    masks = Masks({name: Mask(torch.empty(0, dtype=torch.int32), target.shape) for name, target in targets.items()})
    best, ranges = None, _Ranges()
    for name, first, chunk in scores:
        ranges.see(name, chunk)
        if first == 0:
            best = BestEntries(shares[name], targets[name].shape.numel(), step)
        best.update(chunk, first)
        if first + chunk.numel() == targets[name].shape.numel():
            masks[name] = Mask(best.positions, targets[name].shape)
            # Not held on to while the next group is accumulated.
            best = None
    ranges.warn_of_ties(masks)
    return masks


def _select_global(
    scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], total: int, step: int
) -> Masks:
    starts, start = {}, 0
    for name, target in targets.items():
        starts[name] = start
        start += target.shape.numel()
    best, ranges = BestEntries(total, start, step), _Ranges()
    for name, first, chunk in scores:
        ranges.see(name, chunk)
        best.update(chunk, starts[name] + first)
    masks = Masks()
    kept = best.positions
    # Their scores are not needed any more.
    del best
    bounds = torch.tensor([*starts.values(), start], dtype=kept.dtype, device=kept.device)
    cuts = torch.searchsorted(kept, bounds).tolist()
    for number, (name, target) in enumerate(targets.items()):
        positions = kept[cuts[number] : cuts[number + 1]] - starts[name]
        masks[name] = Mask(positions.to(target.device), target.shape)
    ranges.warn_of_ties(masks)
    return masks


class _Ranges:
    """Smallest and largest score of each weight."""

    def __init__(self):
        self._of: dict[str, tuple[float, float]] = {}

    def see(self, name: str, scores: Tensor) -> None:
        """Take in some scores of a weight.

        Raises:
            ValueError: one is not finite.
        """
        if not scores.numel():
            return
        # NaN passes through both ends.
        low, high = torch.stack(torch.aminmax(scores)).tolist()
        if not math.isfinite(low) or not math.isfinite(high):
            bad = scores.numel() - int(torch.isfinite(scores).sum())
            raise ValueError(
                f"{bad:,} scores of {name} are not finite; check its weights and the calibration data for NaN or inf."
            )
        before = self._of.get(name, (low, high))
        self._of[name] = min(before[0], low), max(before[1], high)

    def warn_of_ties(self, masks: Masks) -> None:
        """Tell of weights that were chosen from without a reason."""
        tied = [name for name, (low, high) in self._of.items() if low == high]
        tied = [name for name in tied if 0 < len(masks[name]) < masks[name].shape.numel()]
        if tied:
            logger.warning(
                "All scores of %d weights are equal, e.g. of %s, so that their first entries are kept: no batch uses "
                "them, or all their entries are alike. Leave them out of targets, or look at the batches.",
                len(tied),
                tied[0],
            )
