"""Sparse fine-tuning on grade-school word problems, from a pretrained model to a scored checkpoint.

    python -m recipes.gsm8k --preset demo
    python -m recipes.gsm8k --preset gemma2-2b --score gsm8k
    python -m recipes.gsm8k --model FOLDER --data FOLDER --density 0.01 --epochs 3 --score gsm8k_local
    python -m recipes.gsm8k --model FOLDER --data FOLDER --no-moving --salience fisher
    python -m recipes.gsm8k --model FOLDER --data FOLDER --method full
    python -m recipes.gsm8k --model FOLDER --data FOLDER --method lora --budget-rank 4 --lr 3e-3
    python -m recipes.gsm8k --preset llama3-70b --base-bits 4 --offload
    python -m recipes.gsm8k --preset llama3-8b --base-bits 4 --dry-run
    torchrun --nproc-per-node 2 -m recipes.gsm8k --preset gemma2-2b
    python -m recipes.gsm8k --list-presets

Under `--out` a run leaves `checkpoint/` (an ordinary checkpoint), `adapter.safetensors` and `masks.safetensors` (sparse
only), `run.json` and `report.png`; with `--score` also `scores_before.json` and `scores_after.json`. The same command
with `--resume` continues after an interruption. If training had finished and a later stage was interrupted or failed,
the same command repeats only the later stages.

**The learning rate matters most**, and no single rate fits every method and model. The best ones of a sweep on
SmolLM2-135M and GSM8K: for moving masks 7e-4 with 9 % of the target weights and 2.5e-3 with 1 %; for static masks 1e-3,
and 3e-3 to 1e-2; for full fine-tuning 1e-4. A step of Adam changes each entry by about the learning rate, whatever the
gradient, so the default scales these rates with the magnitude of the model's weights, to keep the relative change the
same. Gemma 3 270M, whose weights are a fifth as large, shows why: at SmolLM2's 2.7e-3 its loss on GSM8K rises from 1.6
to 2.6 in ten steps, at 1e-3 it falls to 1.39, at 3e-4 to 1.05, at 1e-4 to 1.03. Larger models have not been measured:
watch the loss of the first steps, or sweep. `--paper` sets the rate and recipe of the SPEFT paper instead.
"""

import argparse
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

# torch's OpenMP reads this as it is loaded. By default threads that wait for one another spin, and if another program
# (a browser is enough) needs the same cores, they keep each other from working: steps took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __package__ in (None, ""):  # started as `python recipes/gsm8k.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from recipes import baselines, compiled, data, ending, loop, memory, models, moving, processes, report, word_problems
from recipes.command_line import parse
from recipes.presets import check_resident, configuration_of, expected_host_bytes, expected_memory
from recipes.run import MASKS, Run, is_trained, only_run
from recipes.trainable import Trained, attach
from recipes.training_state import remove_checkpoints
from speft_optim import Masks


def read_data(args: argparse.Namespace) -> tuple[list[data.Example], list[data.Example], str | None]:
    """Return training problems, test problems, and the folder they are in, if any."""
    if args.data == "generator":
        count = args.train_limit or 4000
        folder = str(Path(args.out) / "data")
        word_problems.write(folder, train=count, test=max(args.held_out, args.score_limit or 256), seed=args.seed)
        return *data.load_examples(folder), folder
    train, test = data.load_examples(args.data, train_limit=args.train_limit, held_out=args.held_out)
    return train, test, args.data if Path(args.data).is_dir() else None


