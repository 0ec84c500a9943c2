"""The operations on masked entries. They take tensors only: no modules, no optimizer.

Each operation is defined in plain PyTorch, in a file of its name. The definition runs on any device and is the
reference. An operation that dominates the time of a step also has Triton kernels, in a file beside the definition
(`*_triton.py`) that is imported at the first launch. Positions are flat or in CSR form (`CSR`). All arithmetic is fp32,
and results are cast once, when they are stored.
"""

from speft_optim.kernels.adamw import Update, adamw_, fused_adamw
from speft_optim.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from speft_optim.kernels.csr import CSR
from speft_optim.kernels.dequantize import dequantize_4bit, dequantize_int8
from speft_optim.kernels.entries import gather_entries, scatter_entries_
from speft_optim.kernels.launch import launches
from speft_optim.kernels.overlay import overlay_
from speft_optim.kernels.product import PANEL_BYTES, accumulate_product_, product
from speft_optim.kernels.sampling import RowBlocks, row_blocks, sampled_gradient, suits_blocks

__all__ = [
    "CSR",
    "PANEL_BYTES",
    "RowBlocks",
    "Update",
    "accumulate_product_",
    "adamw_",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_int8",
    "fused_adamw",
    "gather_entries",
    "launches",
    "overlay_",
    "product",
    "quantize_blockwise",
    "row_blocks",
    "sampled_gradient",
    "scatter_entries_",
    "suits_blocks",
]
