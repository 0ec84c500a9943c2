"""Reading and writing single entries of a weight, in plain PyTorch on any device."""

import torch
from torch import Tensor


def gather_entries(weight: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of `weight`, of any shape and strides, at flat positions `indices` (k,): (k,) in its dtype."""
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, indices)
    return weight[torch.unravel_index(indices.long(), weight.shape)]


def scatter_entries_(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Write `values` (k,), rounded to the weight's dtype, at flat positions `indices` (k,) of `weight`, in place."""
    values = values.to(weight.dtype)
    if weight.is_contiguous():
        weight.view(-1).index_copy_(0, indices.long(), values)
    else:
        weight.index_put_(torch.unravel_index(indices.long(), weight.shape), values)
    return weight
