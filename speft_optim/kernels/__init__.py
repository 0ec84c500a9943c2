"""The operations that touch masked entries. They see tensors only: no modules, no optimizer.

Each operation has its definition in plain PyTorch, which runs anywhere and says what is correct, in a file of its name.
Those that cost time have Triton kernels in a file beside it (`*_triton.py`), imported at the first launch. Positions
are given flat or by rows (`CSR`). All arithmetic is fp32; casts happen once, at the store.
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
