"""The operations that touch masked entries. They see tensors only: no modules, no masks, no optimizer."""

from speft_optim.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from speft_optim.kernels.reference import (
    accumulate_product_,
    adamw_,
    gather_entries,
    product,
    sampled_gradient,
    scatter_entries_,
)

__all__ = [
    "accumulate_product_",
    "adamw_",
    "dequantize_blockwise",
    "gather_entries",
    "product",
    "quantize_blockwise",
    "sampled_gradient",
    "scatter_entries_",
]
