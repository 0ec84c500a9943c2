"""Which modules use a weight as one factor of a product with their input, and so have a gradient of two factors."""

from collections.abc import Callable

from torch import nn

from speft_optim.weights.bnb import is_quantized_linear


def is_product(module: nn.Module, attribute: str) -> bool:
    """Return whether the module's forward is a product of its input with the weight, transposed or not."""
    return is_linear(module, attribute) or is_transposed_linear(module, attribute)


def is_linear(module: nn.Module, attribute: str) -> bool:
    """Return whether the module's own forward uses the weight as `x @ W.T`, and only so."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return attribute == "weight" and (plain or is_quantized_linear(module))


def has_other_forward(module: nn.Module, attribute: str) -> bool:
    """Return whether the forward of a module, of which `is_product` was true, has been replaced by another one.

    It may be replaced in the instance or in the class. accelerate's wrapper around a forward does not count.
    """
    own = module.__dict__.get("forward")
    if own is not None and hasattr(module, "_hf_hook"):
        own = None if getattr(module._old_forward, "__func__", None) is type(module).forward else own
    return own is not None or not _is_of_library(type(module).forward)


def _is_of_library(forward: Callable) -> bool:
    # The code object is compared and not the name, since functools.wraps gives the name to a replacement too.
    code, home = getattr(forward, "__code__", None), getattr(forward, "__globals__", {}).get("__name__")
    return code is not None and code.co_name == "forward" and home in (_LINEAR_HOME, _CONV1D_HOME)


_LINEAR_HOME, _CONV1D_HOME = nn.Linear.__module__, "transformers.pytorch_utils"


def is_transposed_linear(module: nn.Module, attribute: str) -> bool:
    """Return whether the weight is used as `x @ W`, as in GPT-2's Conv1D; transformers is not imported to find out."""
    return attribute == "weight" and type(module).__name__ == "Conv1D" and type(module).__module__ == _CONV1D_HOME
