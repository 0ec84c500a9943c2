"""Draw the pictures of the documentation from the measured numbers in `docs/data`.

    python docs/figures.py

Writes `cost_llama3-8b.png`, `quality_smollm2.png`, `forgetting_smollm2.png`, `forgetting_gemma3.png`,
`concentration.png` and `reach.png` into `docs`. The numbers' conditions stand in the data files;
`recipes/mask_profile.json` tells where a mask lies.
"""

import json
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

DOCS = Path(__file__).parent
# Colours that stay apart for readers with colour blindness (Okabe and Ito).
METHODS = {
    "frozen": ("frozen base, the floor", "#BBBBBB"),
    "ours": ("ours, 1 %", "#0072B2"),
    "LoRA": ("LoRA r=32", "#E69F00"),
}
STYLES = {
    "LoRA": ("#E69F00", "o", "-"),
    "rsLoRA": ("#CC79A7", "v", "--"),
    "static gradient": ("#56B4E9", "s", "-"),
    "static snip": ("#009E73", "^", "-"),
    "moving snip": ("#0072B2", "D", ":"),
    "static magnitude": ("#F0E442", "s", "-"),
    "static random": ("#888888", "s", "-"),
    "SHiRA": ("#000000", "X", "-"),
    "PiSSA": ("#D55E00", "P", "-"),
    "DoRA": ("#882255", "<", "--"),
    "moving gradient": ("#44AA99", "D", ":"),
}
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0A0C0", "#0072B2", "#D55E00")
BASES = ("bf16", "int8", "NF4")


def read(name: str) -> dict:
    """Return one data file of `docs/data`."""
    return json.loads((DOCS / "data" / name).read_text())


def draw_bars(axes, rows: list[dict], key: str, form: str) -> None:
    """Draw one bar for each base and method, hatched where another script measured it."""
    for row in rows:
        _, colour = METHODS[row["method"]]
        place = BASES.index(row["base"]) + 0.27 * (list(METHODS).index(row["method"]) - 1)
        hatch = "//" if row["separate"] else None
        axes.bar(place, row[key], 0.25, color=colour, hatch=hatch, edgecolor="white", zorder=2)
        axes.text(place, row[key], format(row[key], form), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(BASES)), [f"{base} base" for base in BASES])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE", zorder=0)


def draw_cost() -> Figure:
    """Draw peak memory and step time of ours, LoRA and the frozen base."""
    data = read("cost.json")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    draw_bars(memory, data["rows"], "peak_gib", ".2f")
    draw_bars(time, data["rows"], "step_ms", "d")
    memory.set(ylabel="GiB", title="Peak memory", ylim=(0, 21))
    time.set(ylabel="ms", title="Time of a step of 2 x 2048 tokens", ylim=(0, 1000))
    handles = [Patch(color=colour, label=label) for label, colour in METHODS.values()]
    time.legend(handles=handles, frameon=False, loc="upper left", fontsize=9)
    figure.suptitle(data["title"])
    note = "Hatched: another script, on bitsandbytes' own layers. Masks as gradients choose them, 8-bit moments."
    figure.supxlabel(note, fontsize=9, color="#555555")
    return figure


