"""Moving masks, with the settings that were measured best (docs/benchmarks.md, "Moving masks").

Entries are ranked by the gradients of the last `WINDOW` steps, over all weights together, every `INTERVAL` steps.
Moments are carried for entries that stay, and each entry has a learning rate proportional to its magnitude, or to the
square root of it if many entries are trained.
"""

from collections.abc import Mapping

from torch import nn

from speft_optim import Mask, MaskSchedule, SparseAdamW, sparsify

# Measures of the gradients of training that were tried; the first is the best.
MEASURES = ("snip", "gradient")
INTERVAL, WINDOW = 50, 8
# Bytes of the sums of gradients; weights that do not fit together take turns.
BUDGET = 2 * 2**30
# In three epochs of GSM8K 5 times as many entries were ever trained as at one time with 1.15 % masked, 3 with 9.2 %.
_EVER = 6
# Two densities were measured: at 1.15 % the magnitude itself was better than its root, at 9.2 % the root was.
_FEW = 0.03


def power_for(density: float) -> float:
    """Return the `magnitude_power` of `SparseAdamW` for a share of masked entries."""
    return 1.0 if density < _FEW else 0.5


def sum_bytes(entries: int) -> int:
    """Return the bytes of the sums of gradients of targets with so many entries in all."""
    return min(BUDGET, 4 * entries)


def saved_bytes(entries: int, masked: int) -> int:
    """Return the bytes that moving masks add to a training state, at most as far as was seen.

    Args:
        entries: entries of all targets.
        masked: entries that are trained at one time.
    """
    return sum_bytes(entries) + min(entries, _EVER * masked) * 8


def attach(
    model: nn.Module,
    masks: Mapping[str, Mask],
    *,
    salience: str,
    power: float,
    window: int = WINDOW,
    interval: int = INTERVAL,
    placement: Mapping | None = None,
    **options,
) -> tuple[SparseAdamW, MaskSchedule]:
    """Attach masks that move, and the optimizer that moves them.

    Args:
        model: the plain model.
        masks: the first masks, for all weights that may get entries.
        salience: the measure, as for `MaskSchedule` without batches.
        power: `magnitude_power` of the optimizer.
        window: over how many optimizer steps gradients are summed to rank the entries.
        interval: the least number of steps between two selections of a weight.
        placement: the options of `sparsify` for a model whose weights stay in CPU memory; None for one on its device.
        **options: further options of the optimizer.
    """
    values = sparsify(model, masks, keep_empty=True, **(placement or {}))
    optimizer = SparseAdamW(values, magnitude_power=power, **options)
    steps = dict(window=window, interval=interval)
    options = dict(salience=salience, scope="global", memory_budget=BUDGET)
    return optimizer, MaskSchedule(model, optimizer, **options, **steps)
