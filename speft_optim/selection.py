"""From scores and a budget to masks.

Local scope keeps a share of every weight, global scope the best entries over all weights together. Both use one running
selection of the best k that sees scores in chunks: no tensor of all scores exists at any time, and the outcome equals
that of one `topk` over everything. Ties go to the earlier position, and to the earlier weight.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from speft_optim.batches import Batches, LossFunction
from speft_optim.calibration import default_memory_budget, stream_scores
from speft_optim.distributed import check_equal, smallest, together
from speft_optim.masks import Mask, Masks
from speft_optim.offload import streaming
from speft_optim.salience import MEASURES
from speft_optim.targets import Target, Targets, find_targets, uncompiled


class BestEntries:
    """The best k of the scores seen so far, exactly k of them and the earlier of equals.

    Args:
        k: how many to keep, at least 0.
    """

    def __init__(self, k: int):
        self.k = k
        self.scores: Tensor | None = None
        self.positions: Tensor | None = None

    def update(self, scores: Tensor, first: int) -> None:
        """Take in 1-D `scores` of the consecutive positions from `first` on, which follow all positions seen before."""
        if self.scores is not None and self.scores.numel() == self.k and self.k:
            # Full: only what beats the worst kept entry can enter, since of equals the earlier stays.
            local = (scores > self._worst.to(scores.device)).nonzero().squeeze(1)
        elif scores.numel() > self.k:
            local = _keep_best(scores, self.k)
        else:
            local = torch.arange(scores.numel(), device=scores.device)
        positions, scores = local + first, scores[local]
        if self.scores is not None:
            positions = torch.cat([self.positions, positions.to(self.positions.device)])
            scores = torch.cat([self.scores, scores.to(self.scores.device)])
        if scores.numel() > self.k:
            kept = _keep_best(scores, self.k)
            positions, scores = positions[kept], scores[kept]
        self.positions, self.scores = positions, scores
        if self.k and scores.numel() == self.k:
            self._worst = scores.min()


def _keep_best(scores: Tensor, k: int) -> Tensor:
    """Rising places of the best k of `scores`; among equals the first. Exactly k."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = torch.topk(scores, k, sorted=False).values.min()
    kept = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    kept[ties[: k - int(kept.sum())]] = True
    return kept.nonzero().squeeze(1)


def select_masks(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    salience: str = "gradient",
    density: float | None = None,
    budget: int | Mapping[str, int] | None = None,
    scope: Literal["local", "global"] = "local",
    targets: Targets = None,
    memory_budget: int | None = None,
    loss: LossFunction | None = None,
    offload: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Masks:
    """Choose which entries to train (SPEFT, Sections 3.1 to 3.3).

    Args:
        model: the model; exactly as before afterwards, also after an error.
        batches: calibration data: an iterable of the dicts the model takes, with labels (a list or a DataLoader; the
            paper uses 64 batches of 16 examples). Not needed by `magnitude` and `random`.
        salience: name of the measure, see `speft_optim.salience`.
        density: share of the targeted entries to keep, in (0, 1]; per weight in local scope, rounded to whole entries.
        budget: number of entries to keep over all targets, instead of `density`; local scope shares it out by size, or
            takes a number for each target by name.
        scope: "local" keeps a share of each weight, "global" the best entries over all weights.
        targets: which weights; see `find_targets`. Default: the linear weights of the decoder blocks.
        memory_budget: bytes that estimation may hold beyond the model and one batch; default half of the free memory.
            Less memory costs more passes over the batches, never another mask.
        loss: from (model, batch) to a scalar; default the loss that the model returns.
        offload: device to compute on while the weights stay in CPU memory and visit it block by block, for a model that
            does not fit there; the masks are those of a resident model. Not for `grasp`.
        checkpoint: with `offload`, folder whose safetensors hold the weights of a model on the meta device.
        seed: of the `random` measure.
        progress: show a progress bar (on terminals only).

    Returns:
        The masks by parameter name, in the model's order. A weight whose share rounds to nothing has an empty mask.

    Raises:
        ValueError: an argument is out of range, the data cannot be used, or scores are not finite.
        TypeError: an argument is of the wrong kind.
        RuntimeError: another process of the group failed.
    """
    model = uncompiled(model)
    with contextlib.ExitStack() as stack:
        with together():
            _check_choice(salience, scope, offload, checkpoint)
            if offload is not None:
                # The graph of `synflow` keeps no weights, and its mode does not reach into a recomputation.
                by_block = MEASURES[salience].signal not in ("none", "random", "flow")
                stack.enter_context(streaming(model, offload, checkpoint, by_block=by_block))
            found = find_targets(model, targets)
            sizes = {name: target.shape.numel() for name, target in found.items()}
            if isinstance(budget, Mapping):
                _check_shares(budget, sizes, scope, density)
            else:
                _check_amount(density, budget, sum(sizes.values()))
            if memory_budget is None:
                memory_budget = default_memory_budget(next(iter(found.values())).device)
            if not isinstance(memory_budget, int) or memory_budget <= 0:
                raise ValueError(
                    f"memory_budget={memory_budget!r} must be a positive number of bytes, such as 2 * 2**30."
                )
        # Processes that measure other things, or cut the weights into other groups, would exchange what does not match.
        choice = f"{salience} of {sum(sizes.values()):,} entries in {len(sizes)} weights"
        check_equal(choice, "The arguments of select_masks", "pass the same in all of them.")
        memory_budget = smallest(memory_budget)
        options = dict(memory_budget=memory_budget, loss=loss, seed=seed, progress=progress)
        scores = stream_scores(model, batches, found, MEASURES[salience], **options)
        # Closed here and not by the garbage collector: an error's traceback would keep it open, and the model changed.
        stack.enter_context(contextlib.closing(scores))
        if scope == "local":
            return _select_local(scores, found, _shares(sizes, density, budget))
        return _select_global(scores, found, budget or round(density * sum(sizes.values())))


def _check_choice(salience: str, scope: str, offload: str | torch.device | None, checkpoint: str | Path | None) -> None:
    if salience not in MEASURES:
        raise ValueError(f"salience={salience!r} is not known; choose from {', '.join(sorted(MEASURES))}.")
    if scope not in ("local", "global"):
        raise ValueError(f"scope={scope!r} is not known; choose 'local' or 'global'.")
    if offload is None and checkpoint is not None:
        raise ValueError("checkpoint is read only with offload; pass offload='cuda' too, or load the model.")
    if offload is not None and salience == "grasp":
        raise ValueError("salience='grasp' differentiates twice, which offload does not support; choose another.")


def _select_local(
    scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], shares: dict[str, int]
) -> Masks:
    # A weight without entries has no scores either, but a mask as in global scope.
    masks = Masks({name: Mask(torch.empty(0, dtype=torch.int32), target.shape) for name, target in targets.items()})
    best = None
    for name, first, chunk in scores:
        _check_finite(name, chunk)
        if first == 0:
            best = BestEntries(shares[name])
        best.update(chunk, first)
        if first + chunk.numel() == targets[name].shape.numel():
            masks[name] = Mask(best.positions, targets[name].shape)
    return masks


