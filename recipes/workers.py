"""Processes that share the cells of a comparison: each takes the next cell that no other has taken."""

import time
import traceback
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from eval.records import write_json
from recipes.bench import Bench
from recipes.cells import Cell
from recipes.claims import claimed


class Worker:
    """Trains cells until none is left.

    Args:
        args: the command line.
        begin: `time.time()` as the command began.
    """

    def __init__(self, args: Namespace, begin: float):
        self.args, self.out = args, Path(args.out)
        self.end = None if args.minutes is None else begin + 60 * args.minutes
        self.longest, self.bench = 0.0, None

    def run(self, cells: list[Cell]) -> None:
        """Train the cells that have no result and that no other process has claimed."""
        for cell in tqdm(cells, desc="cells", disable=None):
            with claimed(self.out / "claims" / cell.name) as mine:
                if not mine or result_of(cell, self.out).exists() or not self.has_time():
                    continue
                self.bench = self.bench or Bench(self.args, self.out)
                self.train(cell)

    def has_time(self) -> bool:
        """Tell whether a cell would end in time that takes as long as the longest so far."""
        return self.end is None or time.time() + self.longest <= self.end

    def train(self, cell: Cell) -> None:
        """Train one cell and write its result; if it fails, write the error to a file beside."""
        # An earlier failure of this cell is forgotten.
        failure = result_of(cell, self.out).with_suffix(".error")
        failure.unlink(missing_ok=True)
        print(f"== {cell.name}", flush=True)
        begin = time.time()
        try:
            write_json(self.bench.run(cell), result_of(cell, self.out))
        except Exception:  # after any error the other cells can still be trained
            failure.write_text(traceback.format_exc(), encoding="utf-8")
            traceback.print_exc()
        self.longest = max(self.longest, time.time() - begin)


def result_of(cell: Cell, out: Path) -> Path:
    """Return the file of a cell's result."""
    return out / "cells" / f"{cell.name}.json"


def work(args: Namespace, cells: list[Cell], begin: float, number: int) -> None:
    """Run as one of several workers, with its output in a log file."""
    with (Path(args.out) / f"worker-{number}.log").open("a", buffering=1) as log, redirect_stdout(log):
        with redirect_stderr(log):
            try:
                Worker(args, begin).run(cells)
            except Exception:
                traceback.print_exc()
                raise


def watch(processes: list, cells: list[Cell], out: Path) -> None:
    """Show how many cells have results, until all workers have ended."""
    bar = tqdm(total=len(cells), desc="cells", disable=None)
    while True:
        alive = any(process.is_alive() for process in processes)
        bar.n = sum(result_of(cell, out).exists() for cell in cells)
        bar.refresh()
        if not alive:
            bar.close()
            return
        time.sleep(1)


def check_ended(processes: list, out: Path) -> None:
    """Refuse to go on if a worker ended early, since it was killed or could not load the model.

    Raises:
        ValueError: names the error of the first; the results of all trained cells are there.
    """
    if ended := [number for number, process in enumerate(processes) if process.exitcode]:
        number = ended[0]
        lines = (out / f"worker-{number}.log").read_text(encoding="utf-8").splitlines()
        raise ValueError(
            f"{len(ended)} of {len(processes)} workers ended early, the first with exit code "
            f"{processes[number].exitcode}: {lines[-1] if lines else 'no output'}; see {out}/worker-*.log, and "
            "repeat the command for the cells that are missing"
        )
