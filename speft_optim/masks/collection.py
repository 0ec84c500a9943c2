"""The masks of a model: saving, loading, comparison, tables and plots."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_optim.checks import checked_path
from speft_optim.files import write_safetensors
from speft_optim.masks.mask import PROBES, Mask
from speft_optim.masks.statistics import density_grid, mean_grid

_FORMAT = "speft_optim.masks/3"


class Masks(dict[str, Mask]):
    """Masks of a model, a dict from a parameter's full name (`model.layers.0.mlp.up_proj.weight`) to its `Mask`."""

    @property
    def count(self) -> int:
        """Number of masked entries over all weights."""
        return sum(len(mask) for mask in self.values())

    @property
    def density(self) -> float:
        """Share of masked entries among all entries of the weights that have a mask here, 0 to 1."""
        return self.count / max(1, sum(mask.shape.numel() for mask in self.values()))

    def fingerprint(self) -> str:
        """Return a hash of names, shapes and positions: sixteen hexadecimal digits."""
        parts = [f"{name}:{mask.fingerprint()}" for name, mask in sorted(self.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def overlap(self, other: "Masks") -> float:
        """Return the share of the smaller selection's entries that are in both, 0 to 1.

        It is 1.0 if the smaller one is empty.

        Raises:
            ValueError: a weight has different shapes in the two.
        """
        for name in self.keys() & other.keys():
            if self[name].shape != other[name].shape:
                shapes = f"{tuple(self[name].shape)} and {tuple(other[name].shape)}"
                raise ValueError(f"Cannot compare masks of {name}: shapes {shapes} differ.")
        smaller = min(self.count, other.count)
        shared = sum(self[name]._shared(other[name]) for name in self.keys() & other.keys())
        return shared / smaller if smaller else 1.0

    def save(self, path: str | Path) -> None:
        """Write all masks atomically to one safetensors file."""
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        tensors = self.parts()
        for name, mask in self.items():
            if mask.selected_on is not None:
                tensors[f"{name}:selected_on"] = mask.selected_on
        write_safetensors(tensors, path, {"format": _FORMAT, "shapes": json.dumps(shapes)})

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of `Mask.packed` of all masks, in CPU memory, named `name:part` as in a file."""
        return {f"{name}:{key}": part for name, mask in self.items() for key, part in mask.to("cpu").packed().items()}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Masks":
        """Read masks that `save` wrote, in the order they were saved in.

        Args:
            path: the file.
            device: where the positions are loaded to.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file was not written by `save`, is damaged, or holds positions outside a weight.
        """
        path = checked_path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; pass the file in it that Masks.save wrote.")
        try:
            with safe_open(str(path), "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                shapes = json.loads(metadata["shapes"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            return cls({name: _read_mask(parts_of(name, tensors), shape) for name, shape in shapes.items()})
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is no readable file of Masks.save ({type(error).__name__}: {error}); pass another file."
            ) from error

    def summary(self) -> str:
        """Return a table to print: density by layer and projection, in percent, and totals."""
        layers, projections, cells = density_grid(self)
        if not self:
            return "no masks"
        width = max([9, *(len(name) for name in projections)])
        head = "layer".ljust(12) + "".join(name.rjust(width + 1) for name in projections)
        lines = [head]
        for i, layer in enumerate(layers):
            row = "".join(("-" if math.isnan(v) else f"{v:.3%}").rjust(width + 1) for v in cells[i])
            lines.append(layer.ljust(12) + row)
        total = f"{self.count:,} of {sum(m.shape.numel() for m in self.values()):,} entries, {self.density:.4%}"
        empty = sum(1 for mask in self.values() if not len(mask))
        lines.append(f"{total}, in {len(self)} weights" + (f", {empty} of them without any" if empty else ""))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Plot the density by layer and projection, and the concentration in rows and columns; needs matplotlib.

        Args:
            path: the file to write; its extension gives the format (`.png`, `.pdf`, `.svg`, ...), PNG without one.

        Raises:
            ValueError: there is no mask, or matplotlib does not support the format.
        """
        from speft_optim.masks.plots import plot_masks

        plot_masks(self, path)

    def draw_means(self, axes, numbers: Mapping[str, float], *, scale: float = 1) -> None:
        """Draw a number for each weight as a heat map into your own figure; a row is a layer, a column a projection.

        Args:
            axes: matplotlib axes in a figure.
            numbers: one number for each masked weight, by its full name. A cell with several weights shows their mean,
                weighted by size.
            scale: the numbers are multiplied by it, such as 100 for percent.
        """
        from speft_optim.masks.plots import draw_grid

        sizes = {name: self[name].shape.numel() for name in numbers}
        draw_grid(axes, *mean_grid(numbers, sizes), scale=scale)

    def draw_concentration(self, axes) -> None:
        """Draw the share of rows and columns that hold 90 % of the entries into your own figure.

        Args:
            axes: matplotlib axes; they get two bars for each projection.
        """
        from speft_optim.masks.plots import draw_concentration

        draw_concentration(axes, self)


# Errors that reading a damaged or foreign file may raise.
UNREADABLE = (
    SafetensorError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,
)


def _read_mask(parts: dict[str, Tensor], shape: list[int]) -> Mask:
    """Return the mask of its parts in a file, with `selected_on` where the file has it."""
    selected_on = parts.pop("selected_on", None)
    mask = Mask.unpack(parts, shape)
    if selected_on is not None:
        if selected_on.dtype != torch.float32 or selected_on.dim() != 1 or len(selected_on) >= 2 * PROBES:
            raise ValueError(f"a selected_on of {selected_on.dtype} and shape {tuple(selected_on.shape)}")
        mask.selected_on = selected_on.cpu()
    return mask


def parts_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a file has under `name:part`, by part."""
    return {key.removeprefix(f"{name}:"): part for key, part in tensors.items() if key.startswith(f"{name}:")}
