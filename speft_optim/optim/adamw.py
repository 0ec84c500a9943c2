"""SparseAdamW: AdamW over the compact values of masked entries.

PyTorch's `SparseAdam` takes sparse *gradients* of a dense parameter and keeps dense moments. Here parameter, gradient
and moments all have the length of the mask, and the step also writes the new values into the weight's masked entries.
"""

import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from speft_optim.checks import check_choice
from speft_optim.distributed import check_equal_masks, together, total_of
from speft_optim.optim.carried_moments import MaskChange, carried_moments, in_runs
from speft_optim.optim.checks import (
    check_gradients,
    check_options,
    check_others,
    refuse_quantised_rows,
    refuse_step_in_backward,
    warn_of_dense_training,
)
from speft_optim.optim.moments import moment_bytes, new_moments_
from speft_optim.optim.saved_optimizer import SavedOptimizer
from speft_optim.optim.state import has_moments
from speft_optim.optim.state_checks import warn_of_lost_entries
from speft_optim.optim.step import planned
from speft_optim.weights.compact_values import linked
from speft_optim.weights.gradient_nodes import present_backward
from speft_optim.weights.sharded import device_of, is_sharded, local_rows

logger = logging.getLogger(__name__)


class SparseAdamW(SavedOptimizer):
    """AdamW for the compact values that `sparsify(model, masks)` returns; ordinary parameters get ordinary AdamW.

    Unlike `torch.optim.SparseAdam` (sparse gradients, dense state), all of its state has the length of the mask.

    Args:
        params: parameters or parameter groups, as for `torch.optim.AdamW`.
        lr: learning rate, a float or a scalar tensor.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: decoupled decay of the masked entries; other entries never change. Compact values are 1-D, so a
            script that applies decay only to parameters with two or more dimensions (`p.ndim >= 2`) skips them. Write
            `if p.ndim >= 2 or name.endswith(".values")` over `model.named_parameters()` instead.
        maximize: ascend instead of descend.
        state_bits: 32, or 8 for block-wise quantised moments: two bytes an entry instead of eight.
        magnitude_power: 0.5 or 1 gives each masked entry its own learning rate: `lr` times abs(entry)^power divided by
            the mean of abs(entry)^power over the parameter group; this factor is clamped to [0.1, 5]. 0 uses `lr` for
            all entries. It needs no state. Weight decay and ordinary parameters use `lr`. docs/benchmarks.md shows its
            effect.
        on_nonfinite: what a step does if any gradient holds inf or NaN: "skip" changes nothing and counts the step in
            `skipped_steps`, "raise" raises a FloatingPointError before anything is changed, and "ignore" takes the
            step, as torch's AdamW does. The first two wait for one number from the device in each step. They also warn
            once if all gradients of a step are zero, such as those of a batch without labels.
        **others: options of `torch.optim.AdamW` that this optimizer lacks; they are accepted only if None or False, so
            that a script can keep `fused=False`.

    Attributes:
        skipped_steps: the number of steps that were skipped because a gradient was not finite; saved in `state_dict()`.
        schedule: the `MaskSchedule` that changes the masks, or None.

    Raises:
        ValueError: a hyper-parameter is out of range, or there is no parameter.
        TypeError: a parameter is not a floating-point tensor, or an option is unknown.
    """

    _own_attributes = (*SavedOptimizer._own_attributes, "_on_nonfinite", "_told_of_zeros")
    _told_of_zeros = False
    # References to the trained masked weights, so that they live as long as the optimizer, as any optimizer's
    # parameters do. A copied optimizer sets them in its first step, since the copied model may not be complete before.
    _held: tuple = ()

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
        """Add a group of parameters.

        Args:
            param_group: a dict with `params` and any options; the constructor's are used for others.

        Raises:
            TypeError: it is no such dict, or a parameter is not a floating-point tensor.
            ValueError: an option is out of range.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"A parameter group is a dict with params, got {param_group!r}; write dict(params=[...]).")
        check_options({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("The params of a group are a set, whose order changes between runs; pass a list.")
        params = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else [params]
        weights = []
        for parameter in params:
            # `named_parameters()` yields pairs of name and parameter.
            parameter = parameter[-1] if isinstance(parameter, tuple) and parameter else parameter
            if not isinstance(parameter, Tensor):
                raise TypeError(f"SparseAdamW got a {type(parameter).__name__} as a parameter; pass tensors.")
            if not parameter.is_floating_point():
                raise TypeError(
                    f"SparseAdamW got a parameter of {parameter.dtype}; pass floating-point tensors, fp32 if possible."
                )
            weights.append(linked(parameter))
        super().add_param_group({**param_group, "params": params})
        self._held += tuple(weights)
        self._reserve_state()

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, and write the new values into the weights.

        Args:
            closure: computes the loss and its gradients, with gradients enabled, and returns the loss; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a masked weight was replaced; under `fully_shard`, gradients are not averaged yet; the step is
                taken within a backward, see `refuse_step_in_backward`; or, at the first step, the masks differ between
                processes or the values of all masked weights are frozen.
            FloatingPointError: a gradient is not finite, with `on_nonfinite="raise"`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stepped:
            self._restore_past_loading()
        # All weights are checked before any update, also those without a gradient: a replaced weight never gets one.
        weights = {parameter: linked(parameter) for parameter in self._parameters()}
        self._held = tuple(weights.values())
        if present_backward() != -1:
            refuse_step_in_backward(weights.values())
        # In the first step an error of one process alone would let the others hang in the exchange below.
        with nullcontext() if self._stepped else together():
            for weight in weights.values():
                if weight is not None:
                    weight.check_average()
                    weight.synchronize()
        if not self._stepped:
            # `sparsify` may have run before the process group was initialised, and DistributedDataParallel would copy
            # the values of one process to the positions of another.
            masks = {weight.name: weight.mask for weight in weights.values() if weight is not None}
            check_equal_masks(masks, may_be_divided=True)
            check_gradients(weights)
            refuse_quantised_rows(self._with_bits())
            warn_of_dense_training(weights)
            # Only now, since the model's own state may be loaded after that of the optimizer.
            warn_of_lost_entries(self._checksums)
            self._checksums = ()
            self._stepped = True
        # The steps are planned while the GPU still computes gradients; only then is their largest magnitude waited for.
        largest = [] if self._on_nonfinite == "ignore" else self._largest_of_gradients()
        plans = [planned(group, weights, self.state) for group in self.param_groups]
        if largest and not self._may_step(largest):
            return loss
        for take_step in plans:
            take_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, as torch's optimizers do; a `MaskSchedule` that has accumulated them is notified."""
        super().zero_grad(set_to_none)
        # Fabric's wrapper imitates this class, and holds the optimizer itself.
        schedule = getattr(self, "optimizer", self).schedule
        if schedule is not None:
            schedule.after_zero_grad()

    def _largest_of_gradients(self) -> list[Tensor]:
        """Return the largest magnitude in the gradients of each device, as scalars that are not waited for yet."""
        found = [p.grad for p in self._parameters() if p.grad is not None]
        sharded = [grad for grad in found if is_sharded(grad)]
        gradients = [part for grad in found if (part := local_rows(grad) if is_sharded(grad) else grad).numel()]
        norms: dict[torch.device, list[Tensor]] = {}
        # A sum of squares could overflow; the maximum does not, and it is NaN if any number is.
        for norm in torch._foreach_norm(gradients, float("inf")) if gradients else ():
            norms.setdefault(norm.device, []).append(norm)
        largest = [torch.stack(of_one).max() for of_one in norms.values()]
        # Each process has rows of its own, and all of them step or none. A sum keeps NaN, which a maximum may lose.
        return [total_of(largest, device_of(sharded[0]))] if sharded else largest

    def _may_step(self, largest: list[Tensor]) -> bool:
        """Tell whether all gradients are finite; if not, count the skipped step or raise."""
        most = [float(one) for one in largest]
        if not any(most) and not self._told_of_zeros:
            # The loss over no label is NaN, but its gradients are zero.
            logger.warning(
                "All gradients of a step are zero; are all labels of a batch ignored? This is not logged again."
            )
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
            logger.warning("A gradient holds inf or NaN, so the step is skipped; skipped_steps counts such steps.")
        return False

    def memory_summary(self) -> dict[str, int]:
        """Return the bytes held now beyond the model's own weights, by kind.

        Returns:
            Bytes of `values`, mask `positions`, `moments`, `gradients`, `salience` (accumulators and scores of a
            `MaskSchedule` without batches), and their `total`. Ordinary parameters have moments and gradients only.
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

    def reset_moments(self, parameter: Tensor) -> None:
        """Drop the moments and step count of a parameter, as before its first step."""
        for key in [key for key in self.state[parameter] if key == "step" or key.startswith("exp_avg")]:
            del self.state[parameter][key]
        self._reserve_state()

    def change_masks(self, changes: Iterable[MaskChange], *, carry: bool) -> None:
        """Apply prepared changes of masks, and drop the moments or carry those of entries that stay.

        See `carried_moments`. Values without moments, as those of a weight that had no entries, then start at the step
        count of the others. The moments of a few weights are computed before the first of their masks changes, and each
        mask changes with its moments. So an error, also one of the iterator, leaves masks and moments that belong
        together. It is an error in all processes.

        Args:
            changes: the changes, each of values that this optimizer trains. To prepare them exchanges nothing between
                processes.
            carry: whether moments are carried.
        """
        runs = in_runs(changes)
        while True:
            # A process that runs out of memory here would let the others hang in the exchange of a sharded weight.
            with together():
                run = next(runs, ())
                moments = self._moments_of(run) if carry else [{}] * len(run)
            if not run:
                return
            self._make(run, moments, carry)
            # What a large weight leaves is not kept while the next one is prepared.
            del moments

    def _make(self, run: list[MaskChange], moments: list[dict[str, Tensor]], carry: bool) -> None:
        for change in run:
            change.exchange()
        with together():
            for change, carried in zip(run, moments, strict=True):
                change.make()
                if not carry:
                    self.reset_moments(change.values)
                self.state[change.values].update(carried)

    def _moments_of(self, run: list[MaskChange]) -> list[dict[str, Tensor]]:
        """Return for each change the keys of its state that get a new tensor."""
        states = [self.state[change.values] for change in run]
        pairs = [(change, state) for change, state in zip(run, states, strict=True) if has_moments(state)]
        carried = iter(carried_moments(*map(list, zip(*pairs, strict=True))) if pairs else ())
        return [
            next(carried) if has_moments(state) else self._beside_others(change)
            for change, state in zip(run, states, strict=True)
        ]

    def _beside_others(self, change: MaskChange) -> dict[str, Tensor]:
        """Return zero moments at the step count of other masked weights; nothing if none has moments."""
        taken = [state["step"] for p, state in self.state.items() if has_moments(state) and linked(p) is not None]
        if not taken:
            return {}
        moments = {"step": max(taken).clone()}
        bits = next(bits for p, bits in self._with_bits() if p is change.values)
        new_moments_(moments, change.values.detach().new_empty(change.entries), bits)
        return moments
