"""The trained tensors of a run and their optimizer: masked entries, an adapter, or all weights."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes import baselines, data, models, moving, processes
from recipes.batch_loss import mean_loss
from recipes.learning_rate import default_rate, linear_weight_size
from recipes.run import MASKS, Run
from speft_optim import MEASURES, Masks, MaskSchedule, SparseAdamW, select_masks, sparsify


@dataclass
class Trained:
    """The trained part of a run's model.

    Attributes:
        optimizer: the optimizer over the trained tensors.
        masks: the masks of the sparse method; after training with moving masks, all entries that were ever trained.
        schedule: the schedule of moving masks.
        adapter: peft's wrapper around the model.
    """

    optimizer: torch.optim.Optimizer
    masks: Masks | None = None
    schedule: MaskSchedule | None = None
    adapter: torch.nn.Module | None = None


def attach(run: Run, model, samples: list[data.Sample], pad_id: int, dtype: torch.dtype) -> Trained:
    """Attach masks or an adapter, and build the optimizer."""
    args, record = run.args, run.record
    record["mask"] = record["adapter"] = None
    if args.method == "sparse":
        return attach_masks(run, model, samples, pad_id, dtype)
    adapter = None
    if args.method in baselines.ADAPTERS:
        with run.stage("attach the adapter"):
            budget = args.budget or rank_budget(args, model) or density_budget(args, model)
            adapter, record["adapter"] = baselines.attach_adapter(
                model, args.method, budget=budget, targets=args.targets, seed=args.seed
            )
    record["lr"] = args.lr or default_rate(args.method, 1.0, linear_weight_size(model))
    optimizer = baselines.optimizer_over(model, lr=record["lr"], weight_decay=args.weight_decay)
    return Trained(optimizer, adapter=adapter)


def rank_budget(args: argparse.Namespace, model) -> int | None:
    """Return how many values LoRA of the rank --budget-rank trains; None without that option."""
    if args.budget_rank is None:
        return None
    return baselines.trained_values(baselines.linear_layers(model, args.targets), args.budget_rank)


def density_budget(args: argparse.Namespace, model) -> int:
    """Return the number of values that --density asks for."""
    layers = baselines.linear_layers(model, args.targets).values()
    return round(args.density * sum(layer.weight.numel() for layer in layers))


def attach_masks(run: Run, model, samples: list[data.Sample], pad_id: int, dtype: torch.dtype) -> Trained:
    """Choose the masks and attach their values."""
    args, record = run.args, run.record
    with run.stage("calibrate"), models.products_of(dtype):
        masks = choose_masks(args, model, samples, pad_id, run.resumes)
        print(masks.summary())
        record["mask"] = {"count": masks.count, "density": masks.density, "fingerprint": masks.fingerprint()}
    kind = "moving" if args.moving else "sparse"
    record["lr"] = args.lr or default_rate(kind, masks.density, linear_weight_size(model))
    # The loop checks the norm of each gradient, so the optimizer need not.
    options = dict(lr=record["lr"], weight_decay=args.weight_decay, on_nonfinite="ignore", state_bits=args.state_bits)
    power = args.magnitude_power
    if args.moving:
        power = moving.power_for(masks.density) if power is None else power
        options |= dict(window=args.window, interval=args.interval, placement=placement(args))
        optimizer, schedule = moving.attach(model, masks, salience=args.salience, power=power, **options)
        return Trained(optimizer, masks, schedule=schedule)
    values = sparsify(model, masks, **placement(args))
    return Trained(SparseAdamW(values, magnitude_power=power or 0, **options), masks)


def offload_device(args: argparse.Namespace) -> torch.device | None:
    """Return the device that computes while the weights stay in host memory; None without --offload."""
    return processes.device() if args.offload else None


def placement(args: argparse.Namespace) -> dict:
    """Return the options of `sparsify` that say where the frozen weights are."""
    if not args.offload:
        return {}
    blocks, head = args.resident_blocks or 0, bool(args.resident_head)
    return dict(offload=offload_device(args), resident_blocks=blocks, resident_head=head)


def choose_masks(args: argparse.Namespace, model, samples: list[data.Sample], pad_id: int, resumes: bool) -> Masks:
    """Select masks on training samples that are drawn by the seed; a resumed run loads its own."""
    path = Path(args.out) / MASKS
    if resumes and path.is_file():
        return Masks.load(path)
    options = dict(pad_id=pad_id, seed=args.seed)
    batches = processes.share(data.calibration_batches(samples, args.calibration_samples, args.batch_size, **options))
    masks = select_masks(
        model,
        batches,
        salience=args.salience,
        density=args.density,
        budget=args.budget or rank_budget(args, model),
        scope=args.scope,
        targets=args.targets,
        # Second derivatives need the model's own loss, which forms all logits.
        loss=None if MEASURES[args.salience].differentiates_twice else mean_loss,
        seed=args.seed,
        offload=offload_device(args),
        progress=processes.is_first(),
    )
    if processes.is_first():
        masks.save(path)
    return masks
