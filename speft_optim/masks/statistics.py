"""Where the entries of masks lie: density by layer and projection, concentration in rows and columns."""

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from speft_optim.masks.mask import Mask


def split_name(name: str) -> tuple[str, str]:
    """A parameter's name as (layer, projection): `model.layers.3.mlp.up_proj.weight` -> ("layers.3", "up_proj")."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = f"{parts[numbers[0] - 1]}.{parts[numbers[0]]}" if numbers and numbers[0] else "other"
    rest = parts[numbers[0] + 1 :] if numbers else parts
    if rest and rest[-1] == "weight" and len(rest) > 1:
        rest = rest[:-1]
    return layer, rest[-1] if rest else name


def density_grid(masks: Mapping[str, Mask]) -> tuple[list[str], list[str], list[list[float]]]:
    """Density of each (layer, projection) cell, NaN where there is no such weight; layers and projections in order."""
    entries: dict[tuple[str, str], list[int]] = {}
    for name, mask in masks.items():
        cell = entries.setdefault(split_name(name), [0, 0])
        cell[0] += len(mask)
        cell[1] += mask.shape.numel()
    layers = list(dict.fromkeys(layer for layer, _ in entries))
    projections = list(dict.fromkeys(projection for _, projection in entries))
    share = {key: kept / max(1, size) for key, (kept, size) in entries.items()}
    return layers, projections, [[share.get((row, column), math.nan) for column in projections] for row in layers]


def concentration(counts: Iterable[Tensor], share: float = 0.9) -> float:
    """Smallest fraction of rows (or columns) that holds `share` of the entries, averaged over the weights given."""
    fractions = list(_fractions(counts, share))
    return sum(fractions) / len(fractions) if fractions else math.nan


def _fractions(counts: Iterable[Tensor], share: float) -> Iterator[float]:
    for count in counts:
        if total := int(count.sum()):
            covered = count.sort(descending=True).values.cumsum(0)
            yield (int((covered < share * total).sum()) + 1) / count.numel()
