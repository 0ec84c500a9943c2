"""Checks that the values attached to a weight are the same in forward and in its backward.

A dense weight holds its trained entries, and autograd, which saves it, refuses a backward after a write into it. A
quantised weight or one in host memory does not hold them: it is rebuilt in backward, with the values of that time.
"""

import operator
from collections.abc import Sequence

from torch import Tensor

from speft_optim.weights.compact_values import version


class ValuesInForward:
    """Notes what is attached to a weight in forward, and refuses a backward after it has changed.

    Args:
        name: the weight's name.
        values: the values of its overlays.
    """

    def __init__(self, name: str, values: Sequence[Tensor]):
        # They are kept, so that no other tensor can be taken for one of them.
        self._name, self._values = name, tuple(values)
        self._versions = [_version(one) for one in self._values]

    def check(self, values: Sequence[Tensor]) -> None:
        """Compare with what is attached now.

        Raises:
            RuntimeError: it has changed.
        """
        alike = len(values) == len(self._values) and all(map(operator.is_, values, self._values))
        if not alike or [_version(one) for one in values] != self._versions:
            raise RuntimeError(
                f"The trained values of {self._name or 'a layer'} changed after this loss was computed, as by "
                "optimizer.step() or desparsify, and its backward would compute with the new ones; call backward "
                "before that, or compute the loss again after it."
            )


def _version(values: Tensor) -> tuple | None:
    # What was made in inference mode has no version.
    return None if values.is_inference() else version(values)
