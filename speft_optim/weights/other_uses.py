"""Uses of a masked weight outside its module: their gradient is added to that of the values, and the user is told.

`weights/verification.py` tells how such uses are found.
"""

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speft_optim.distributed import is_distributed
from speft_optim.weights.verification import DenseGradient

if TYPE_CHECKING:
    from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


class OtherUses:
    """Collects the gradient of uses of a dense weight that no gradient hook sees.

    Args:
        weight: the masked weight.
        hooks: its gradient hooks.

    Attributes:
        is_unreduced: whether there was such a use whose gradient is not averaged over the processes.
    """

    is_unreduced = _warned = False

    def __init__(self, weight: "SparseWeight", hooks: list):
        self._weight, self._hooks = weight, hooks
        self._gradient = DenseGradient(self._add, weight.warn_of_thaw)

    def watch(self, parameter: Tensor) -> None:
        """Collect the gradients of this parameter, which may be another one than before."""
        self._gradient.open(parameter)

    def watch_gathered(self) -> None:
        """Watch a sharded weight as it is gathered: uses outside its module are of that, which FSDP keeps for good."""
        place = self._weight.place
        if place.shards is not None and self._gradient.weight is None and (gathered := place.gathered()) is not None:
            self.watch(gathered)

    def close(self) -> None:
        """Watch nothing, until `watch` is called again."""
        self._gradient.close()

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        """Add the masked entries of a dense gradient to the gradient of the values."""
        weight, values = self._weight, self._weight.values
        if not values.requires_grad:
            return
        # The gradient of a sharded weight's values is averaged at the end of the backward, with all others.
        self.is_unreduced = is_distributed() and weight.place.shards is None
        if not self._warned and not any(hook.warned for hook in self._hooks):
            self._warned = True
            logger.warning(
                "%s is used outside its module's forward, where no hook sees it: the gradient of these uses is formed "
                "densely, one weight at a time, which is correct but slower.",
                weight.name,
            )
        entries = weight.from_dense(gradient)
        values.grad = entries if values.grad is None else values.grad.add_(entries)
