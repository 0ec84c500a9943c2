"""The benchmark's rows as a table and as stacked bars."""

from pathlib import Path

from eval.records import save_figure


def table(rows: list[dict]) -> str:
    """Format the rows for people, with times also as multiples of the frozen bf16 step."""
    floor = next((row["step_ms"] for row in rows if row["mode"] == "frozen-bf16" and "error" not in row), None)
    lines = [
        "| mode | trained | ms a step | / floor | optimizer ms | peak GiB | estimate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [f"{row[key]:.2f}" if row.get(key) else "-" for key in ("peak_gib", "estimate_gib")]
        if "error" in row:
            cells = ["-", "-", "-", "-", row["error"], sizes[1]]
        else:
            ratio = f"{row['step_ms'] / floor:.2f}" if floor else "-"
            cells = [f"{row['trained']:,}", f"{row['step_ms']:.0f}", ratio, f"{row['optimizer_ms']:.1f}", *sizes]
        lines.append("| " + " | ".join([row["mode"], *cells]) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Draw a stacked bar for each mode: the parts of its peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = ["weights", "values and positions", "adapters", "moments", "sums of gradients", "activations and gradients"]
    bottom = [0.0] * len(rows)
    for number, name in enumerate(names):
        sizes = [row["parts_gib"].get(name, 0.0) for row in rows]
        axes.bar([row["mode"] for row in rows], sizes, bottom=bottom, label=name, color=f"C{number}")
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for place, (row, total) in enumerate(zip(rows, bottom, strict=True)):
        axes.annotate(
            f"{row['peak_gib'] or total:.2f}", (place, total), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    axes.set(ylabel="GiB at the peak", title=title)
    axes.tick_params(axis="x", rotation=20)
    axes.legend()
    save_figure(figure, path, dpi=120)
