"""Statistics of masks: density by layer and projection, concentration in rows and columns."""

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from speft_optim.masks.mask import Mask


def split_name(name: str) -> tuple[str, str]:
    """Split a parameter's name into layer and projection.

    `model.layers.3.mlp.up_proj.weight` gives ("layers.3", "up_proj"); the layer of a name without a number is "other".
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = f"{parts[numbers[0] - 1]}.{parts[numbers[0]]}" if numbers and numbers[0] else "other"
    rest = parts[numbers[0] + 1 :] if numbers else parts
    if rest and rest[-1] == "weight" and len(rest) > 1:
        rest = rest[:-1]
    return layer, rest[-1] if rest else name


def density_grid(masks: Mapping[str, Mask]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return layers, projections, and the density (0 to 1) of each cell, as `mean_grid` does."""
    sizes = {name: mask.shape.numel() for name, mask in masks.items()}
    return mean_grid({name: len(mask) / max(1, sizes[name]) for name, mask in masks.items()}, sizes)


def mean_grid(numbers: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return the mean of a number over the weights of each (layer, projection) cell, weighted by their sizes.

    Args:
        numbers: one number for each weight, by its full name.
        sizes: each weight's number of entries.

    Returns:
        Layers and projections in order of appearance, and for each layer a row of cells, NaN where there is no weight.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for name, number in numbers.items():
        cell = sums.setdefault(split_name(name), [0.0, 0])
        cell[0] += number * sizes[name]
        cell[1] += sizes[name]
    layers = list(dict.fromkeys(layer for layer, _ in sums))
    projections = list(dict.fromkeys(projection for _, projection in sums))
    means = {key: total / max(1, size) for key, (total, size) in sums.items()}
    return layers, projections, [[means.get((row, column), math.nan) for column in projections] for row in layers]


def concentration(counts: Iterable[Tensor], share: float = 0.9) -> float:
    """Return the smallest fraction of rows (or columns) that holds `share` of the entries, averaged over weights.

    Args:
        counts: for each weight, the number of masked entries of each row (or column).
        share: of the entries, 0 to 1.

    Returns:
        The mean of the fractions, 0 to 1; weights without masked entries do not count, and NaN without any weight.
    """
    fractions = list(_fractions(counts, share))
    return sum(fractions) / len(fractions) if fractions else math.nan


def _fractions(counts: Iterable[Tensor], share: float) -> Iterator[float]:
    for count in counts:
        if total := int(count.sum()):
            covered = count.sort(descending=True).values.cumsum(0)
            yield (int((covered < share * total).sum()) + 1) / count.numel()
