"""Presets: the defaults of known jobs, and the GPU that each of them fits."""

import argparse
from collections.abc import Callable

from transformers import PretrainedConfig

from recipes import memory, models, moving, shapes

METAMATH = {"data": "meta-math/MetaMathQA", "train_limit": 100_000, "checkpointing": True, "state_bits": 8}
PRESETS = {
    "gemma2-2b": {"model": "google/gemma-2-2b", "budget": 25_559_040, **METAMATH},
    "qwen2-7b": {"model": "Qwen/Qwen2-7B", "budget": 40_370_176, **METAMATH},
    "llama3-8b": {"model": "meta-llama/Meta-Llama-3-8B", "budget": 54_525_952, **METAMATH},
    "llama3-70b": {"model": "meta-llama/Meta-Llama-3-70B", "budget": 262_144_000, **METAMATH},
    "demo": {
        "model": "smollm2",
        "data": "generator",
        "density": 0.01,
        # It has too few steps for a mask to move more than once or twice.
        "moving": False,
        # A few minutes hold too few steps for the rate that suits whole epochs: 1.5e-3 was the best of a sweep, in 110
        # steps of 8 problems.
        "lr": 1.5e-3,
        "train_limit": 4000,
        # This is a limit; a CPU without bf16 instructions takes a quarter of these steps in the minutes below.
        "steps": 220,
        "train_minutes": 3.0,
        "batch_size": 4,
        "accumulation": 1,
        "max_length": 256,
        "calibration_samples": 32,
        "held_out": 32,
        "score": ["demo"],
        "score_limit": 64,
        "out": "out/demo",
    },
}
# The published recipe: https://arxiv.org/abs/2412.13488
PAPER = {
    "moving": False,
    "lr": 2e-5,
    "train_limit": 100_000,
    "epochs": 1.0,
    "max_length": 1024,
    "batch_size": 4,
    "accumulation": 4,
    "warmup": 0.03,
    "schedule": "linear",
    "calibration_samples": 1024,
}


# Batches of the table of presets: the recipe's own, and longer ones.
BATCHES = ((4, 512), (2, 2048), (4, 2048))


def preset_table(parse: Callable[[list[str]], argparse.Namespace]) -> str:
    """Format the expected peaks of the presets for several batches, and the smallest common GPU for each.

    Args:
        parse: the function that reads a command line.
    """
    modes = [(bits, offload) for offload in (False, True) for bits in (16, 8, 4)]
    names = [f"{bits} bits{', offload' if offload else ''}" for bits, offload in modes]
    lines = [f"| preset | entries | batch | {' | '.join(names)} |", "|---" * (3 + len(modes)) + "|"]
    for name in [name for name in PRESETS if name in shapes.SHAPES]:
        for batch, length in BATCHES:
            size, cells = [f"--batch-size={batch}", f"--max-length={length}"], []
            for bits, offload in modes:
                mode = ["--base-bits", str(bits), "--offload" if offload else "--no-offload"]
                args = parse(["--preset", name, *mode, *size])
                needed = memory.peak_bytes(expected_memory(args))
                gb = memory.smallest_gpu(needed)
                cells.append(f"{needed / memory.GIB:.1f} GiB: {f'{gb} GB' if gb else 'none'}")
            lines.append(f"| {name} | {args.budget:,} | {batch} x {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def configuration_of(args: argparse.Namespace) -> PretrainedConfig:
    """Return the configuration of the model, without fetching or loading its weights."""
    if args.preset in shapes.SHAPES and args.model == PRESETS[args.preset]["model"]:
        return shapes.configuration(args.preset)  # needs no network and no accepted licence
    return models.configuration(args.model, cache=args.cache)


def shape_of(args: argparse.Namespace) -> shapes.Shape:
    """Return the sizes of the model, from its configuration alone."""
    return shapes.Shape.of(configuration_of(args))


def check_resident(args: argparse.Namespace, config: PretrainedConfig) -> None:
    """Refuse more resident blocks than the model has.

    Raises:
        ValueError: says how many it has.
    """
    blocks = config.get_text_config().num_hidden_layers
    if (args.resident_blocks or 0) > blocks:
        raise ValueError(f"--resident-blocks is {args.resident_blocks}; the model has {blocks} blocks, so lower it")


def expected_host_bytes(args: argparse.Namespace) -> int:
    """Estimate the host memory of training with --offload, with the longest batch."""
    return memory.host_bytes(shape_of(args), bits=args.base_bits, batch=args.batch_size, length=args.max_length)


def expected_memory(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Estimate the memory of training with the longest batch, by moment and part; see `recipes.memory.estimate`."""
    config = configuration_of(args)
    check_resident(args, config)
    shape = shapes.Shape.of(config)
    sizes = shape.targets(args.targets)
    total = sum(rows * columns for rows, columns in sizes)
    entries = args.budget or sum((args.budget_rank or 0) * (rows + columns) for rows, columns in sizes)
    if entries > total:
        raise ValueError(f"--budget {entries:,} is above {total:,}, the number of targeted entries; lower it.")
    entries = entries or round(args.density * total)
    return memory.estimate(
        shape,
        bits=args.base_bits,
        entries=entries,
        batch=args.batch_size,
        length=args.max_length,
        targets=args.targets,
        state_bits=args.state_bits,
        accumulation=args.accumulation,
        checkpointing=args.checkpointing,
        sums=moving.sum_bytes(total) if args.moving else 0,
        offload=args.offload,
        resident_blocks=args.resident_blocks or 0,
        resident_head=bool(args.resident_head),
    )
