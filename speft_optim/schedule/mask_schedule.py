"""Dynamic masks: entries are chosen again during training (SPEFT, Section 3.3).

A `MaskSchedule` is a hook on the optimizer: it counts its steps and selects masks after some of them, and its state is
saved in the optimizer's. So a training loop or trainer needs no change, steps are counted right under gradient
accumulation, and a resumed run restores masks and counter together with the moments. Parameters stay the same objects,
with other contents, so that learning rate schedulers and wrappers that hold them are not affected.

An entry that leaves the mask keeps its trained value in the weight, and is not trained unless it is selected again.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from speft_optim.checkpoint.save import named_root
from speft_optim.distributed import check_equal, check_equal_masks
from speft_optim.masks.collection import Masks
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.optim.carried_moments import MaskChange
from speft_optim.optim.state import SCHEDULE_KEYS, TURN_KEYS
from speft_optim.salience.batches import Batches
from speft_optim.salience.measures import Measure
from speft_optim.salience.selection import select_masks
from speft_optim.salience.streaming import Choice, TrainingSalience
from speft_optim.schedule.amounts import amount_at, trained
from speft_optim.schedule.arguments import Arguments, check_owner
from speft_optim.schedule.saved_schedule import SavedSchedule
from speft_optim.weights.attached import refuse_reducer, sparse_weights
from speft_optim.weights.mesh import reshard
from speft_optim.weights.sparse_weight import NextMask, SparseWeight


class MaskSchedule(SavedSchedule):
    """Re-selects the masks of a sparsified model during training (dynamic masks: SPEFT, Section 3.3).

    The candidates are all entries of the weights that `sparsify` attached values to. In global scope many weights may
    start with an empty mask; `sparsify(model, masks, keep_empty=True)` makes them candidates too.

    **With batches**, `select_masks` re-selects all masks after every `interval` steps, as in the paper.

    **Without batches**, scores come from training itself, without extra passes. One group of weights at a time
    accumulates its gradients in the backward passes of training; after `window` optimizer steps its masks are
    re-selected, and the next group follows. A round of all groups takes at least `interval` steps. In local scope each
    weight keeps its number of entries. In global scope the group's new scores compete with the stored scores of the
    entries of other groups, so that entries move between weights and their total number is constant; in the first round
    each group keeps its number of entries.

    Memory and checkpoints then also hold the group's accumulators, 4 bytes for each of its entries and at most
    `memory_budget` in all, and a score for each trained entry. Scores use the raw gradients: before clipping, and
    including the constant factors of a loss scaler and of gradient accumulation. If a step is skipped because of inf or
    NaN, or `optimizer.zero_grad()` is called instead of a step, the group's window starts again; gradients that are
    dropped in another way, such as by `model.zero_grad()`, are counted. Weights that get no gradient keep their masks.
    With several processes, each accumulates its own gradients, which are averaged at the end of a group's window; see
    `share_sums` for checkpoints within a window. DistributedDataParallel needs local scope
    and no `density`, since its buffers have fixed numbers of entries; otherwise its forward fails. `magnitude`,
    `random` and `synflow` need no gradient: with these measures and no batches, `select_masks` is called at intervals
    too.

    Averages of parameters, such as torch's `AveragedModel`, mix different entries once masks have moved. In local
    scope, a copied model that averages all parameters then uses its averaged dense weights, in their dtype; if numbers
    of entries change, torch raises an error, since the averaged tensors differ in length. Averages of the values alone
    cannot be corrected, and a warning is issued when the values are set to them. Average the tensors of `state_dict()`
    instead.

    Args:
        model: the sparsified model, or a wrapper around it.
        optimizer: its `SparseAdamW`, or accelerate's wrapper around it.
        batches: calibration data as for `select_masks`, iterated again for each selection; None uses the gradients of
            training.
        interval: with batches, optimizer steps between selections; default 1000, as in the paper. Without batches, the
            minimum number of steps of a round, in which each weight is selected once; default 50.
        window: without batches, the number of optimizer steps over which a group accumulates its gradients; default 8.
        salience: the measure, as for `select_masks`; default "gradient" with batches. Without them it is "gradient",
            "snip" (the default), "force" or "taylor_fo" of the summed gradients, or "fisher", which sums the squared
            gradients of backward passes, that is of micro-batches instead of single examples; or a function
            `salience(weight, gradient)` of entries and their summed gradients, both fp32 of shape (entries,), that
            returns floating-point scores of that shape, of which the highest are kept.
        scope: "local" keeps the number of entries of each weight, "global" their total number.
        density: a function from the number of steps taken to the share of all candidates to keep, in (0, 1]; None keeps
            the number of entries that `sparsify` was given.
        moments: "reset" drops all moments at a selection, as in the paper; the default with batches. "carry" keeps
            those of entries that stay, and new entries start from zero with the same step count; the default without
            batches.
        threshold: with batches, re-select only if the overlap of the current masks with masks selected on `probe`
            batches is less than this number in (0, 1]; None re-selects every time.
        probe: the number of batches for this cheaper selection; default 1.
        memory_budget: with batches, the `memory_budget` of `select_masks`; without, the most bytes of a group's
            accumulators, default 2 GiB.
        **options: with batches, `loss`, `max_batches`, `seed` or `progress` of `select_masks`.

    Attributes:
        steps: the number of optimizer steps counted.
        history: for each selection or probe its `step`, `entries`, and `overlap` with the masks before.

    Raises:
        ValueError: an argument is out of range, or applies only with batches but there are none, or the reverse; or the
            optimizer does not train this model's values.
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
        self.model, self.optimizer = named_root(model), optimizer
        weights = self._weights()
        check_owner(optimizer, weights)
        rest = (interval, window, salience, scope, density, moments, threshold, probe, memory_budget, options)
        given = Arguments(batches, *rest)
        self.batches, self.salience, self.scope, self.density = batches, given.salience, scope, density
        self.interval, self.window, self.moments = given.interval, given.window, given.moments
        self.threshold, self.probe = threshold, given.probe
        self.memory_budget, self.options = given.memory_budget, given.options
        self.steps, self.history = 0, []
        self._skipped = optimizer.skipped_steps
        self.entries = trained(weights)
        self.training = None if given.measure is None else self._from_training(weights, given.measure)
        self.keys = SCHEDULE_KEYS if self.training is None else (*SCHEDULE_KEYS, *TURN_KEYS)
        optimizer.follow(self)
        refuse_reducer(self.model, scope == "global" or density is not None)

    def _from_training(self, weights: list[SparseWeight], measure: Measure) -> TrainingSalience:
        """Return the salience of training's own gradients, after a check that all processes have the same arguments."""
        budget, rounds = int(self.memory_budget), f"windows of {self.window}, rounds of {self.interval} steps"
        choice = f"{measure.name} in {rounds}, {budget} bytes of accumulators"
        check_equal(choice, "The arguments of MaskSchedule", "pass the same in all of them.")
        steps = dict(window=int(self.window), interval=int(self.interval))
        return TrainingSalience(weights, measure, self.scope, **steps, memory_budget=budget)

    @property
    def bytes_held(self) -> int:
        """Bytes of accumulators and stored scores that are held now; 0 with batches."""
        return 0 if self.training is None else self.training.bytes_held

    @property
    def is_summing(self) -> bool:
        """Whether backward passes accumulate gradients now, which a replayed CUDA graph of a pass would not do."""
        return self.training is not None and self.training.is_summing

    def reselect(self) -> Masks:
        """Re-select the masks now, regardless of interval and threshold; call it between steps.

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
        event = self._event(masks)
        self._change({name: Choice(mask, None) for name, mask in masks.items()})
        self.history.append(event)
        return masks

    def share_sums(self) -> None:
        """Let the state of any process be that of all, between steps: call it in all processes before one saves.

        Without batches, each of several processes has sums of gradients of its own within a window. This averages them,
        which changes no later choice beyond rounding. A state that one process saves within a window without it lets
        the resumed run begin the window again, and a warning says so. States of models under `fully_shard`, which all
        processes ask for, are complete without it. In one process it does nothing.
        """
        if self.training is not None:
            self.training.share()

    def ever_trained(self) -> Masks:
        """Return masks of all entries that are or were trained; only these can differ from the base model."""
        return Masks({weight.name: weight.ever_trained() for weight in self._weights()})

    def _change(self, choices: Mapping[str, Choice]) -> tuple[int, int]:
        """Change the masks of these weights; return how many entries they had before, and how many of these stay.

        Mask, moments and score of a weight change together: after an error each weight has all of them as they were or
        all of them new.
        """
        check_equal_masks({name: choice.mask for name, choice in choices.items()})
        before = kept = 0

        def changes() -> Iterator[MaskChange]:
            nonlocal before, kept
            for weight in (weight for weight in self._weights() if weight.name in choices):
                mask, scores = choices[weight.name]
                following = weight.compare(mask)
                before, kept = before + len(weight.mask), kept + len(following.after)
                exchange = partial(weight.exchange_entries, following)
                make = partial(self._change_one, weight, following, scores)
                yield MaskChange(weight.values, len(mask), following.before, following.after, exchange, make)

        self.optimizer.change_masks(changes(), carry=self.moments == "carry")
        return before, kept

    def _change_one(self, weight: SparseWeight, following: NextMask, scores: Tensor | None) -> None:
        weight.change_mask(following)
        if scores is not None:
            self.training.scores[weight.name] = scores

    def after_step(self, optimizer: SparseAdamW, args: tuple, kwargs: dict) -> None:
        """Count a step, and select masks when it is time; a post-hook of the optimizer's step."""
        self.steps += 1
        if self.training is not None:
            self._after_step_of_turn(optimizer)
            return
        if self.steps % self.interval:
            return
        if self.threshold is not None:
            self.history.append(self._event(self._select(itertools.islice(self.batches, self.probe))))
            if self.history[-1]["overlap"] >= self.threshold and self._trains_as_many_as_wanted():
                return
        self.reselect()

    def after_zero_grad(self) -> None:
        """Forget gradients that are dropped without a step."""
        if self.training is not None:
            self.training.drop_gradients()

    def _after_step_of_turn(self, optimizer: SparseAdamW) -> None:
        """Count a step of the group's window, and choose its masks when the window is over."""
        skipped, self._skipped = optimizer.skipped_steps > self._skipped, optimizer.skipped_steps
        if skipped:
            self.training.start_anew()
        elif self.training.end_step():
            # A forward since the step's backward may have left weights gathered, in another dtype than their rows.
            reshard(self.model)
            choices = self.training.select(self._amount())
            if choices is not None:
                total = trained(self._weights())
                before, kept = self._change(choices)
                now = trained(self._weights())
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
            budget=self._amount(),
            memory_budget=self.memory_budget,
            targets=lambda name, parameter: name in weights,
            **options,
        )

    def _event(self, masks: Masks) -> dict[str, Any]:
        """Return what the history says of masks that are selected now."""
        overlap = masks.overlap(Masks({weight.name: weight.mask for weight in self._weights()}))
        return {"step": self.steps, "entries": masks.count, "overlap": overlap}

    def _amount(self) -> int | dict[str, int]:
        """Return how many entries to keep now: over all weights in global scope, of each weight in local scope."""
        return amount_at(self.steps, self._weights(), self.scope, self.density, self.entries)

    def _trains_as_many_as_wanted(self) -> bool:
        wanted = self.entries if self.density is None else self._amount()
        return trained(self._weights()) == (sum(wanted.values()) if isinstance(wanted, dict) else wanted)

    def _weights(self) -> list[SparseWeight]:
        return sparse_weights(self.model)
