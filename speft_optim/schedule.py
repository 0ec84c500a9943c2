"""Dynamic masks: entries are chosen again during training (SPEFT, Section 3.3).

A `MaskSchedule` is a hook on the optimizer: it counts its steps and selects masks after some of them, and its state is
saved in the optimizer's. So a training loop or trainer needs no change, steps are counted right under gradient
accumulation, and a resumed run restores masks and counter together with the moments. Parameters stay the same objects,
with other contents, so that learning rate schedulers and wrappers that hold them are not affected.

With batches `select_masks` selects the masks at intervals; without, they are selected from training's own backward
passes, one group of weights after another (see `salience/streaming.py`).

An entry that leaves the mask keeps its trained value in the weight, and is not trained unless it is selected again.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.adapter_file import named_root
from speft_optim.checks import check_callable, check_choice, check_share, check_whole
from speft_optim.distributed import check_equal, check_equal_masks, is_distributed
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.optim.state import SCHEDULE_KEYS, TURN_KEYS
from speft_optim.salience.batches import Batches, check_batches, check_max_batches
from speft_optim.salience.measures import Measure, measure_of
from speft_optim.salience.selection import check_together, select_masks
from speft_optim.salience.streaming import TrainingSalience
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.mesh import reshard
from speft_optim.weights.sparse_weight import SparseWeight

_OPTIONS = {"loss", "max_batches", "seed", "progress"}


_EVENT = ("step", "entries", "overlap")


_KEPT_EVENTS = 256


# Bytes of accumulators: 2 GiB hold 512 million entries, a fourteenth of a model of 8 billion. A share of the free
# memory would not do, since a resumed run must cut the weights into the same groups.
_BUDGET = 2 * 2**30


class MaskSchedule:
    """Chooses the masks of a sparsified model again while its optimizer trains it.

    The candidates are all entries of the weights that `sparsify` attached values to. In global scope many weights may
    start with an empty mask; `sparsify(model, masks, keep_empty=True)` makes them candidates too.

    **With batches**, `select_masks` chooses all masks anew after every `interval` steps, as the paper does.

    **Without batches** scores come from training itself, without extra passes. One group of weights at a time adds up
    its gradients in the backward passes of training; after `window` optimizer steps its masks are chosen anew and the
    next group's turn begins. A round of all groups takes at least `interval` steps. In local scope each weight keeps
    its number of entries. In global scope the group's new scores compete with those by which the entries of other
    groups were kept, so that entries move between weights and their total stays; in the first round each group keeps
    its number.

    Memory and checkpoints then also hold the group's accumulators, 4 bytes for each of its entries and at most
    `memory_budget` in all, and a score for each trained entry. Scores are those of the raw gradients: before clipping,
    and including the constant factors of a loss scaler and of gradient accumulation. A step that is skipped because of
    inf or NaN lets the group's window begin again. Weights that get no gradient keep their masks. With several
    processes each adds up its own gradients, and they are averaged at the end of a turn; a checkpoint within a turn
    holds the sums of the process that saved it. `magnitude`, `random` and `synflow` need no gradient: with these
    measures and no batches, `select_masks` selects at intervals too.

    Args:
        model: the sparsified model, or a wrapper around it.
        optimizer: its `SparseAdamW`, or accelerate's wrapper around it.
        batches: calibration data as for `select_masks`, iterated again each time; None selects from training itself.
        interval: with batches, optimizer steps between selections; default 1000, as in the paper. Without, the least
            number of steps in which each weight is selected once; default 50.
        window: without batches, over how many optimizer steps a group adds up its gradients; default 8.
        salience: the measure, as for `select_masks`; default "gradient" with batches. Without them it is "gradient",
            "snip" (the default), "force" or "taylor_fo" of the summed gradients, or "fisher", which sums the squared
            gradient of each backward pass, that is of a micro-batch and not of an example; or a function
            `salience(weight, gradient)` of entries and their summed gradients, both fp32 of shape (entries,), that
            returns floating scores of that shape, of which the highest are kept.
        scope: "local" keeps the number of entries of each weight, "global" their total.
        density: from the number of steps taken to the share of all candidates to keep, in (0, 1]; None keeps the number
            of entries that `sparsify` got.
        moments: "reset" drops all moments at a selection, as the paper does; the default with batches. "carry" keeps
            those of entries that stay, and new entries start from zero under the same step count; the default without.
        threshold: with batches, select only if the overlap of the current masks with those that `probe` batches give is
            less than this number in (0, 1]; None selects every time.
        probe: how many batches are read for that cheaper estimate; default 1.
        memory_budget: with batches the `memory_budget` of `select_masks`; without, bytes of a group's accumulators,
            default 2 GiB.
        **options: with batches, `loss`, `max_batches`, `seed` or `progress` of `select_masks`.

    Attributes:
        steps: how many optimizer steps were counted.
        history: for each selection or probe its `step`, `entries`, and `overlap` with the masks before.

    Raises:
        ValueError: an argument is out of range or has no meaning with or without batches, or the optimizer does not
            train this model's values.
        TypeError: the optimizer is not a SparseAdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SparseAdamW,
        batches: Batches | None = None,
        *,
        interval: int | None = None,
        window: int | None = None,
        salience: str | Callable[[Tensor, Tensor], Tensor] | None = None,
        scope: Literal["local", "global"] = "local",
        density: Callable[[int], float] | None = None,
        moments: Literal["reset", "carry"] | None = None,
        threshold: float | None = None,
        probe: int | None = None,
        memory_budget: int | None = None,
        **options: Any,
    ):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.model, self.optimizer, self.batches = named_root(model), optimizer, batches
        self.interval, self.window, self.salience, self.scope, self.density = interval, window, salience, scope, density
        self.moments, self.threshold, self.probe = moments, threshold, probe
        self.memory_budget, self.options = memory_budget, options
        self.steps, self.history = 0, []
        self._skipped = 0
        self.training: TrainingSalience | None = None
        self._check_owners()
        measure = self._check_mode()
        self._check()
        weights = self._weights()
        self.entries = sum(len(weight.mask) for weight in weights)
        if measure is not None:
            budget = int(_BUDGET if memory_budget is None else memory_budget)
            rounds = f"windows of {self.window}, rounds of {self.interval} steps"
            choice = f"{measure.name} in {rounds}, {budget} bytes of accumulators"
            check_equal(choice, "The arguments of MaskSchedule", "pass the same in all of them.")
            steps = dict(window=int(self.window), interval=int(self.interval))
            self.training = TrainingSalience(weights, measure, scope, **steps, memory_budget=budget)
            self._skipped = optimizer.skipped_steps
        self.keys = SCHEDULE_KEYS if self.training is None else (*SCHEDULE_KEYS, *TURN_KEYS)
        optimizer.follow(self)

    @property
    def bytes_held(self) -> int:
        """Bytes of accumulators and stored scores that are held now; 0 with batches."""
        return 0 if self.training is None else self.training.bytes_held

    def reselect(self) -> Masks:
        """Choose the masks again now, regardless of interval and threshold; call it between steps.

        Returns:
            The new masks.

        Raises:
            ValueError: there are no batches, and masks are selected from training itself, group by group.
        """
        if self.training is not None:
            raise ValueError(
                "This MaskSchedule selects from training's own backward passes at the end of each window, so that "
                "reselect() has no scores; pass batches to MaskSchedule."
            )
        masks = self._select(self.batches)
        self._note(masks)
        self._change(masks)
        return masks

    def ever_trained(self) -> Masks:
        """Return the entries that are or were trained, which are all that can differ from the base model."""
        return Masks({weight.name: weight.ever_trained() for weight in self._weights()})

    def _change(self, masks: Mapping[str, Mask]) -> tuple[int, int]:
        """Change the masks of these weights; return how many entries they had before, and how many of these stay."""
        check_equal_masks(masks)
        before = kept = 0
        for weight in (weight for weight in self._weights() if weight.name in masks):
            before += len(weight.mask)
            places, stays = weight.change_mask(masks[weight.name])
            kept += int(stays.sum())
            if self.moments == "carry":
                self.optimizer.carry_moments(weight.values, places, stays)
            else:
                self.optimizer.reset_moments(weight.values)
        return before, kept

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counter and the latest events; the masks themselves are in the optimizer's state.

        Returns:
            `schedule_steps`, an int64 scalar, and `schedule_history`, (256, 3) float64: step, entries and overlap of
            the latest 256 events, followed by rows of -1. Its size is fixed, see `optim/state.py`.
        """
        history = torch.full((_KEPT_EVENTS, 3), -1.0, dtype=torch.float64)
        for row, event in zip(history, self.history[-_KEPT_EVENTS:], strict=False):
            row.copy_(torch.tensor([event[key] for key in _EVENT], dtype=torch.float64))
        return {"schedule_steps": torch.tensor(self.steps), "schedule_history": history}

    def check_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Refuse a state that `state_dict` cannot have returned.

        Raises:
            ValueError: a tensor has another dtype, shape or content.
        """
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
        """Restore what `state_dict` returned; the optimizer's `load_state_dict` calls this."""
        self.steps = int(state_dict["schedule_steps"])
        rows = [row for row in state_dict["schedule_history"].tolist() if row[0] >= 0]
        self.history = [{"step": int(step), "entries": int(n), "overlap": overlap} for step, n, overlap in rows]

    def state_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        """Return the state that is saved with a weight: nothing with batches, else see `TrainingSalience.state_of`."""
        return {} if self.training is None else self.training.state_of(weight)

    def check_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Refuse a state that `state_of` cannot have returned.

        Raises:
            ValueError: a tensor has another dtype, shape or content, or the saved run selected in another way.
        """
        if self.training is not None:
            self.training.check_state_of(weight, len(saved["values"]), saved)
        elif "schedule_turn" in saved:
            raise ValueError("The saved run's MaskSchedule had no batches; build this one without them too.")

    def load_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
        if self.training is not None:
            self.training.load_state_of(weight, saved)
            self._skipped = int(saved["skipped_steps"])

    def after_step(self, optimizer: SparseAdamW, args: tuple, kwargs: dict) -> None:
        """Count a step, and select masks when it is time; a post-hook of the optimizer's step."""
        self.steps += 1
        if self.training is not None:
            self._after_step_of_turn(optimizer)
            return
        if self.steps % self.interval:
            return
        if self.threshold is not None:
            overlap = self._note(self._select(itertools.islice(self.batches, self.probe)))
            if overlap >= self.threshold and self._wanted() == self._count():
                return
        self.reselect()

    def _after_step_of_turn(self, optimizer: SparseAdamW) -> None:
        """Count a step of the group's window, and choose its masks when the window is over."""
        skipped, self._skipped = optimizer.skipped_steps > self._skipped, optimizer.skipped_steps
        if skipped:
            self.training.start_anew()
        elif self.training.end_step():
            # A forward since the step's backward may have left weights gathered, in another dtype than their rows.
            reshard(self.model)
            masks = self.training.select(self._wanted() if self.scope == "global" else self._wanted_by_weight())
            if masks is not None:
                total = self._count()
                before, kept = self._change(masks)
                now = self._count()
                overlap = (total - before + kept) / max(1, min(total, now))
                self.history.append({"step": self.steps, "entries": now, "overlap": overlap})

    def _select(self, batches: Batches | Iterator | None) -> Masks:
        weights = {weight.name: weight for weight in self._weights()}
        options = {**self.options, "seed": self.options.get("seed", 0) + self.steps}
        return select_masks(
            self.model,
            list(batches) if isinstance(batches, itertools.islice) else batches,
            salience=self.salience,
            scope=self.scope,
            budget=self._wanted() if self.scope == "global" else self._wanted_by_weight(),
            memory_budget=self.memory_budget,
            targets=lambda name, parameter: name in weights,
            **options,
        )

    def _note(self, masks: Masks) -> float:
        overlap = masks.overlap(Masks({weight.name: weight.mask for weight in self._weights()}))
        self.history.append({"step": self.steps, "entries": masks.count, "overlap": overlap})
        return overlap

    def _wanted(self) -> int:
        """Return how many entries to keep now, over all weights."""
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
        check_share(f"density({self.steps})", density, "a schedule must give a share, such as 0.01")
        return density

    def _count(self) -> int:
        """Return how many entries are trained now, over all weights."""
        return sum(len(weight.mask) for weight in self._weights())

    def _weights(self) -> list[SparseWeight]:
        return sparse_weights(self.model)

    def _check_owners(self) -> None:
        if not isinstance(self.optimizer, SparseAdamW):
            raise TypeError(f"MaskSchedule changes the moments of a SparseAdamW and needs one; got {self.optimizer!r}.")
        if self.optimizer.schedule is not None:
            raise ValueError("The optimizer has a MaskSchedule already; use one, since two would overrule each other.")
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not self._weights() or any(id(weight.values) not in held for weight in self._weights()):
            raise ValueError("The optimizer does not train all of the model's values; build it from sparsify(...).")

    def _check_mode(self) -> Measure | None:
        """Set the defaults with or without batches, and refuse options that have no meaning there.

        Returns:
            The measure if masks are selected from training itself, else None.
        """
        if self.salience is None:
            self.salience = "snip" if self.batches is None else "gradient"
        measure = measure_of(self.salience)
        if self.batches is None and measure.takes_batches:
            if measure.statistic not in ("gradient", "squared_gradient"):
                raise ValueError(
                    f"salience={self.salience!r} needs calibration batches, since backward passes of training do not "
                    "give its statistic; pass some, or choose gradient, snip, force, taylor_fo, fisher or a function."
                )
            given = {name: getattr(self, name) for name in ("threshold", "probe")} | self.options
            for name, value in given.items():
                if value is not None and name in (*_OPTIONS, "threshold", "probe"):
                    raise ValueError(
                        f"{name}={value!r} has no meaning without batches, when masks are selected from training; "
                        f"leave {name} out, or pass batches."
                    )
            self.window = 8 if self.window is None else self.window
            self.interval = 50 if self.interval is None else self.interval
            self.moments = "carry" if self.moments is None else self.moments
            return measure
        if self.window is not None:
            raise ValueError(
                f"window={self.window!r} has a meaning only where masks are selected from training's own gradients; "
                "leave batches out, or set interval instead."
            )
        self.interval = 1000 if self.interval is None else self.interval
        self.probe = 1 if self.probe is None else self.probe
        self.moments = "reset" if self.moments is None else self.moments
        return None

    def _check(self) -> None:
        for name, usual in (("interval", 1000), ("probe", 1), ("window", 8)):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, least=1, usual=usual)
        check_choice("moments", self.moments, ("reset", "carry"))
        check_together(self.salience, self.scope)
        if self.threshold is not None:
            check_share("threshold", self.threshold, "0.8 selects anew below 80 % overlap")
        check_callable("density", self.density, "the step")
        if unknown := self.options.keys() - _OPTIONS:
            raise ValueError(
                f"MaskSchedule passes no {', '.join(sorted(unknown))} on to select_masks; it takes "
                f"memory_budget, {', '.join(sorted(_OPTIONS))}."
            )
        if self.window and self.memory_budget is not None:
            check_whole("memory_budget", self.memory_budget, least=1, usual="2 * 2**30 bytes")
        check_max_batches(self.options.get("max_batches"))
        if isinstance(self.batches, Iterator):
            raise ValueError(
                "batches can be iterated only once, but every selection reads them; pass a list or DataLoader."
            )
        if not self.window and measure_of(self.salience).takes_batches:
            check_batches(self.batches, 1)
        if is_distributed() and (self.scope == "global" or self.density is not None):
            raise ValueError(
                "With several processes each weight must keep its number of entries, since DistributedDataParallel "
                "reduces buffers of fixed size; use scope='local' and density=None."
            )
