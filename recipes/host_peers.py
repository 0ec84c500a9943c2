"""Modes of the benchmark whose frozen weights are in host memory: this library's, and those of torch and accelerate.

In all of them trained values and their optimizer are on the GPU, so they differ only in how the frozen weights come to
it. For this reason LoRA's adapters are excluded from `fully_shard`, which would keep and update them in host memory.
"""

import argparse

import torch
from torch import distributed, nn

from recipes.peers import Attached, attach_lora, held_by, random_masks
from speft_optim import SparseAdamW, sparsify


def attach_streamed(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach the masks of `ours` to a model that stays in host memory; return SparseAdamW and its bytes held."""
    return _attach_offloaded(model, args, device, resident_blocks=args.resident_blocks)


def attach_lean(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach the same to a model whose blocks and head are on the GPU; in host memory are embedding and inputs."""
    return _attach_offloaded(model, args, device, resident_blocks="all", resident_head=True)


def _attach_offloaded(model: nn.Module, args: argparse.Namespace, device: torch.device, **options) -> Attached:
    masks = random_masks(model, args.density, args.masks, device)
    values = sparsify(model, masks, offload=device, **options)
    optimizer = SparseAdamW(values, lr=1e-5, state_bits=args.state_bits)
    return optimizer, held_by(optimizer)


def attach_fsdp_offload(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach LoRA and let torch's `fully_shard` keep all other weights in host memory, as a group of one process.

    Embedding, blocks and head are groups of weights of their own: each is on the GPU only while it is needed.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    optimizer, held = attach_lora(model, args, device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.init_device_mesh(device.type, (1,))
    adapters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # The benchmark calls decoder and head apart, so that each of them is the root of its weights.
    for module in (model.model.embed_tokens, *model.model.layers, model.model, model.lm_head):
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=adapters)
    return optimizer, held


def attach_accelerate_offload(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach LoRA and let accelerate's `cpu_offload` copy the weights of each frozen module for its own forward.

    Modules with adapters are left to themselves: accelerate would give their forward copies, which train nothing.
    """
    from accelerate import cpu_offload

    optimizer, held = attach_lora(model, args, device)
    for module in list(model.modules()):
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            cpu_offload(module, device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return optimizer, held


HOST_ATTACH = {
    "streamed": attach_streamed,
    "lean": attach_lean,
    "fsdp-offload": attach_fsdp_offload,
    "accelerate-offload": attach_accelerate_offload,
}