@dataclass
class Job:
    """A model and its data, ready to be trained.

    Attributes:
        base: folder of the base checkpoint.
        model: on its device, or in CPU memory with `--offload`; after training without an adapter around its layers.
        tokenizer: its tokenizer, with a pad token.
        samples: training problems as tokens.
        held_out: problems for the held-out loss as tokens.
        dtype: dtype of the weights that are not quantised.
        steps: optimizer steps that were asked for.
    """

    base: Path
    model: torch.nn.Module
    tokenizer: object
    samples: list[data.Sample]
    held_out: list[data.Sample]
    dtype: torch.dtype
    steps: int

    @property
    def pad_id(self) -> int:
        """The token that pads."""
        return self.tokenizer.pad_token_id


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Choose the dtype of the weights: bf16 will do for a mask, whose values are fp32; AdamW loses small steps."""
    if args.method == "full" and args.dtype == "bfloat16":
        warnings.warn("all weights in bfloat16: steps below half a rounding step of a weight are lost", stacklevel=2)
    if args.dtype != "auto":
        return models.DTYPES[args.dtype]
    return torch.float32 if args.method == "full" else models.fastest_dtype(device)


def prepare(run: Run, base: Path, train_problems: list[data.Example], test_problems: list[data.Example]) -> Job:
    """Load the model and tokenise the problems."""
    args, record = run.args, run.record
    device = processes.device()
    with run.stage("prepare"):
        torch.manual_seed(args.seed)
        dtype = models.DTYPES[record["dtype"]] if "dtype" in record else choose_dtype(args, device)
        record["dtype"] = str(dtype).removeprefix("torch.")
        model, tokenizer = models.load(base, dtype=dtype, device=device, bits=args.base_bits, offload=args.offload)
        samples = data.tokenize(tokenizer, train_problems, max_length=args.max_length)
        held_out = data.tokenize(tokenizer, test_problems[: args.held_out], max_length=args.max_length)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        per_epoch = data.steps_per_epoch(len(samples), args.batch_size * args.accumulation)
        steps = args.steps or max(1, round(args.epochs * per_epoch))
    return Job(base, model, tokenizer, samples, held_out, dtype, steps)


def window_options(args: argparse.Namespace, model) -> dict:
    """Return the options of a step: its batches and how they are computed."""
    return dict(
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        seed=args.seed,
        autocast=baselines.autocast_dtype(args.method, model.device),
        pool=args.length_pool,
        pad_multiple=args.pad_multiple,
    )


def fitting_steps(run: Run, job: Job, optimizer: torch.optim.Optimizer) -> int:
    """Return how many of the steps fit into `--train-minutes`, at least one; all of them without that option."""
    args = run.args
    if args.train_minutes is None:
        return job.steps
    with run.stage("try a step"), models.products_of(job.dtype):
        options = window_options(args, job.model)
        seconds = loop.seconds_per_step(job.model, optimizer, job.samples, pad_id=job.pad_id, **options)
        fit = int(60 * args.train_minutes / seconds)
    return processes.agreed(max(1, min(job.steps, fit)))


def try_ending(run: Run, job: Job, trained: Trained) -> None:
    """Write all files of the run once before training, so that it does not fail after it."""
    args, masks = run.args, trained.masks
    with run.stage("try the ending"):
        targeted = sum(mask.shape.numel() for mask in (masks or {}).values())
        moves = 0 if trained.schedule is None else moving.saved_bytes(targeted, masks.count)
        ending.check_space(run.out, ending.expected_bytes(job.model, masks, args.state_bits, moves))
        # PiSSA subtracts its start from the weights, which rounds them.
        options = dict(out=run.out, salience=args.salience, exact=args.method != "pissa")
        ending.rehearse(job.model, job.tokenizer, trained.optimizer, masks=masks, base=job.base, **options)


def train(run: Run, job: Job, trained: Trained) -> None:
    """Train, or load the last state if training is over, and merge an adapter."""
    args, record = run.args, run.record
    with run.stage("train"), models.products_of(job.dtype):
        history = loop.train(
            job.model,
            trained.optimizer,
            job.samples,
            steps=record["steps"],
            pad_id=job.pad_id,
            warmup=args.warmup,
            schedule=args.schedule,
            clip=args.clip,
            checkpoint_folder=run.out / "resume",
            checkpoint_every=args.checkpoint_every,
            resume=run.resumes,
            graphs=args.cuda_graphs,
            **window_options(args, job.model),
        )
        note_training(record, history, job, trained)
    if args.compile:
        compiled.uncompile(job.model)
    if trained.adapter is not None:
        job.model = trained.adapter.merge_and_unload()


def note_training(record: dict, history: loop.History, job: Job, trained: Trained) -> None:
    """Record the history of training, and the optimizer's memory."""
    record |= {"history": vars(history), "tokens_per_second": history.tokens_per_second}
    record["steady_tokens_per_second"] = history.tokens_per_second_after(loop.READ_EVERY)
    if record["steps"] > loop.READ_EVERY:
        print(f"{record['steady_tokens_per_second']:.0f} tokens/s without the first {loop.READ_EVERY} steps")
    if trained.schedule is not None:
        # These are all entries that can differ from the base.
        trained.masks = trained.schedule.ever_trained()
        record["mask"]["ever_trained"] = trained.masks.count
    record["optimizer_bytes"] = {
        "held": report.optimizer_bytes(trained.optimizer, trained.masks),
        "adamw": report.adamw_bytes(job.model),
    }


