"""A model and data, loaded once, on which the cells of a comparison are trained and judged.

Every method gets the same data in the same order, the same loop and the same number of trained values, and is judged as
the checkpoint that it would be published as: merged, in the base's dtype.
"""

import copy
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recipes import baselines, compiled, data, forgetting, loop, models, moving, report
from recipes.batch_loss import evaluate, mean_loss
from recipes.cells import Cell
from recipes.claims import claimed
from recipes.settings import keep_settings
from speft_optim import Masks, SparseAdamW, select_masks, sparsify


@dataclass
class Trained:
    """The trained part of a cell's model.

    Attributes:
        kind: `sparse`, `full`, or the name of an adapter.
        optimizer: the optimizer over it.
        counted: the number of `trained` values and, if there are any, `budget`, `rank` and `density`.
        adapter: peft's wrapper around the model, or None.
    """

    kind: str
    optimizer: torch.optim.Optimizer
    counted: dict
    adapter: torch.nn.Module | None = None


class Bench:
    """A model and data, loaded once for many cells.

    Args:
        args: the settings of the comparison.
        out: its folder, which keeps the texts for forgetting.
    """

    def __init__(self, args: Namespace, out: Path):
        self.args, self.out = args, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, args.dtype) if args.dtype != "auto" else models.fastest_dtype(self.device)
        base = models.resolve(args.model, cache=args.cache)
        model, self.tokenizer = models.load(base, dtype=self.dtype, device=self.device)
        self.pad_id = self.tokenizer.pad_token_id
        train, test = data.load_examples(args.data, train_limit=args.train_limit)
        self.samples = data.tokenize(self.tokenizer, train, max_length=args.max_length)
        self.test = data.tokenize(self.tokenizer, test[: args.test_limit], max_length=args.max_length)
        # Only now, since a command that could not begin must not decide over the next one's settings.
        with claimed(out / "texts.claim", wait=True):
            keep_settings(args, out)
            self.texts = forgetting.load_texts(out / "texts.json", model, self.tokenizer)
        self.base = self.judge(model)
        # Each cell trains a copy, so that no cell affects the next.
        self.pristine = model.cpu()

    @property
    def steps(self) -> int:
        """Optimizer steps of a cell."""
        per_epoch = data.steps_per_epoch(len(self.samples), self.args.batch_size * self.args.accumulation)
        return self.args.steps or max(1, round(self.args.epochs * per_epoch))

    def run(self, cell: Cell) -> dict:
        """Train and judge a cell, and return its record."""
        begin = time.perf_counter()
        torch.manual_seed(cell.seed)
        model = copy.deepcopy(self.pristine).to(self.device).requires_grad_(True)
        with _peak(self.device) as selecting:
            trained = self.attach(model, cell)
        attached = time.perf_counter()
        with _peak(self.device) as training, models.products_of(self.dtype):
            history = self.train(model, trained, cell)
        ended = time.perf_counter()
        record = asdict(cell) | trained.counted | {"steps": self.steps, "problems": len(self.samples)}
        if trained.adapter is not None:
            record["unmerged_test_loss"] = self.test_loss(model)
            model = trained.adapter.merge_and_unload()
        del trained.optimizer
        record |= self.judge(model.to(self.dtype))
        record["forgetting"] = {kind: record[f"{kind}_loss"] - self.base[f"{kind}_loss"] for kind in self.texts}
        record |= {"base": self.base, "test_problems": len(self.test)}
        record |= {"peak_bytes": training.get("bytes"), "attach_peak_bytes": selecting.get("bytes")}
        record["tokens_per_second"] = history.tokens_per_second_after(loop.READ_EVERY)
        record |= {"train_loss": history.loss, "skipped_steps": history.skipped_steps}
        record["seconds"] = {
            "attach": attached - begin,
            "train": ended - attached,
            "judge": time.perf_counter() - ended,
        }
        return record | {"workers": self.args.workers, "machine": report.machine(), "commit": commit()}

    def attach(self, model, cell: Cell) -> Trained:
        """Attach the cell's masks or adapter, and build the optimizer."""
        options = dict(lr=cell.rate, weight_decay=self.args.weight_decay)
        if cell.method == "full":
            # These are the fp32 master weights; autocast casts products.
            model.float()
            count = sum(parameter.numel() for parameter in model.parameters())
            return Trained("full", baselines.optimizer_over(model, **options), {"trained": count})
        layers = baselines.linear_layers(model)
        budget = baselines.trained_values(layers, cell.budget_rank)
        share = {"density": budget / sum(layer.weight.numel() for layer in layers.values())}
        if cell.method in baselines.ADAPTERS:
            adapter, counted = baselines.attach_adapter(model, cell.method, budget=budget, seed=cell.seed)
            optimizer = baselines.optimizer_over(model, **options)
            return Trained(cell.method, optimizer, counted | share, adapter)
        kind, salience = cell.method.split("-")
        optimizer = SPARSE[kind](self, model, salience, budget, cell.seed, options)
        count = sum(values.numel() for group in optimizer.param_groups for values in group["params"])
        if count != budget:
            raise ValueError(f"{cell.method} trains {count:,} values, not the {budget:,} of its budget")
        return Trained("sparse", optimizer, {"budget": budget, "trained": count} | share)

    def train(self, model, trained: Trained, cell: Cell) -> loop.History:
        """Train what is attached."""
        args = self.args
        if args.compile:
            compiled.compile_model(model, args.compile)
        history = loop.train(
            model,
            trained.optimizer,
            self.samples,
            steps=self.steps,
            batch_size=args.batch_size,
            accumulation=args.accumulation,
            pad_id=self.pad_id,
            warmup=args.warmup,
            schedule=args.schedule,
            clip=args.clip,
            seed=cell.seed,
            autocast=baselines.autocast_dtype(trained.kind, self.device),
            pool=args.length_pool,
            pad_multiple=args.pad_multiple,
            graphs=args.cuda_graphs,
        )
        if args.compile:
            compiled.uncompile(model)
        return history

    def test_loss(self, model) -> float:
        """Return the mean loss over the answer tokens of all test problems."""
        return evaluate(model, self.test, batch_size=self.args.judge_batch_size, pad_id=self.pad_id)

    def judge(self, model) -> dict[str, float]:
        """Return the losses of a model after freezing it: `test_loss`, and one for each kind of text."""
        model.requires_grad_(False)
        losses = {"test_loss": self.test_loss(model)}
        for kind, samples in self.texts.items():
            options = dict(batch_size=self.args.judge_batch_size, pad_id=self.pad_id)
            losses[f"{kind}_loss"] = evaluate(model, samples, **options)
        return losses


