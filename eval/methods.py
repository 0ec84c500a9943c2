"""Makes the table and the pictures of a comparison of methods that `recipes.compare` trained.

    python -m eval.methods out/compare
    python -m eval.methods out/compare --markdown --plots out/pictures

For each method and budget the rate with the lowest loss stands in the table. It is **bracketed** if a lower and a
higher rate were tried and both are worse; else the best rate may be one that was not tried.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from eval.records import save_figure

ADAPTERS = ("lora", "rslora", "dora", "pissa", "shira")


@dataclass(frozen=True)
class Entry:
    """All cells of one method at one budget and rate.

    Attributes:
        method: as `lora`.
        budget_rank: LoRA's rank of as many values; None for all weights.
        rate: peak learning rate.
        cells: their records, one a seed.
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
        """Mean test loss over some of the seeds; over all where none is given."""
        pairs = zip(self.cells, self.losses, strict=True)
        return fmean(loss for cell, loss in pairs if not seeds or cell["seed"] in seeds)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test loss between seeds; None for a single one."""
        return stdev(self.losses) if len(self.cells) > 1 and math.isfinite(self.mean) else None

    def mean_of(self, value: Callable[[dict], float | None]) -> float | None:
        """Mean of another number over the seeds that have it."""
        found = [number for cell in self.cells if (number := value(cell)) is not None]
        return fmean(found) if found else None


def read_entries(folder: Path) -> list[Entry]:
    """Reads the cells of a comparison, gathered by method, budget and rate, in this order.

    Raises:
        ValueError: the folder has no cells, or a file is none of a cell.
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
    """The entries of each method and budget, by rising rate."""
    found = defaultdict(list)
    for entry in entries:
        found[entry.method, entry.budget_rank].append(entry)
    return dict(found)


def best_of(sweep: list[Entry]) -> tuple[Entry, bool]:
    """The entry of the best rate, and whether worse ones lie on either side.

    Rates are compared by the seeds that all of them have, if there are any: of a rate that was repeated the mean over
    its other seeds says nothing about rates that were not.
    """
    seeds = set.intersection(*({cell["seed"] for cell in entry.cells} for entry in sweep))
    losses = {entry.rate: entry.mean_at(seeds) for entry in sweep}
    best = min(sweep, key=lambda entry: losses[entry.rate])
    worse = [rate for rate, loss in losses.items() if loss > losses[best.rate]]
    return best, any(rate < best.rate for rate in worse) and any(rate > best.rate for rate in worse)


def difference(one: Entry, other: Entry) -> tuple[float, float | None]:
    """Difference of mean losses, and its standard error where both have several seeds."""
    if one.deviation is None or other.deviation is None:
        return one.mean - other.mean, None
    parts = [entry.deviation**2 / len(entry.cells) for entry in (one, other)]
    return one.mean - other.mean, math.sqrt(sum(parts))


HEADS = (
    *("method", "trained", "share", "rate", "bracketed", "loss", "sd", "n", "to best adapter"),
    *("own texts", "documentation", "peak GB", "tokens/s"),
)


def rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    """One row of text for each method and budget, best first within a budget."""
    chosen = {key: best_of(sweep) for key, sweep in sweeps(entries).items()}
    ordered = sorted(chosen.values(), key=lambda one: (one[0].budget_rank or math.inf, one[0].mean))
    found = []
    for best, bracketed in ordered:
        rivals = [e for e, _ in chosen.values() if e.method in ADAPTERS and e.budget_rank == best.budget_rank]
        found.append(_row(best, bracketed, min(rivals, key=lambda entry: entry.mean, default=None)))
    return found


def _row(best: Entry, bracketed: bool, rival: Entry | None) -> tuple[str, ...]:
    shared = any(cell["workers"] > 1 for cell in best.cells)
    speed = median(cell["tokens_per_second"] for cell in best.cells)
    trained, share = best.cells[0]["trained"], best.cells[0].get("density")
    compared = rival is not None and rival is not best and math.isfinite(best.mean + rival.mean)
    against = _signed(*difference(best, rival)) if compared else ""
    forgotten = [best.mean_of(lambda cell, kind=kind: cell["forgetting"][kind]) for kind in ("own", "documentation")]
    peak = best.mean_of(lambda cell: cell["peak_bytes"])
    return (
        best.method,
        f"{trained:,}",
        "all" if share is None else f"{share:.2%}",
        f"{best.rate:g}",
        "yes" if bracketed else "no",
        "diverged" if math.isinf(best.mean) else f"{best.mean:.4f}",
        "" if best.deviation is None else f"{best.deviation:.4f}",
        str(len(best.cells)),
        against,
        *("" if number is None else f"{number:+.4f}" for number in forgotten),
        "" if peak is None else f"{peak / 1e9:.2f}",
        f"{speed:,.0f}" + ("*" if shared else ""),
    )


def _signed(value: float, error: float | None) -> str:
    return f"{value:+.4f}" + ("" if error is None else f" +- {error:.4f}")


