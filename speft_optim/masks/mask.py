"""The mask of one weight: which of its entries are trained. `Masks` in `collection.py` holds those of a model.

A mask is the sorted set of flat, row-major positions of its entries. It is never held as a boolean tensor of the
weight's shape: at 1 % density that would cost a hundred bytes for each masked entry. If it takes fewer bytes, the
positions are stored in CSR form: a 16-bit column for each entry and an int32 pointer for each row. `Mask.indices`
computes the flat positions when they are needed.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.sampling import RowBlocks, row_blocks, sampled_gradient, suits_blocks
from speft_optim.masks.positions import INT32_LIMIT, checked_positions, checked_shape, describes_rows, position_dtype

_UINT16_COLUMNS = 2**16


# A mask remembers about so many entries of the weight it was selected on, from outside itself.
PROBES = 64


class Mask:
    """The masked entries of one weight.

    Args:
        indices: 1-D integer tensor of unique flat (row-major) positions, in any order.
        shape: shape of the weight.

    Attributes:
        shape: shape of the weight.
        positions: the positions as stored, in CSR or flat form (`CSR` or a 1-D integer tensor); must not be changed.
        selected_on: a sample of fewer than 128 unmasked entries of the weight that the mask was selected on, 1-D fp32
            on the CPU (see `weights/provenance.py`); None if that weight is unknown.

    Raises:
        TypeError: `indices` is not a 1-D integer tensor.
        ValueError: a position lies outside the weight or occurs twice, or `shape` is not a shape.
    """

    selected_on: Tensor | None = None

    def __init__(self, indices: Tensor, shape: Sequence[int]):
        self.shape = checked_shape(shape)
        indices = checked_positions(indices, self.shape)
        self._length = indices.numel()
        self.positions = self._by_rows(indices) or indices.clone()

    @classmethod
    def of_sorted(cls, indices: Tensor, shape: torch.Size) -> "Mask":
        """Return the mask of positions in ascending order, without checks, which would wait for the GPU.

        Args:
            indices: 1-D integer tensor of unique flat positions inside the weight, in ascending order; must not be
                changed later.
            shape: shape of the weight.
        """
        mask = object.__new__(cls)
        mask.shape, mask._length = shape, indices.numel()
        indices = indices.to(position_dtype(shape))
        mask.positions = mask._by_rows(indices) or indices
        return mask

    def _by_rows(self, indices: Tensor) -> CSR | None:
        """Return the positions in row form where that takes fewer bytes, else None."""
        columns = self._columns
        rows = self.shape.numel() // columns
        # The size is computed first, since the row pointers of a weight with few entries could take gigabytes.
        size = 2 * self._length + 4 * (rows + 1)
        if columns > _UINT16_COLUMNS or self._length > INT32_LIMIT or size >= indices.nbytes:
            return None
        starts = torch.arange(rows + 1, device=indices.device, dtype=torch.int64) * columns
        pointers = torch.searchsorted(indices, starts.to(indices.dtype), out_int32=True)
        return CSR(pointers, (indices % columns).to(torch.uint16))

    @property
    def _columns(self) -> int:
        return max(1, self.shape[-1]) if self.shape else 1

    @property
    def indices(self) -> Tensor:
        """Flat positions, sorted and unique, (len(self),) int32, or int64 for a weight of 2^31 entries or more."""
        if not isinstance(self.positions, CSR):
            return self.positions
        return self.positions.flat(self._columns, position_dtype(self.shape))

    def sampled_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the masked entries of a gradient `left.T @ right`.

        Args:
            left: (T, rows), a floating dtype.
            right: (T, columns), the same dtype.

        Returns:
            (len(self),) fp32.
        """
        blocks = self._row_blocks if suits_blocks(left, right, self.positions) else None
        return sampled_gradient(left, right, self.positions, blocks)

    @functools.cached_property
    def _row_blocks(self) -> RowBlocks | None:
        """Blocks of rows for the kernel for concentrated masks, made at the first use and not copied with the mask."""
        return row_blocks(self.positions, self._columns)

    def packed(self) -> dict[str, Tensor]:
        """Return the positions as stored, for a file.

        Returns:
            `indices` (k,) int32 or int64, or in CSR form `row_pointers` (rows + 1,) int32 and `columns` (k,) uint16.
        """
        return self.positions._asdict() if isinstance(self.positions, CSR) else {"indices": self.positions}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: Sequence[int]) -> "Mask":
        """Return the mask whose positions `packed` returned, with the checks of the constructor.

        Args:
            parts: the tensors of `packed`, from a file that need not be trusted.
            shape: shape of the weight.

        Raises:
            TypeError: `indices` is not a 1-D integer tensor.
            ValueError: the parts do not describe positions in a weight of `shape`.
            KeyError: a part is missing.
        """
        if "indices" in parts:
            return cls(parts["indices"], shape)
        shape = checked_shape(shape)
        csr, width = CSR(parts["row_pointers"], parts["columns"]), max(1, shape[-1]) if shape else 1
        if not describes_rows(csr, shape.numel() // width, width):
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
        """Bytes that the positions take, including block tables if they were built."""
        blocks = self.__dict__.get("_row_blocks")
        return sum(part.nbytes for part in self.packed().values()) + (0 if blocks is None else blocks.nbytes)

    @property
    def device(self) -> torch.device:
        """Device that holds the positions."""
        return (self.positions.columns if isinstance(self.positions, CSR) else self.positions).device

    def to(self, device: torch.device | str) -> "Mask":
        """Return the same mask with its positions on `device`; the mask itself if they are there already."""
        if torch.device(device) == self.device:
            return self
        other = object.__new__(Mask)
        other.shape, other._length, other.selected_on = self.shape, self._length, self.selected_on
        moved = {key: part.to(device) for key, part in self.packed().items()}
        other.positions = moved["indices"] if "indices" in moved else CSR(**moved)
        return other

    def fingerprint(self) -> str:
        """Return a hash of shape and positions: sixteen hexadecimal digits, the same on every device."""
        digest = hashlib.sha256(repr(tuple(self.shape)).encode())
        digest.update(self.indices.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def overlap(self, other: "Mask") -> float:
        """Return the share of the smaller mask's entries that are in both, 0 to 1; 1.0 if the smaller one is empty.

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
        """Return the number of masked entries of each row, (rows,) int64; a row runs along the last dimension."""
        return torch.bincount(self.indices.long() // self._columns, minlength=self.shape.numel() // self._columns)

    def column_counts(self) -> Tensor:
        """Return the number of masked entries of each column, (columns,) int64; columns are the last dimension."""
        return torch.bincount(self.indices.long() % self._columns, minlength=self._columns)

    def __eq__(self, other: object) -> bool:
        """Return whether shape and positions are equal, on whatever device they are."""
        if not isinstance(other, Mask):
            return NotImplemented
        same = self.shape == other.shape and len(self) == len(other)
        return same and torch.equal(self.indices, other.indices.to(self.device))

    __hash__ = None

    def __getstate__(self) -> dict:
        """Return the state for copies and pickle. Pickle cannot carry uint16 tensors, so their bits go as int16."""
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
        """Return shape, number of entries and density."""
        return f"Mask(shape={tuple(self.shape)}, entries={len(self):,}, density={self.density:.4%})"


def places_outside(mask: Mask | None, count: int, most: int) -> Tensor:
    """Return evenly spaced flat positions outside a mask, int64, on the mask's device.

    Args:
        mask: their positions are left out; None to leave out none.
        count: number of entries of the weight.
        most: fewer than twice as many positions are returned.
    """
    # The step is odd. Else all places would lie in one column of a matrix with 2^n columns, which the mask may fill.
    places = torch.arange(0, count, max(1, count // most) | 1, dtype=torch.int64)
    if mask is None or not len(mask):
        return places
    places, indices = places.to(mask.device), mask.indices
    found = torch.searchsorted(indices, places.to(indices.dtype)).clamp_(max=len(indices) - 1)
    return places[indices[found] != places]


def united(masks: Sequence[Mask]) -> Mask:
    """Return the mask of all entries of some masks of one shape, on the device of the first."""
    first = masks[0]
    if len(masks) == 1:
        return first
    return Mask(torch.cat([mask.indices.to(first.device) for mask in masks]).unique(), first.shape)


def find(sorted_positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Look each of `wanted` up in `sorted_positions`.

    Args:
        sorted_positions: (n,) integer, ascending.
        wanted: (k,) integer, on the same device.

    Returns:
        Its place there, (k,) int64, and whether it is there, (k,) bool; the place of one that is not has no meaning.
    """
    if not sorted_positions.numel():
        return torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(sorted_positions, wanted.to(sorted_positions.dtype)).clamp_(
        max=len(sorted_positions) - 1
    )
    return place, sorted_positions[place] == wanted
