"""Dynamic masks: entries are chosen again during training (SPEFT, Section 3.3).

A `MaskSchedule` hangs on the optimizer: it counts its steps, re-selects in between, and its state is saved in the
optimizer's. So nothing is added to a training loop or a trainer, accumulation and skipped steps are counted as the
optimizer sees them, and a resumed run restores masks and counter with the moments. Parameters stay the same objects,
with other contents, so that schedulers and wrappers that hold them need not know.

An entry that leaves keeps its trained value in the weight and never moves again.
"""

import itertools
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.adapter_file import named_root
from speft_optim.distributed import check_equal_masks, is_distributed
from speft_optim.masks.collection import Masks
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.optim.moments import carry_moments_
from speft_optim.optim.state import has_moments
from speft_optim.salience.batches import Batches, check_batches, check_max_batches
from speft_optim.salience.selection import check_choice, is_whole, select_masks
from speft_optim.weights.sparse_weight import SparseWeight, sparse_weights

_OPTIONS = {"loss", "max_batches", "memory_budget", "seed", "progress"}


_EVENT = ("step", "entries", "overlap")


_KEPT_EVENTS = 256


class MaskSchedule:
    """Choose the masks of a sparsified model again after every `interval` steps of its optimizer.

    Candidates are the weights that `sparsify` attached to. In global scope many may start with an empty mask: pass
    them all on with `sparsify(model, masks, keep_empty=True)`.

    Args:
        model: the sparsified model, or a wrapper around it.
        optimizer: its `SparseAdamW`, or accelerate's wrapper around it.
        batches: calibration data as for `select_masks`, iterated afresh each time.
        interval: optimizer steps between selections; the paper's is 1000.
        salience: name or function of the measure, as for `select_masks`.
        scope: "local" keeps each weight's number of entries, "global" their sum.
        density: from the number of steps taken to the share of all candidates to keep; None keeps the number that
            `sparsify` got.
        moments: "reset" all, as the paper does, or "carry" over those of entries that stay.
        threshold: select only when the current masks and those that `probe` batches give overlap less than this, 0 to
            1; None selects every time.
        probe: batches for that cheaper estimate.
        **options: `loss`, `max_batches`, `memory_budget`, `seed` or `progress` of `select_masks`.

    Attributes:
        steps: optimizer steps counted.
        history: for each selection or probe its `step`, `entries`, and `overlap` with the masks before.

    Raises:
        ValueError: an argument is out of range, or the optimizer does not train this model's values.
        TypeError: the optimizer is not a SparseAdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseAdamW,
        batches: Batches | None,
        *,
        interval: int = 1000,
        salience: str | Callable[[Tensor, Tensor], Tensor] = "gradient",
        scope: Literal["local", "global"] = "local",
        density: Callable[[int], float] | None = None,
        moments: Literal["reset", "carry"] = "reset",
        threshold: float | None = None,
        probe: int = 1,
        **options: Any,
    ):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.model, self.optimizer, self.batches = named_root(model), optimizer, batches
        self.interval, self.salience, self.scope, self.density = interval, salience, scope, density
        self.moments, self.threshold, self.probe, self.options = moments, threshold, probe, options
        self.steps, self.history = 0, []
        self._check()
        weights = self._weights()
        self.entries = sum(len(weight.mask) for weight in weights)
        optimizer.follow(self)

    def reselect(self) -> Masks:
        """Choose the masks again now, whatever interval and threshold say; call between steps.

        Returns:
            The new masks.
        """
        masks = self._select(self.batches)
        self._note(masks)
        check_equal_masks(masks)
        for weight in self._weights():
            places, stays = weight.change_mask(masks[weight.name])
            state = self.optimizer.state.get(weight.values, {})
            if self.moments == "carry" and has_moments(state):
                carry_moments_(state, weight.values.detach(), places, stays)
            else:
                self.optimizer.reset_moments(weight.values)
        return masks

    def state_dict(self) -> dict[str, Tensor]:
        """Counter and latest events; the masks themselves are in the optimizer's state.

        Returns:
            `schedule_steps`, an int64 scalar, and `schedule_history`, (256, 3) float64: step, entries and overlap of
            the latest 256 events, and rows of -1 after the last. Its size must not change, see `state.py`.
        """
        history = torch.full((_KEPT_EVENTS, 3), -1.0, dtype=torch.float64)
        for row, event in zip(history, self.history[-_KEPT_EVENTS:], strict=False):
            row.copy_(torch.tensor([event[key] for key in _EVENT], dtype=torch.float64))
        return {"schedule_steps": torch.tensor(self.steps), "schedule_history": history}

    def check_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Raise a ValueError for what `state_dict` cannot have given."""
        steps, history = state_dict["schedule_steps"], state_dict["schedule_history"]
        if steps.dtype != torch.int64 or steps.dim() or int(steps) < 0:
            raise ValueError(f"The saved schedule_steps is {steps}, not a whole number as int64; load another state.")
        kept = (history.dtype, tuple(history.shape)) == (torch.float64, (_KEPT_EVENTS, 3))
        if not kept or not bool(history.isfinite().all()):
            raise ValueError(
                f"The saved schedule_history is of {history.dtype} and shape {tuple(history.shape)} or not finite; it "
                f"must be of torch.float64, ({_KEPT_EVENTS}, 3) and finite."
            )

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; the optimizer does so in its own."""
        self.steps = int(state_dict["schedule_steps"])
        rows = [row for row in state_dict["schedule_history"].tolist() if row[0] >= 0]
        self.history = [{"step": int(step), "entries": int(n), "overlap": overlap} for step, n, overlap in rows]

    def after_step(self, optimizer: SparseAdamW, args: tuple, kwargs: dict) -> None:
        """Post-hook of the optimizer: count a step, and select when it is time."""
        self.steps += 1
        if self.steps % self.interval:
            return
        if self.threshold is not None:
            overlap = self._note(self._select(itertools.islice(self.batches, self.probe)))
            if overlap >= self.threshold and self._wanted() == sum(len(weight.mask) for weight in self._weights()):
                return
        self.reselect()

    def _select(self, batches: Batches | Iterator | None) -> Masks:
        weights = {weight.name: weight for weight in self._weights()}
        options = {**self.options, "seed": self.options.get("seed", 0) + self.steps}
        return select_masks(
            self.model,
            list(batches) if isinstance(batches, itertools.islice) else batches,
            salience=self.salience,
            scope=self.scope,
            budget=self._wanted() if self.scope == "global" else self._wanted_by_weight(),
            targets=lambda name, parameter: name in weights,
            **options,
        )

    def _note(self, masks: Masks) -> float:
        overlap = masks.overlap(Masks({weight.name: weight.mask for weight in self._weights()}))
        self.history.append({"step": self.steps, "entries": masks.count, "overlap": overlap})
        return overlap

    def _wanted(self) -> int:
        """Entries to keep now, over all weights."""
        if self.density is None:
            return self.entries
        if self.scope == "local":
            return sum(self._wanted_by_weight().values())
        return max(1, round(self._density_now() * sum(weight.mask.shape.numel() for weight in self._weights())))

    def _wanted_by_weight(self) -> dict[str, int]:
        if self.density is None:
            return {weight.name: len(weight.mask) for weight in self._weights()}
        density = self._density_now()
        return {weight.name: round(density * weight.mask.shape.numel()) for weight in self._weights()}

    def _density_now(self) -> float:
        density = self.density(self.steps)
        if not isinstance(density, Real) or not 0.0 < density <= 1.0:
            raise ValueError(f"density({self.steps}) is {density!r}; it must give a share in (0, 1], such as 0.01.")
        return density

    def _weights(self) -> list[SparseWeight]:
        return sparse_weights(self.model)

    def _check(self) -> None:
        if not isinstance(self.optimizer, SparseAdamW):
            raise TypeError(f"MaskSchedule needs a SparseAdamW, whose moments it knows; got {self.optimizer!r}.")
        if self.optimizer.schedule is not None:
            raise ValueError("The optimizer has a MaskSchedule already; two would overrule each other.")
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not self._weights() or any(id(weight.values) not in held for weight in self._weights()):
            raise ValueError("The optimizer does not train all of the model's values; build it from sparsify(...).")
        for name, usual in (("interval", 1000), ("probe", 1)):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1, such as {usual}.")
        if not isinstance(self.moments, str) or self.moments not in ("reset", "carry"):
            raise ValueError(f'moments={self.moments!r}; they are "reset" or "carry".')
        measure = check_choice(self.salience, self.scope)
        if self.threshold is not None and not isinstance(self.threshold, Real):
            raise TypeError(f"threshold={self.threshold!r} is no number; pass None or a share such as 0.8.")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold} is outside (0, 1]; 0.8 selects anew below 80 % overlap.")
        if self.density is not None and not callable(self.density):
            raise TypeError(f"density={self.density!r} is not callable; pass a function of the step, or None.")
        if unknown := self.options.keys() - _OPTIONS:
            raise ValueError(
                f"MaskSchedule passes no {', '.join(sorted(unknown))} on to select_masks; "
                f"it takes {', '.join(sorted(_OPTIONS))}."
            )
        check_max_batches(self.options.get("max_batches"))
        if isinstance(self.batches, Iterator):
            raise ValueError("batches can be iterated once, but every selection needs them; pass a list or DataLoader.")
        if measure.takes_batches:
            check_batches(self.batches, 1)
        if is_distributed() and (self.scope == "global" or self.density is not None):
            raise ValueError(
                "Over several processes each weight must keep its number of entries, since DistributedDataParallel "
                "reduces buffers of fixed size; use scope='local' and density=None."
            )
