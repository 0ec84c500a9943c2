"""The saved state of an optimizer over compact values: saved, checked and restored.

All of it is tensors under each parameter; `state.py` describes their keys and shapes.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from speft_optim.optim.checks import check_options
from speft_optim.optim.moments import new_moments_
from speft_optim.optim.schedule_protocol import Schedule
from speft_optim.optim.state import (
    SCHEDULE_KEYS,
    has_moments,
    mask_of,
    moment_keys,
    own_keys,
    positions_to_bits,
    previous_checksum,
    previous_of,
    text_to_tensor,
)
from speft_optim.optim.state_checks import check_common, check_origin, check_parameter
from speft_optim.weights.compact_values import linked


class SavedOptimizer(Optimizer):
    """An optimizer whose saved state also holds values, masks and counters.

    Attributes:
        skipped_steps: how many steps were skipped since a gradient was not finite; saved in `state_dict()`.
        schedule: the `MaskSchedule` that changes the masks, or None.
    """

    # These attributes are copied and pickled beside groups and state.
    _own_attributes: tuple[str, ...] = ("_stepped", "skipped_steps", "schedule")
    _stepped = False
    skipped_steps = 0
    schedule: Schedule | None = None
    # Those of entries that left their masks, from a state that was loaded, until the first step compares them.
    _checksums: Iterable[tuple[Tensor, int]] = ()

    def follow(self, schedule: Schedule) -> None:
        """Let a schedule change the masks after steps of this optimizer, from now on."""
        self.schedule = schedule
        self.register_step_post_hook(schedule.after_step)
        self._reserve_state()

    def __getstate__(self) -> dict[str, Any]:
        """Return the content of a copy or pickle; torch's own method leaves out all but groups and state.

        It includes a schedule and its model. Copy model and optimizer in one call, `copy.deepcopy((model, optimizer))`,
        so that the copied optimizer trains the copied model. A schedule whose density is a lambda cannot be pickled;
        one with a named function can.
        """
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own_attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # `load_state_dict` calls this too, on an optimizer that has its hook already.
        if "schedule" in state and self.schedule is not None:
            # `follow` would read the copied model, which may not be complete yet.
            self.register_step_post_hook(self.schedule.after_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of each parameter, and of compact values also the values, the mask and the weight's name.

        All of it is tensors under each parameter (see `state.py`), so that any checkpoint tool can save it and
        `torch.load(..., weights_only=True)` can load it. The counters of optimizer and schedule are saved with each
        parameter.
        """
        live = self.state
        complete = {p: self._saved_state(p, bits) for p, bits in self._with_bits() if p in live or p.requires_grad}
        self.state = defaultdict(dict, complete)
        try:
            return super().state_dict()
        finally:
            self.state = live

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in the saved dtypes, and write the values into the weights.

        With a `MaskSchedule` the saved masks are restored too; graphs of earlier forward passes then have no backward.

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
        # torch's own loader would cast the moments to the parameter's dtype.
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
        self._checksums = [(parameter, int(saved.get("previous_checksum", 0))) for parameter, saved in pairs]
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _saved_state(self, parameter: Tensor, state_bits: int) -> dict[str, Any]:
        """Return the saved state of a parameter."""
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
        # A tool may load into these tensors, so they are copies: values and mask must change together.
        saved.update(
            values=parameter.detach().clone(),
            indices=mask.indices.to(device, copy=True),
            shape=torch.tensor(mask.shape, device=device),
            name=text_to_tensor(weight.name, device),
        )
        if self.schedule is not None:
            saved.update({**self.schedule.state_dict(), **self.schedule.state_of(weight)})
            if weight.place.shards is not None:
                # torch distributes the full state of a sharded model only if all of it is on one device.
                saved.update({key: part.to(device) for key, part in saved.items() if key.startswith("schedule_")})
        if "previously_trained" in own_keys(weight, self.schedule):
            saved["previously_trained"] = positions_to_bits(weight.previously_trained, mask.shape.numel(), device)
            nothing = parameter.new_empty(0)
            saved["previous_values"] = nothing if weight.previously_trained is None else weight.previous_entries()
            saved["previous_checksum"] = previous_checksum(weight)
        return saved

    def _reserve_state(self) -> None:
        """Give each parameter's state all its keys from the start, since tools that load take the keys from it.

        Empty tensors stand for moments before the first step, and for all that is computed when the state is saved.
        """
        for parameter, state_bits in self._with_bits():
            weight = linked(parameter)
            if weight is None and not parameter.requires_grad:
                continue
            state = self.state[parameter]
            moments = () if has_moments(state) else moment_keys(state_bits)
            for key in (*moments, *own_keys(weight, self.schedule)):
                if key not in state:
                    state[key] = torch.zeros(() if key == "step" else 0)

    def _checked_state(self, state_dict: dict[str, Any]) -> tuple[list, list]:
        """Check a saved state; return pairs of each parameter and its state, and the groups."""
        # States that were saved before `magnitude_power` existed do not have it.
        groups = [{"magnitude_power": 0, **group} for group in state_dict["param_groups"]]
        states = [state_dict["state"].get(key) or {} for group in groups for key in group["params"]]
        check_origin(self._parameters(), states)
        sizes, saved_sizes = ([len(g["params"]) for g in side] for side in (self.param_groups, groups))
        if sizes != saved_sizes:
            raise ValueError(
                f"The saved optimizer has parameter groups of sizes {saved_sizes}, this one of {sizes}; "
                "build it with the same masks and groups as the saved run."
            )
        pairs = list(zip(self._parameters(), states, strict=True))
        for parameter, saved in pairs:
            check_parameter(parameter, saved, self.schedule)
        for key in ("skipped_steps", *SCHEDULE_KEYS, "schedule_turn"):
            check_common(key, [saved[key] for saved in states if key in saved])
        if self.schedule is not None:
            self.schedule.check_state_dict(next(saved for saved in states if "schedule_steps" in saved))
        for group in groups:
            check_options(group)
        return pairs, groups

    @torch.no_grad()
    def _restore(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        # The step count is read in each step, and reading it from a GPU would wait for it.
        moments = {
            key: part.detach().to("cpu" if key == "step" else parameter.device, copy=True)
            for key, part in saved.items()
            if has_moments(saved) and (key == "step" or key.startswith("exp_avg"))
        }
        weight = linked(parameter)
        if weight is not None:
            mask = mask_of(saved)
            if weight.mask != mask:
                following = weight.compare(mask)
                weight.exchange_entries(following)
                weight.change_mask(following)
            if "previously_trained" in saved:
                weight.restore_previous(previous_of(saved), saved["previous_values"])
            parameter.copy_(saved["values"])
            weight.write()
        if moments:
            # After the mask, which may fail to change.
            self.state[parameter] = moments

    def _restore_past_loading(self) -> None:
        """Restore saved states that `ZeroRedundancyOptimizer` has put directly into `self.state`."""
        loaded = {p: state for p in self._parameters() if len((state := self.state.get(p, {})).get("values", ()))}
        for parameter, saved in loaded.items():
            check_parameter(parameter, saved, self.schedule)
        for parameter, saved in loaded.items():
            del self.state[parameter]
            self._restore(parameter, saved)
            self.skipped_steps = int(saved["skipped_steps"])
        self._reserve_state()

    def _with_bits(self) -> list[tuple[Tensor, int]]:
        """Return the parameters, each with the `state_bits` of its group."""
        return [(parameter, group["state_bits"]) for group in self.param_groups for parameter in group["params"]]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
