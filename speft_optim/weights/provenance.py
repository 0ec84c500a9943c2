"""Warns if masks are used with other weights than those they were selected on.

A script that builds its optimizer before it loads the weights selects masks on random weights, and nothing fails. So a
selected mask carries a few entries of its weight that it does not train. They are compared with the model's at the
first step, since a script may load the weights at any time before it. Rounding (a cast, quantisation to 4 bits) changes
the median entry by a seventh at most. Entries of unrelated weights differ by more than their own size.
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


# The median of fewer entries is not reliable.
_FEWEST = 8


# Masks as they were attached.
_waiting: WeakKeyDictionary[SparseWeight, Mask] = WeakKeyDictionary()


_stepped: WeakSet[Optimizer] = WeakSet()


def note_weights(masks: Masks, targets: Mapping[str, Target]) -> None:
    """Set `selected_on` of masks that were just selected, except for weights on the meta device.

    Args:
        masks: by parameter name.
        targets: the weights of these names.
    """
    for name, mask in masks.items():
        if not targets[name].parameter.is_meta:
            weight = frozen_weight(*targets[name].sites[0])
            places = places_outside(mask, mask.shape.numel(), PROBES).to(weight.device)
            mask.selected_on = weight.gather(places).to("cpu", torch.float32)


def note_masks(weights: Iterable[SparseWeight]) -> None:
    """Note newly attached masks, for the comparison at the first step."""
    _waiting.update({weight: weight.mask for weight in weights if weight.mask.selected_on is not None})


def compare_at_first_step(optimizer: Optimizer) -> None:
    """Warn once if masks that an optimizer trains were selected on other weights; called after each step."""
    if not _waiting or optimizer in _stepped:
        return
    _stepped.add(optimizer)
    weights = [linked(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    _warn_of_others({weight: _waiting.pop(weight) for weight in weights if weight is not None and weight in _waiting})


def _warn_of_others(masks: Mapping[SparseWeight, Mask]) -> None:
    others = [weight.name for weight, mask in masks.items() if _is_other(weight, mask)]
    if others:
        logger.warning(
            "%d of %d masks were selected on other weights than the model has now, e.g. that of %s. Were the weights "
            "loaded after selection? Such masks are no better than random; load first, then select again.",
            len(others),
            len(masks),
            others[0],
        )


@torch.no_grad()
def _is_other(weight: SparseWeight, mask: Mask) -> bool:
    before, base = mask.selected_on, weight.base
    places = places_outside(mask, mask.shape.numel(), PROBES).to(base.device)
    if len(before) != len(places):
        return False
    # Entries that a schedule has trained meanwhile are left out.
    _, trained = find(weight.ever_trained().to(base.device).indices, places)
    now = base.gather(places)[~trained].to("cpu", torch.float32)
    return _differ(before[~trained.cpu()], now)


def _differ(before: Tensor, now: Tensor) -> bool:
    """Return whether entries differ by more than rounding, by medians, which a few large entries do not decide."""
    if len(before) < _FEWEST:
        return False
    size = torch.maximum(before.abs().median(), now.abs().median())
    return bool((now - before).abs().median() > _TOLERANCE * size)
