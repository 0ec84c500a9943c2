"""Models of real shapes with random weights, drawn on the GPU one tensor at a time, in 16, 8 or 4 bits."""

import copy
import re
from collections.abc import Callable

import torch
from torch import nn

from recipes.shapes import configuration

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shaped(name: str, layers: int | None = None):
    """Return the configuration of a shape, with fewer blocks if asked for."""
    config = configuration(name, max_position_embeddings=8192, use_cache=False)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def build(
    name: str,
    precision: str,
    device: torch.device,
    layers: int | None = None,
    *,
    in_host_memory: bool = False,
    storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """Build a random model of a shape: first without data, then one tensor at a time on the GPU.

    Args:
        name: a key of `SHAPES`.
        precision: `bf16`, `int8` or `nf4`.
        device: the device that draws the weights, and that holds them unless the next option says otherwise.
        layers: number of blocks, instead of the model's own.
        in_host_memory: whether the weights are left in CPU memory. Only the first block is drawn then, and the others
            are copies of it in memory of their own: a model of 70 billion would take minutes to draw and to quantise.
        storage: dtype under which bitsandbytes stores 4-bit weights, `bnb_4bit_quant_storage` of transformers.
    """
    import accelerate
    import transformers

    config = shaped(name, layers)
    # Gemma 2 caps its attention scores, which the fused kernels leave out.
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    # Buffers keep their data, since only their constructors fill such tables and scales.
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    home = torch.device("cpu") if in_host_memory else device
    first = {} if in_host_memory else None
    for path, module in list(model.named_modules()):
        if precision != "bf16" and path.rpartition(".")[2] in PROJECTIONS:
            layer = _once(first, path, lambda module=module: quantized_linear(module, precision, device, home, storage))
            model.set_submodule(path, layer)
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                shape = parameter.shape
                module._parameters[key] = _once(
                    first, f"{path}.{key}", lambda shape=shape: random_parameter(shape, device, home)
                )
    for module in model.modules():
        module._buffers.update({k: None if b is None else b.to(home) for k, b in module._buffers.items()})
    model.tie_weights()
    if lost := [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise RuntimeError(f"{lost[0]} has no data; this version of transformers lays the model out in another way")
    return model.requires_grad_(False)


def _once(first: dict | None, path: str, make: Callable):
    """Make a parameter or layer, or copy that of the first block if `first` keeps them by their path in a block."""
    if first is None:
        return make()
    place = re.sub(r"\.\d+\.", ".", path)
    if place not in first:
        first[place] = make()
        return first[place]
    made = copy.deepcopy(first[place])
    if hasattr(made, "quant_state"):
        # A copied layer of bitsandbytes has scales of its own beside those of its copied weight.
        made.quant_state, made.weight.module = made.weight.quant_state, made
    return made


def use_liger(model: nn.Module) -> None:
    """Use Liger's kernels for norms, rotary embedding and gated activation; the loss stays `loss_of`."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def random_parameter(shape: torch.Size, device: torch.device, home: torch.device | None = None) -> nn.Parameter:
    """Draw a matrix as at initialisation, or fill a vector with ones, and leave it on the device `home`."""
    data = torch.empty(shape, dtype=torch.bfloat16, device=device)
    data = data.normal_(0, 0.02) if len(shape) > 1 else data.fill_(1.0)
    return nn.Parameter(data.to(home or device), requires_grad=False)


def quantized_linear(
    plain: nn.Linear, precision: str, device: torch.device, home: torch.device, storage: torch.dtype
) -> nn.Module:
    """Build a bitsandbytes layer with random weights, of the shape of a plain one, on the device `home`."""
    import bitsandbytes as bnb

    weight = random_parameter(plain.weight.shape, device)
    sizes, bias = (plain.in_features, plain.out_features), plain.bias is not None
    if precision == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        codes, scales = codes.to(home), scales.to(home)
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        options = dict(compress_statistics=True, quant_type="nf4", quant_storage=storage)
        layer = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, device="meta", **options)
        quantised = bnb.nn.Params4bit(weight.data, requires_grad=False, module=layer, **options).to(device)
        layer.weight = quantised if home == device else quantised.to(home)
    if bias:
        layer.bias = random_parameter(plain.bias.shape, device, home)
    return layer
