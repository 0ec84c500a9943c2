"""Models of real shapes with random weights, made on the GPU one tensor at a time, in 16, 8 or 4 bits."""

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


def build(name: str, precision: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """Build a random model of a shape: first without data, then one tensor at a time on the GPU."""
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
    for path, module in list(model.named_modules()):
        if precision != "bf16" and path.rpartition(".")[2] in PROJECTIONS:
            model.set_submodule(path, quantized_linear(module, precision, device))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = random_parameter(parameter.shape, device)
    for module in model.modules():
        module._buffers.update({k: None if b is None else b.to(device) for k, b in module._buffers.items()})
    model.tie_weights()
    if lost := [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise RuntimeError(f"{lost[0]} has no data; this version of transformers lays the model out in another way")
    return model.requires_grad_(False)


def use_liger(model: nn.Module) -> None:
    """Use Liger's kernels for norms, rotary embedding and gated activation; the loss stays `loss_of`."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def random_parameter(shape: torch.Size, device: torch.device) -> nn.Parameter:
    """Draw a matrix as at initialisation, or fill a vector with ones."""
    data = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return nn.Parameter(data.normal_(0, 0.02) if len(shape) > 1 else data.fill_(1.0), requires_grad=False)


def quantized_linear(plain: nn.Linear, precision: str, device: torch.device) -> nn.Module:
    """Build a bitsandbytes layer with random weights, of the shape of a plain one."""
    import bitsandbytes as bnb

    weight = random_parameter(plain.weight.shape, device)
    sizes, bias = (plain.in_features, plain.out_features), plain.bias is not None
    if precision == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes, bias=bias, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(device)
    if bias:
        layer.bias = random_parameter(plain.bias.shape, device)
    return layer