NOTES = (
    "loss: mean over the answer tokens of the test problems, over n seeds; sd between seeds. own texts, documentation: "
    "rise of the loss on texts of the base model and on Python's reference. to best adapter: difference of the means "
    "at this budget +- its standard error."
)


def table(entries: list[Entry], *, markdown: bool = False) -> str:
    """Formats the comparison."""
    lines = [HEADS, *rows(entries)]
    shared = "* several workers shared the GPU" if any(line[-1].endswith("*") for line in lines) else ""
    notes = "\n".join(filter(None, [NOTES, shared]))
    if markdown:
        text = ["| " + " | ".join(line) + " |" for line in lines]
        text.insert(1, "|" + "---|" * len(HEADS))
        return "\n".join(text) + "\n\n" + notes.replace("*", "\\*")
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*text, "", notes])


def draw(entries: list[Entry], folder: Path) -> list[Path]:
    """Draws loss against rate, and the best loss against budget and against peak memory.

    Returns:
        The PNGs; the last is missing where no cell ran on a GPU.
    """
    paths = [draw_rates(entries, folder / "rates.png"), draw_budgets(entries, folder / "budgets.png")]
    if any(cell["peak_bytes"] is not None for entry in entries for cell in entry.cells):
        paths.append(draw_memory(entries, folder / "memory.png"))
    return paths


def _colours(entries: list[Entry]) -> dict[str, str]:
    return {method: f"C{i}" for i, method in enumerate(dict.fromkeys(sorted(entry.method for entry in entries)))}


def _figure(panels: int):
    from matplotlib.figure import Figure  # no pyplot: no window system and no global state

    figure = Figure(figsize=(1.5 + 5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.set_ylabel("loss an answer token, test problems")
    return figure, axes


def draw_rates(entries: list[Entry], path: Path) -> Path:
    """Draws the loss against the learning rate, a panel for each budget."""
    colours, found = _colours(entries), sweeps(entries)
    budgets = list(dict.fromkeys(entry.budget_rank for entry in entries))
    figure, axes = _figure(len(budgets))
    for axis, budget in zip(axes, budgets, strict=True):
        for (method, rank), sweep in found.items():
            if rank == budget:
                errors = [entry.deviation or 0.0 for entry in sweep]
                axis.errorbar(
                    [entry.rate for entry in sweep],
                    [entry.mean if math.isfinite(entry.mean) else math.nan for entry in sweep],
                    errors,
                    marker="o",
                    capsize=3,
                    label=method,
                    color=colours[method],
                )
        title = "all weights" if budget is None else f"values of LoRA rank {budget}"
        axis.set(xscale="log", xlabel="peak learning rate", title=title)
        axis.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    return path


def draw_budgets(entries: list[Entry], path: Path) -> Path:
    """Draws the loss at the best rate against the number of trained values; all weights are a line across."""
    colours, found = _colours(entries), defaultdict(list)
    for sweep in sweeps(entries).values():
        best, _ = best_of(sweep)
        found[best.method].append(best)
    figure, (axis,) = _figure(1)
    for method, best in found.items():
        if best[0].budget_rank is None:
            axis.axhline(best[0].mean, linestyle="--", color=colours[method], label=method)
            continue
        x, y = [entry.cells[0]["trained"] for entry in best], [entry.mean for entry in best]
        errors = [entry.deviation or 0.0 for entry in best]
        axis.errorbar(x, y, errors, marker="o", capsize=3, label=method, color=colours[method])
    axis.set(xscale="log", xlabel="trained values")
    axis.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    return path


def draw_memory(entries: list[Entry], path: Path) -> Path:
    """Draws the loss at the best rate against the peak of training, a point for each method and budget."""
    colours, named = _colours(entries), set()
    figure, (axis,) = _figure(1)
    for sweep in sweeps(entries).values():
        best, _ = best_of(sweep)
        peak = best.mean_of(lambda cell: cell["peak_bytes"])
        if peak is None:
            continue
        label = None if best.method in named else best.method
        named.add(best.method)
        axis.errorbar(peak / 1e9, best.mean, best.deviation or 0.0, fmt="o", color=colours[best.method], label=label)
        share = best.cells[0].get("density")
        text = "all" if share is None else f"{share:.2%}"
        axis.annotate(text, (peak / 1e9, best.mean), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axis.set(xlabel="peak memory of training, GB")
    axis.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Compares from the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.methods", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="--out of recipes.compare")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    parser.add_argument("--plots", help="folder for three PNGs")
    options = parser.parse_args(arguments)
    try:
        entries = read_entries(Path(options.folder))
        print(table(entries, markdown=options.markdown))
        if options.plots is not None:
            print("\n" + "\n".join(str(path) for path in draw(entries, Path(options.plots))))
    except ValueError as error:
        raise SystemExit(f"eval.methods: {error}") from error


if __name__ == "__main__":
    main()