def _select_global(scores: Iterable[tuple[str, int, Tensor]], targets: Mapping[str, Target], total: int) -> Masks:
    starts, start = {}, 0
    for name, target in targets.items():
        starts[name] = start
        start += target.shape.numel()
    best = BestEntries(total)
    for name, first, chunk in scores:
        _check_finite(name, chunk)
        best.update(chunk, starts[name] + first)
    masks = Masks()
    bounds = torch.tensor([*starts.values(), start], device=best.positions.device)
    cuts = torch.searchsorted(best.positions, bounds).tolist()
    for number, (name, target) in enumerate(targets.items()):
        positions = best.positions[cuts[number] : cuts[number + 1]] - starts[name]
        masks[name] = Mask(positions.to(target.device), target.shape)
    return masks


def _shares(sizes: dict[str, int], density: float | None, budget: int | Mapping[str, int] | None) -> Mapping[str, int]:
    """Entries to keep of each weight: its density rounded, or its part of the budget by largest remainder."""
    if isinstance(budget, Mapping):
        return budget
    if density is not None:
        return {name: round(density * size) for name, size in sizes.items()}
    total = sum(sizes.values())
    shares = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(shares.values())]:
        shares[name] += 1
    return shares


def _check_amount(density: float | None, budget: int | None, total: int) -> None:
    if (density is None) == (budget is None):
        raise ValueError(f"Give exactly one of density and budget; got density={density}, budget={budget}.")
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, int | float):
            raise TypeError(f"density={density!r} is a {type(density).__name__}; pass a number in (0, 1].")
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density={density} is outside (0, 1]; 0.01 keeps one entry in a hundred.")
    else:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget={budget!r} is a {type(budget).__name__}; pass a whole number of entries.")
        if not 1 <= budget <= total:
            raise ValueError(f"budget={budget:,} is outside 1..{total:,}, the number of targeted entries.")


def _check_shares(budget: Mapping[str, int], sizes: dict[str, int], scope: str, density: float | None) -> None:
    if scope != "local" or density is not None:
        raise ValueError(f"A budget for each weight needs scope='local' and no density; got {scope!r} and {density}.")
    if budget.keys() != sizes.keys():
        odd = sorted(budget.keys() ^ sizes.keys())[0]
        raise ValueError(f"budget must name exactly the targeted weights; {odd} is on one side only.")
    for name, count in budget.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= sizes[name]:
            raise ValueError(f"budget of {name} is {count!r}; pass a whole number of entries in 0..{sizes[name]:,}.")


def _check_finite(name: str, scores: Tensor) -> None:
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        bad = scores.numel() - int(finite.sum())
        raise ValueError(
            f"{bad:,} scores of {name} are not finite; check its weights and the calibration data for NaN or inf."
        )
