"""The command line of `recipes.gsm8k`: defaults from presets, and checks of options.

Options that would fail minutes later are refused here, before anything is loaded.
"""

import argparse
import importlib.util

import torch

from recipes import baselines, fitting, moving, processes, ranges
from recipes.options import GROUPS
from recipes.presets import PAPER, PRESETS, preset_table

DESCRIPTION = "Sparse fine-tuning on grade-school word problems, from a pretrained model to a scored checkpoint."
# These options say how many values are trained, each in its own way.
BUDGETS = ("density", "budget", "budget_rank")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: a preset gives defaults, `--paper` overrides some, and what is typed wins over both."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gsm8k", description=DESCRIPTION)
    add_run(parser)
    for add_group in GROUPS:
        add_group(parser)
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**defaults_of(chosen))
    args = parser.parse_args(argv)
    check_typed(parser, args, chosen)
    if args.method in baselines.ADAPTERS:
        # A preset's learning rate is meant for its mask.
        args.lr = chosen.lr
    fill_in(args)
    typed = {name: getattr(args, name) for name in ("base_bits", "offload", "resident_blocks", "resident_head")}
    args.base_bits, args.offload = args.base_bits or 16, bool(args.offload)
    check(parser, args)
    if args.gpu_gb:
        vars(args).update(typed)
        print(fitting.choose(args))
        check(parser, args)
    return args


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of the run as a whole."""
    run = parser.add_argument_group("run")
    run.add_argument("--preset", choices=PRESETS, help="defaults for a known job")
    run.add_argument("--list-presets", action=ListPresets, help="print which GPU each preset fits, and stop")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print the expected peak on a GPU, from the configuration alone, and stop",
    )
    run.add_argument(
        "--paper", action="store_true", help="defaults of the SPEFT paper: lr 2e-5, 1 epoch, batch 4 x 4, length 1024"
    )
    run.add_argument("--out", default="out/gsm8k", help="folder for everything the run writes (default %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--seed", type=int, default=0, help="mask, data order and generator (default %(default)s)")


class ListPresets(argparse.Action):
    """Prints which GPU each preset fits, and ends the program, as `--help` does."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        """Print and exit."""
        print(preset_table(parse))
        parser.exit()


def defaults_of(chosen: argparse.Namespace) -> dict:
    """Return the defaults of a preset and of `--paper`, without those that a typed option replaces."""
    defaults = dict(PRESETS.get(chosen.preset, {}))
    if chosen.paper:
        defaults.update(PAPER)
    # A typed option also replaces its alternatives in a preset.
    if any(getattr(chosen, name) is not None for name in BUDGETS) or chosen.method == "full":
        for name in BUDGETS:
            defaults.pop(name, None)
    if chosen.steps is not None:
        defaults.pop("epochs", None)
    if chosen.epochs is not None or chosen.paper:
        defaults.pop("steps", None)
    # If a length was typed, the minutes of a preset do not limit it.
    if chosen.paper or chosen.steps is not None or chosen.epochs is not None:
        defaults.pop("train_minutes", None)
    return defaults


def check_typed(parser: argparse.ArgumentParser, args: argparse.Namespace, chosen: argparse.Namespace) -> None:
    """Refuse options that were typed, and not set by a preset, beside a method that they do not belong to."""
    for flag in (*BUDGETS, "targets", "state_bits"):
        if args.method == "full" and getattr(chosen, flag) is not None:
            name = flag.replace("_", "-")
            parser.error(f"--{name} belongs to a mask, and --method full trains all weights; leave out one of the two")
    if args.method in baselines.ADAPTERS and chosen.state_bits is not None:
        parser.error(f"--state-bits belongs to a mask, and --method {args.method} has none; leave out one of the two")


def fill_in(args: argparse.Namespace) -> None:
    """Set the defaults that depend on other options."""
    if args.state_bits is None:
        args.state_bits = 32
    if args.pad_multiple is None:
        args.pad_multiple = 128 if args.cuda_graphs else 32 if args.compile else 1
    if all(getattr(args, name) is None for name in BUDGETS):
        args.density = 0.01
    if args.steps is None and args.epochs is None:
        args.epochs = 3.0
    fill_in_mask(args)


def fill_in_mask(args: argparse.Namespace) -> None:
    """Set the options of the mask, which moves unless an option says otherwise."""
    if args.moving is None:
        args.moving = args.method == "sparse" and args.scope != "local" and args.salience in (None, *moving.MEASURES)
    if args.moving:
        args.interval = moving.INTERVAL if args.interval is None else args.interval
        args.window = moving.WINDOW if args.window is None else args.window
    args.salience = args.salience or ("snip" if args.moving else "gradient")
    args.scope = args.scope or ("global" if args.moving else "local")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that would otherwise fail minutes later."""
    if args.model is None or args.data is None:
        parser.error("give --model and --data, or a --preset")
    check_numbers(parser, args)
    check_method(parser, args)
    check_moving(parser, args)
    check_memory(parser, args)
    check_graphs(parser, args)


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range, and more than one number of trained entries."""
    if sum(getattr(args, name) is not None for name in BUDGETS) > 1:
        parser.error("give one of --density, --budget and --budget-rank, not both or all three")
    ranges.check(parser, args)


def check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go with the method, or with the number of processes."""
    if args.method == "full" and args.base_bits != 16:
        parser.error(
            f"--base-bits {args.base_bits} freezes the weights, and --method full trains them; leave out one of the two"
        )
    try:
        processes.check(args.accumulation)
    except ValueError as error:
        parser.error(str(error))
    if args.method in baselines.ADAPTERS:
        check_adapter(parser, args)


def check_moving(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go with masks that move, or that stay."""
    if args.moving and (args.method != "sparse" or args.scope == "local"):
        parser.error("--moving is for --method sparse in --scope global")
    if args.moving and args.salience not in moving.MEASURES:
        parser.error(f"--salience {args.salience} cannot move a mask; {' and '.join(moving.MEASURES)} can")
    if not args.moving and (args.interval or args.window):
        parser.error("--interval and --window need a moving mask; leave out the option that keeps the mask static")


def check_memory(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go with a quantised base, with `--offload`, or with counting memory beforehand."""
    if args.base_bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        parser.error(f"--base-bits {args.base_bits} needs bitsandbytes, which is missing; pip install bitsandbytes")
    for flag in ("dry_run", "gpu_gb"):
        if getattr(args, flag) and (args.method != "sparse" or args.dtype == "float32"):
            name = flag.replace("_", "-")
            parser.error(f"--{name} estimates sparse training in bfloat16; leave out --method and --dtype float32")
    if args.offload and (refusal := fitting.offload_refusal(args)):
        parser.error(refusal)
    if not args.offload and (args.resident_blocks or args.resident_head):
        parser.error("--resident-blocks and --resident-head are for --offload; give that too, or leave them out")


def check_graphs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse `--cuda-graphs` where passes cannot be replayed."""
    if args.cuda_graphs and not torch.cuda.is_available():
        parser.error("--cuda-graphs needs a CUDA device, and there is none")
    if args.cuda_graphs and args.checkpointing:
        parser.error("--checkpointing reads the random state, which --cuda-graphs cannot replay; leave one out")


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
