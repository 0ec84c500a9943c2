"""SparseAdamW: AdamW over the compact values of masked entries.

PyTorch's `SparseAdam` takes sparse *gradients* of a dense parameter and keeps dense moments. Here parameter, gradient
and moments all have the length of the mask; the weight itself is written at the masked entries in the same step.
"""

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from speft_optim.kernels import adamw_
from speft_optim.masks import Mask


class WriteThrough(Protocol):
    """The masked weight behind compact values."""

    name: str
    mask: Mask

    def synchronize(self) -> None:
        """Let the newer of weight and values win."""

    def write(self) -> None:
        """Write the values into the weight."""


_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()


def link(values: nn.Parameter, weight: WriteThrough) -> None:
    """Tell optimizers which masked weight stands behind `values`; the link keeps neither alive."""
    _weights[values] = ref(weight)


def unlink(values: Tensor) -> None:
    """Forget the masked weight behind `values`."""
    _weights.pop(values, None)


def linked(values: Tensor) -> WriteThrough | None:
    """The masked weight behind `values`, or None for an ordinary parameter."""
    reference = _weights.get(values)
    return reference() if reference is not None else None


class SparseAdamW(Optimizer):
    """AdamW for `sparsify(model, masks)`; ordinary parameters among them get ordinary AdamW.

    Unlike `torch.optim.SparseAdam` (sparse gradients, dense state) everything it holds is as long as the mask.

    Args:
        params: parameters or parameter groups, as for `torch.optim.AdamW`.
        lr: learning rate, a float or a scalar tensor.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the masked entries; the others never move.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of range, or there is no parameter.
        TypeError: a parameter is not a floating tensor.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it lacks are the constructor's."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point():
                self.param_groups.pop()
                raise TypeError(
                    f"SparseAdamW got a parameter of {parameter.dtype}; it trains floating tensors, fp32 best."
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, and write the new values into the weights.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss; called once.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        weight = linked(parameter)
        if weight is not None:
            weight.synchronize()
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        adamw_(
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
        if weight is not None:
            weight.write()

    def state_dict(self) -> dict[str, Any]:
        """Moments, and for each compact parameter its values, mask positions and the weight's name and shape.

        Only tensors, numbers, strings, lists and dicts: `torch.load(..., weights_only=True)` opens it.
        """
        packed = super().state_dict()
        packed["state"] = {key: dict(state) for key, state in packed["state"].items()}
        for key, parameter in enumerate(self._parameters()):
            weight = linked(parameter)
            if weight is not None:
                weight.synchronize()
                packed["state"].setdefault(key, {}).update(
                    values=parameter.detach(),
                    indices=weight.mask.indices,
                    shape=list(weight.mask.shape),
                    name=weight.name,
                )
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, dtypes kept, and write the values into the weights.

        Raises:
            ValueError: groups or parameters differ in number, or a parameter's mask is not the saved one; nothing is
                changed.
        """
        groups = state_dict["param_groups"]
        sizes, saved_sizes = ([len(g["params"]) for g in side] for side in (self.param_groups, groups))
        if sizes != saved_sizes:
            raise ValueError(
                f"The saved optimizer has parameter groups of sizes {saved_sizes}, this one of {sizes}; "
                "build it with the same masks and groups as the saved run."
            )
        keys = [key for group in groups for key in group["params"]]
        pairs = [(p, state_dict["state"].get(key, {})) for p, key in zip(self._parameters(), keys, strict=True)]
        for parameter, saved in pairs:
            _check_saved(parameter, saved)
        super().load_state_dict({"state": {}, "param_groups": groups})
        for parameter, saved in pairs:
            self._restore(parameter, saved)

    @torch.no_grad()
    def _restore(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        moments = {key: saved[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in saved}
        if moments:
            # torch's own loader would cast the moments to the parameter's dtype and move the step to its device.
            self.state[parameter] = {
                key: value.detach().clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }
        weight = linked(parameter)
        if weight is not None:
            parameter.copy_(saved["values"])
            weight.write()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _check_options(options: dict[str, Any]) -> None:
    lr, eps, decay = options["lr"], options["eps"], options["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; pass a number or a tensor of one element.")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        # Written so that NaN fails too.
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{name}={value} is not a finite number of at least 0.")
    betas = options["betas"]
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1), such as (0.9, 0.999).")


def _check_saved(parameter: Tensor, saved: dict[str, Any]) -> None:
    """Refuse the state of another mask before anything is changed."""
    weight = linked(parameter)
    name = weight.name if weight is not None else f"a parameter of shape {tuple(parameter.shape)}"
    for key in ("values", "exp_avg", "exp_avg_sq"):
        if key in saved and saved[key].shape != parameter.shape:
            raise ValueError(f"{name} has {parameter.numel():,} entries, its saved {key} {saved[key].numel():,}.")
    if weight is None:
        return
    if "indices" not in saved:
        raise ValueError(f"The saved state of {name} has no mask; it was not saved by SparseAdamW over sparsify(...).")
    saved_mask = Mask(saved["indices"], saved["shape"])
    if saved["name"] != name or saved_mask != weight.mask:
        raise ValueError(
            f"{name} has mask {weight.mask.fingerprint()} ({len(weight.mask):,} entries), the saved state is of "
            f"{saved['name']} with mask {saved_mask.fingerprint()} ({len(saved_mask):,} entries); "
            "sparsify the model with the saved run's masks (Masks.load) before loading."
        )
