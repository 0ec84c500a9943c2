"""Which entries of a weight are trained: `Mask` for one weight, `Masks` for a model.

A mask is the sorted set of flat, row-major positions of its entries. It is never held as a boolean tensor of the
weight's shape: at 1 % density that would cost a hundred bytes per entry kept. Where it is smaller, the positions are
held by rows (CSR): a 16-bit column for each entry and an int32 pointer for each row. `Mask.indices` makes flat
positions of them for the moment of use.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_optim.files import checked_path, write_safetensors
from speft_optim.kernels import CSR, RowBlocks, row_blocks, sampled_gradient, suits_blocks

_FORMAT = "speft_optim.masks/3"
_INT32_LIMIT = 2**31 - 1
_INT64_LIMIT = 2**63 - 1
_UINT16_COLUMNS = 2**16

# About how many entries outside itself a mask remembers of the weight it was selected on.
PROBES = 64


class Mask:
    """The masked entries of one weight.

    Args:
        indices: 1-D integer tensor of unique flat (row-major) positions, in any order.
        shape: shape of the weight they refer to.

    Attributes:
        shape: shape of the weight.
        positions: the positions as held, by rows or flat (`CSR` or a 1-D integer tensor); not to be changed.
        selected_on: 64 or some more entries outside the mask of the weight it was selected on, 1-D fp32 on the CPU, see
            `provenance.py`; None where that is not known or did not matter.

    Raises:
        TypeError: `indices` is not a 1-D integer tensor.
        ValueError: a position lies outside the weight or occurs twice, or the shape is none.
    """

    selected_on: Tensor | None = None

    def __init__(self, indices: Tensor, shape: Sequence[int]):
        self.shape = _checked_shape(shape)
        count = self.shape.numel()
        if not isinstance(indices, Tensor) or indices.dim() != 1:
            raise TypeError(f"Mask needs a 1-D tensor of flat positions, got {_describe(indices)}.")
        if indices.dtype not in (torch.int16, torch.int32, torch.int64):
            raise TypeError(
                f"Mask needs integer positions, got {indices.dtype}; use mask.flatten().nonzero().squeeze(1)."
            )
        indices = indices.detach()
        if indices.numel():
            if not bool((indices[1:] > indices[:-1]).all()):
                indices = indices.sort().values
                if bool((indices[1:] == indices[:-1]).any()):
                    raise ValueError(
                        f"Mask of shape {tuple(self.shape)} got the same position twice; pass unique positions."
                    )
            low, high = int(indices[0]), int(indices[-1])
            if low < 0 or high >= count:
                bad = low if low < 0 else high
                raise ValueError(
                    f"Mask position {bad} lies outside 0..{count - 1} of a weight of shape {tuple(self.shape)}; "
                    "pass flat, row-major positions."
                )
        # Only now: a position beyond the int32 range would come out of the cast as one that looks valid.
        indices = indices.to(torch.int32 if count <= _INT32_LIMIT else torch.int64)
        self._length = indices.numel()
        self.positions = self._by_rows(indices) or indices.clone()

    def _by_rows(self, indices: Tensor) -> CSR | None:
        """The positions by rows, where that takes fewer bytes."""
        columns = self._columns
        rows = self.shape.numel() // columns
        # Not even tried where it cannot pay: row pointers of a weight with few entries could take gigabytes.
        size = 2 * self._length + 4 * (rows + 1)
        if columns > _UINT16_COLUMNS or self._length > _INT32_LIMIT or size >= indices.nbytes:
            return None
        starts = torch.arange(rows + 1, device=indices.device, dtype=torch.int64) * columns
        pointers = torch.searchsorted(indices, starts.to(indices.dtype), out_int32=True)
        return CSR(pointers, (indices % columns).to(torch.uint16))

    @property
    def _columns(self) -> int:
        return max(1, self.shape[-1]) if self.shape else 1

    @property
    def indices(self) -> Tensor:
        """Sorted unique flat positions, int32 (int64 for weights of 2^31 entries or more), shape (len(self),)."""
        if not isinstance(self.positions, CSR):
            return self.positions
        dtype = torch.int32 if self.shape.numel() <= _INT32_LIMIT else torch.int64
        return self.positions.flat(self._columns, dtype)

    def sampled_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Masked entries of `left.T @ right`, (len(self),) fp32, for (T, rows) and (T, columns) in one dtype."""
        blocks = self._row_blocks if suits_blocks(left, right, self.positions) else None
        return sampled_gradient(left, right, self.positions, blocks)

    @functools.cached_property
    def _row_blocks(self) -> RowBlocks | None:
        """Blocks of rows for the kernel of concentrated masks, made at the first use and not copied with the mask."""
        return row_blocks(self.positions, self._columns)

    def packed(self) -> dict[str, Tensor]:
        """The positions as held, for a file: `indices`, or `row_pointers` (rows + 1,) int32 and `columns` uint16."""
        return self.positions._asdict() if isinstance(self.positions, CSR) else {"indices": self.positions}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: Sequence[int]) -> "Mask":
        """The mask that `packed` took apart, checked as the constructor checks.

        Raises:
            ValueError: the parts do not describe positions in a weight of `shape`.
            KeyError: a part is missing.
        """
        if "indices" in parts:
            return cls(parts["indices"], shape)
        shape = _checked_shape(shape)
        csr, width = CSR(parts["row_pointers"], parts["columns"]), max(1, shape[-1]) if shape else 1
        if not _describes_rows(csr, shape.numel() // width, width):
            raise ValueError(f"Row pointers and columns do not describe entries of a weight of shape {tuple(shape)}.")
        return cls(csr.flat(width), shape)

    def __len__(self) -> int:
        """Number of masked entries."""
        return self._length

    @property
    def density(self) -> float:
        """Share of the weight's entries that are masked, 0 to 1."""
        return self._length / max(1, self.shape.numel())

    @property
    def nbytes(self) -> int:
        """Bytes the positions take at rest, with the blocks of rows where they were made."""
        blocks = self.__dict__.get("_row_blocks")
        return sum(part.nbytes for part in self.packed().values()) + (0 if blocks is None else blocks.nbytes)

    @property
    def device(self) -> torch.device:
        """Device that holds the positions."""
        return next(iter(self.packed().values())).device

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask with its positions on `device`."""
        if torch.device(device) == self.device:
            return self
        other = object.__new__(Mask)
        other.shape, other._length, other.selected_on = self.shape, self._length, self.selected_on
        moved = {key: part.to(device) for key, part in self.packed().items()}
        other.positions = moved["indices"] if "indices" in moved else CSR(**moved)
        return other

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ between different masks, equal on every device."""
        digest = hashlib.sha256(repr(tuple(self.shape)).encode())
        digest.update(self.indices.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def overlap(self, other: "Mask") -> float:
        """Share of the smaller mask's entries that both have, 0 to 1; 1.0 where the smaller one is empty.

        Raises:
            ValueError: the two masks belong to weights of different shapes.
        """
        if self.shape != other.shape:
            raise ValueError(f"Cannot compare masks of shapes {tuple(self.shape)} and {tuple(other.shape)}.")
        smaller = min(len(self), len(other))
        return self._shared(other) / smaller if smaller else 1.0

    def _shared(self, other: "Mask") -> int:
        return int(torch.isin(self.indices, other.indices.to(self.device), assume_unique=True).sum())

    def row_counts(self) -> Tensor:
        """Masked entries per row, int64; a row is a run of the weight's last dimension."""
        return torch.bincount(self.indices.long() // self._columns, minlength=self.shape.numel() // self._columns)

    def column_counts(self) -> Tensor:
        """Masked entries per position in the weight's last dimension, int64."""
        return torch.bincount(self.indices.long() % self._columns, minlength=self._columns)

    def __eq__(self, other: object) -> bool:
        """Equal shape and equal positions, on whatever device."""
        if not isinstance(other, Mask):
            return NotImplemented
        same = self.shape == other.shape and len(self) == len(other)
        return same and torch.equal(self.indices, other.indices.to(self.device))

    __hash__ = None

    def __getstate__(self) -> dict:
        """State for copies and pickle, which cannot carry uint16 tensors: their bits go as int16."""
        state = {**self.__dict__, "positions": self.packed()}
        state.pop("_row_blocks", None)
        if "columns" in state["positions"]:
            state["positions"]["columns"] = state["positions"]["columns"].view(torch.int16)
        return state

    def __setstate__(self, state: dict) -> None:
        parts = state["positions"]
        if "columns" in parts:
            positions = CSR(parts["row_pointers"], parts["columns"].view(torch.uint16))
        else:
            positions = parts["indices"]
        self.__dict__.update(state, positions=positions)

    def __repr__(self) -> str:
        """Shape, count and density."""
        return f"Mask(shape={tuple(self.shape)}, entries={len(self):,}, density={self.density:.4%})"


class Masks(dict[str, Mask]):
    """Masks of a model: from the parameter's full name (`model.layers.0.mlp.up_proj.weight`) to its `Mask`."""

    @property
    def count(self) -> int:
        """Masked entries over all weights."""
        return sum(len(mask) for mask in self.values())

    @property
    def density(self) -> float:
        """Masked share of all entries of the weights named here, 0 to 1."""
        return self.count / max(1, sum(mask.shape.numel() for mask in self.values()))

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over names, shapes and positions."""
        parts = [f"{name}:{mask.fingerprint()}" for name, mask in sorted(self.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def overlap(self, other: "Masks") -> float:
        """Share of the smaller selection's entries that both have, 0 to 1, over the weights of either.

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
        """Write all masks to one safetensors file; the file appears whole or not at all."""
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        tensors = self.parts()
        for name, mask in self.items():
            if mask.selected_on is not None:
                tensors[f"{name}:selected_on"] = mask.selected_on
        write_safetensors(tensors, path, {"format": _FORMAT, "shapes": json.dumps(shapes)})

    def parts(self) -> dict[str, Tensor]:
        """What `Mask.packed` gives for each, in CPU memory under `name:part`, for a file."""
        return {f"{name}:{key}": part for name, mask in self.items() for key, part in mask.to("cpu").packed().items()}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Masks":
        """Read masks written by `save`, in the order they were saved in.

        Raises:
            ValueError: the file is not such a file, is damaged, or holds positions outside a weight.
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
                f"{path} is no readable file of Masks.save ({type(error).__name__}: {error}); pass another."
            ) from error

    def summary(self) -> str:
        """A table of density per layer and projection, in percent, with totals; for people."""
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
        """Draw density by layer and projection, and how concentrated rows and columns are (by matplotlib).

        Args:
            path: the picture; its ending tells the format (`.png`, `.pdf`, `.svg`, ...), PNG without one.

        Raises:
            ValueError: there is no mask, or the ending is of no picture.
        """
        from speft_optim.plots import plot_masks

        plot_masks(self, path)


# What may come of a file that is not what it should be.
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


def places_outside(mask: Mask | None, count: int, most: int) -> Tensor:
    """Evenly spaced flat positions, less than twice `most` of `count`, without a mask's; int64 on its device."""
    # An odd step, or all places would lie in one column of a matrix with 2^n columns, which the mask may fill.
    places = torch.arange(0, count, max(1, count // most) | 1, dtype=torch.int64)
    if mask is None or not len(mask):
        return places
    places, indices = places.to(mask.device), mask.indices
    found = torch.searchsorted(indices, places.to(indices.dtype)).clamp_(max=len(indices) - 1)
    return places[indices[found] != places]


def _read_mask(parts: dict[str, Tensor], shape: list[int]) -> Mask:
    """A mask from its parts in a file, with what it remembers."""
    selected_on = parts.pop("selected_on", None)
    mask = Mask.unpack(parts, shape)
    if selected_on is not None:
        if selected_on.dtype != torch.float32 or selected_on.dim() != 1 or len(selected_on) >= 2 * PROBES:
            raise ValueError(f"entries of dtype {selected_on.dtype} and shape {tuple(selected_on.shape)} beside a mask")
        mask.selected_on = selected_on.cpu()
    return mask


def parts_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that stand under `name:part` in a file, by part."""
    return {key.removeprefix(f"{name}:"): part for key, part in tensors.items() if key.startswith(f"{name}:")}


def split_name(name: str) -> tuple[str, str]:
    """A parameter's name as (layer, projection): `model.layers.3.mlp.up_proj.weight` -> ("layers.3", "up_proj")."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = f"{parts[numbers[0] - 1]}.{parts[numbers[0]]}" if numbers and numbers[0] else "other"
    rest = parts[numbers[0] + 1 :] if numbers else parts
    if rest and rest[-1] == "weight" and len(rest) > 1:
        rest = rest[:-1]
    return layer, rest[-1] if rest else name


def density_grid(masks: Masks) -> tuple[list[str], list[str], list[list[float]]]:
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


def _describes_rows(csr: CSR, rows: int, width: int) -> bool:
    """Whether what may come from a file has the form that a matrix of this size asks for."""
    pointers, columns = csr
    return (
        (pointers.dtype, columns.dtype) == (torch.int32, torch.uint16)
        and pointers.dim() == columns.dim() == 1
        and len(pointers) == rows + 1
        and int(pointers[0]) == 0
        and int(pointers[-1]) == len(columns)
        and bool((pointers[1:] >= pointers[:-1]).all())
        and bool((columns.int() < width).all())
    )


def _checked_shape(shape: Sequence[int]) -> torch.Size:
    """The shape as a torch.Size; it may come from a file."""
    try:
        size = torch.Size(shape)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{shape!r} is not a shape of a weight; pass its sizes, such as (4, 8).") from error
    if any(extent < 0 for extent in size) or math.prod(size) > _INT64_LIMIT:
        raise ValueError(f"{shape!r} is not a shape of a weight; pass its sizes, such as (4, 8).")
    return size


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
