"""Plots of masks; matplotlib is imported only here."""

from collections.abc import Mapping
from pathlib import Path

from speft_optim.checks import checked_path
from speft_optim.files import write_atomically
from speft_optim.masks.mask import Mask
from speft_optim.masks.statistics import concentration, density_grid, split_name


def plot_masks(masks: Mapping[str, Mask], path: str | Path) -> None:
    """Draw the density by layer and projection, and the concentration in rows and columns by projection.

    Args:
        masks: by parameter name.
        path: the file to write; its ending tells the format, PNG without one.

    Raises:
        ValueError: there is no mask to draw, or matplotlib has no format of this ending.
    """
    if not masks:
        raise ValueError("There is no mask to draw; select some weights first.")
    kind = checked_path(path).suffix.removeprefix(".").lower() or "png"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, _, _ = density_grid(masks)
    figure = Figure(figsize=(11, max(3.5, 0.2 * len(layers) + 1.5)), layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    if kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise ValueError(f"Cannot draw {path}: .{kind} is no picture format; append one such as .png, of {known}.")
    heat, bars = figure.subplots(1, 2)
    draw_density(heat, masks)
    draw_concentration(bars, masks)
    figure.suptitle(f"{masks.count:,} masked entries, {masks.density:.3%} of the targeted weights")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=130))


def draw_density(axes, masks: Mapping[str, Mask]) -> None:
    """Draw a heat map of the density in percent, a row for each layer, a column for each projection."""
    draw_grid(axes, *density_grid(masks), scale=100)
    axes.set_title("density, %")


def draw_grid(axes, layers: list[str], projections: list[str], cells: list[list[float]], scale: float = 1) -> None:
    """Draw a heat map of `scale` times the cells, a row for each layer, a column for each projection."""
    image = axes.imshow([[scale * v for v in row] for row in cells], aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(projections)), projections, rotation=45, ha="right")
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.figure.colorbar(image, ax=axes)


def draw_concentration(axes, masks: Mapping[str, Mask]) -> None:
    """Draw two bars for each projection: the percentage of rows and of columns that hold 90 % of the masked entries."""
    by_projection: dict[str, list] = {}
    for name, mask in masks.items():
        by_projection.setdefault(split_name(name)[1], []).append(mask)
    names = list(by_projection)
    rows = [100 * concentration(m.row_counts() for m in by_projection[name]) for name in names]
    columns = [100 * concentration(m.column_counts() for m in by_projection[name]) for name in names]
    places = range(len(names))
    axes.bar([p - 0.2 for p in places], rows, 0.4, label="rows")
    axes.bar([p + 0.2 for p in places], columns, 0.4, label="columns")
    axes.axhline(90, color="0.6", linewidth=1, linestyle=":", label="evenly spread")
    axes.set_xticks(list(places), names, rotation=45, ha="right")
    axes.set_ylim(0, 100)
    axes.set_title("rows and columns that hold 90 % of the entries, %")
    axes.legend()
