"""Training on several GPUs under torch's `fully_shard`, compared with one GPU: tokens/s and peak memory per GPU.

    torchrun --nproc-per-node 2 -m recipes.benchmark several --shape llama3-8b --batch 4
    torchrun --nproc-per-node 2 -m recipes.benchmark several --shape llama3-70b --modes sharded-nf4,fsdp-qlora-nf4 \
        --density 0.002 --batch 1 --gpu-gb 24 --cpu-offload

`--batch` sequences a GPU, random weights and masks, blocks checkpointed, and the loss in chunks, as in `memory`.

    one-bf16, one-nf4          the mode `ours` on the first GPU alone, while the others wait
    sharded-bf16, sharded-nf4  the same masks, with the frozen weights divided by `fully_shard`
    fsdp-lora-bf16, fsdp-qlora-nf4  PEFT LoRA of rank --rank on the same seven, divided by `fully_shard` with the base

Values are replicated on every GPU, so that 1 % of 70 billion would take 8 GB besides half of the base. Embedding, head
and each block are sharded separately. With `--cpu-offload` each process keeps its part of them in pinned host memory;
what is trained, and its optimizer, stays on the GPU. Each mode runs in processes of its own, one a GPU; the first
prints one JSON line a mode: the slowest step and the largest peak of all GPUs.
"""

import argparse
import functools
import itertools
import os
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from recipes import processes, timed_steps
from recipes.peers import Attached, attach_lora, held_by, random_masks
from recipes.random_models import build
from speft_optim import SparseAdamW, sparsify

MODES = ["one-bf16", "sharded-bf16", "fsdp-lora-bf16", "one-nf4", "sharded-nf4", "fsdp-qlora-nf4"]


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse modes that cannot be compared as asked for."""
    modes = args.modes.split(",")
    if len(set(modes)) < len(modes):
        parser.error(f"--modes {args.modes} names a mode twice; start the command twice")
    if args.cpu_offload and (alone := [mode for mode in modes if mode.startswith("one-")]):
        parser.error(f"--cpu-offload is for sharded weights, and {alone[0]} shards none; leave it out of --modes")


def environment(mode: str) -> dict[str, str] | None:
    """Return the environment of the process that runs a mode: without the others if it uses one GPU alone."""
    if not mode.startswith("one-"):
        return None
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def start_group(mode: str, device: torch.device) -> None:
    """Form the process group of a mode. All modes share torchrun's one store, in which each has names of its own."""
    store, number, count = next(rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # If one process fails, the others wait for it no longer than this.
    options = dict(rank=number, world_size=count, timeout=timedelta(minutes=5))
    distributed.init_process_group(backend, store=distributed.PrefixStore(mode, store), **options)


def run_steps(method: str, precision: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Divide the model of a mode, take a few steps, and return the slowest times and the largest peak of all GPUs."""
    start_group(f"{method}-{precision}", device)
    torch.manual_seed(0)
    # A model may be larger than a GPU, so that it comes to it block by block, as `fully_shard` takes it.
    # Gathered under the dtype of the rest, 4-bit weights would change.
    model = build(args.shape, precision, device, args.layers, in_host_memory=True, storage=torch.float32)
    # The loss is computed in the model's own call, before which FSDP gathers what the blocks do not hold.
    model.forward = functools.partial(timed_steps.loss_of, model)
    optimizer, held = ATTACH[method](model, args, device)
    torch.manual_seed(1 + processes.number())
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=device)
    row, _ = timed_steps.train(model, optimizer, ids, device, args.steps + 2, loss=_called)
    row |= timed_steps.memory_of(device, {"trained": held})
    row = _of_all(row) | {"processes": distributed.get_world_size()} | timed_steps.software(device)
    distributed.destroy_process_group()
    return row


def _called(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)


def _of_all(row: dict) -> dict:
    """Return the row of this process with the largest times and memory of all processes."""
    rows = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, row)
    largest = ("step_ms", "optimizer_ms", "peak_gib", "reserved_gib")
    return row | {name: max(each[name] for each in rows) for name in largest if row[name] is not None}


def attach_sharded(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Divide the model, and attach the masks of `ours`, whose values are whole on every process."""
    # All processes draw the same masks: they have the same seed.
    masks = random_masks(model, args.density, args.masks, device)
    shard(model, device, cpu_offload=args.cpu_offload)
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-5, state_bits=args.state_bits)
    return optimizer, held_by(optimizer)


def attach_sharded_lora(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach LoRA and divide it with the model; return AdamW over the rows of this process, and their bytes."""
    attach_lora(model, args, torch.device("cpu"))
    for block in model.model.layers if args.cpu_offload else ():
        # As a group of their own, adapters stay on the GPU when the rest of the block leaves it.
        divide([module for module in block.modules() if _is_trained(module)], device)
    shard(model, device, cpu_offload=args.cpu_offload)
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            # `fully_shard` moves parameters alone, and kernels would read the scales in host memory.
            module.quant_state.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    return optimizer, sum(parameter.to_local().nbytes for parameter in trained)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def shard(model: nn.Module, device: torch.device, *, cpu_offload: bool) -> None:
    """Divide the model among all processes, block by block; each block's weights are asked for one block ahead."""
    parts = [model.model.embed_tokens, *model.model.layers, model.lm_head]
    for module in (*parts, model):
        divide(module, device, cpu_offload=cpu_offload)
    # By default they are gathered when the CPU reaches the block, which is late if it is hardly ahead of the GPU.
    # Groups inside the block are gathered with it: later they would wait for the weights of the next block.
    for part, following in itertools.pairwise(parts):
        part.set_modules_to_forward_prefetch(_groups_of(following))


def _groups_of(part: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in part.modules() if isinstance(module, FSDPModule)]


def divide(modules: nn.Module | list[nn.Module], device: torch.device, *, cpu_offload: bool = False) -> None:
    """Divide what modules hold among all processes as one group, perhaps into parts in pinned host memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    fully_shard(modules, mesh=mesh, offload_policy=policy)


def add_rates(row: dict, args: argparse.Namespace, alone: dict | None) -> dict:
    """Add tokens a second of each GPU, and its share of those of one GPU alone, where that was measured."""
    if "error" in row:
        return row
    row["tokens_per_second_a_gpu"] = round(args.batch * args.seq / row["step_ms"] * 1e3, 1)
    if alone and "error" not in alone:
        row["scaling"] = round(row["tokens_per_second_a_gpu"] / alone["tokens_per_second_a_gpu"], 3)
    return row


def table(rows: list[dict]) -> str:
    """Format the rows for people."""
    lines = [
        "| mode | GPUs | trained | ms a step | tokens/s a GPU | of one GPU's | peak GiB a GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['mode']} | - | - | - | - | - | {row['error']} |")
            continue
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        cells = [row["mode"], str(row.get("processes", 1)), f"{row['trained']:,}", f"{row['step_ms']:.0f}"]
        cells += [f"{row['tokens_per_second_a_gpu']:.0f}", f"{row['scaling']:.2f}" if "scaling" in row else "-", peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


ATTACH = {"sharded": attach_sharded, "fsdp-lora": attach_sharded_lora, "fsdp-qlora": attach_sharded_lora}
