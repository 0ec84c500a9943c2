"""Dequantisation of a bitsandbytes weight with an overlay of compact values, by Triton kernels.

The definitions in PyTorch are in `weights/int8.py` and `weights/four_bit.py`, with the classes that know the layouts.
"""

from torch import Tensor


def dequantize_int8(*arguments) -> Tensor:
    """Call `dequantize_triton.dequantize_int8`; `launches` must be true of the quantised weight."""
    from speft_optim.kernels import dequantize_triton

    return dequantize_triton.dequantize_int8(*arguments)


def dequantize_4bit(*arguments) -> Tensor:
    """Call `dequantize_triton.dequantize_4bit`; `launches` must be true of the quantised weight."""
    from speft_optim.kernels import dequantize_triton

    return dequantize_triton.dequantize_4bit(*arguments)
