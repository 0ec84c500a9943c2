"""Tiny models loaded through transformers' own bitsandbytes path, and the dense models of their dequantised weights."""

import copy

import bitsandbytes as bnb
import torch
import transformers as tf
from conftest import device, tiny_model
from torch import nn

from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.storage import frozen_weight

for _compiled in ("_dequantize_blockwise_compute", "_dequantize_4bit_compute"):
    # On the CPU bitsandbytes compiles these for each shape anew, which takes seconds and shows nothing of this library.
    _found = getattr(bnb.backends.default.ops, _compiled, None)
    setattr(bnb.backends.default.ops, _compiled, getattr(_found, "__wrapped__", _found))

KINDS = ["int8", "nf4", "double"]

# Wide enough that rows are several blocks of 64 in one projection, and no whole number of them in another.
SIZES = dict(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


def configuration(kind, **options):
    if kind == "int8":
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    compute = options.pop("compute", torch.float32)
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "double",
        bnb_4bit_compute_dtype=compute,
        **options,
    )


def save_original(folder, architecture="llama", seed=0, **config):
    """An ordinary bf16 checkpoint on disk; returns its folder."""
    model = tiny_model(architecture, torch.bfloat16, seed, **{**SIZES, **config})
    model.save_pretrained(folder)
    return folder


def load_quantized(folder, kind, dtype=torch.float32, **options):
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=configuration(kind, **options), dtype=dtype, device_map={"": device()}
    )


def dequantized_twin(model):
    """A plain copy of the model whose linears hold the dequantised weights, in the dtype of the model."""
    twin = copy.deepcopy(model)
    for name, module in list(quantized_linears(twin)):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=model.dtype)
        plain.weight = nn.Parameter(frozen_weight(module).dense(model.dtype))
        plain.bias = module.bias
        twin.set_submodule(name, plain)
    twin.is_quantized = False
    return twin


def stored(model):
    """Copies of all quantised weights and scales of a model."""
    tensors = []
    for _, module in quantized_linears(model):
        tensors.append(module.weight.detach().clone())
        if isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            tensors.append(scales.clone())
        else:
            state = module.weight.quant_state
            tensors += [state.absmax.clone(), state.code.clone()]
            if state.nested:
                tensors += [state.state2.absmax.clone(), state.state2.code.clone(), state.offset.clone()]
    assert tensors
    return tensors


def effective(model):
    """Every quantised weight as the model computes with it, fp32, by name."""
    return {f"{name}.weight": frozen_weight(module).dense(torch.float32) for name, module in quantized_linears(model)}
