"""Learning rates in proportion to the magnitudes of the entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The powers that a kernel knows; 0 is one rate for all.
POWERS = (0.0, 0.5, 1.0)
LEAST, MOST = 0.1, 5.0
TINY = torch.finfo(torch.float32).tiny
# Entries whose magnitudes are taken at a time, which bounds what is held beside the values.
_ENTRIES = 2**24


def mean_power(values: Sequence[Tensor], power: float) -> Tensor:
    """Mean of abs(value)^power over all entries of several tensors, an fp32 scalar on the first one's device.

    Args:
        values: fp32 tensors with at least one entry in all.
        power: one of `POWERS` but 0.
    """
    values = [part for part in values if part.numel()]
    sums = [total for group in _groups(values) for total in _sums(group, power)]
    device = values[0].device
    return torch.stack([total.to(device) for total in sums]).sum() / sum(part.numel() for part in values)


def relative_rates(values: Tensor, mean: Tensor, power: float) -> Tensor:
    """abs(value)^power over its mean, cut to 0.1 to 5: what multiplies the rate of each entry, (k,) fp32."""
    magnitudes = values.abs() if power == 1.0 else values.abs().sqrt_()
    # All entries may be zero.
    return magnitudes.div_(mean.clamp_min(TINY)).clamp_(LEAST, MOST)


def _sums(values: list[Tensor], power: float) -> Sequence[Tensor]:
    """The sum of abs(value)^power of each tensor."""
    if power == 0.5:
        values = torch._foreach_abs(values)
        torch._foreach_sqrt_(values)
    return torch._foreach_norm(values, 1)


def _groups(values: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in runs of at most `_ENTRIES`, or one alone, each on one device."""
    groups, room = [], 0
    for part in values:
        if part.numel() > room or groups[-1][0].device != part.device:
            groups.append([])
            room = _ENTRIES
        groups[-1].append(part)
        room -= part.numel()
    return groups
