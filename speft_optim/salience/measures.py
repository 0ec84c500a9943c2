"""Salience measures: how much each entry of a weight matters for training it (SPEFT, Section 3.2 and Table 1).

A measure is a `signal` that calibration accumulates per weight, and a small function from weight and signal to scores;
higher scores are kept. With g the gradient of the loss averaged over the calibration batches with its sign, H its
Hessian:

    magnitude   abs(w)                        gradient   abs(g)
    snip        abs(g * w)                    force      -(g * w), signed
    taylor_fo   (g * w)^2                     grasp      -(H g) * w
    fisher      mean over examples of the squared gradient of that example's own mean loss
    synflow     abs(w * dR/dw), R the sum of the logits of the linearised network of absolute weights
    activation  abs(w) * norm of the weight's input feature: ours, not the paper's; for text without labels
    random      uniform: the control
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Signal = Literal["none", "random", "gradient", "squared_gradient", "hessian_gradient", "flow", "squared_input"]


@dataclass(frozen=True)
class Measure:
    """A salience measure.

    Attributes:
        score: from a piece of a weight and the same piece of its signal, both fp32 or fp64 of one shape, to scores of
            that shape; must not change its arguments.
        signal: what calibration accumulates; `none` and `random` need no pass over data.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    signal: Signal

    @property
    def takes_batches(self) -> bool:
        """Whether the signal comes of passes over calibration batches."""
        return self.signal not in ("none", "random", "flow")


def magnitude(w: Tensor, _: Tensor) -> Tensor:
    """abs(w)."""
    return w.abs()


def gradient(_: Tensor, g: Tensor) -> Tensor:
    """abs(g), the paper's choice."""
    return g.abs()


def snip(w: Tensor, g: Tensor) -> Tensor:
    """abs(g * w): first-order change of the loss when the entry is removed."""
    return (g * w).abs()


def force(w: Tensor, g: Tensor) -> Tensor:
    """-(g * w), with its sign."""
    return -(g * w)


def taylor_fo(w: Tensor, g: Tensor) -> Tensor:
    """(g * w)^2, which ranks as snip does; in fp64, where the square of a small fp32 number does not vanish."""
    return (g * w).double().square()


def grasp(w: Tensor, hessian_gradient: Tensor) -> Tensor:
    """-(H g) * w: first-order change of the gradient's norm when the entry is removed."""
    return -(hessian_gradient * w)


def fisher(_: Tensor, squared: Tensor) -> Tensor:
    """Mean over examples of the squared per-example gradient, the diagonal of the empirical Fisher information."""
    return squared


def synflow(w: Tensor, flow: Tensor) -> Tensor:
    """abs(w * dR/dw)."""
    return (w * flow).abs()


def activation(w: Tensor, squares: Tensor) -> Tensor:
    """abs(w) times the norm of the entry's input feature over all tokens."""
    return w.abs() * squares.sqrt()


def uniform(_: Tensor, draws: Tensor) -> Tensor:
    """The draws themselves."""
    return draws


MEASURES: dict[str, Measure] = {
    "magnitude": Measure(magnitude, "none"),
    "gradient": Measure(gradient, "gradient"),
    "snip": Measure(snip, "gradient"),
    "force": Measure(force, "gradient"),
    "taylor_fo": Measure(taylor_fo, "gradient"),
    "synflow": Measure(synflow, "flow"),
    "grasp": Measure(grasp, "hessian_gradient"),
    "fisher": Measure(fisher, "squared_gradient"),
    "activation": Measure(activation, "squared_input"),
    "random": Measure(uniform, "random"),
}


def measure_of(salience: str | Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """The measure of a name, or of a function of a weight and its gradient.

    Args:
        salience: a name, or a function from a weight's entries and their gradients, fp32 of one shape, to scores of
            that shape; higher scores are kept.

    Raises:
        ValueError: no measure has that name.
    """
    if callable(salience):
        return Measure(salience, "gradient")
    if not isinstance(salience, str) or salience not in MEASURES:
        raise ValueError(f"salience={salience!r} is not known; choose from {', '.join(sorted(MEASURES))}.")
    return MEASURES[salience]
