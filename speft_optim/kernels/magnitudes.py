"""Learning rates in proportion to the magnitudes of the entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The powers that the kernel supports; 0 gives all entries one rate.
POWERS = (0.0, 0.5, 1.0)
LEAST, MOST = 0.1, 5.0
TINY = torch.finfo(torch.float32).tiny
# Number of entries whose magnitudes are computed at a time, which bounds the temporary memory.
_ENTRIES = 2**24


def mean_power(values: Sequence[Tensor], power: float) -> Tensor:
    """Return the mean of abs(value)^power over all entries of several tensors, fp32, on the first one's device.

    Args:
        values: fp32 tensors with at least one entry in all.
        power: one of `POWERS` other than 0.
    """
    values = [part for part in values if part.numel()]
    sums = [total for group in _groups(values) for total in _sums(group, power)]
    device = values[0].device
    return torch.stack([total.to(device) for total in sums]).sum() / sum(part.numel() for part in values)


def relative_rates(values: Tensor, mean: Tensor, power: float) -> Tensor:
    """Return the factor of each entry's learning rate: abs(value)^power / mean, clamped to 0.1 to 5, (k,) fp32.

    Args:
        values: (k,) fp32.
        mean: fp32 scalar of `mean_power`, over all weights.
        power: 0.5 or 1.
    """
    magnitudes = values.abs() if power == 1.0 else values.abs().sqrt_()
    # The mean is 0 where all entries are.
    return magnitudes.div_(mean.clamp_min(TINY)).clamp_(LEAST, MOST)


def _sums(values: list[Tensor], power: float) -> Sequence[Tensor]:
    """Return the sum of abs(value)^power of each tensor."""
    if power == 0.5:
        values = torch._foreach_abs(values)
        torch._foreach_sqrt_(values)
    return torch._foreach_norm(values, 1)


def _groups(values: list[Tensor]) -> list[list[Tensor]]:
    """Group neighbouring tensors of one device up to `_ENTRIES` entries; a larger tensor is a group of its own."""
    groups, room = [], 0
    for part in values:
        if part.numel() > room or groups[-1][0].device != part.device:
            groups.append([])
            room = _ENTRIES
        groups[-1].append(part)
        room -= part.numel()
    return groups
