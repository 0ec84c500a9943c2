"""Plots of a comparison of methods: loss against rate, forgetting, budget and peak memory."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from eval.entries import Entry, best_of, sweeps
from eval.records import save_figure


def draw(entries: list[Entry], folder: Path) -> list[Path]:
    """Draw loss against rate and against forgetting, and the best loss against budget and against peak memory.

    Returns:
        The PNGs; the last is missing where no cell ran on a GPU.
    """
    paths = [
        draw_rates(entries, folder / "rates.png"),
        draw_forgetting(entries, folder / "forgetting.png"),
        draw_budgets(entries, folder / "budgets.png"),
    ]
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
    """Draw the loss against the learning rate, a panel for each budget."""
    return _draw_sweeps(entries, path, lambda entry: entry.rate, xscale="log", xlabel="peak learning rate")


def draw_forgetting(entries: list[Entry], path: Path) -> Path:
    """Draw the loss against forgetting for all learning rates, a panel for each budget.

    A higher rate learns more and forgets more, up to a point, so that methods compare fairly as whole curves: the lower
    one is better whatever rate is chosen.
    """
    label = "rise of the loss on the base's own texts"
    return _draw_sweeps(
        entries, path, lambda entry: entry.mean_of(lambda cell: cell["forgetting"]["own"]), xlabel=label
    )


def _draw_sweeps(entries: list[Entry], path: Path, place: Callable[[Entry], float], **settings) -> Path:
    """Draw each method's losses at its learning rates, in their order, a panel for each budget."""
    colours, found = _colours(entries), sweeps(entries)
    budgets = list(dict.fromkeys(entry.budget_rank for entry in entries))
    figure, axes = _figure(len(budgets))
    for axis, budget in zip(axes, budgets, strict=True):
        for (method, rank), sweep in found.items():
            if rank == budget:
                errors = [entry.deviation or 0.0 for entry in sweep]
                axis.errorbar(
                    [place(entry) for entry in sweep],
                    [entry.mean if math.isfinite(entry.mean) else math.nan for entry in sweep],
                    errors,
                    marker="o",
                    capsize=3,
                    label=method,
                    color=colours[method],
                )
        title = "all weights" if budget is None else f"values of LoRA rank {budget}"
        axis.set(title=title, **settings)
        axis.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
    return path


def draw_budgets(entries: list[Entry], path: Path) -> Path:
    """Draw the loss at the best rate against the number of trained values; all weights are a line across."""
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
    """Draw the loss at the best rate against the peak of training, a point for each method and budget."""
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
