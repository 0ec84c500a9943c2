"""A masked weight of a model: a module beside the weight, which holds its trained entries.

`equal_entries.EqualEntries` keeps the entries equal to the weight. `SparseWeight` adds what happens to them as a whole:
another mask, and the model's state dicts, moves and copies.
"""

from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from speft_optim.kernels.entries import scatter_entries_
from speft_optim.masks.mask import Mask, find
from speft_optim.weights.compact_values import unlink, version
from speft_optim.weights.equal_entries import EqualEntries
from speft_optim.weights.mesh import keep_whole
from speft_optim.weights.storage import keep_attached


class NextMask(NamedTuple):
    """Another mask of a weight, compared with the present one.

    Attributes:
        mask: the mask.
        indices: (k,) its flat positions.
        previously_trained: the entries that were trained so far and are not in it.
        before: (m,) int64, the places among the present entries of those that stay, in rising order.
        after: (m,) int64, their places among the new ones.
        entries: (k,) fp32, the weight's entries at the positions; of a divided weight those that this process holds,
            and zeros, until `exchange_entries`.
    """

    mask: Mask
    indices: Tensor
    previously_trained: Mask
    before: Tensor
    after: Tensor
    entries: Tensor


class SparseWeight(EqualEntries):
    """The trained entries of one weight, which follow its model; see `EqualEntries` for arguments and attributes."""

    def compare(self, mask: Mask) -> NextMask:
        """Compare another mask with the present one, for `exchange_entries` and `change_mask`.

        Args:
            mask: the new entries, of the same weight; their number may differ.

        Raises:
            ValueError: the mask has another shape than the weight, or see `check`.
        """
        if mask.shape != self.mask.shape:
            raise ValueError(f"The mask of {self.name} is for shape {tuple(mask.shape)}, not {tuple(self.mask.shape)}.")
        self.synchronize()
        mask = mask.to(self.values.device)
        old, new = self.placed_mask().indices, mask.indices
        places, stays = find(old, new)
        # As numbers, since each use of a mask of bools would wait for the GPU.
        after = stays.nonzero().squeeze(1)
        before = places[after]
        leaves = torch.ones(len(old), dtype=torch.bool, device=old.device).index_fill_(0, before, False)
        entries = self.base.own_entries(new)
        return NextMask(mask, new, self._trained_before(new, old[leaves]), before, after, entries)

    def exchange_entries(self, following: NextMask) -> None:
        """Complete the entries of a divided weight, in place; all processes call this, and nothing else can fail in it.

        Args:
            following: what `compare` returned for the new mask.
        """
        self.base.complete_(following.entries)

    @torch.no_grad()
    def change_mask(self, following: NextMask) -> None:
        """Train other entries from now on. Those that leave keep their value; `values` stays the same Parameter.

        What may run out of memory is done before anything changes.

        Args:
            following: what `compare` returned for the new mask, after `exchange_entries` if the weight is divided.
        """
        base = self.base
        following.entries[following.after] = self.values[following.before]
        base.release(self.values)
        self._exchange(following.mask, following.previously_trained, following.entries)
        self.moves += 1
        base.attach(self.mask, self.values)
        self._remember()

    def bytes_held(self) -> tuple[int, int]:
        """Return the bytes of values and of positions, those of untrained overlays of a quantised weight included."""
        beside = [(mask, values) for mask, values in self.base.overlays if values is not self.values]
        masks = [self.mask, *(mask for mask, _ in beside)]
        masks += [] if self.previously_trained is None else [self.previously_trained]
        return sum(v.nbytes for v in [self.values, *(v for _, v in beside)]), sum(mask.nbytes for mask in masks)

    def previous_entries(self) -> Tensor:
        """Return the entries of `previously_trained`, (k,) fp32, of a quantised weight; (0,) of a dense one."""
        return self.values.new_empty(0) if self.holds_entries else self.base.overlaid(self.previously_trained.indices)

    def restore_previous(self, previous: Mask | None, entries: Tensor | None) -> None:
        """Set `previously_trained`, and in a quantised weight its entries to those of `previous_entries`."""
        self.previously_trained = None if previous is None else previous.to(self.values.device)
        if previous is not None and not self.holds_entries:
            self.base.put(self.previously_trained, entries)

    def detach_from_model(self) -> None:
        """Remove all hooks and this module; the weight keeps the values, unless it was resized or replaced."""
        if self.can_be_trained():
            self.synchronize()
            self.base.release(self.values)
            self.base.drop_unchanged()
        for hook in self._hooks:
            hook.remove()
        self.uses.remove()
        self.place.remove()
        unlink(self.values)
        self._hooks, self.accumulator = [], None
        self.place, self.uses, self._seen, self._linked = None, None, (), ()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._follow_sharding()
        # Rows on the meta device are still to be loaded, as in accelerate where only one process reads the weights.
        if self.place.shards is None or not self.place.shards.parameter.is_meta:
            # The state dict's entry of the weight shares its memory, so a write now still reaches it.
            self.synchronize()
            if self.holds_entries:
                self.base.settle()

    def _load_from_state_dict(self, *args) -> None:
        self._follow_sharding()
        # A weight that was just loaded wins over the values of before, even if those changed later.
        if self._weight_is_as_seen():
            self.synchronize()
        else:
            self.read()

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but keep the values in fp32 whatever the weights are cast to."""
        if self.can_be_trained():
            self.synchronize()
        if fn(self.values.detach()[:0]).is_meta:
            # They could not come back from there, as a sharded weight can, whose rows are loaded afterwards.
            return self
        super()._apply(fn, recurse)
        # torch exchanges the content of a DTensor with that of the moved one, which a weak reference forbids.
        seen = self._seen[0] if self.place.shards is None else _none
        # The values are written again at the next use: a weight cast up from 16 bits holds only their rounding.
        self._seen, self._moved_with = (seen, self._seen[1], None), version(self.values)
        return self

    def __getstate__(self):
        """Return the state for copies and pickle, with equal weight and values: a copy cannot tell which is newer."""
        self.refresh()
        state = super().__getstate__()
        state["_seen"] = self._seen and (self._seen[0](), *self._seen[1:])
        return state

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        # The weight is reached without the model, which may be copied later. A dense weight is written, since it may
        # have been copied before `__getstate__` wrote into it.
        weight = self._seen[0]
        if self.holds_entries:
            scatter_entries_(weight.detach(), self.mask.indices, self.values.detach())
        else:
            keep_attached(weight, self.mask, self.values)
        self._watch_gradient()
        self.uses.watch(weight)
        self._seen, self._looks_seen = (ref(weight), self.place.version(weight), version(self.values)), 0


def _none() -> None:
    """Stand for a weak reference to a weight that is gone."""


keep_whole(SparseWeight)
