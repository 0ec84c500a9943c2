"""One training loop for every method, so that a comparison of methods is a comparison of methods.

The loop knows a model, an optimizer and samples. What is trained is whatever requires a gradient: the compact values of
a sparse mask, all weights, or an adapter. One optimizer step sees one *window* of `batch_size * accumulation` samples,
and its loss is the mean over all label tokens of the window. Averaging the micro-batches' means instead would weigh a
token by the company it was batched with, and training would change with the accumulation.

A training that was interrupted goes on from its last state (`recipes.training_state`). The position in the data and the
learning rate are functions of the step number and need no state.
"""

import itertools
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from recipes.data import IGNORED, Sample, collate, make_batches, sample_windows
from recipes.loss import frozen_head, linear_cross_entropy
from recipes.training_state import (
    History,
    load_checkpoint,
    newest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)

SCHEDULES = ("linear", "cosine", "constant")


def rate_factor(step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then decay to 0 or constant.

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


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Cross-entropy summed over the label tokens of a batch, and their number.

    Logits are a good part of the work and most of the memory with a large vocabulary. Where the head is frozen they are
    made for label tokens only, a chunk at a time; else from the first labelled position on.
    """
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if (head := frozen_head(model)) is not None:
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
        softcap = getattr(model.config, "final_logit_softcapping", None)
        loss = linear_cross_entropy(hidden[counted], head, targets[counted], softcap=softcap)
        return loss, int(counted.sum())
    first = int(counted.any(0).int().argmax())
    # Position i predicts token i + 1. A tensor of positions, not a count from the end: a count leaves a view with gaps
    # of the hidden states, for which torch copies the whole vocabulary matrix once per row of the batch.
    positions = torch.arange(first, targets.shape[1], device=targets.device)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits[counted[:, first:]]
    loss = functional.cross_entropy(logits.float(), targets[counted], reduction="sum")
    return loss, int(counted.sum())


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the label tokens of a batch, as the model's own loss is, at less cost."""
    loss, count = summed_loss(model, batch)
    return loss / count


def evaluate(model: nn.Module, samples: Sequence[Sample], *, batch_size: int, pad_id: int) -> float:
    """Mean loss over the label tokens of all samples, in evaluation mode and without gradients."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            batches = make_batches(samples, batch_size, pad_id=pad_id)
            for batch in tqdm(batches, desc="held-out loss", disable=None, leave=False):
                if (batch["labels"] != IGNORED).any():
                    loss, tokens = summed_loss(model, _to(batch, device))
                    total, count = total + float(loss), count + tokens
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("none of the held-out samples has a label; give samples whose answers are not empty")
    return total / count


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
) -> History:
    """Train whatever in `model` requires a gradient.

    Args:
        model: a causal language model of transformers, on its device.
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
        checkpoint_folder: where the training state goes, always after the last step, so that nothing that comes
            after training can lose it; only the newest complete one is kept. None writes none.
        checkpoint_every: steps between further ones before the last. None writes none of these.
        resume: go on from the state in `checkpoint_folder`, or start where there is none.

    Returns:
        The history of the whole run.
    """
    _check(
        samples, steps, batch_size, accumulation, warmup, schedule, clip, checkpoint_every, checkpoint_folder, resume
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing in the model requires a gradient; attach a mask with sparsify, or unfreeze weights")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    history, start = History(), 0
    if resume and (checkpoint := newest_checkpoint(checkpoint_folder)) is not None:
        history, start = load_checkpoint(checkpoint, model, optimizer)
        if start > steps:
            raise ValueError(
                f"the checkpoint {checkpoint} is at step {start}, beyond the {steps} asked for; raise the steps"
            )
    model.train()
    windows = sample_windows(samples, batch_size * accumulation, seed=seed, start=start)
    bar = tqdm(range(start, steps), desc="train", initial=start, total=steps, disable=None)
    for step, window in zip(bar, windows, strict=False):
        begin = time.perf_counter()
        factor = rate_factor(step, steps, warmup=warmup, schedule=schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        loss = _accumulate(model, window, batch_size, pad_id, history)
        norm = (
            float(nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip))
            if loss is not None
            else math.nan
        )
        if math.isfinite(norm):
            optimizer.step()
        else:
            _skip(history, step, "no label in its window" if loss is None else f"a gradient of norm {norm}")
        optimizer.zero_grad()
        history.loss.append(math.nan if loss is None else loss)
        history.grad_norm.append(norm)
        history.lr.append(optimizer.param_groups[0]["initial_lr"] * factor)
        history.tokens.append(sum(len(sample.input_ids) for sample in window))
        history.step_seconds.append(time.perf_counter() - begin)
        bar.set_postfix(loss=f"{history.loss[-1]:.4f}", norm=f"{norm:.2f}")
        if bar.disable and (step + 1) % max(1, steps // 10) == 0:  # a log file gets ten lines instead of a bar
            print(
                f"step {step + 1}/{steps}  loss {history.loss[-1]:.4f}  {history.tokens_per_second:.0f} tokens/s",
                flush=True,
            )
        last = step + 1 == steps and checkpoint_folder is not None
        if last or (checkpoint_every is not None and (step + 1) % checkpoint_every == 0):
            _keep_state(checkpoint_folder, model, optimizer, history, step + 1)
    return history


def _keep_state(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: History, step: int):
    """Write the state; a disk that takes none is warned of, since what is trained is still there to go on with."""
    try:
        save_checkpoint(folder, model, optimizer, history, step)
    except OSError as error:
        warnings.warn(
            f"the state after step {step} cannot be written to {folder} ({error}); training goes on, but a run that "
            "stops now begins again at an earlier state: free some room",
            stacklevel=3,
        )


def seconds_per_step(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int, pad_id: int, accumulation: int = 1, seed: int = 0
) -> float:
    """Time of forward and backward of a step, the longer of two trials on the run's first windows; nothing is changed.

    Args:
        model: with whatever is to be trained attached.
        samples: as for `train`, like the rest.
        batch_size: samples in one forward pass.
        pad_id: token to pad with.
        accumulation: forward passes in one optimizer step.
        seed: decides the order of the data.
    """
    state, was_training, seconds = random_state(), model.training, []
    model.train()
    for window in itertools.islice(sample_windows(samples, batch_size * accumulation, seed=seed), 3):
        begin = time.perf_counter()
        _accumulate(model, window, batch_size, pad_id, History())
        seconds.append(time.perf_counter() - begin)
        model.zero_grad()
    model.train(was_training)
    restore_random_state(state)
    # The first pays for what is prepared once.
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


def _accumulate(model: nn.Module, window: list[Sample], batch_size: int, pad_id: int, history: History) -> float | None:
    """Backward over all micro-batches of a window; its mean loss a label token, None where it has no label."""
    # The first token of a sequence is never predicted, so its label does not count.
    total = sum(label != IGNORED for sample in window for label in sample.labels[1:])
    # Similar lengths share a micro-batch: less padding, and the gradient of the window is the same in any order.
    window = sorted(window, key=lambda sample: len(sample.input_ids))
    device, mean = next(model.parameters()).device, 0.0
    for i in range(0, len(window), batch_size):
        batch = collate(window[i : i + batch_size], pad_id=pad_id)
        if not (batch["labels"][:, 1:] != IGNORED).any():
            history.skipped_batches += 1
            if history.skipped_batches == 1:
                warnings.warn(
                    "a batch has no label at all and is skipped; later ones are counted silently", stacklevel=3
                )
            continue
        loss, _ = summed_loss(model, _to(batch, device))
        (loss / total).backward()
        mean += float(loss.detach()) / total
    return mean if total else None


def _skip(history: History, step: int, reason: str) -> None:
    history.skipped_steps += 1
    if history.skipped_steps == 1:
        warnings.warn(f"step {step + 1} is skipped because of {reason}; later ones are counted silently", stacklevel=3)


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}
