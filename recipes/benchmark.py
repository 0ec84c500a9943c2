"""Memory and step time of sparse fine-tuning beside its peers: each mode in a process of its own.

    python -m recipes.benchmark memory --shape llama3-8b
    python -m recipes.benchmark memory --shape qwen2-7b --modes ours-int8,ours-nf4 --batch 1 --gpu-gb 12
    python -m recipes.benchmark memory --shape llama3-8b --layers 2 --batch 1 --seq 64     # a trial, also on a CPU
    python -m recipes.benchmark memory --shape llama3-70b --modes streamed-nf4 --gpu-gb 24
    torchrun --nproc-per-node 2 -m recipes.benchmark several --batch 4                     # see recipes.several

Random weights of the model's shape, built tensor by tensor: neither memory nor time depends on their values. Masks are
uniform, the worst case for the sampled gradient, or with `--masks gradient` concentrated in few rows and columns, as
those that gradients choose. Blocks are checkpointed (not reentrant) and the loss is taken in chunks (`recipes.loss`),
for every mode alike.

    frozen-bf16, -int8, -nf4   forward and input gradients only: the floor that no method can beat; the quantised ones
                               through speft_optim's layer
    ours-bf16, -int8, -nf4     SparseAdamW on the seven projections of each block at --density
    moving-bf16, -nf4          the same with masks that move: a group of weights sums its gradients (see
                               `recipes.moving`), and every few steps a selection adds `selection_ms` to the step
    lora-bf16, qlora-nf4       PEFT LoRA of rank --rank on the same seven, adapters in bf16
    streamed-bf16, -int8, -nf4 as ours, with the frozen weights in host memory (`sparsify(..., offload=)`)
    lean-bf16, -int8, -nf4     as streamed, with all blocks and the head on the GPU (`resident_blocks="all"`): embedding
                               and inputs of blocks are in host memory
    fsdp-offload-bf16          as lora, with the frozen weights in host memory by torch's fully_shard (CPUOffloadPolicy)
    accelerate-offload-bf16    as lora, with the frozen weights in host memory by accelerate's cpu_offload

`--liger` puts Liger's kernels for norms, rotary embedding and gated activation into every mode alike
(`pip install liger-kernel`); the estimate is that of transformers' own, which keep a little more for backward.

`--gpu-gb` gives each mode as much of the GPU as a smaller one has; running out of memory is then a result like others.
Prints one JSON line a mode, then a table with the estimate of `recipes.memory` beside each peak; writes `memory.json`
and a stacked-bar `memory.png` to --out.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # started as `python recipes/benchmark.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval.records import write_json
from recipes import host_memory, moving, processes, ranges, salience_cost, several, timed_steps
from recipes.apart import ending_together, run_apart, run_together
from recipes.benchmark_report import draw, table
from recipes.host_peers import HOST_ATTACH
from recipes.memory import GIB, GPU_SIZES, estimate, host_bytes, let_segments_grow, peak_bytes, usable_bytes
from recipes.presets import check_resident
from recipes.random_models import build, shaped
from recipes.shapes import SHAPES, Shape

MODES = [
    "frozen-bf16",
    "ours-bf16",
    "moving-bf16",
    "lora-bf16",
    "frozen-int8",
    "ours-int8",
    "frozen-nf4",
    "ours-nf4",
    "moving-nf4",
    "qlora-nf4",
    "streamed-bf16",
    "streamed-int8",
    "streamed-nf4",
    "lean-bf16",
    "lean-int8",
    "lean-nf4",
    "fsdp-offload-bf16",
    "accelerate-offload-bf16",
]
BITS = {"bf16": 16, "int8": 8, "nf4": 4}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmark", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="peak memory and step time, with peers")
    add_arguments(memory, MODES)
    memory.add_argument("--liger", action="store_true", help="Liger's norms, rotary embedding and gated activation")
    memory.add_argument(
        "--resident-blocks", type=int, default=0, help="blocks on the GPU in the streamed modes (default %(default)s)"
    )
    on_several = commands.add_parser("several", help=several.__doc__.split("\n")[0])
    add_arguments(on_several, several.MODES)
    on_several.add_argument(
        "--cpu-offload", action="store_true", help="divided frozen weights in host memory, by CPUOffloadPolicy"
    )
    salience_cost.add_arguments(
        commands.add_parser("salience", help=salience_cost.__doc__.split("\n")[0]), list(SHAPES)
    )
    args = parser.parse_args(argv)
    ranges.check(parser, args)
    if args.command != "salience":
        check(parser, args)
    return args


def add_arguments(parser: argparse.ArgumentParser, modes: list[str]) -> None:
    """Add the options that the modes on one GPU and on several have."""
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="model (default %(default)s)")
    parser.add_argument("--modes", default=",".join(modes), help="comma-separated (default all: %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks, instead of the model's own")
    parser.add_argument("--batch", type=int, default=2, help="sequences on a GPU (default %(default)s)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in each (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.01, help="share of the seven (default %(default)s)")
    parser.add_argument(
        "--masks", choices=["uniform", "gradient"], default="uniform", help="how entries lie (default %(default)s)"
    )
    parser.add_argument("--state-bits", type=int, choices=[8, 32], default=8, help="moments (default %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps after two more (default %(default)s)")
    parser.add_argument("--gpu-gb", type=int, choices=GPU_SIZES, help="simulate a GPU of so many GB")
    parser.add_argument("--out", default="out/benchmark", help="folder for the results (default %(default)s)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(liger=False, resident_blocks=0)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that need other hardware or packages, and unknown modes."""
    if args.gpu_gb and not torch.cuda.is_available():
        parser.error(f"--gpu-gb {args.gpu_gb} simulates a small GPU on a larger one, but there is no CUDA device")
    if args.liger and not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        parser.error("--liger needs a CUDA device and the package: pip install liger-kernel")
    try:
        check_resident(args, shaped(args.shape, args.layers))
    except ValueError as error:
        parser.error(str(error))
    known = several.MODES if args.command == "several" else MODES
    if unknown := [mode for mode in args.modes.split(",") if mode not in known]:
        parser.error(f"--modes names {unknown[0]!r}; it takes {', '.join(known)}")
    if args.command == "several":
        several.check(parser, args)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the modes one after the other, each in its own process, and report."""
    let_segments_grow()
    args = parse(argv)
    if args.command == "salience":
        if args.memory_limit:
            timed_steps.limit_memory(args.memory_limit * 10**9)
        return salience_cost.run(args, build)
    modes, words = args.modes.split(","), sys.argv[1:] if argv is None else argv
    if args.in_process:
        rows = [(measure_several if args.command == "several" else measure)(mode, args) for mode in modes]
        print(json.dumps(rows[0]), flush=True)
        return rows
    return (report_several if args.command == "several" else report)(modes, words, args)


def report(modes: list[str], words: list[str], args: argparse.Namespace) -> list[dict]:
    """Run each mode on one GPU and report."""
    rows, out = [], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for mode in modes:
        rows.append(run_apart(mode, words))
        print(json.dumps(rows[-1]), flush=True)
        write_json({"arguments": vars(args), "rows": rows}, out / "memory.json")
    print(table(rows))
    good = [row for row in rows if "error" not in row]
    if good:
        liger = ", Liger" if args.liger else ""
        draw(good, out / "memory.png", f"{args.shape}, {args.batch} x {args.seq} tokens{liger}, {good[0]['gpu']}")
        print(out / "memory.png")
    return rows


def report_several(modes: list[str], words: list[str], args: argparse.Namespace) -> list[dict]:
    """Run each mode on all GPUs; the first process reports."""
    rows, alone, out = [], {}, Path(args.out)
    for mode in modes:
        if mode.startswith("one-") and not processes.is_first():
            continue  # The others meet the first process again in the next mode.
        environment = several.environment(mode)
        row = run_apart(mode, words, environment) if environment else run_together(mode, words)
        precision = mode.rpartition("-")[2]
        rows.append(several.add_rates(row, args, alone.get(precision)))
        if mode.startswith("one-"):
            alone[precision] = row
        if processes.is_first():
            print(json.dumps(row), flush=True)
            out.mkdir(parents=True, exist_ok=True)
            write_json({"arguments": vars(args), "rows": rows}, out / "several.json")
    if processes.is_first():
        print(several.table(rows))
    return rows


def measure_several(mode: str, args: argparse.Namespace) -> dict:
    """Measure one mode in this process of several; an error of any ends all of them."""
    method, _, precision = mode.rpartition("-")
    if method == "one":
        return measure(f"ours-{precision}", args) | {"mode": mode}
    row = {"mode": mode, "shape": args.shape, "tokens": [args.batch, args.seq], "simulated_gb": args.gpu_gb}
    device = processes.device()
    shape = Shape.of(shaped(args.shape, args.layers))
    # Every process builds the whole model, which `fully_shard` then takes apart. A part in pinned memory is half of a
    # weight that has left, or less, and takes no more room than it, though torch rounds sizes up to powers of two.
    needed = processes.count() * host_bytes(shape, bits=BITS[precision], batch=0, length=0)
    with ending_together(mode) as end:
        row |= attempt(lambda: several.run_steps(method, precision, args, device), args, needed)
        if "error" in row:
            end(row["error"])
    return row


def measure(mode: str, args: argparse.Namespace) -> dict:
    """Measure one mode beside its estimate; running out of memory becomes a row too."""
    method, _, precision = mode.rpartition("-")
    device = processes.device()
    row = {"mode": mode, "shape": args.shape, "tokens": [args.batch, args.seq], "simulated_gb": args.gpu_gb}
    if method in ("ours", "moving", "streamed", "lean"):
        row["masks"] = args.masks
    shape, bits, needed = Shape.of(shaped(args.shape, args.layers)), BITS[precision], 0
    if method in ("ours", "moving", "frozen", "streamed", "lean"):
        row["estimate_gib"] = round(peak_bytes(estimated(shape, method, bits, args)) / GIB, 3)
    if method in HOST_ATTACH:
        needed = host_bytes(shape, bits=bits, batch=args.batch, length=args.seq)
        row["host_estimate_gib"] = round(needed / GIB, 3)
    return row | attempt(lambda: timed_steps.run_steps(method, precision, args, device), args, needed)


def attempt(run: Callable[[], dict], args: argparse.Namespace, needed: int) -> dict:
    """Return what a mode measures on a GPU of the size asked for, or the error if memory is short.

    Args:
        run: takes the steps of the mode.
        args: the options.
        needed: bytes of host memory that the mode needs for a model there; 0 if none is.
    """
    if needed and (lacking := host_memory.shortage(needed)):
        return {"error": lacking}
    if args.gpu_gb:
        timed_steps.limit_memory(usable_bytes(args.gpu_gb))
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def estimated(shape: Shape, method: str, bits: int, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Estimate the memory of a mode; see `recipes.memory.estimate`."""
    total = sum(rows * columns for rows, columns in shape.targets())
    return estimate(
        shape,
        bits=bits,
        entries=0 if method == "frozen" else round(args.density * total),
        batch=args.batch,
        length=args.seq,
        state_bits=args.state_bits,
        sums=moving.sum_bytes(total) if method == "moving" else 0,
        offload=method in ("streamed", "lean"),
        resident_blocks=shape.layers if method == "lean" else args.resident_blocks,
        resident_head=method == "lean",
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
