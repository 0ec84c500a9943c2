"""Positions of entries in a weight of some shape, checked: they come from callers and from files."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speft_optim.kernels.csr import CSR

INT32_LIMIT = 2**31 - 1


_INT64_LIMIT = 2**63 - 1


def position_dtype(shape: torch.Size) -> torch.dtype:
    """Return the dtype of flat positions: int32, or int64 for a weight of 2^31 entries or more."""
    return torch.int32 if shape.numel() <= INT32_LIMIT else torch.int64


def checked_positions(indices: Tensor, shape: torch.Size) -> Tensor:
    """Return flat positions in rising order, in their dtype.

    Args:
        indices: what the caller passed: 1-D integer, in any order.
        shape: shape of the weight.

    Raises:
        TypeError: it is not a 1-D integer tensor.
        ValueError: a position lies outside the weight or occurs twice.
    """
    count = shape.numel()
    if not isinstance(indices, Tensor) or indices.dim() != 1:
        raise TypeError(f"Mask needs a 1-D tensor of flat positions, got {_describe(indices)}.")
    if indices.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"Mask needs integer positions, got {indices.dtype}; use mask.flatten().nonzero().squeeze(1).")
    indices = indices.detach()
    if indices.numel():
        if not bool((indices[1:] > indices[:-1]).all()):
            indices = indices.sort().values
            if bool((indices[1:] == indices[:-1]).any()):
                raise ValueError(f"Mask of shape {tuple(shape)} got the same position twice; pass unique positions.")
        low, high = int(indices[0]), int(indices[-1])
        if low < 0 or high >= count:
            bad = low if low < 0 else high
            raise ValueError(
                f"Mask position {bad} lies outside 0..{count - 1} of a weight of shape {tuple(shape)}; "
                "pass flat, row-major positions."
            )
    # Positions are cast after the check: one beyond the int32 range could become a valid one by the cast.
    return indices.to(position_dtype(shape))


def checked_shape(shape: Sequence[int]) -> torch.Size:
    """Return the shape as a torch.Size.

    Raises:
        ValueError: it is not a shape of a weight.
    """
    try:
        size = torch.Size(shape)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{shape!r} is not a shape of a weight; pass its sizes, such as (4, 8).") from error
    if any(extent < 0 for extent in size) or math.prod(size) > _INT64_LIMIT:
        raise ValueError(f"{shape!r} is not a shape of a weight; pass its sizes, such as (4, 8).")
    return size


def describes_rows(csr: CSR, rows: int, width: int) -> bool:
    """Return whether row pointers and columns, perhaps from a file, are valid for a matrix of this size."""
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


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
