"""Averages and other copies of compact values after a mask has moved.

Libraries average parameters one by one. After a selection the values belong to other entries, so earlier averages and
later values must not be mixed. The dense weight itself, which tools that take all parameters average too, stays
comparable.
"""

import copy
import logging
from weakref import ref

import torch
from torch import nn

from speft_optim.weights.attached import is_told_first

logger = logging.getLogger(__name__)


class MovingValues(nn.Module):
    """The part of a masked weight that knows whether its mask, or that of the weight it was copied from, has moved.

    Attributes:
        moves: how often its mask has changed.
        original: the masked weight that this one is a copy of, and that one's `moves` at the time; None for no copy.
    """

    moves = 0
    original: "tuple[ref[MovingValues], int] | None" = None

    def is_behind(self) -> bool:
        """Whether this is a copy of a weight whose mask has moved since."""
        original = None if self.original is None else self.original[0]()
        return original is not None and original.moves != self.original[1]

    def warn_of_mixture(self) -> None:
        """Warn once for a model of values set by hand after a mask had moved, unless the weight holds them."""
        if "mixture" in self.told or self.holds_entries and self._is_held():
            return
        if is_told_first(self, "mixture"):
            logger.warning(
                "The values of %s were set by hand, as by swapping in averages of parameters, after a schedule had "
                "moved masks. Earlier values belong to other entries, so averages of both are wrong: average "
                "the tensors of model.state_dict() instead, or begin a new average after each selection.",
                self.name,
            )

    def _is_held(self) -> bool:
        held = self.base.gather(self.placed_mask().indices)
        return torch.equal(self.values.detach().to(held), held)

    def __deepcopy__(self, memo: dict) -> "MovingValues":
        made = memo[id(self)] = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        made.original = ref(self), self.moves
        return made

    def __getstate__(self) -> dict:
        return {name: part for name, part in super().__getstate__().items() if name not in ("moves", "original")}
