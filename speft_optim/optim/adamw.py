"""SparseAdamW: AdamW over the compact values of masked entries.

PyTorch's `SparseAdam` takes sparse *gradients* of a dense parameter and keeps dense moments. Here parameter, gradient
and moments all have the length of the mask; the weight itself is written at the masked entries in the same step.
"""

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from speft_optim.checks import check_choice
from speft_optim.distributed import check_equal_masks, together
from speft_optim.kernels.adamw import adamw_, fused_adamw
from speft_optim.masks.mask import Mask
from speft_optim.optim.checks import check_gradients, check_options, check_others, warn_of_dense_training
from speft_optim.optim.moments import (
    carry_moments_,
    moment_bytes,
    new_moments_,
    store_moments_,
    unpack_moments,
)
from speft_optim.optim.state import (
    FORMER_KEYS,
    MASK_KEYS,
    SCHEDULE_KEYS,
    check_common,
    check_saved,
    check_saved_mask,
    former_of,
    has_moments,
    mask_of,
    moment_keys,
    positions_to_bits,
    text_of,
    text_to_tensor,
)
from speft_optim.optim.step import Prepared, mean_powers
from speft_optim.weights.compact_values import linked
from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class Schedule(Protocol):
    """What changes the masks during training; its state travels in the optimizer's.

    Attributes:
        keys: of the tensors that it keeps with each weight.
        bytes_held: bytes of what it gathers for the next masks.
    """

    keys: tuple[str, ...]
    bytes_held: int

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Optimizer post-hook: a step was taken."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of fixed shape under `SCHEDULE_KEYS`."""

    def check_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Raise a ValueError if `load_state_dict` could not restore it."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""

    def state_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        """What it keeps with one weight, under the rest of `keys`."""

    def check_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Raise a ValueError if `load_state_of` could not restore it."""

    def load_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Restore what `state_of` gave."""