def attach_static(bench: Bench, model, salience: str, budget: int, seed: int, options: dict) -> torch.optim.Optimizer:
    """Choose masks once on training problems, attach their values, and return the optimizer."""
    masks = _choose(bench, model, salience, budget, seed)
    # The loop checks the norm of each gradient, so the optimizer need not.
    return SparseAdamW(sparsify(model, masks), on_nonfinite="ignore", **options)


def attach_moving(bench: Bench, model, salience: str, budget: int, seed: int, options: dict) -> torch.optim.Optimizer:
    """Choose masks over all weights together, let them move in training, and return the optimizer."""
    masks = _choose(bench, model, salience, budget, seed, scope="global")
    args = bench.args
    power = moving.power_for(masks.density) if args.magnitude_power is None else args.magnitude_power
    steps = dict(window=args.window, interval=args.interval)
    settings = dict(salience=salience, power=power, **steps, on_nonfinite="ignore")
    optimizer, _ = moving.attach(model, masks, **settings, **options)
    return optimizer


def _choose(bench: Bench, model, salience: str, budget: int, seed: int, **options) -> Masks:
    """Select masks on training problems that are drawn by the seed."""
    count, size = bench.args.calibration_samples, bench.args.batch_size
    batches = data.calibration_batches(bench.samples, count, size, pad_id=bench.pad_id, seed=seed)
    with models.products_of(bench.dtype):
        options = dict(salience=salience, budget=budget, seed=seed, **options)
        return select_masks(model, batches, loss=mean_loss, **options)


# From the first half of a method's name to the function that attaches it.
SPARSE: dict[str, Callable[..., torch.optim.Optimizer]] = {"static": attach_static, "moving": attach_moving}


@contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure the peak `bytes` of tensors on a GPU while the context lasts; nothing on a CPU."""
    measured: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        measured["bytes"] = torch.cuda.max_memory_allocated(device)


def commit() -> str | None:
    """Return the git commit of the source tree, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
