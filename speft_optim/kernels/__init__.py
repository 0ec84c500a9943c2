"""The operations that touch masked entries. They see tensors only: no modules, no optimizer.

`reference` defines what each one does, in plain PyTorch. On a card those that cost time are Triton kernels; Triton is
imported at the first launch. With TRITON_INTERPRET=1 they run on CPU tensors too, slowly, for tests.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from speft_optim.kernels import reference
from speft_optim.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from speft_optim.kernels.operands import Positions, Update
from speft_optim.kernels.reference import accumulate_product_, adamw_, gather_entries, product, scatter_entries_

__all__ = [
    "Positions",
    "Update",
    "accumulate_product_",
    "adamw_",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_int8",
    "fused_adamw",
    "gather_entries",
    "launches",
    "lay_over_",
    "product",
    "quantize_blockwise",
    "sampled_gradient",
    "scatter_entries_",
]

_FOUND = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launches(tensor: Tensor) -> bool:
    """Whether kernels run on the tensor as it lies."""
    return _FOUND and (tensor.is_cuda or _INTERPRETED) and tensor.is_contiguous()


def lay_over_(weight: Tensor, positions: Positions, values: Tensor) -> None:
    """Write `values` (k,) fp32, rounded to the weight's dtype, at `positions` of `weight`, in place."""
    if launches(weight) and positions.row_group is not None:
        from speft_optim.kernels import rows

        rows.lay_over_(weight, positions, values)
    else:
        scatter_entries_(weight, positions.indices, values)


def sampled_gradient(left: Tensor, right: Tensor, positions: Positions) -> Tensor:
    """Entries of `left.T @ right` at `positions`, (k,) fp32, for (T, R) and (T, C) operands of one floating dtype."""
    columns = positions.packed().get("columns")
    if columns is None or not launches(columns):
        return reference.sampled_gradient(left, right, positions.indices)
    from speft_optim.kernels import blocks, panels

    # While a compiler traces this the positions are not there to be looked at.
    if not torch.compiler.is_compiling() and blocks.suit(left, right):
        if (concentrated := positions.derived(blocks.row_blocks)) is not None:
            return blocks.sampled_gradient(left, right, positions, concentrated)
    return panels.sampled_gradient(left, right, positions)


def dequantize_int8(*arguments) -> Tensor:
    """See `kernels.dequantize`; for codes that `launches`."""
    from speft_optim.kernels import dequantize

    return dequantize.dequantize_int8(*arguments)


def dequantize_4bit(*arguments) -> Tensor:
    """See `kernels.dequantize`; for codes that `launches`."""
    from speft_optim.kernels import dequantize

    return dequantize.dequantize_4bit(*arguments)


def fused_adamw(updates: Iterable[Update], **options: float) -> Callable[[], None]:
    """What takes the step of `adamw_` on each update, in one launch a kind of them, and writes the new values through.

    Made ahead, so that between knowing that a step may be taken and taking it the card waits for no more than a launch.
    """
    from speft_optim.kernels import adamw

    return adamw.fused_adamw(updates, **options)
