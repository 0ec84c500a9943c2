"""The uses of a masked weight, in its module and elsewhere, and how their gradients reach the compact values.

`weights/verification.py` explains how uses outside the module are detected.
"""

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from speft_optim.distributed import is_distributed
from speft_optim.weights.attached import is_told_first, weight_beside
from speft_optim.weights.observation import observe_gradient
from speft_optim.weights.sharded import is_managed, is_sharded
from speft_optim.weights.verification import DenseGradient, WatchedWeight

if TYPE_CHECKING:
    from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class Uses:
    """Hooks the module of a masked weight, and collects the gradient of uses that these hooks do not see.

    Args:
        weight: the masked weight, which is the accumulator of the hooks.
        verify: whether to verify the hooks of a linear layer, and to collect gradients of a dense weight elsewhere.

    Attributes:
        hooks: the gradient hooks.
        is_unreduced: whether there was a use elsewhere whose gradient is not averaged over the processes.
        is_averaged: whether gradients under `fully_shard` are averaged at the end of each backward, see `averaging`.
        is_put_off: whether the gradient of the last backward under `fully_shard` is still to be averaged.
    """

    is_unreduced = is_averaged = is_put_off = False
    # Whether it was warned of a use elsewhere.
    _warned_of_use = False

    def __init__(self, weight: "SparseWeight", verify: bool):
        _watch_replacements()
        self._weight = weight
        self.hooks = observe_gradient(weight.place.target, weight.values, weight, verify)
        self._elsewhere = DenseGradient(self._add, self.warn_of_thaw) if verify and weight.holds_entries else None

    def watch(self, parameter: Tensor) -> None:
        """Collect the gradients of this parameter, which may be another one than before."""
        if self._elsewhere is not None:
            self._elsewhere.open(parameter)

    def watch_gathered(self) -> None:
        """See uses of a sharded weight outside its module: they are of the gathered one, which FSDP keeps for good."""
        place = self._weight.place
        if place.shards is not None and self._elsewhere is not None and self._elsewhere.weight is None:
            if (gathered := place.gathered()) is not None:
                self.watch(gathered)

    def leave(self) -> None:
        """Watch no parameter, until `watch` is called again."""
        if self._elsewhere is not None:
            self._elsewhere.close()

    def promote(self) -> None:
        """Adopt what the last backward verified; called after each optimizer step."""
        for hook in self.hooks:
            hook.promote()

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self.hooks:
            hook.remove()
        self.leave()

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        """Add the masked entries of the dense gradient of uses that no hook saw to the gradient of the values."""
        weight, values = self._weight, self._weight.values
        if not values.requires_grad:
            return
        # The gradient of a sharded weight's values is averaged at the end of the backward, with all others.
        self.is_unreduced = is_distributed() and weight.place.shards is None
        if not self._warned_of_use and not any(hook.warned for hook in self.hooks):
            self._warned_of_use = True
            logger.warning(
                "%s is used outside its module's forward, where no hook sees it: the gradient of these uses is formed "
                "densely, one weight at a time, which is correct but slower.",
                weight.name,
            )
        entries = weight.from_dense(gradient)
        values.grad = entries if values.grad is None else values.grad.add_(entries)

    def warn_of_thaw(self) -> None:
        """Warn once for a model that its masked weights stay frozen."""
        if not is_told_first(self._weight, "thaw"):
            return
        logger.warning(
            "%s was set to require gradients after sparsify, as model.requires_grad_(True) does with all parameters. "
            "Masked weights stay frozen, since their masked entries train as values; freeze the other parameters "
            "again if they should not train.",
            self._weight.name,
        )


@functools.cache
def _watch_replacements() -> None:
    """Let each parameter that replaces a masked weight be watched at once; a hook of all modules in the process."""
    register_module_parameter_registration_hook(_watch_replacement)


def _watch_replacement(module: nn.Module, attribute: str, parameter: nn.Parameter | None) -> None:
    # The weight's module would notice at its next forward, too late for a use of the weight before that.
    weight = weight_beside(module, attribute)
    if weight is None or parameter is None or weight.place.shards is not None or is_managed(module):
        return  # Rows of a sharded weight cannot be watched.
    # FSDP sets parameters past this hook, except on modules of a class that sets attributes in its own way.
    if is_sharded(parameter) and type(module).__setattr__ is nn.Module.__setattr__:
        raise ValueError(
            f"{weight.name} is masked and cannot be divided by tensor parallelism (parallelize_module, a device mesh); "
            "leave its layer out of the plan, or shard the model with fully_shard."
        )
    # Another shape or dtype is refused when the module notices, and so is a parameter that is masked already.
    fits = parameter.is_floating_point() and parameter.shape == weight.mask.shape
    if fits and not isinstance(parameter, WatchedWeight):
        weight.uses.watch(parameter)
