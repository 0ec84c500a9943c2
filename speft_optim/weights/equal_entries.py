"""The trained entries of a weight as a compact parameter, kept equal to the weight.

`EqualEntries` receives the gradient of the values through hooks, and writes the values into the weight, or reads them
from it, whichever of the two changed last. `sparse_weight.SparseWeight` adds what concerns the model.
"""

import logging
from typing import Any
from weakref import ref

import torch
from torch import nn

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.launch import launches
from speft_optim.masks.mask import Mask
from speft_optim.weights.attached import is_told_first
from speft_optim.weights.averages import MovingValues
from speft_optim.weights.compact_entries import CompactEntries
from speft_optim.weights.compact_values import version
from speft_optim.weights.place import Place
from speft_optim.weights.storage import FrozenWeight
from speft_optim.weights.targets import Target
from speft_optim.weights.uses import Uses
from speft_optim.weights.verification import hook_gradient

logger = logging.getLogger(__name__)


class EqualEntries(MovingValues, CompactEntries):
    """The trained entries of one weight, kept equal to the weight.

    Args:
        model: the module that `sparsify` was called on.
        target: the weight.
        mask: which entries are trained.
        verify: see `sparsify`.

    Attributes:
        place: where the weight is in its model.
        uses: what passes the gradient of each use of the weight to the values.
        holds_entries: whether the weight itself holds its trained entries: a dense one does, a quantised one cannot.
    """

    # The version of the values when they last moved to another device with their model.
    _moved_with: tuple | None = None
    # How often their `.data` had been read when weight and values were last equal.
    _looks_seen = 0

    def __init__(self, model: nn.Module, target: Target, mask: Mask, verify: bool = True):
        place = Place(model, target)
        base = place.base
        mask = mask.to(base.device)
        super().__init__(target.name, mask, base.gather(mask.indices))
        self.place, self.holds_entries = place, place.is_dense
        base.attach(self.mask, self.values)
        modules = {module for module, _ in target.sites} if self.holds_entries else ()
        self._hooks = [module.register_forward_pre_hook(self._before_forward) for module in modules]
        self._watch_gradient()
        self.uses = Uses(self, verify)
        self._remember()

    def check(self) -> None:
        """Refuse to go on with a weight that was replaced, or whose gradient is not averaged over processes.

        Raises:
            ValueError: the model has another module, or a weight of another shape, in the place of this one; or the
                weight is used outside its module's forward while several processes train.
        """
        self._follow_sharding()
        if change := self._change():
            raise ValueError(
                f"{self.name} {change}, but was sparsified with shape {tuple(self.mask.shape)} (a resized or replaced "
                "module, one sharded by FSDP version 1 or ZeRO-3, or offloaded?); call desparsify, and sparsify again "
                "after such changes, and build a new optimizer."
            )
        if self.uses.is_unreduced:
            raise ValueError(
                f"{self.name} is used outside its module's forward, where DistributedDataParallel does not average its "
                "gradient over processes; leave it out of targets, or call its module instead of reading its weight."
            )

    def check_average(self) -> None:
        """Refuse a step with a gradient of this process alone, by which processes would write other entries each.

        Raises:
            ValueError: the average over processes was put off in the last backward.
        """
        if self.uses.is_put_off and self.values.grad is not None:
            raise ValueError(
                f"The gradient of {self.name} is not averaged over processes, since set_requires_gradient_sync(False) "
                "was called; call set_requires_gradient_sync(True) before the last backward of each step."
            )

    @property
    def base(self) -> FrozenWeight:
        """The weight behind one interface, dense or quantised."""
        return self.place.base

    @property
    def weight(self) -> nn.Parameter | None:
        """The masked weight as the model holds it, or None if it is gone."""
        return self.place.weight

    @property
    def seen(self) -> nn.Parameter | None:
        """The masked weight at the last look, or None if it is gone."""
        return self._seen[0]() if self._seen else None

    def _change(self) -> str | None:
        """Return what happened to the weight since `sparsify` if it can no longer be trained, else None."""
        if change := self.place.change(self.seen):
            return change
        if not self.holds_entries and not self._is_attached():
            return "was quantised anew, its trained entries with it"
        return None if self._has_its_values() else "has values that were replaced, as in functional_call and export"

    def can_be_trained(self) -> bool:
        """Return whether the model still has the weight and these values."""
        return self._change() is None

    def _has_its_values(self) -> bool:
        return self._parameters["values"] is self._linked[0]

    def synchronize(self) -> None:
        """Make weight and values equal: write the values if they changed, else read the entries if the weight changed.

        Raises:
            ValueError: see `check`.
        """
        self.check()
        if version(self._parameters["values"]) != self._seen[2]:
            self._write_or_read()
        elif not self._weight_is_as_seen():
            self.read()
        elif self._was_looked_at():
            self._write_if_changed()

    def _was_looked_at(self) -> bool:
        """Return whether the `.data` of the values was read since weight and values were equal."""
        return getattr(self._parameters["values"], "looks", 0) != self._looks_seen

    @torch.no_grad()
    def _write_if_changed(self) -> None:
        """Write values that differ from the weight's entries: something wrote them past every version counter."""
        if self.holds_entries and self.base.holds(self.placed_mask(), self.values):
            self._looks_seen = self.values.looks
        else:
            self.write()

    @torch.no_grad()
    def _write_or_read(self) -> None:
        """Write values that were set by hand, unless they are averages of entries that are not theirs."""
        was_set = version(self._parameters["values"]) != (self._seen[2] or self._moved_with)
        if was_set and self.holds_entries and self.is_behind() and not self._weight_is_as_seen():
            # The average of the weight itself is right.
            self.read()
            return
        if was_set and (self.moves or self.is_behind()):
            self.warn_of_mixture()
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into a dense weight, rounded to its dtype; a quantised weight reads them as an overlay."""
        if self.holds_entries:
            self.base.write(self.placed_mask(), self.values)
        self._remember()

    def writable(self) -> dict[str, Any]:
        """Return what a kernel needs to write the values into the weight, see `Update`; nothing where `write` must.

        It needs a dense, contiguous weight on the values' device, or the rows of it that this process holds, and a
        mask in row form.
        """
        weight, first_row = self.base.writable() if self.holds_entries else (None, 0)
        fits = weight is not None and weight.device == self.values.device and launches(weight)
        if not fits or not isinstance(positions := self.placed_mask().positions, CSR):
            return {}
        return {"weight": weight, "positions": positions, "first_row": first_row}

    def written(self) -> None:
        """Note that a kernel wrote the values into `writable()`."""
        self._remember()

    @torch.no_grad()
    def read(self) -> None:
        """Read the entries that differ in the weight; a value that still rounds to the weight's entry stays exact."""
        self.values.copy_(self.base.read(self.placed_mask().indices, self.values))
        self._remember()

    def _remember(self) -> None:
        """Note the present state of weight and values, as equal."""
        weight = self.weight
        if self.place.shards is not None:
            self.place.shards.remember_rows()
        else:
            # The weight may be another tensor now, as after `load_state_dict(assign=True)`.
            self.uses.watch(weight)
        # A weak reference keeps no weight alive that was replaced, as the whole one is by its rows in `fully_shard`.
        self._seen = ref(weight), self.place.version(weight), version(self._parameters["values"])
        self._looks_seen = getattr(self._parameters["values"], "looks", 0)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # This is done before forward, since a weight that autograd saved for backward must not be written.
        if torch.compiler.is_compiling():
            # A compiled graph cannot read version counters.
            self.refresh_in_graph(self)
        else:
            self.refresh()
            self.uses.watch_gathered()

    def _watch_gradient(self) -> None:
        """Let each gradient of the values be checked as it arrives; copies of a parameter lose its hooks."""
        self._hooks.append(hook_gradient(self.values, self._check_use))

    def _check_use(self, values: nn.Parameter) -> None:
        """Warn once for a model of a gradient that came from a forward with other values than these."""
        self.average_in_backward(self)
        changed = self._seen[2] is not None and values._version != self._seen[2][0]
        if changed and is_told_first(self, "gradient of former values"):
            logger.warning(
                "The values of %s changed before a gradient arrived that was computed with the former ones: either "
                "after that forward, or a compiled graph was called without its model, which alone brings changed "
                "values into the weight before a graph; call the model once after values are changed.",
                self.name,
            )

    def refresh(self) -> None:
        """Synchronize if weight or values changed; costs next to nothing if not."""
        self._follow_sharding()
        shards = self.place.shards
        if not self._has_its_values():
            self.check()
        is_changed = version(self._parameters["values"]) != self._seen[2] or not self._weight_is_as_seen()
        if is_changed or self._was_looked_at():
            if not self._was_merged():
                self.synchronize()
        elif shards is not None and not shards.rows_are_as_seen():
            shards.check_rows(self.name, self.placed_mask(), self.values)
        if shards is not None and shards.parameter.requires_grad:
            shards.parameter.requires_grad_(False)
            self.uses.warn_of_thaw()

    def _follow_sharding(self) -> None:
        """Write into the process's own rows from now on, if `fully_shard` was called since.

        Raises:
            ValueError: the model is divided in a way that masked weights cannot be.
        """
        if self.place.follow_sharding():
            self.uses.leave()
            # It moves what it divides to the GPU itself.
            self.values.data = self.values.data.to(self.place.shards.device)
            if not self.holds_entries:
                # On a GPU one copy of the mask serves both.
                self.base.overlays[-1:] = [(self.placed_mask(), self.values)]

    def _weight_is_as_seen(self) -> bool:
        place, weight = self.place, self.place.weight
        return weight is not None and weight is self.seen and place.version(weight) == self._seen[1]

    def _was_merged(self) -> bool:
        """Return whether a quantised weight was replaced by one that contains the trained entries, as merging does.

        The forward of such a model is right, but training cannot go on.
        """
        return not self.holds_entries and not (self.place.is_in_model() and self._is_attached())

    def _is_attached(self) -> bool:
        """Return whether the values are an overlay of the quantised weight."""
        return any(values is self._linked[0] for _, values in self.base.overlays)