def save(run: Run, job: Job, masks: Masks | None) -> dict[str, str]:
    """Write adapter, checkpoint and picture, one stage each; return the paths of all files of the run."""
    record, out = run.record, run.out
    files = {"checkpoint": str(out / "checkpoint")}
    if masks is not None:
        with run.stage("save the adapter"):
            record["adapter_sha256"] = ending.save_masked_entries(job.model, out, run.args.salience)
        files |= {"adapter": str(out / "adapter.safetensors"), "masks": str(out / MASKS)}
    with run.stage("save the checkpoint"):
        ending.save_model(job.model, job.tokenizer, out)
        record["moved"] = report.moved_share(job.base, out / "checkpoint", masks, job.model)
    with run.stage("draw"):
        held_out = (record["held_out_loss"]["before"], record["held_out_loss"]["after"])
        title = f"{run.args.model}, {report.trained_line(record)}"
        report.draw(record["history"]["loss"], held_out, masks, record["moved"]["change"], out / "report.png", title)
    return files | {"picture": str(out / "report.png"), "record": str(out / "run.json")}


def main(argv: list[str] | None = None) -> dict:
    """Load, calibrate, select, attach, try the ending, train, save and report; return the record in run.json.

    With `--dry-run` it returns what a run needs, and does nothing else.
    """
    args = parse(argv)
    if args.dry_run:
        moments = expected_memory(args)
        print(memory.describe(moments))
        if args.offload:
            print(f"host memory {expected_host_bytes(args) / memory.GIB:.2f} GiB for weights and inputs of blocks")
        return moments
    if args.resident_blocks:
        check_resident(args, configuration_of(args))
    models.check_folder(args.model)
    memory.let_segments_grow()
    with processes.joined(), only_run(Path(args.out)):
        return work(args)


def work(args: argparse.Namespace) -> dict:
    """Do the work of a run, of several processes each its share; return the record."""
    run = Run(args)
    record, out = run.record, run.out
    with processes.first_before_others(), run.stage("load"):
        base = models.resolve(args.model, cache=args.cache)
        train_problems, test_problems, data_folder = read_data(args)
    run.score("before", base, data_folder)
    job = prepare(run, base, train_problems, test_problems)
    if not args.offload:
        run.measure_loss("before", job.model, job.held_out, job.pad_id)

    trained = attach(run, job.model, job.samples, job.pad_id, job.dtype)
    if args.offload:
        # Only now the device computes with the weights. The values are still those of the base.
        run.measure_loss("before", job.model, job.held_out, job.pad_id)
    if args.compile:
        compiled.compile_model(job.model, args.compile)
    # A resumed run takes the number of steps from the record, which also tells whether training is over.
    record["steps"] = record.get("steps") or fitting_steps(run, job, trained.optimizer)
    if processes.is_first() and not is_trained(record, out):
        try_ending(run, job, trained)
    train(run, job, trained)
    # From here on each result is written at once, and a run that stops begins here from the last state.
    run.measure_loss("after", job.model, job.held_out, job.pad_id)
    if not processes.is_first():
        return record
    files = save(run, job, trained.masks)
    del job, trained
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
