"""The interface between an optimizer and a schedule that changes its masks."""

from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from speft_optim.weights.sparse_weight import SparseWeight


class Schedule(Protocol):
    """Changes the masks during training; its state is saved in the optimizer's.

    Attributes:
        keys: the keys of the tensors that it saves with each weight.
        bytes_held: bytes of its accumulators and scores.
    """

    keys: tuple[str, ...]
    bytes_held: int

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Count a step; a post-hook of the optimizer's step."""

    def after_zero_grad(self) -> None:
        """Note that the gradients since the last step, if there are any, lead to no step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors of fixed shapes under `SCHEDULE_KEYS`."""

    def check_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Raise a ValueError if `load_state_dict` could not restore the state."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def state_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        """Return the tensors that are saved with one weight, under the other `keys`."""

    def check_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Raise a ValueError if `load_state_of` could not restore the state."""

    def load_state_of(self, weight: SparseWeight, saved: dict[str, Tensor]) -> None:
        """Restore what `state_of` returned."""
