"""The arguments of a `MaskSchedule`: defaults with and without batches, and what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from speft_optim.checks import check_callable, check_choice, check_share, check_whole
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.salience.batches import Batches, check_batches, check_max_batches
from speft_optim.salience.measures import Measure, measure_of
from speft_optim.salience.selection import check_together
from speft_optim.weights.sparse_weight import SparseWeight

_OPTIONS = {"loss", "max_batches", "seed", "progress"}


_WITH_BATCHES = {"interval": 1000, "probe": 1, "moments": "reset"}


# Bytes of accumulators: 2 GiB hold 512 million entries, a fourteenth of a model of 8 billion. A share of the free
# memory would not do, since a resumed run must cut the weights into the same groups.
_BUDGET = 2 * 2**30


_FROM_TRAINING = {"interval": 50, "window": 8, "moments": "carry", "memory_budget": _BUDGET}


@dataclass
class Arguments:
    """The arguments of a `MaskSchedule` that say when and how masks are selected, as its docstring describes them.

    Defaults are put in for those that are None, and all are checked.

    Attributes:
        measure: the measure if masks are selected from training itself, None if `select_masks` selects them.

    Raises:
        ValueError: an argument is out of range, or does not apply with or without batches.
        TypeError: an argument is of a wrong type.
    """

    batches: Batches | None
    interval: int | None
    window: int | None
    salience: str | Callable[[Tensor, Tensor], Tensor] | None
    scope: str
    density: Callable[[int], float] | None
    moments: str | None
    threshold: float | None
    probe: int | None
    memory_budget: int | None
    options: dict[str, Any]

    def __post_init__(self):
        if self.salience is None:
            self.salience = "snip" if self.batches is None else "gradient"
        measure = measure_of(self.salience)
        self.measure: Measure | None = measure if self.batches is None and measure.takes_batches else None
        if self.measure is None:
            self._refuse_window()
        else:
            self._refuse_what_needs_batches()
        for name, usual in (_WITH_BATCHES if self.measure is None else _FROM_TRAINING).items():
            if getattr(self, name) is None:
                setattr(self, name, usual)
        self._check_values()
        self._check_options()
        if isinstance(self.batches, Iterator):
            raise ValueError(
                "batches can be iterated only once, but every selection reads them; pass a list or DataLoader."
            )
        if self.measure is None and measure.takes_batches:
            check_batches(self.batches, 1)

    def _refuse_window(self) -> None:
        if self.window is not None:
            raise ValueError(
                f"window={self.window!r} applies only if masks are selected from training's own gradients; "
                "leave batches out, or set interval instead."
            )

    def _refuse_what_needs_batches(self) -> None:
        if self.measure.statistic not in ("gradient", "squared_gradient"):
            raise ValueError(
                f"salience={self.salience!r} needs calibration batches, since backward passes of training do not "
                "give its statistic; pass some, or choose gradient, snip, force, taylor_fo, fisher or a function."
            )
        for name, value in {"threshold": self.threshold, "probe": self.probe, **self.options}.items():
            if value is not None and name in (*_OPTIONS, "threshold", "probe"):
                raise ValueError(
                    f"{name}={value!r} does not apply without batches, when masks are selected from training; "
                    f"leave {name} out, or pass batches."
                )

    def _check_values(self) -> None:
        for name, usual in (("interval", 1000), ("probe", 1), ("window", 8)):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, least=1, usual=usual)
        check_choice("moments", self.moments, ("reset", "carry"))
        check_together(self.salience, self.scope)
        if self.threshold is not None:
            check_share("threshold", self.threshold, "0.8 selects anew below 80 % overlap")
        check_callable("density", self.density, "the step")
        if self.measure is not None and self.memory_budget is not None:
            check_whole("memory_budget", self.memory_budget, least=1, usual="2 * 2**30 bytes")

    def _check_options(self) -> None:
        if unknown := self.options.keys() - _OPTIONS:
            raise ValueError(
                f"MaskSchedule does not accept {', '.join(sorted(unknown))}; it accepts "
                f"memory_budget, {', '.join(sorted(_OPTIONS))}."
            )
        check_max_batches(self.options.get("max_batches"))


def check_owner(optimizer: Optimizer, weights: list[SparseWeight]) -> None:
    """Refuse an optimizer whose moments a schedule of these weights cannot change.

    Args:
        optimizer: the optimizer, without accelerate's wrapper.
        weights: the masked weights of the model.

    Raises:
        TypeError: it is not a SparseAdamW.
        ValueError: it has a schedule already, or does not train the values of all weights.
    """
    if not isinstance(optimizer, SparseAdamW):
        raise TypeError(f"MaskSchedule changes the moments of a SparseAdamW and needs one; got {optimizer!r}.")
    if optimizer.schedule is not None:
        raise ValueError("The optimizer has a MaskSchedule already; use one, since two would overrule each other.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not weights or any(id(weight.values) not in held for weight in weights):
        raise ValueError("The optimizer does not train all of the model's values; build it from sparsify(...).")
