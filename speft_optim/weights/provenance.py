"""Whether masks are on the weights that they were selected on.

A script that builds its optimizer before it loads the weights selects on random ones, and nothing fails. So a selected
mask carries a few entries from outside itself, which training does not change. They are compared when values are
attached and at the first step. What rounds them (a cast, quantisation to 4 bits) moves the median entry by a seventh
at most; entries of other weights lie farther from each other than they are large.
"""

import logging
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import PROBES, Mask, find, places_outside
from speft_optim.weights.compact_values import linked
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target

logger = logging.getLogger(__name__)


_TOLERANCE = 0.25


# Of fewer entries a median tells little.
_FEWEST = 8


# Weights whose masks are to be compared at the first step, and the masks as they were attached.
_waiting: WeakKeyDictionary[SparseWeight, Mask] = WeakKeyDictionary()


_stepped: WeakSet[Optimizer] = WeakSet()


def note_weights(masks: Masks, targets: Mapping[str, Target]) -> None:
    """Let masks remember the weights that they were just selected on; none that lie elsewhere than in memory."""
    for name, mask in masks.items():
        if not targets[name].parameter.is_meta:
            weight = frozen_weight(*targets[name].sites[0])
            places = places_outside(mask, mask.shape.numel(), PROBES).to(weight.device)
            mask.selected_on = weight.gather(places).to("cpu", torch.float32)


def compare_weights(weights: Iterable[SparseWeight]) -> None:
    """Warn where newly attached masks were selected on other weights; what agrees is compared again at a first step."""
    weights = [weight for weight in weights if weight.mask.selected_on is not None]
    if not _warn_of_others({weight: weight.mask for weight in weights}):
        _waiting.update({weight: weight.mask for weight in weights})


def compare_at_first_step(optimizer: Optimizer) -> None:
    """Warn once where weights were loaded between attaching and the first step of an optimizer."""
    if not _waiting or optimizer in _stepped:
        return
    _stepped.add(optimizer)
    weights = [linked(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    _warn_of_others({weight: _waiting.pop(weight) for weight in weights if weight is not None and weight in _waiting})


def _warn_of_others(masks: Mapping[SparseWeight, Mask]) -> bool:
    others = [weight.name for weight, mask in masks.items() if _is_other(weight, mask)]
    if others:
        logger.warning(
            "%d of %d masks were selected on other weights than the model has now, e.g. that of %s. Were the weights "
            "loaded after the masks were selected? Such masks are as good as random; load first, then select again.",
            len(others),
            len(masks),
            others[0],
        )
    return bool(others)


@torch.no_grad()
def _is_other(weight: SparseWeight, mask: Mask) -> bool:
    before, base = mask.selected_on, weight.base
    places = places_outside(mask, mask.shape.numel(), PROBES).to(base.device)
    if len(before) != len(places):
        return False
    # What a schedule has trained meanwhile tells nothing.
    _, trained = find(weight.ever_trained().to(base.device).indices, places)
    now = base.gather(places)[~trained].to("cpu", torch.float32)
    return _differ(before[~trained.cpu()], now)


def _differ(before: Tensor, now: Tensor) -> bool:
    """Whether entries differ by more than any rounding; medians, which no few large entries decide."""
    if len(before) < _FEWEST:
        return False
    size = torch.maximum(before.abs().median(), now.abs().median())
    return bool((now - before).abs().median() > _TOLERANCE * size)
