"""The cost of salience estimation beside plain training passes, on a random model of a real shape.

Run as `python -m recipes.benchmark salience`. The row `plain` is the floor: the same batches forward and backward with
frozen weights and a dense gradient of each targeted weight, freed at once. With all accumulators in one group a
gradient measure should cost at most 1.15 times that. For a model larger than the GPU, which has no such floor:

    python -m recipes.benchmark salience --offload --memory-limit 24 --memory-budget 8 --batches 8

There the bus limits the speed: 64 batches take eight times as long. `peak_gib` is all memory on the GPU.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from recipes.salience import PeakMemory
from speft_optim import MEASURES, find_targets, select_masks


def add_arguments(parser: argparse.ArgumentParser, shapes: list[str]) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("--shape", choices=shapes, default="llama3-8b", help="model (default %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks, instead of the model's own")
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=["plain", *sorted(MEASURES)],
        help="rows to measure (default plain gradient; gradient with --offload)",
    )
    parser.add_argument("--batches", type=int, default=64, help="calibration batches (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (default %(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens in each (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="share of entries to keep (default %(default)s)")
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--memory-budget", type=float, help="GB for estimation (default half of the GPU's free memory)")
    parser.add_argument("--memory-limit", type=float, help="use only so many GB of the GPU")
    parser.add_argument(
        "--offload", action="store_true", help="weights stay in CPU memory and are copied to the GPU block by block"
    )
    parser.add_argument("--out", default="out/benchmark", help="folder for salience_cost.jsonl (default %(default)s)")


def run(args: argparse.Namespace, build: Callable[..., nn.Module]) -> list[dict]:
    """Measure each row, print it, and append it to the file as a line of JSON.

    Raises:
        ValueError: `plain` is asked for under `--offload`.
    """
    measures = args.measures or (["gradient"] if args.offload else ["plain", "gradient"])
    if args.offload and "plain" in measures:
        raise ValueError("plain passes need the model on the GPU; leave plain or --offload out.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(args.shape, "bf16", device, args.layers)
    if args.offload:
        # The model was built on the GPU, which draws random numbers fastest.
        model = model.to("cpu")
    batches = random_batches(args, model.config.vocab_size)
    # The first pass of a process also loads libraries and kernels, so it is not counted.
    if not args.offload:
        plain_passes(model, batches[:1], device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in measures:
        rows.append(measure(name, model, batches, args, device))
        print(json.dumps(rows[-1]), flush=True)
        with open(out / "salience_cost.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def random_batches(args: argparse.Namespace, vocabulary: int) -> list[dict]:
    """Draw batches of random tokens."""
    generator, size = torch.Generator().manual_seed(0), (args.batch, args.seq)
    ids = [torch.randint(0, vocabulary, size, generator=generator) for _ in range(args.batches)]
    return [{"input_ids": row, "labels": row} for row in ids]


def measure(name: str, model: nn.Module, batches: list[dict], args: argparse.Namespace, device: torch.device) -> dict:
    """Measure one row: seconds, passes and memory, and the settings that they depend on."""
    with PeakMemory(device) as peak:
        begin = time.perf_counter()
        passes = _one(name, model, batches, args, device)
    seconds = time.perf_counter() - begin
    settings = ("shape", "layers", "batches", "batch", "seq", "memory_budget", "memory_limit", "offload")
    return {
        "measure": name,
        "seconds": round(seconds, 2),
        "seconds_a_pass": round(seconds / max(1, passes), 2),
        "passes": passes,
        "peak_beyond_model_gib": round(peak.bytes / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{key: vars(args)[key] for key in settings},
    }


class _Counted(list):
    """A list that counts how often it is iterated."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def _one(name: str, model: nn.Module, batches: list[dict], args: argparse.Namespace, device: torch.device) -> int:
    """Run one row, and return how many passes over the batches it took."""
    if name == "plain":
        plain_passes(model, batches, device)
        return 1
    counted = _Counted(batches)
    select_masks(
        model,
        counted,
        salience=name,
        density=args.density,
        scope=args.scope,
        memory_budget=None if args.memory_budget is None else int(args.memory_budget * 10**9),
        offload=device if args.offload else None,
    )
    return counted.passes


def plain_passes(model: nn.Module, batches: list[dict], device: torch.device) -> None:
    """Run forward and backward with a dense gradient of each targeted weight, freed as soon as it is complete."""

    def free(parameter: torch.Tensor) -> None:
        parameter.grad = None

    weights = [target.parameter for target in find_targets(model).values()]
    # Estimation runs in evaluation mode too.
    model.eval()
    hooks = []
    for weight in weights:
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(free))
    for batch in batches:
        model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
    for hook, weight in zip(hooks, weights, strict=True):
        hook.remove()
        weight.requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.synchronize()
