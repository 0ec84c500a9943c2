"""What dense weights and weights under `fully_shard` have in common: the parameter itself holds the trained entries."""

import torch
from torch import Tensor

from speft_optim.masks.mask import Mask


class FloatingWeight:
    """A floating parameter of a module; subclasses say how its entries are gathered and written."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    overlays: tuple[()] = ()

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), (k,) in the weight's dtype."""
        raise NotImplementedError

    def own_entries(self, indices: Tensor) -> Tensor:
        """Return the same in fp32, newly made: all entries are this process's own."""
        return self.gather(indices).to(torch.float32)

    def complete_(self, entries: Tensor) -> None:
        """Do nothing: no other process holds entries of the weight."""

    def write(self, mask: Mask, values: Tensor) -> None:
        """Write `values` (k,) fp32 into the weight at `mask`, rounded to its dtype."""
        raise NotImplementedError

    def writable(self) -> tuple[Tensor | None, int]:
        """Return the rows that a kernel may write, and the number of the first; None where `write` must."""
        return None, 0

    def gather_base(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), as `gather`: what they were before training is not stored."""
        return self.gather(indices)

    def attach(self, mask: Mask, values: Tensor) -> None:
        """Do nothing: the weight gets new values by `write`."""

    def release(self, values: Tensor) -> None:
        """Do nothing: the weight has the values already."""

    def drop_unchanged(self) -> None:
        """Do nothing: there are no overlays."""

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return the values that fit the weight's entries: an fp32 value that still rounds to the entry stays exact.

        Args:
            indices: (k,) flat positions.
            values: (k,) fp32, the values so far.
        """
        entries = self.gather(indices)
        return torch.where(entries == values.to(entries.dtype), values, entries.to(values.dtype))

    def holds(self, mask: Mask, values: Tensor) -> bool:
        """Return whether the entries at `mask` are `values` (k,); False where to tell would cost more than to write."""
        entries = self.gather(mask.indices)
        return torch.equal(entries, values.to(entries.dtype))

    def settle(self) -> None:
        """Do nothing: the weight has the newest values, except in host memory, where a subclass updates it."""

    def put(self, mask: Mask, values: Tensor) -> None:
        """Set the entries at `mask` to `values` (k,)."""
        self.write(mask.to(self.device), values.to(self.device))

    def entries(self, mask: Mask) -> tuple[Mask, Tensor]:
        """Return what an adapter must hold for this weight when `mask` is trained: the mask, and the entries, (k,)."""
        return mask, self.gather(mask.indices.to(self.device))
