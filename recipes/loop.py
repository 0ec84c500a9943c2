"""One training loop for every method, so that compared runs differ only in the method.

The loop knows a model, an optimizer and samples. All parameters that require a gradient are trained: the compact values
of a sparse mask, all weights, or an adapter. One optimizer step sees one *window* of `batch_size * accumulation`
samples, and its loss is the mean over all label tokens of the window. Averaging the micro-batches' means instead would
weigh a token by the batch that it is in, and training would change with the accumulation.

Interrupted training continues from its last state (`recipes.training_state`). The position in the data and the learning
rate are functions of the step number and need no state.
"""

import itertools
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from recipes import processes
from recipes.baselines import casts_by_autocast
from recipes.batch_loss import device_of
from recipes.data import Sample, sample_windows
from recipes.passes import Passes, ReplayedPasses
from recipes.random_state import random_state, restore_random_state
from recipes.training_state import History, load_checkpoint, newest_checkpoint, save_checkpoint
from recipes.updates import Updates, accumulate
from recipes.windows import prepare

# Losses are read from the device every so many steps.
READ_EVERY = 10
SCHEDULES = ("linear", "cosine", "constant")


def rate_factor(step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """Return the share of the peak learning rate at `step` (from 0): linear warm-up, then decay to 0 or constant.

    Args:
        step: the step about to be taken.
        steps: all steps of the run.
        warmup: share of the steps that warm up.
        schedule: one of `SCHEDULES`.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    if schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch_size: int,
    pad_id: int,
    accumulation: int = 1,
    warmup: float = 0.03,
    schedule: str = "linear",
    clip: float | None = 1.0,
    seed: int = 0,
    checkpoint_folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    autocast: torch.dtype | None = None,
    pool: int = 1,
    pad_multiple: int = 1,
    graphs: bool = False,
) -> History:
    """Train whatever in `model` requires a gradient.

    Args:
        model: a causal language model of transformers, on its device, or sparsified with `offload`.
        optimizer: over the trained tensors; the rates in its groups are the peak rates.
        samples: tokenised training problems, passed over as often as `steps` asks.
        steps: optimizer steps of the whole run, those before a resume included.
        batch_size: samples in one forward pass.
        pad_id: token to pad with.
        accumulation: forward passes in one optimizer step.
        warmup: share of the steps that warm up.
        schedule: one of `SCHEDULES`.
        clip: largest norm of the gradient over all trained tensors; None does not clip.
        seed: decides the order of the data.
        checkpoint_folder: folder for the training state, which is always written after the last step, so that nothing
            after training can lose it; only the newest complete one is kept. None writes no state.
        checkpoint_every: also write the state every so many steps. None writes it after the last step only.
        resume: whether to go on from the state in `checkpoint_folder`, if there is one.
        autocast: dtype of autocast, for fp32 weights in mixed precision; None for no autocast.
        pool: windows within which samples of similar length come together; see `sample_windows`.
        pad_multiple: lengths are padded to a multiple of this, so that shapes repeat.
        graphs: whether batches whose shape came before are replayed as CUDA graphs, see `recipes.passes`.

    Returns:
        The history of the whole run.
    """
    _check(
        samples, steps, batch_size, accumulation, warmup, schedule, clip, checkpoint_every, checkpoint_folder, resume
    )
    passes = Passes(model, autocast)
    if graphs:
        passes = ReplayedPasses(model, autocast, getattr(optimizer, "schedule", None))
    updates = Updates(optimizer, passes, clip)
    start = _resume(checkpoint_folder, model, updates, steps) if resume else 0
    history = updates.history
    model.train()
    windows = (
        prepare(window, batch_size, pad_id=pad_id, device=passes.device, multiple=pad_multiple)
        for window in sample_windows(samples, batch_size * accumulation, seed=seed, start=start, pool=pool)
    )
    with passes.on_stream(), casts_by_autocast(model, autocast):
        window = next(windows) if start < steps else None
        for step in (bar := _bar(start, steps)):
            begin = time.perf_counter()
            updates.set_rates(rate_factor(step, steps, warmup=warmup, schedule=schedule))
            norm = updates.backward(window)
            # A GPU still computes the gradients while the next window is prepared.
            present, window = window, next(windows) if step + 1 < steps else None
            updates.step(step, norm, present)
            is_last, tells = step + 1 == steps, (step + 1) % max(1, steps // 10) == 0
            is_due = is_last or (checkpoint_every is not None and (step + 1) % checkpoint_every == 0)
            keeps = checkpoint_folder is not None and is_due
            if keeps or tells or is_last or (step + 1) % READ_EVERY == 0:
                updates.read_losses()
                bar.set_postfix(loss=f"{history.loss[-1]:.4f}", norm=f"{history.grad_norm[-1]:.2f}")
            history.step_seconds.append(time.perf_counter() - begin)
            if bar.disable and tells:  # a log file gets ten lines instead of a bar
                _print_progress(step + 1, steps, history)
            if keeps:
                _share_sums(optimizer)
                if processes.is_first():
                    _keep_state(checkpoint_folder, model, optimizer, history, step + 1)
    return history


def _resume(folder: str | Path, model: nn.Module, updates: Updates, steps: int) -> int:
    """Load the newest state in the folder, if there is one, and return how many steps were taken before it."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return 0
    updates.history, start = load_checkpoint(checkpoint, model, updates.optimizer)
    if start > steps:
        raise ValueError(
            f"the checkpoint {checkpoint} is at step {start}, beyond the {steps} asked for; raise the steps"
        )
    return start


def _bar(start: int, steps: int) -> tqdm:
    """Return the steps to take, under a progress bar where the first process has a terminal."""
    disable = None if processes.is_first() else True
    return tqdm(range(start, steps), desc="train", initial=start, total=steps, disable=disable)


def _print_progress(step: int, steps: int, history: History) -> None:
    speed = f"{history.tokens_per_second:.0f} tokens/s"
    print(f"step {step}/{steps}  loss {history.loss[-1]:.4f}  {speed}", flush=True)


def _share_sums(optimizer: torch.optim.Optimizer) -> None:
    """Let the first process save a window's sums of all; each of them calls this."""
    if (schedule := getattr(optimizer, "schedule", None)) is not None:
        schedule.share_sums()


def _keep_state(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: History, step: int):
    """Write the state; if the disk refuses, warn and go on, since the model is still in memory."""
    try:
        save_checkpoint(folder, model, optimizer, history, step)
    except OSError as error:
        warnings.warn(
            f"the state after step {step} cannot be written to {folder} ({error}); training goes on, but a run that "
            "stops now begins again at an earlier state: free some room",
            stacklevel=3,
        )


def seconds_per_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    pad_id: int,
    accumulation: int = 1,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    pool: int = 1,
    pad_multiple: int = 1,
) -> float:
    """Measure forward and backward of a step: the longer of two trials on the run's first windows. Nothing is changed.

    Args:
        model: the model, with its mask or adapter attached.
        optimizer: over the trained tensors; it drops the gradients.
        samples: tokenised training problems.
        batch_size: samples in one forward pass.
        pad_id: token to pad with.
        accumulation: forward passes in one optimizer step.
        seed: decides the order of the data.
        autocast: dtype to which products are cast.
        pool: windows within which samples of similar length come together.
        pad_multiple: lengths are padded to a multiple of this.
    """
    state, was_training, seconds = random_state(), model.training, []
    device = device_of(model)
    model.train()
    for window in itertools.islice(sample_windows(samples, batch_size * accumulation, seed=seed, pool=pool), 3):
        begin = time.perf_counter()
        window = prepare(window, batch_size, pad_id=pad_id, device=device, multiple=pad_multiple)
        with casts_by_autocast(model, autocast):
            accumulate(Passes(model, autocast), window, History())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        optimizer.zero_grad()
    model.train(was_training)
    restore_random_state(state)
    # The first trial includes one-time costs.
    return max(seconds[1:])


def _check(samples, steps, batch_size, accumulation, warmup, schedule, clip, every, folder, resume) -> None:
    whole = {"steps": steps, "batch_size": batch_size, "accumulation": accumulation}
    if every is not None:
        whole["checkpoint_every"] = every
    for name, value in whole.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not samples:
        raise ValueError("there are no training samples; give at least one")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup}; it is a share of the steps, from 0 to 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {SCHEDULES}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be above 0, or None for no clipping")
    if (every is not None or resume) and folder is None:
        raise ValueError("checkpoints were asked for without a folder; pass checkpoint_folder")
