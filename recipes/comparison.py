"""What the cells of `recipes.compare` came to: a table, and pictures of loss against rate, budget and memory."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from speft_optim.files import write_atomically

_HEADER = (
    "| method | trained | best rate | n | test loss | sd | own texts | docs | changed | peak GB | tokens/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Setting:
    """Cells that differ in nothing but their seed.

    Attributes:
        method: with what sets it apart from others of its name.
        rank: the budget.
        rate: peak learning rate.
        results: of the cells.
    """

    method: str
    rank: int
    rate: float
    results: tuple[dict, ...]

    @property
    def loss(self) -> float:
        """Mean test loss."""
        return self.mean("loss")

    def mean(self, key: str) -> float:
        """Mean of a number of the results."""
        return statistics.fmean(result[key] for result in self.results)

    @property
    def deviation(self) -> float:
        """Standard deviation of the test loss over seeds; NaN of one."""
        losses = [result["loss"] for result in self.results]
        return statistics.stdev(losses) if len(losses) > 1 else float("nan")


def read(folder: Path) -> list[Setting]:
    """The settings of the cells that are done, by method, budget and rate.

    Raises:
        ValueError: no cell is done, or a file is damaged.
    """
    found: dict[tuple, list[dict]] = {}
    for path in sorted(folder.glob("*_s*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            cell = result["cell"]
            found.setdefault((label(cell), cell["rank"], cell["rate"]), []).append(result)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and run the command again.") from error
    if not found:
        raise ValueError(f"No cell in {folder} is done; run `python -m recipes.compare run` first.")
    return [Setting(*key, tuple(results)) for key, results in sorted(found.items())]


def label(cell: dict) -> str:
    """The name of a method with its options."""
    text = cell["method"]
    if cell["power"]:
        text += f", rates by abs(w)^{cell['power']:g}"
    if cell["method"].startswith("moving-"):
        text += f", {cell['groups']} groups x {cell['window']} steps"
    return text


def best(settings: list[Setting]) -> list[tuple[Setting, bool]]:
    """Of each method and budget the setting of the lowest loss, and whether a lower and a higher rate are worse."""
    chosen = []
    for key in dict.fromkeys((setting.rank, setting.method) for setting in settings):
        same = sorted((s for s in settings if (s.rank, s.method) == key), key=lambda setting: setting.rate)
        place = min(range(len(same)), key=lambda number: same[number].loss)
        chosen.append((same[place], 0 < place < len(same) - 1))
    return sorted(chosen, key=lambda pair: (pair[0].rank, pair[0].loss))


def table(settings: list[Setting]) -> str:
    """The best setting of each method at each budget, in Markdown; a rate in brackets is the edge of its sweep."""
    lines = [_HEADER]
    for setting, bracketed in best(settings):
        first = setting.results[0]
        rate = f"{setting.rate:g}" if bracketed else f"({setting.rate:g})"
        forgotten = [f"{setting.mean(key) - first['before'][key]:+.3f}" for key in ("own_texts", "docs_texts")]
        peak = first["peak_bytes"]["card"] or first["peak_bytes"]["host"]
        lines.append(
            f"| {setting.method} | {first['trained']:,} | {rate} | {len(setting.results)} | {setting.loss:.4f} | "
            f"{setting.deviation:.4f} | {forgotten[0]} | {forgotten[1]} | {setting.mean('changed'):.2%} | "
            f"{peak / 1e9:.2f} | {setting.mean('tokens_per_second'):,.0f} |"
        )
    return "\n".join(lines)


def draw(settings: list[Setting], path: Path) -> None:
    """Draw loss against rate, and the best loss against budget and against peak memory, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    rates, budgets, memory = figure.subplots(1, 3)
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(s.method for s in settings))}
    for method, rank in dict.fromkeys((s.method, s.rank) for s in settings):
        same = [s for s in settings if (s.method, s.rank) == (method, rank)]
        rates.plot(
            [s.rate for s in same], [s.loss for s in same], "o-", color=colours[method], label=f"{method}, rank {rank}"
        )
    for method, colour in colours.items():
        same = [setting for setting, _ in best(settings) if setting.method == method]
        losses = [setting.loss for setting in same]
        budgets.plot([s.results[0]["trained"] for s in same], losses, "o-", color=colour, label=method)
        peaks = [s.results[0]["peak_bytes"] for s in same]
        memory.plot([(p["card"] or p["host"]) / 1e9 for p in peaks], losses, "o", color=colour, label=method)
    rates.set(xscale="log", xlabel="peak learning rate", ylabel="test loss", title="rate")
    budgets.set(xscale="log", xlabel="numbers trained at a time", title="budget, each at its best rate")
    memory.set(xlabel="peak memory of training, GB", title="memory, each at its best rate")
    rates.legend(fontsize="small")
    budgets.legend(fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def write(folder: Path) -> str:
    """Write `table.md` and `comparison.png` of the cells in a folder; the table."""
    settings = read(folder)
    text = table(settings)
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    draw(settings, folder / "comparison.png")
    return text
