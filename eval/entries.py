"""The cells that `recipes.compare` trained, grouped by method, budget and rate over their seeds."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

ADAPTERS = ("lora", "rslora", "dora", "pissa", "shira")


@dataclass(frozen=True)
class Entry:
    """All cells of one method at one budget and rate.

    Attributes:
        method: the name of the method, such as `lora`.
        budget_rank: the rank of LoRA with as many trained values; None for all weights.
        rate: peak learning rate.
        cells: their records, one for each seed.
    """

    method: str
    budget_rank: int | None
    rate: float
    cells: tuple[dict, ...]

    @property
    def losses(self) -> list[float]:
        """Test losses; infinite where training diverged."""
        return [math.inf if cell["test_loss"] is None else cell["test_loss"] for cell in self.cells]

    @property
    def mean(self) -> float:
        """Mean test loss over the seeds."""
        return fmean(self.losses)

    def mean_at(self, seeds: set[int]) -> float:
        """Return the mean test loss over some of the seeds; over all where none is given."""
        pairs = zip(self.cells, self.losses, strict=True)
        return fmean(loss for cell, loss in pairs if not seeds or cell["seed"] in seeds)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test loss between seeds; None for a single one."""
        return stdev(self.losses) if len(self.cells) > 1 and math.isfinite(self.mean) else None

    def mean_of(self, value: Callable[[dict], float | None]) -> float | None:
        """Return the mean of another number over the seeds that have it."""
        found = [number for cell in self.cells if (number := value(cell)) is not None]
        return fmean(found) if found else None


def read_entries(folder: Path) -> list[Entry]:
    """Read the cells of a comparison, gathered by method, budget and rate, in this order.

    Raises:
        ValueError: the folder has no cells, or a file is not a cell.
    """
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} has no cells; train some with `python -m recipes.compare --out {folder}`")
    gathered = defaultdict(list)
    for path in paths:
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            gathered[cell["method"], cell["budget_rank"], cell["rate"]].append(cell)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no cell of a comparison ({type(error).__name__}: {error}); delete it"
            ) from error
    entries = [Entry(*key, tuple(cells)) for key, cells in gathered.items()]
    return sorted(entries, key=lambda entry: (entry.budget_rank or math.inf, entry.method, entry.rate))


def sweeps(entries: list[Entry]) -> dict[tuple[str, int | None], list[Entry]]:
    """Return the entries of each method and budget, by rising rate."""
    found = defaultdict(list)
    for entry in entries:
        found[entry.method, entry.budget_rank].append(entry)
    return dict(found)


def best_of(sweep: list[Entry]) -> tuple[Entry, bool]:
    """Return the entry of the best rate, and whether worse ones lie on either side.

    Rates are compared on the seeds that all of them have, if there are any: the other seeds of a repeated rate say
    nothing about rates that were not repeated.
    """
    seeds = set.intersection(*({cell["seed"] for cell in entry.cells} for entry in sweep))
    losses = {entry.rate: entry.mean_at(seeds) for entry in sweep}
    best = min(sweep, key=lambda entry: losses[entry.rate])
    worse = [rate for rate, loss in losses.items() if loss > losses[best.rate]]
    return best, any(rate < best.rate for rate in worse) and any(rate > best.rate for rate in worse)


def difference(one: Entry, other: Entry) -> tuple[float, float | None]:
    """Return the difference of mean losses, and its standard error if both have several seeds, else None."""
    if one.deviation is None or other.deviation is None:
        return one.mean - other.mean, None
    parts = [entry.deviation**2 / len(entry.cells) for entry in (one, other)]
    return one.mean - other.mean, math.sqrt(sum(parts))
