"""Weights cut into row slices and grouped, so that the accumulators of a group fit a budget.

A row slice is a whole weight, or some of its rows if the weight is larger than the budget. Row slices are grouped in
the order of the weights: one pass over the calibration batches serves a group, and the scores come out in order.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from speft_optim.salience.accumulators import RowSlice
from speft_optim.weights.targets import Target

# Bytes of an entry of a gradient.
_GRADIENT_BYTES = 4


def cut_into_groups(
    targets: Iterable[Target],
    budget: int,
    entry_bytes: int,
    processes: int = 1,
    units: Mapping[nn.Module, nn.Module] | None = None,
) -> list[list[RowSlice]]:
    """Cut weights into row slices, in their order, and group these so that a group takes at most `budget` bytes.

    Args:
        targets: the weights.
        budget: bytes that a group may take in a process; a weight that needs more is cut into slices of at least one
            row.
        entry_bytes: bytes that the statistic takes for each entry; 0 puts all weights into one group.
        processes: over how many processes accumulators are divided.
        units: the block of each module if what is accumulated is exchanged, see `exchange.py`.
    """
    groups: list[list[RowSlice]] = []
    need = _Need(entry_bytes, processes, units)
    for target in targets:
        rows, columns = target.matrix_shape
        panel = max(1, min(rows, budget // max(1, need.row_bytes(columns))))
        for first in range(0, rows, panel):
            row_slice = RowSlice(target, first, min(rows, first + panel), processes=processes)
            if not groups or need.with_(row_slice) > budget:
                groups.append([])
                need = _Need(entry_bytes, processes, units)
            groups[-1].append(row_slice)
            need.add(row_slice)
    return groups


class _Need:
    """The bytes that a group takes in a process: its rows of the accumulators.

    Where gradients are exchanged, it takes also, for a moment, those of a block and those that lie in no block, all
    whole, and what the exchange of one of them receives.
    """

    def __init__(self, entry_bytes: int, processes: int, units: Mapping[nn.Module, nn.Module] | None):
        self.entry_bytes, self.processes, self.units = entry_bytes, processes, units
        self.own = self.received = 0
        self.of_unit: dict[nn.Module | None, int] = {}

    def row_bytes(self, columns: int) -> int:
        """Bytes for a row of a row slice that is a group by itself."""
        own = -(-self.entry_bytes * columns // self.processes)
        return own if self.units is None else own + 2 * _GRADIENT_BYTES * columns

    def with_(self, row_slice: RowSlice) -> int:
        """Bytes of the group with one row slice more."""
        own, received, of_unit = self._of(row_slice)
        of_unit = {**self.of_unit, **of_unit}
        outside = of_unit.pop(None, 0)
        return self.own + own + max(self.received, received) + outside + max(of_unit.values(), default=0)

    def add(self, row_slice: RowSlice) -> None:
        """Count a row slice in."""
        own, received, of_unit = self._of(row_slice)
        self.own, self.received = self.own + own, max(self.received, received)
        self.of_unit.update(of_unit)

    def _of(self, row_slice: RowSlice) -> tuple[int, int, dict[nn.Module | None, int]]:
        """Bytes of a row slice's own rows, of what its exchange receives, and of all gradients of its block with it."""
        own = row_slice.division[0] * row_slice.columns
        if self.units is None:
            return self.entry_bytes * own, 0, {}
        unit = self.units.get(row_slice.target.sites[0][0])
        gradients = self.of_unit.get(unit, 0) + _GRADIENT_BYTES * row_slice.entries
        return self.entry_bytes * own, _GRADIENT_BYTES * own * self.processes, {unit: gradients}
