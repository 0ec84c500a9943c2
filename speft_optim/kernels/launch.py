"""Whether Triton kernels run on a tensor. With TRITON_INTERPRET=1 they run on CPU tensors too, slowly, for tests."""

import importlib.util
import os

from torch import Tensor

_FOUND = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launches(tensor: Tensor) -> bool:
    """Whether kernels run on the tensor as it lies."""
    return _FOUND and (tensor.is_cuda or _INTERPRETED) and tensor.is_contiguous()
