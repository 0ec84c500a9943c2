"""The default learning rate for a method, a density and a model; `recipes.gsm8k` describes the measurements."""

from torch import nn

from speft_optim import find_targets


def default_rate(method: str, density: float, weight_size: float) -> float:
    """Return the default learning rate: a power law through the best rates of one model at two densities.

    It has three digits, so that sums in another order, as on another device, hardly ever give another rate.

    Args:
        method: `sparse`, `moving` or `full`.
        density: masked share of the target weights.
        weight_size: root mean square of the model's linear weights; 0.19 in the model that was measured.
    """
    if method == "moving":
        measured = min(6e-3, 2.5e-3 * (0.0115 / density) ** 0.61)
    else:
        measured = 1e-4 if method == "full" else min(1e-2, 1e-3 * (0.09 / density) ** 0.5)
    return float(f"{measured * weight_size / 0.19:.3g}")


def linear_weight_size(model: nn.Module) -> float:
    """Return the root mean square of the entries of the blocks' linear weights."""
    weights = find_targets(model).values()
    squares = sum(weight.rows(0, weight.matrix_shape[0]).float().square().sum().item() for weight in weights)
    return (squares / sum(weight.shape.numel() for weight in weights)) ** 0.5
