"""Salience measures: how much each entry of a weight matters for training it (SPEFT, Section 3.2 and Table 1).

A measure is a statistic that calibration accumulates per weight, and a small function from weight and statistic to
scores; the highest scores are kept. With w the weight, g the gradient of the loss averaged over the calibration batches
with its sign, and H the Hessian of that loss:

    magnitude   abs(w)                        gradient   abs(g)
    snip        abs(g * w)                    force      -(g * w), signed
    taylor_fo   (g * w)^2                     grasp      -(H g) * w
    fisher      mean over examples of the squared gradient of that example's own mean loss
    synflow     abs(w * dR/dw), R the sum of the logits of the linearised network of absolute weights
    activation  abs(w) * norm of the weight's input feature: not the paper's; for text without labels
    random      uniform numbers, as a control

Each measure is defined by its row in `MEASURES`. A user's function of weight and gradient can also be a measure, see
`measure_of`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["none", "random", "gradient", "squared_gradient", "hessian_gradient", "flow", "squared_input"]


@dataclass(frozen=True)
class Measure:
    """A salience measure.

    Attributes:
        score: a function from a chunk of a weight's entries, 1-D, and their statistic, both fp32 (the statistic of
            `random` is fp64), to scores of the same shape; it must not change its arguments.
        statistic: what calibration accumulates for each weight.
        entry_bytes: bytes of the accumulator for each entry. `grasp` temporarily needs more: a part of H g in the
            weight's dtype, see `stream_scores`.
        score_bytes: the most bytes of a score.
        passes: passes over the calibration batches for each group of weights; 0 if no batches are needed.
        labels: whether a loss is differentiated, which needs batches with labels or a loss function.
        checked: whether each result of `score` is checked, since the function is a user's.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    statistic: Statistic
    entry_bytes: int = 4
    score_bytes: int = 4
    passes: int = 1
    labels: bool = True
    checked: bool = False

    @property
    def name(self) -> str:
        """The name of the score function: the key of the measure in `MEASURES`, or the name of a user's function."""
        return getattr(self.score, "__name__", type(self.score).__name__)

    @property
    def takes_batches(self) -> bool:
        """Whether the statistic needs calibration batches."""
        return self.passes > 0

    @property
    def differentiates_twice(self) -> bool:
        """Whether the loss is differentiated twice, which fused attention and fused losses do not support."""
        return self.statistic == "hessian_gradient"

    def scores(self, name: str, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """Score a chunk of a weight's entries.

        Args:
            name: the weight's name, for errors.
            weight: (entries,) fp32.
            statistic: (entries,) fp32 or fp64; None if the measure needs none.

        Returns:
            (entries,) fp32 or fp64.

        Raises:
            TypeError: a user's function did not return a floating tensor.
            ValueError: it returned scores of another shape, or NaN.
        """
        if not self.checked:
            return self.score(weight, statistic)
        with torch.no_grad():
            # A run of an fp32 weight is a view of it, and a function that works in place would change the weight.
            scores = self.score(weight.clone(), statistic)
        self._check(name, weight, scores)
        return scores.to(weight.device, torch.promote_types(scores.dtype, torch.float32))

    def _check(self, name: str, weight: Tensor, scores: object) -> None:
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            got = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(f"salience={self.name} returned {got} for {name}; return a floating tensor of scores.")
        if scores.shape != weight.shape:
            raise ValueError(
                f"salience={self.name} returned scores of shape {tuple(scores.shape)} for {tuple(weight.shape)} "
                f"entries of {name}; return one score for each entry, in the shape of the arguments."
            )
        if bad := int(scores.isnan().sum()):
            raise ValueError(
                f"salience={self.name} returned NaN for {bad:,} of {weight.numel():,} entries of {name}; return "
                "finite scores, the lowest for entries that must not be kept."
            )


def magnitude(w: Tensor, _: Tensor) -> Tensor:
    """Return abs(w)."""
    return w.abs()


def gradient(_: Tensor, g: Tensor) -> Tensor:
    """Return abs(g), the paper's choice."""
    return g.abs()


def snip(w: Tensor, g: Tensor) -> Tensor:
    """Return abs(g * w): the first-order change of the loss when the entry is removed."""
    return (g * w).abs()


def force(w: Tensor, g: Tensor) -> Tensor:
    """Return -(g * w), with its sign."""
    return -(g * w)


def taylor_fo(w: Tensor, g: Tensor) -> Tensor:
    """Return (g * w)^2, which ranks as snip does; fp64, in which the square of a small fp32 number is not 0."""
    return (g * w).double().square()


def grasp(w: Tensor, hessian_gradient: Tensor) -> Tensor:
    """Return -(H g) * w: the first-order change of the gradient's norm when the entry is removed."""
    return -(hessian_gradient * w)


def fisher(_: Tensor, squared: Tensor) -> Tensor:
    """Return the mean squared gradient of single examples, the diagonal of the empirical Fisher information."""
    return squared


def synflow(w: Tensor, flow: Tensor) -> Tensor:
    """Return abs(w * dR/dw)."""
    return (w * flow).abs()


def activation(w: Tensor, squares: Tensor) -> Tensor:
    """Return abs(w) times the norm of the entry's input feature over all tokens."""
    return w.abs() * squares.sqrt()


def random(_: Tensor, draws: Tensor) -> Tensor:
    """Return the drawn numbers themselves."""
    return draws


# The measures that `select_masks` and `MaskSchedule` take by name.
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(magnitude, "none", entry_bytes=0, passes=0, labels=False),
        Measure(gradient, "gradient"),
        Measure(snip, "gradient"),
        Measure(force, "gradient"),
        Measure(taylor_fo, "gradient", score_bytes=8),
        Measure(synflow, "flow", passes=0, labels=False),
        Measure(grasp, "hessian_gradient", passes=2),
        Measure(fisher, "squared_gradient", entry_bytes=8),
        Measure(activation, "squared_input", entry_bytes=0, labels=False),
        Measure(random, "random", entry_bytes=0, score_bytes=8, passes=0, labels=False),
    )
}


def measure_of(salience: str | Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """Return the measure for the argument `salience` of `select_masks`.

    Args:
        salience: a name in `MEASURES`, or a function `salience(weight, gradient) -> scores`. It is called under
            `torch.no_grad()` with fp32 runs of a weight's entries and of their gradient, both of shape (entries,) and
            on one device; the gradient is the mean over the calibration batches, with its sign. It must return floating
            scores of that shape, of which the highest are kept. How a weight is cut into runs depends on the memory
            budget, so each score must depend on its own entry alone.

    Raises:
        ValueError: no measure has this name.
        TypeError: it is neither a name nor a function.
    """
    if isinstance(salience, str):
        if salience not in MEASURES:
            raise ValueError(f"salience={salience!r} is not known; choose from {', '.join(sorted(MEASURES))}.")
        return MEASURES[salience]
    if not callable(salience):
        raise TypeError(
            f"salience={salience!r} is a {type(salience).__name__}; pass one of {', '.join(sorted(MEASURES))}, or a "
            "function of (weight, gradient)."
        )
    measure = Measure(salience, "gradient", score_bytes=8, checked=True)
    _check_arguments(measure)
    return measure


def _check_arguments(measure: Measure) -> None:
    try:
        signature = inspect.signature(measure.score)
    except ValueError:
        return  # A function written in C may have no signature.
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"salience={measure.name} must take a weight's entries and their gradient: {error}; write it as "
            "(weight, gradient) -> scores."
        ) from error
