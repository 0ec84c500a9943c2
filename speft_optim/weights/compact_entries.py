"""The trained entries of one weight by themselves: their mask, their values in a compact parameter, their gradient."""

import torch
from torch import Tensor

from speft_optim.kernels.entries import gather_entries
from speft_optim.masks.mask import Mask, find
from speft_optim.weights.compact_values import CompactValues, exchange, leave_graph, link
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.targets import AddedModule


class CompactEntries(AddedModule):
    """The trained entries of one weight, as an accumulator of its gradient.

    Args:
        name: the weight's full parameter name.
        mask: which entries are trained.
        entries: (k,), what they are now.

    Attributes:
        name: as given.
        mask: as given, until it changes.
        previously_trained: the entries that were trained before the mask changed and are not now; they keep what they
            learned. None while the mask has never changed.
        values: (k,) fp32 parameter, the weight's masked entries.
        told: what was warned of once for the model, see `attached.is_told_first`.
        accumulator: receives the weight's whole gradient in training too, as a `MaskSchedule` needs; None without one.
    """

    previously_trained: Mask | None = None
    accumulator: Accumulator | None = None
    told: frozenset[str] = frozenset()

    def __init__(self, name: str, mask: Mask, entries: Tensor):
        super().__init__()
        self.name, self.mask = name, mask
        self.values = CompactValues(entries.to(torch.float32))
        self._link()

    def _link(self) -> None:
        """Link the values to this weight, for optimizers."""
        link(self.values, self)
        # The values are in a tuple: as a plain attribute they would be replaced along with the parameter.
        self._linked = (self.values,)

    def placed_mask(self) -> Mask:
        """Return the mask on the device of the values."""
        # The attribute is set only if the device changed: inside a compiled graph an assignment breaks the graph.
        if self.mask.device != self.values.device:
            self.mask = self.mask.to(self.values.device)
        return self.mask

    def ever_trained(self) -> Mask:
        """Return the mask of all entries that are or were trained."""
        if self.previously_trained is None or not len(self.previously_trained):
            return self.mask
        both = [mask.to(self.values.device).indices for mask in (self.mask, self.previously_trained)]
        return Mask(torch.cat(both), self.mask.shape)

    def note_trained(self, mask: Mask) -> None:
        """Note that the entries at `mask` are not the base's, as those of an adapter that was just loaded."""
        ever, own = (part.to(self.values.device).indices for part in (self.ever_trained(), self.mask))
        every = torch.cat([ever, mask.to(self.values.device).indices]).unique()
        if len(every) > len(own):
            self.previously_trained = Mask(every[~torch.isin(every, own, assume_unique=True)], self.mask.shape)

    def _trained_before(self, indices: Tensor, left: Tensor) -> Mask:
        """Return what `previously_trained` is to be with another mask.

        Args:
            indices: (k,) the flat positions of the new mask.
            left: (m,) the flat positions of the present mask that are not in the new one.
        """
        if self.previously_trained is not None and len(self.previously_trained):
            earlier = self.previously_trained.to(left.device).indices
            _, returns = find(indices, earlier)
            left = torch.cat([left, earlier[~returns]]).sort().values
        return Mask.of_sorted(left, self.mask.shape)

    def _exchange(self, mask: Mask, previously_trained: Mask, entries: Tensor) -> None:
        """Train other entries from now on; `values` stays the same Parameter.

        Args:
            mask: the new entries.
            previously_trained: the entries that were trained before and are not in it.
            entries: (k,) fp32, the values of the new entries.
        """
        exchange(self.values, entries)
        self.mask, self.previously_trained = mask, previously_trained

    def from_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sampled gradient of a linear weight, (k,) fp32, after `accumulate`; see `Accumulator`."""
        self.accumulate(left, right)
        return self.sample(left, right)

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sampled gradient of a linear weight, (k,) fp32, which need not be verified yet."""
        if not len(self.mask):
            return torch.zeros_like(self.values)
        return self.placed_mask().sampled_gradient(left.flatten(0, -2), right.flatten(0, -2))

    def accumulate(self, left: Tensor, right: Tensor) -> None:
        """Pass the whole gradient, as two factors, to `accumulator`."""
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_product(left, right)

    def from_dense(self, gradient: Tensor) -> Tensor:
        """Return the masked entries of a dense gradient, (k,) fp32, after passing it to `accumulator`."""
        # A weight in host memory may be used there, outside its module.
        gradient = gradient.to(self.values.device)
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_dense(gradient)
        return gather_entries(gradient, self.placed_mask().indices).to(torch.float32)

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but keep the values in fp32 whatever the weights are cast to."""
        exact = self.values.detach()
        super()._apply(fn, recurse)
        if self.values.dtype != torch.float32:
            self.values.data = exact.to(self.values.device)
        if self.values.grad is not None and self.values.grad.dtype != torch.float32:
            self.values.grad.data = self.values.grad.data.to(torch.float32)
        return self

    def __getstate__(self):
        state = self.__dict__.copy()
        # The accumulator belongs to a schedule, whose copy sets it in the weights of a copied model.
        state.pop("accumulator", None)
        return state

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        # Pickle restores the values as a plain Parameter.
        self.values.__class__ = CompactValues
        self._link()

    def extra_repr(self) -> str:
        """Return number of entries and density, for printed models."""
        return f"entries={len(self.mask):,}, density={self.mask.density:.3%}"