class SparseAdamW(Optimizer):
    """AdamW for `sparsify(model, masks)`; ordinary parameters among them get ordinary AdamW.

    Unlike `torch.optim.SparseAdam` (sparse gradients, dense state) everything it holds is as long as the mask.

    Args:
        params: parameters or parameter groups, as for `torch.optim.AdamW`.
        lr: learning rate, a float or a scalar tensor.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the masked entries; the others never move. Compact values are 1-D, so a script
            that decays only parameters with two or more dimensions (`p.ndim >= 2`) decays none of them. Write instead
            `if p.ndim >= 2 or name.endswith(".values")`, over `model.named_parameters()`.
        maximize: ascend instead of descend.
        state_bits: 32, or 8 for block-wise quantised moments: two bytes an entry instead of eight.
        magnitude_power: with 1 or 0.5 each masked entry has a rate of its own, `lr` times abs(entry)^magnitude_power
            over its mean in the parameter group, cut to 0.1 to 5; 0 is one rate for all. It needs no state. Decay goes
            by `lr`, and so do ordinary parameters. See docs/benchmarks.md for when it pays.
        on_nonfinite: what a step does that meets a gradient with inf or NaN, in whatever parameter: "skip" it whole
            and count it in `skipped_steps`, "raise" a FloatingPointError before anything changed, or "ignore" it, as
            torch's AdamW does. The first two read one number back from the device per step; they also tell once of a
            step whose gradients are all zero, as those of a batch without labels may be.
        **others: options of `torch.optim.AdamW` that this optimizer lacks, taken only when None or False, so that a
            script may keep writing `fused=False`.

    Attributes:
        skipped_steps: steps left out because of a gradient that was not finite; saved in `state_dict()`.
        schedule: the `MaskSchedule` that changes the masks, if any.

    Raises:
        ValueError: a hyper-parameter is out of range, or there is no parameter.
        TypeError: a parameter is not a floating tensor, or an option is not known.
    """

    _stepped = False
    _told_of_zeros = False
    skipped_steps = 0
    schedule: Schedule | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_bits: Literal[8, 32] = 32,
        magnitude_power: Literal[0, 0.5, 1] = 0,
        on_nonfinite: Literal["skip", "raise", "ignore"] = "skip",
        **others: Any,
    ):
        check_others(others)
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise", "ignore"))
        self._on_nonfinite = on_nonfinite
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        if not isinstance(params, Iterable) or isinstance(params, Tensor | dict | set):
            raise TypeError(
                f"params is a {type(params).__name__}; pass the list sparsify(model, masks), or a list of groups."
            )
        if not (params := list(params)):
            raise ValueError("params is empty, so nothing would train; pass sparsify(model, masks), or groups of it.")
        super().__init__(params, {**defaults, "state_bits": state_bits, "magnitude_power": magnitude_power})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it lacks are the constructor's."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"A parameter group is a dict with params, got {param_group!r}; write dict(params=[...]).")
        check_options({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("The params of a group are a set, whose order changes between runs; pass a list.")
        params = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else [params]
        for parameter in params:
            # With a name in front, as of `named_parameters()`.
            parameter = parameter[-1] if isinstance(parameter, tuple) and parameter else parameter
            if not isinstance(parameter, Tensor):
                raise TypeError(f"SparseAdamW got a {type(parameter).__name__} as a parameter; it trains tensors.")
            if not parameter.is_floating_point():
                raise TypeError(
                    f"SparseAdamW got a parameter of {parameter.dtype}; it trains floating tensors, fp32 best."
                )
            linked(parameter)
        super().add_param_group({**param_group, "params": params})
        self._reserve_state()

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, and write the new values into the weights.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a masked weight was replaced, or at the first step the masks differ between processes or the
                values of all masked weights are frozen.
            FloatingPointError: a gradient is not finite, with `on_nonfinite="raise"`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stepped:
            self._restore_past_loading()
        # All of them before any update, and those without a gradient too: a weight that is gone never gets one.
        weights = {parameter: linked(parameter) for parameter in self._parameters()}
        # An error of one process alone, in its first step, would let the others wait in the exchange below.
        with nullcontext() if self._stepped else together():
            for weight in weights.values():
                if weight is not None:
                    weight.synchronize()
        if not self._stepped:
            # Not only in `sparsify`, which may have run before there were other processes: DistributedDataParallel lays
            # the values of one over the positions of another.
            masks = {weight.name: weight.mask for weight in weights.values() if weight is not None}
            check_equal_masks(masks, may_be_divided=True)
            check_gradients(weights)
            warn_of_dense_training(weights)
            self._stepped = True
        # What the host does is done while the GPU is still at the gradients, of which one number is waited for.
        largest = [] if self._on_nonfinite == "ignore" else self._largest_of_gradients()
        plans = [self._plan(group, weights) for group in self.param_groups]
        if largest and not self._may_step(largest):
            return loss
        for take_step in plans:
            take_step()
        return loss

    def _plan(self, group: dict[str, Any], weights: dict[Tensor, SparseWeight | None]) -> Callable[[], None]:
        """What takes the step of the parameters of a group that have a gradient; until then none of them changes."""
        options = dict(
            lr=group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
            magnitude_power=float(group["magnitude_power"]),
        )
        means = mean_powers(group, weights)
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        prepared = [
            Prepared.of(
                parameter,
                weights[parameter],
                self.state.get(parameter),
                group["state_bits"],
                None if weights[parameter] is None else means.get(parameter.device),
            )
            for parameter in trained
        ]
        updates = [one.update for one in prepared if one.update is not None]
        launch = fused_adamw(updates, **{**options, "lr": float(options["lr"])}) if updates else None
        return partial(self._take, prepared, options, launch)

    def _take(self, prepared: list["Prepared"], options: dict[str, Any], launch: Callable[[], None] | None) -> None:
        """Take the step: together where kernels run, else one by one."""
        if launch is not None:
            launch()
        for one in prepared:
            self.state[one.parameter] = one.state
        if prepared:
            torch._foreach_add_([one.state["step"] for one in prepared], 1)
        for one in prepared:
            if one.update is None:
                exp_avg, exp_avg_sq = unpack_moments(one.state)
                step, gradient = int(one.state["step"]), one.parameter.grad
                if one.state["exp_avg"] is not exp_avg:
                    # Decoded moments are fp32, whatever the parameter is.
                    gradient = gradient.float()
                adamw_(one.parameter, gradient, exp_avg, exp_avg_sq, step=step, mean=one.mean, **options)
                store_moments_(one.state, exp_avg, exp_avg_sq)
            if one.weight is not None:
                one.weight.write() if one.update is None or one.update.weight is None else one.weight.written()

    def _largest_of_gradients(self) -> list[Tensor]:
        """The largest magnitude in the gradients, one number for each device, which nothing has waited for yet."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None and p.grad.numel()]
        norms: dict[torch.device, list[Tensor]] = {}
        # Not a sum of squares, which can overflow; NaN passes through a maximum.
        for norm in torch._foreach_norm(gradients, float("inf")) if gradients else ():
            norms.setdefault(norm.device, []).append(norm)
        return [torch.stack(of_one).max() for of_one in norms.values()]

    def _may_step(self, largest: list[Tensor]) -> bool:
        """Whether all gradients are finite; if not the step is counted, or refused."""
        most = [float(one) for one in largest]
        if not any(most) and not self._told_of_zeros:
            # What comes of a loss over no label: the loss is NaN, but its gradient is not.
            logger.warning("All gradients of a step are zero: a batch whose labels are all ignored? Told of once.")
            self._told_of_zeros = True
        if all(map(math.isfinite, most)):
            return True
        if self._on_nonfinite == "raise":
            raise FloatingPointError(
                "A gradient holds inf or NaN; nothing was changed. Look for a bad sample, or skip such steps with "
                'SparseAdamW(..., on_nonfinite="skip").'
            )
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            logger.warning("A gradient holds inf or NaN: the step is skipped, like all such; see skipped_steps.")
        return False

    def memory_summary(self) -> dict[str, int]:
        """Bytes held now beyond the model's own weights, by kind.

        Returns:
            Bytes of `values`, mask `positions`, `moments`, `gradients`, of the `salience` that a `MaskSchedule` gathers
            from the training, and their `total`. Ordinary parameters count with moments and gradients only.
        """
        parameters = self._parameters()
        held = [weight.bytes_held() for parameter in parameters if (weight := linked(parameter)) is not None]
        kinds = {
            "values": sum(values for values, _ in held),
            "positions": sum(positions for _, positions in held),
            "moments": sum(moment_bytes(self.state[p]) for p in parameters if p in self.state),
            "gradients": sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None),
            "salience": 0 if self.schedule is None else self.schedule.bytes_held,
        }
        return {**kinds, "total": sum(kinds.values())}

    def follow(self, schedule: Schedule) -> None:
        """Let a schedule change the masks from now on, after steps of this optimizer."""
        self.schedule = schedule
        self.register_step_post_hook(schedule.after_step)
        self._reserve_state()

    def reset_moments(self, parameter: Tensor) -> None:
        """Forget the moments and step count of a parameter, as before its first step."""
        for key in [key for key in self.state[parameter] if key == "step" or key.startswith("exp_avg")]:
            del self.state[parameter][key]
        self._reserve_state()

    def carry_moments(self, parameter: Tensor, places: Tensor, stays: Tensor) -> None:
        """Let the moments of compact values follow a changed mask, see `carry_moments_`.

        Values that took no step yet, as those of a weight that had no entries, join at the step count of the others.
        """
        if has_moments(self.state[parameter]):
            carry_moments_(self.state[parameter], parameter.detach(), places, stays)
            return
        self.reset_moments(parameter)
        taken = [state["step"] for p, state in self.state.items() if has_moments(state) and linked(p) is not None]
        if taken:
            bits = next(bits for p, bits in self._with_bits() if p is parameter)
            self.state[parameter]["step"] = max(taken).clone()
            new_moments_(self.state[parameter], parameter.detach(), bits)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, a schedule and its model included: torch's own leaves out all but groups and state.

        A copy of the optimizer belongs to a copy of the model: copy both in one go, as `copy.deepcopy((model, o))`.
        What the schedule was given must allow it too: a density that is a lambda cannot be pickled, a function can.
        """
        own = ("_on_nonfinite", "_stepped", "_told_of_zeros", "skipped_steps", "schedule")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Also called by `load_state_dict`, on one that has its hook already.
        if "schedule" in state and self.schedule is not None:
            # Not `follow`: the model of this copy may not be there yet.
            self.register_step_post_hook(self.schedule.after_step)

    def state_dict(self) -> dict[str, Any]:
        """For each parameter its moments, for each compact one also its values, mask and the weight's name and shape.

        All of it is tensors under each parameter (see `state.py`), so that every tool for checkpoints carries it and
        `torch.load(..., weights_only=True)` opens it. The counters of optimizer and schedule stand with each parameter.
        """
        live = self.state
        complete = {p: self._saved_state(p, bits) for p, bits in self._with_bits() if p in live or p.requires_grad}
        self.state = defaultdict(dict, complete)
        try:
            return super().state_dict()
        finally:
            self.state = live

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, dtypes kept, and write the values into the weights.

        With a `MaskSchedule` the saved masks are restored too; graphs from before cannot go backward after that.

        Raises:
            ValueError: groups or parameters differ in number, a key is missing or damaged, or without a schedule a
                parameter's mask is not the saved one; nothing is changed.
        """
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        try:
            pairs, groups = self._checked_state(state_dict)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"The saved optimizer state is damaged ({type(error).__name__}: {error}); load another."
            ) from error
        # Not by torch's own loader, which would cast the moments to the parameter's dtype.
        groups = [
            {**({"param_names": own["param_names"]} if "param_names" in own else {}), **saved, "params": own["params"]}
            for own, saved in zip(self.param_groups, copy.deepcopy(groups), strict=True)
        ]
        self.__setstate__({"state": defaultdict(dict), "param_groups": groups})
        self._stepped = False
        for parameter, saved in pairs:
            self._restore(parameter, saved)
            if "skipped_steps" in saved:
                self.skipped_steps = int(saved["skipped_steps"])
            if self.schedule is not None and "schedule_steps" in saved:
                self.schedule.load_state_dict(saved)
                self.schedule.load_state_of(linked(parameter), saved)
        self._reserve_state()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _saved_state(self, parameter: Tensor, state_bits: int) -> dict[str, Any]:
        """What `state_dict` tells of a parameter."""
        live, weight = self.state.get(parameter, {}), linked(parameter)
        saved = {"step": torch.zeros((), dtype=torch.float32)}
        if has_moments(live):
            saved = {key: part for key, part in live.items() if key == "step" or key.startswith("exp_avg")}
        else:
            new_moments_(saved, parameter.detach(), state_bits)
        saved["skipped_steps"] = torch.tensor(self.skipped_steps)
        if weight is None:
            return saved
        weight.synchronize()
        mask, device = weight.mask, parameter.device
        # Copies, since a tool may load into them: the mask must not change unseen, nor the values beside the old mask.
        saved.update(
            values=parameter.detach().clone(),
            indices=mask.indices.to(device, copy=True),
            shape=torch.tensor(mask.shape, device=device),
            name=text_to_tensor(weight.name, device),
        )
        if self.schedule is not None:
            saved.update({**self.schedule.state_dict(), **self.schedule.state_of(weight)})
        if "former" in self._own_keys(weight):
            saved["former"] = positions_to_bits(weight.former, mask.shape.numel(), device)
            saved["former_values"] = parameter.new_empty(0) if weight.former is None else weight.former_entries()
        return saved

    def _own_keys(self, weight: SparseWeight | None) -> list[str]:
        """The keys of a saved state beside moments."""
        keys = ["skipped_steps"]
        if weight is not None:
            keys += MASK_KEYS
            if self.schedule is not None:
                keys += self.schedule.keys
            if self.schedule is not None or weight.former is not None:
                keys += FORMER_KEYS
        return keys

    def _reserve_state(self) -> None:
        """Let each parameter's state have all its keys from the start, of which tools that load ask it.

        What is computed only as the state is saved, and moments before the first step, are empty tensors meanwhile.
        """
        for parameter, state_bits in self._with_bits():
            weight = linked(parameter)
            if weight is None and not parameter.requires_grad:
                continue
            state = self.state[parameter]
            moments = () if has_moments(state) else moment_keys(state_bits)
            for key in (*moments, *self._own_keys(weight)):
                if key not in state:
                    state[key] = torch.zeros(() if key == "step" else 0)

    def _checked_state(self, state_dict: dict[str, Any]) -> tuple[list, list]:
        """Pairs of parameters with their saved state, and the saved groups."""
        # States saved before there were rates by magnitude do not name a power.
        groups = [{"magnitude_power": 0, **group} for group in state_dict["param_groups"]]
        states = [state_dict["state"].get(key) or {} for group in groups for key in group["params"]]
        self._check_origin(states)
        sizes, saved_sizes = ([len(g["params"]) for g in side] for side in (self.param_groups, groups))
        if sizes != saved_sizes:
            raise ValueError(
                f"The saved optimizer has parameter groups of sizes {saved_sizes}, this one of {sizes}; "
                "build it with the same masks and groups as the saved run."
            )
        pairs = list(zip(self._parameters(), states, strict=True))
        for parameter, saved in pairs:
            self._check_saved(parameter, saved)
        for key in ("skipped_steps", *SCHEDULE_KEYS, "schedule_turn"):
            check_common(key, [saved[key] for saved in states if key in saved])
        if self.schedule is not None:
            self.schedule.check_state_dict(next(saved for saved in states if "schedule_steps" in saved))
        for group in groups:
            check_options(group)
        return pairs, groups

    def _check_origin(self, states: list[dict[str, Any]]) -> None:
        """Refuse what another optimizer saved."""
        names = [weight.name for parameter in self._parameters() if (weight := linked(parameter)) is not None]
        if names and not any("values" in saved for saved in states):
            raise ValueError(
                f"The saved optimizer state knows no values of {names[0]}: the state of a dense run, or of another "
                "optimizer, cannot be used; start without it."
            )

    def _check_saved(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        """Refuse the state of another mask, or with a schedule of another weight, before anything is changed."""
        weight = linked(parameter)
        if weight is None:
            if saved or parameter.requires_grad:
                what = f"a parameter of shape {tuple(parameter.shape)}"
                check_saved(what, parameter, saved, ("step", "exp_avg", "exp_avg_sq", *self._own_keys(None)))
            return
        weight.check()
        if self.schedule is None and "schedule_steps" in saved:
            raise ValueError(
                "The saved run had a MaskSchedule, this optimizer has none; build that MaskSchedule before loading."
            )
        if self.schedule is not None and "values" in saved and "schedule_steps" not in saved:
            raise ValueError(
                "The saved state has no schedule_steps: that run had no MaskSchedule; load the state first, then build "
                "the MaskSchedule."
            )
        kept = [key for key in self._own_keys(weight) if self.schedule is not None or key not in FORMER_KEYS]
        fits = saved["values"] if self.schedule is not None and isinstance(saved.get("values"), Tensor) else parameter
        check_saved(weight.name, fits, saved, ("step", "exp_avg", "exp_avg_sq", *kept))
        self._check_mask(weight, check_saved_mask(weight.name, saved, weight.holds_entries), text_of(saved["name"]))
        if self.schedule is not None and "schedule_steps" in saved:
            self.schedule.check_state_of(weight, saved)

    def _check_mask(self, weight: SparseWeight, mask: Mask, name: str) -> None:
        fits = mask.shape == weight.mask.shape if self.schedule is not None else mask == weight.mask
        if name != weight.name or not fits:
            raise ValueError(
                f"{weight.name} has mask {weight.mask.fingerprint()} ({len(weight.mask):,} entries), the saved state "
                f"is of {name} with mask {mask.fingerprint()} ({len(mask):,} entries); sparsify the model with the "
                "saved run's masks (Masks.load) before loading, or build the run's MaskSchedule before loading if it "
                "had one."
            )

    @torch.no_grad()
    def _restore(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        if has_moments(saved):
            # The step is read at each step, which on a GPU would wait for it.
            self.state[parameter] = {
                key: part.detach().to("cpu" if key == "step" else parameter.device, copy=True)
                for key, part in saved.items()
                if key == "step" or key.startswith("exp_avg")
            }
        weight = linked(parameter)
        if weight is not None:
            mask = mask_of(saved)
            if weight.mask != mask:
                weight.change_mask(mask)
            weight.restore_former(former_of(saved), saved.get("former_values"))
            parameter.copy_(saved["values"])
            weight.write()

    def _restore_past_loading(self) -> None:
        """Restore what was put straight into the live state, as `ZeroRedundancyOptimizer` does with a saved one."""
        loaded = {p: state for p in self._parameters() if len((state := self.state.get(p, {})).get("values", ()))}
        for parameter, saved in loaded.items():
            self._check_saved(parameter, saved)
        for parameter, saved in loaded.items():
            del self.state[parameter]
            self._restore(parameter, saved)
            self.skipped_steps = int(saved["skipped_steps"])
        self._reserve_state()

    def _with_bits(self) -> list[tuple[Tensor, int]]:
        """The parameters, each with the width of its group's moments."""
        return [(parameter, group["state_bits"]) for group in self.param_groups for parameter in group["params"]]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
