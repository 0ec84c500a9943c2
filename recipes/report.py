"""The report of a run: `run.json`, `report.png`, and a table.

`run.json` is written after every stage, so that it shows how far a stopped run came, and `--resume` measures nothing
twice.
"""

import platform
import resource
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from eval.records import package_version, save_figure
from recipes.baselines import plain_layers
from speft_optim import Masks, Target, __version__, find_targets
from speft_optim.files import tensor_files

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "datasets", "lm-eval")


def machine() -> dict:
    """Return versions and hardware, on which the numbers of a run depend."""
    versions = {"python": platform.python_version(), "speft-optim": __version__}
    return {
        "versions": versions | {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def peak_bytes() -> dict[str, int | None]:
    """Return the most bytes that this process has held so far: resident on the host, allocated on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer, masks: Masks | None) -> int:
    """Return the bytes held beyond the weights: the optimizer's state, and a mask's fp32 values and positions."""
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    if masks is not None:
        total += sum(parameter.nbytes for group in optimizer.param_groups for parameter in group["params"])
        total += sum(mask.nbytes for mask in masks.values())
    return total


def adamw_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of AdamW's two fp32 moments for all weights of the model."""
    return 8 * sum(target.shape.numel() for target in base_weights(model))


def base_weights(model: torch.nn.Module) -> list[Target]:
    """Return the weights of the model itself, without those that an adapter has put beside them."""
    with plain_layers(model):
        return list(find_targets(model, lambda name, parameter: True).values())


def moved_share(
    base: str | Path, tuned: str | Path, masks: Masks | None, model: torch.nn.Module
) -> dict[str, int | float]:
    """Count the entries of a saved checkpoint that differ from its base, tensor by tensor from the files.

    Args:
        base: folder of the base checkpoint.
        tuned: folder of the trained checkpoint. If the dtypes differ, the base is rounded to the dtype of this one.
        masks: which entries were trained; None for all of them.
        model: the trained model; a quantised weight is compared with its own dequantised base.

    Returns:
        `entries` of the model, how many `moved`, how many of these lie outside the mask (`stray`, to be 0), the
        `share`, and `change`: for each trained weight the mean change of its trained entries, as a share of the mean
        magnitude of all its entries.
    """
    before, after = tensor_files(base), tensor_files(tuned)
    missing = sorted(after.keys() - before.keys())
    if missing:
        raise ValueError(
            f"{base} has no tensor called {missing[0]}, which {tuned} has; the folders hold different models"
        )
    weights = {target.name: target for target in base_weights(model)}
    moved = stray = total = 0
    change: dict[str, float] = {}
    for name in after:
        with safe_open(before[name], "pt") as old, safe_open(after[name], "pt") as new:
            trained = new.get_tensor(name)
            dequantized = weights[name].dequantized_base(trained.dtype) if name in weights else None
            start = old.get_tensor(name) if dequantized is None else dequantized.cpu()
            differs = (start.to(trained.dtype) != trained).flatten()
        moved += int(differs.sum())
        total += trained.numel()
        if masks is not None:
            if name in masks:
                kept = masks[name].indices.to("cpu", torch.int64)
                change[name] = _relative_change(start.flatten(), trained.flatten(), kept)
                differs[kept] = False
            stray += int(differs.sum())
    return {"moved": moved, "stray": stray, "entries": total, "share": moved / total, "change": change}


def _relative_change(start: torch.Tensor, trained: torch.Tensor, kept: torch.Tensor) -> float:
    """Return the mean change of the entries at `kept`, as a share of the mean magnitude of all of `start`."""
    moved = (trained[kept].float() - start[kept].float()).abs().mean() if len(kept) else torch.zeros(())
    return float(moved / start.abs().mean(dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny))


def draw(
    losses: list[float],
    held_out: tuple[float, float],
    masks: Masks | None,
    change: dict[str, float],
    path: Path,
    title: str,
) -> None:
    """Draw the loss curve and, where there is a mask, how far its entries moved and its concentration, to a PNG.

    Args:
        losses: training loss of each step; NaN where a step was skipped.
        held_out: loss on held-out answers before and after.
        masks: the mask, or None.
        change: of `moved_share`, one number for each masked weight.
        path: the PNG.
        title: above the pictures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if masks is None else 17, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curve, *rest = figure.subplots(1, 1 if masks is None else 3, squeeze=False)[0]
    curve.plot(range(1, len(losses) + 1), losses, color="C0", linewidth=1, label="training, each step")
    curve.plot([0, len(losses)], held_out, "o", color="C3", label="held-out answers")
    for step, loss, place, side in ((0, held_out[0], (9, -4), "left"), (len(losses), held_out[1], (0, 7), "right")):
        curve.annotate(f"{loss:.3f}", (step, loss), xytext=place, textcoords="offset points", color="C3", ha=side)
    curve.set(xlabel="optimizer step", ylabel="loss a label token", title="loss")
    curve.set_ylim(bottom=0)
    curve.legend()
    if rest:
        # The density would be the same everywhere in local scope.
        masks.draw_means(rest[0], change, scale=100)
        rest[0].set_title("change of the trained entries, % of the mean weight")
        masks.draw_concentration(rest[1])
    figure.suptitle(title)
    save_figure(figure, path, dpi=120)


def table(record: dict) -> str:
    """Format the result of a run, for people."""
    rows = [("model", record["base"]), ("trained", trained_line(record))]
    before, after = record["scores"]["before"], record["scores"]["after"]
    for task in after:
        for metric, by_filter in after[task]["scores"].items():
            for chosen, entry in by_filter.items():
                pair = f"{_percent(before[task]['scores'][metric][chosen])} -> {_percent(entry)}"
                rows.append((f"{task}, {chosen}", f"{metric} {pair}   (n = {entry['n']})"))
    rows.append(("held-out loss", f"{record['held_out_loss']['before']:.4f} -> {record['held_out_loss']['after']:.4f}"))
    moved = record["moved"]
    rows.append(
        (
            "weights moved",
            f"{moved['moved']:,} of {moved['entries']:,} ({moved['share']:.3%}), {moved['stray']:,} outside the mask",
        )
    )
    own, dense = record["optimizer_bytes"]["held"], record["optimizer_bytes"]["adamw"]
    rows.append(
        ("optimizer", f"{own / 1e6:.1f} MB; AdamW over all weights {dense / 1e6:.1f} MB ({dense / own:.0f} times)")
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    rows.append(("time", f"{sum(record['seconds'].values()):.0f} s: {seconds}"))
    rows.append(("peak memory", f"{record['peak_bytes']['host'] / 1e9:.2f} GB"))
    rows += [(name, path) for name, path in record["files"].items()]
    width = max(len(name) for name, _ in rows)
    rule = "-" * 100
    return "\n".join([rule, *(f"{name.ljust(width)}  {text}" for name, text in rows), rule])


def trained_line(record: dict) -> str:
    """Describe in one line what was trained, and how."""
    steps, rate = record["steps"], record["lr"]
    mask, adapter, what = record["mask"], record["adapter"], "all weights"
    if mask is not None:
        what = f"{mask['count']:,} masked entries ({mask['density']:.2%} of the targets)"
    elif adapter is not None:
        what = f"{record['arguments']['method']} of rank {adapter['rank']}, {adapter['trained']:,} values"
    return f"{what}, {steps} steps, lr {rate:.2g}, {record['tokens_per_second']:.0f} tokens/s, {record['dtype']}"


def _percent(entry: dict) -> str:
    error = "" if entry["stderr"] is None else f" +- {100 * entry['stderr']:.1f}"
    return f"{100 * entry['value']:.1f} %{error}"
