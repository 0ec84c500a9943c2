"""Refuses weights of quantisers other than bitsandbytes, which cannot be trained as they are stored.

They are tensor subclasses (torchao, quanto), parameters of 8-bit dtypes (fp8, HQQ, GGUF), or buffers of a layer without
a weight parameter (GPTQ, AWQ, EETQ). An error that names the library is raised before anything else is done. Otherwise
the first unsupported operation would fail with an error from inside PyTorch.
"""

import torch
from torch import Tensor, nn

from speft_optim.weights.wrappers import plain_modules

_REMEDY = (
    "Load the base in fp32, bf16 or fp16 (dequantised), or quantised by bitsandbytes: "
    "BitsAndBytesConfig(load_in_8bit=True) or (load_in_4bit=True)."
)


_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.qint8, torch.quint8, torch.qint32}


# Parts of the names of tensors that hold quantised values or scales; names of index tables contain none of them.
_PARTS = ("scale", "zero", "qweight", "weight", "packed", "codes", "codebook", "absmax", "blocks", "w_q")


def foreign_parameter(module: nn.Module, attribute: str) -> str | None:
    """Describe how a parameter is stored, or return None for plain floating numbers and bitsandbytes' storage."""
    parameter = module._parameters[attribute]
    if hasattr(parameter, "device_mesh"):
        # A sharded parameter gets its own error in `check_parameters`.
        return None
    kind = type(parameter)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__name__} of {kind.__module__.partition('.')[0]}"
    # Other parts of bitsandbytes (embeddings, parametrised experts) may stay in the model, untrained.
    if any(type(part).__module__.startswith("bitsandbytes") for part in (parameter, module, *module.children())):
        return None
    if parameter.dim() > 1 and _is_quantised(parameter):
        return f"a weight in the storage of a {type(module).__name__}"
    return None


def _is_quantised(tensor: Tensor) -> bool:
    return tensor.dtype in _CODES or tensor.is_floating_point() and tensor.dtype.itemsize == 1


def foreign_layer(module: nn.Module) -> str | None:
    """Describe how a quantiser's layer without a weight parameter stores its weight; None for any other layer."""
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")):
        return f"packed by a {type(module).__name__} of torch.ao" if callable(getattr(module, "weight", None)) else None
    if any(p is not None and p.dim() > 1 and p.is_floating_point() for p in module._parameters.values()):
        return None
    for name, tensor in module._buffers.items():
        if tensor is None or tensor.dim() < 2 or not any(part in name.lower() for part in _PARTS):
            continue
        if _is_quantised(tensor):
            return f"stored in {tensor.dtype} ({name}) by a {type(module).__name__}"
    return None


def check_parameters(model: nn.Module) -> None:
    """Refuse a model with parameters that are stored by a foreign quantiser.

    Raises:
        TypeError: a parameter is quantised otherwise than by bitsandbytes.
    """
    for path, module in plain_modules(model):
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is not None and (how := foreign_parameter(module, attribute)):
                raise TypeError(f"{name} has dtype {parameter.dtype} and is {how}, which cannot be trained. {_REMEDY}")


def check_layers(model: nn.Module, name: str | None = None) -> None:
    """Refuse a model with layers of a quantiser that leaves them without a weight parameter.

    Args:
        model: the model.
        name: check only layers with this name, or this end of their full name; None checks all.

    Raises:
        TypeError: there is such a layer.
    """
    for path, module in plain_modules(model):
        if name is None or f".{path}".endswith(f".{name}"):
            if how := foreign_layer(module):
                raise TypeError(f"The weight of {path} is {how}, which cannot be trained. {_REMEDY}")