def draw_quality() -> Figure:
    """Draw the test loss against the number of trained entries, a dot for each seed and a line through the means."""
    data = read("quality.json")
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(point["method"] for point in data["methods"])):
        colour, marker, line = STYLES[method]
        points = [point for point in data["methods"] if point["method"] == method]
        shift = 1.02 ** (number - 2)  # so that the seeds of different methods do not lie on one another
        places = [point["entries"] * shift for point in points]
        label = "moving snip, global, rate by size (simulated)" if method == "moving snip" else method
        axes.plot(places, [mean(point["losses"]) for point in points], line, color=colour, marker=marker, label=label)
        for place, point in zip(places, points, strict=True):
            axes.scatter([place] * len(point["losses"]), point["losses"], s=14, color=colour, alpha=0.45, linewidths=0)
    axes.axhline(data["full"], color="#888888", linewidth=1, linestyle=(0, (1, 3)))
    label = dict(ha="left", va="bottom", fontsize=9, color="#555555", transform=axes.get_yaxis_transform())
    axes.text(0.01, data["full"], "full fine-tuning", **label)
    budgets = sorted({point["entries"] for point in data["methods"]})
    axes.set_xscale("log")
    names = [f"{count / 1e6:.1f} M\n{100 * count / data['trainable']:.2f} %" for count in budgets]
    axes.set_xticks(budgets, names)
    axes.minorticks_off()
    axes.set(
        xlabel="numbers trained at a time, and their share of the linear weights", ylabel="test loss (lower is better)"
    )
    axes.set_title(data["title"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE", zorder=0)
    axes.legend(frameon=False)
    return figure


def draw_forgetting_of_smollm2() -> Figure:
    """Draw what SmolLM2 learned against what it forgot; losses beyond the limits are in docs/benchmarks.md."""
    figure = draw_forgetting(read("rates.json"), {4: "1.15 %", 32: "9.2 %"})
    figure.axes[0].set(xlim=(0.2, 1.2), ylim=(0.604, 0.627))
    figure.axes[1].set(xlim=(0.2, 1.2), ylim=(0.594, 0.624))
    return figure


def draw_forgetting_of_gemma3() -> Figure:
    """Draw what Gemma 3 learned against what it forgot."""
    return draw_forgetting(read("rates_gemma3.json"), {4: "0.95 %"})


def draw_forgetting(data: dict, shares: dict[int, str]) -> Figure:
    """Draw the test loss against forgetting: a point for each rate, its mean over the seeds; the best one is larger.

    Rates and numbers of seeds are in docs/benchmarks.md: beside the points they would cover each other.

    Args:
        data: title and cells.
        shares: by the rank of LoRA with that budget the share of the linear weights, a panel each.
    """
    figure = Figure(figsize=(1 + 5 * len(shares), 4.6), layout="constrained")
    for axes, (rank, share) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
        cells = [cell for cell in data["cells"] if cell["budget_rank"] == rank]
        for method, (colour, marker, _) in STYLES.items():
            rates = sorted({cell["rate"] for cell in cells if cell["method"] == method})
            if not rates:
                continue
            runs = [[cell for cell in cells if cell["method"] == method and cell["rate"] == rate] for rate in rates]
            places = [[mean(cell[key] for cell in run) for run in runs] for key in ("own", "loss")]
            axes.plot(*places, color=colour, marker=marker, markersize=5, label=method)
            best = min(range(len(rates)), key=places[1].__getitem__)
            axes.plot(places[0][best], places[1][best], color=colour, marker=marker, markersize=11)
        axes.set(title=f"{share} trained at a time (LoRA r={rank})", xlabel="rise of the loss on the base's own texts")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EEEEEE", zorder=0)
        axes.margins(x=0.12)
    figure.axes[0].set_ylabel("test loss (lower is better)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.suptitle(data["title"])
    return figure


def draw_concentration() -> Figure:
    """Draw how many masked entries the rows and columns of each projection hold, from the emptiest to the fullest."""
    profile = json.loads((DOCS.parent / "recipes" / "mask_profile.json").read_text())["quantiles"]["0.01"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, name in zip(panels, ("rows", "cols"), ("rows", "columns"), strict=True):
        for (projection, counts), colour in zip(profile.items(), COLOURS, strict=True):
            shares = [100 * step / (len(counts[key]) - 1) for step in range(len(counts[key]))]
            axes.plot(shares, counts[key], color=colour, label=projection)
        axes.axhline(1, color="#888888", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        axes.set(
            xlabel=f"{name} of a weight, emptiest first (%)", title=name.capitalize(), xlim=(0, 100), ylim=(0, 100)
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#EEEEEE", zorder=0)
    panels[0].set_ylabel("masked entries / mean")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle("Where a gradient mask lies: SmolLM2-135M, GSM8K, 1 %, mean of 30 layers")
    return figure


def draw_reach() -> Figure:
    """Draw the GPU memory that models of a size need, ours and others', and the sizes of common GPUs."""
    data = read("reach.json")
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(data["others"].items(), ("#E69F00", "#CC79A7"), strict=True):
        axes.plot(*zip(*points, strict=True), "--", color=colour, marker="v", markersize=5, label=f"{name} (Unsloth)")
    modes = [key for key in data["ours"][0] if key not in ("model", "billions")]
    for mode, colour in zip(modes, ("#56B4E9", "#009E73", "#0072B2", "#000000"), strict=True):
        places = [row["billions"] for row in data["ours"]]
        axes.plot(places, [row[mode] for row in data["ours"]], color=colour, marker="o", label=f"ours, {mode}")
        for point in (point for point in data["measured"] if point["mode"] == mode):
            axes.scatter(point["billions"], point["gb"], s=110, marker="*", color=colour, zorder=3)
    for size in (6, 12, 24, 48, 80):
        axes.axhline(size, color="#BBBBBB", linewidth=1, linestyle=(0, (1, 3)))
        axes.text(1.005, size, f"{size} GB", transform=axes.get_yaxis_transform(), va="center", color="#555555")
    axes.set(xscale="log", yscale="log", xlabel="billions of parameters", ylabel="GB of GPU memory")
    axes.set_xticks([2.6, 8, 14, 32, 70], ["2.6", "8", "14", "32", "70"])
    axes.set_yticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(data["title"])
    figure.supxlabel("Counted for 2 x 2048 tokens; stars are measured.", fontsize=9, color="#555555")
    return figure


def main(folder: Path = DOCS) -> None:
    """Draw all pictures into a folder."""
    pictures = {
        "cost_llama3-8b.png": draw_cost,
        "quality_smollm2.png": draw_quality,
        "forgetting_smollm2.png": draw_forgetting_of_smollm2,
        "forgetting_gemma3.png": draw_forgetting_of_gemma3,
        "concentration.png": draw_concentration,
        "reach.png": draw_reach,
    }
    for name, draw in pictures.items():
        figure = draw()
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=130)


if __name__ == "__main__":
    main()
