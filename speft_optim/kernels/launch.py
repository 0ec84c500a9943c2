"""Decides whether Triton kernels run on a tensor.

With TRITON_INTERPRET=1 they run on CPU tensors too, slowly, for tests.
"""

import importlib.util
import os

from torch import Tensor

_FOUND = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launches(tensor: Tensor) -> bool:
    """Return whether kernels run on the tensor: Triton is installed, and the tensor is contiguous and on a GPU."""
    return _FOUND and (tensor.is_cuda or _INTERPRETED) and tensor.is_contiguous()
