"""Which entries of a weight are trained: `Mask` for one weight, `Masks` for a model.

A mask is the sorted set of flat, row-major positions of its entries. It is never held as a boolean tensor of the
weight's shape: at 1 % density that would cost a hundred bytes per entry kept. Where it is smaller, the positions are
held by rows (CSR): a 16-bit column for each entry and an int32 pointer for each row. `Mask.indices` makes flat
positions of them for the moment of use.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.sampling import RowBlocks, row_blocks, sampled_gradient, suits_blocks

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
            `weights/provenance.py`; None where that is not known or did not matter.

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


def places_outside(mask: Mask | None, count: int, most: int) -> Tensor:
    """Evenly spaced flat positions, less than twice `most` of `count`, without a mask's; int64 on its device."""
    # An odd step, or all places would lie in one column of a matrix with 2^n columns, which the mask may fill.
    places = torch.arange(0, count, max(1, count // most) | 1, dtype=torch.int64)
    if mask is None or not len(mask):
        return places
    places, indices = places.to(mask.device), mask.indices
    found = torch.searchsorted(indices, places.to(indices.dtype)).clamp_(max=len(indices) - 1)
    return places[indices[found] != places]


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


def find(sorted_positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `wanted` stands in `sorted_positions`, and whether it does (if not, the place means nothing)."""
    if not sorted_positions.numel():
        return torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(sorted_positions, wanted.to(sorted_positions.dtype)).clamp_(
        max=len(sorted_positions) - 1
    )
    return place, sorted_positions[place] == wanted
