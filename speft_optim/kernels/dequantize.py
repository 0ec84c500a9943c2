"""Quantised weights made dense, with an overlay of compact values, by Triton kernels.

The definitions in PyTorch stand with the classes that know bitsandbytes' layouts.
"""

from torch import Tensor


def dequantize_int8(*arguments) -> Tensor:
    """See `dequantize_triton.dequantize_int8`; for quantised weights that `launches`."""
    from speft_optim.kernels import dequantize_triton

    return dequantize_triton.dequantize_int8(*arguments)


def dequantize_4bit(*arguments) -> Tensor:
    """See `dequantize_triton.dequantize_4bit`; for quantised weights that `launches`."""
    from speft_optim.kernels import dequantize_triton

    return dequantize_triton.dequantize_4bit(*arguments)
