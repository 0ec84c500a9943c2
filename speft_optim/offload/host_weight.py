"""A weight in host memory, or memory-mapped from a checkpoint, of which a device computes with copies.

In training the trained values are on the device and written over each copy as an overlay; the host's weight is not
updated in each step, but when it is used (see `offload/host_parameter.py`). This library reads it with the values as an
overlay too, without a write: each page of a mapped weight that is written would stay in memory.
"""

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from speft_optim.kernels.entries import gather_entries, scatter_entries_
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask, find
from speft_optim.offload.host_parameter import HostParameter, host_class, plainly
from speft_optim.offload.pages import copy_pages_
from speft_optim.offload.quantized import NOT_COPIED
from speft_optim.weights.compact_values import linked
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.targets import Target


class HostWeight(FloatingWeight):
    """A floating parameter in CPU memory that is copied to a device, whole or in rows.

    Args:
        target: the weight in the model, in CPU memory or on the meta device.
        device: the device of the copies.
        mapped: the weight in a checkpoint, if it is memory-mapped; in the dtype of the checkpoint.

    Attributes:
        device: where the weight is computed with, and where its values and mask are.
        forms: shape and dtype of each tensor of a copy; a floating weight is one.
        is_mapped: whether the weight is memory-mapped.
        ahead: the `HeadCopy` of a head, which copies the weight before it is used; else None.
    """

    def __init__(self, target: Target, device: torch.device, mapped: Tensor | None = None):
        parameter = target.parameter
        self.name, self.shape, self.dtype, self.device = target.name, parameter.shape, parameter.dtype, device
        self.forms = [(self.shape, self.dtype)]
        self._site, self._mapped, self.is_mapped = target.sites[0], mapped, mapped is not None
        self._mask: Mask | None = None
        self._values: nn.Parameter | None = None
        # The parameter that lacks the newest values, and its version since then.
        self._behind: tuple[nn.Parameter, int] | None = None
        self._writes = 0
        # A copy that stays on the device, and the state of the weight when it was made.
        self._stays, self._copy, self._copied = False, None, ()
        self._kind: type = nn.Parameter
        self._is_watched = False
        self.ahead = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the model has now."""
        module, attribute = self._site
        return module._parameters[attribute]

    @property
    def is_overlaid(self) -> bool:
        """Whether copies get trained values as an overlay."""
        return self._values is not None

    @property
    def attached(self) -> list[Tensor]:
        """The trained values that copies get as an overlay."""
        return [] if self._values is None else [self._values]

    @property
    def keeps_copy(self) -> bool:
        """Whether a copy stays on the device: not of a weight with trained values, see `lasting`."""
        return self._stays and not self.is_overlaid

    def _held(self) -> Tensor:
        """The parameter's own memory, up to date or not."""
        return plainly(self.parameter.detach)

    def state(self) -> tuple:
        """Return what changes whenever the weight in host memory does."""
        parameter = self.parameter
        return () if parameter.is_meta else (parameter.data_ptr(), parameter._version, self._writes)

    def source(self, rows: slice = slice(None)) -> Tensor:
        """Return the weight, or some of its rows, in CPU memory, perhaps without the newest values.

        A weight in a checkpoint is returned in the checkpoint's dtype.
        """
        held = self._mapped if self.parameter.is_meta else self._held()
        return held if rows == slice(None) else held[rows]

    def sources(self) -> list[Tensor]:
        """Return the tensors in CPU memory of which copies are made."""
        return [self.source()]

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Return the copy of the weight, of copies of `sources`."""
        return parts[0]

    def whole(self) -> Tensor:
        """Copy the weight to the device, in the model's dtype, with the trained values."""
        out = None if self.ahead is None else self.ahead.take()
        if out is None:
            out = self._bring(self.source())
        if self.is_overlaid and out.data_ptr() == self._held().data_ptr():
            out = out.clone()
        self.overlay_(out)
        return out

    def stay(self) -> None:
        """Let the copy that `lasting` returns stay on the device until `close`."""
        self._stays = True

    def lasting(self) -> Tensor:
        """Return the copy that stays on the device, after a new copy if the weight has changed, or else `whole`.

        A weight with trained values is copied each time, since graphs may hold its copies while the values change.
        """
        if not self.keeps_copy:
            self._copy = None
            return self.whole()
        state = self.state()
        if self._copy is None or state != self._copied:
            # The former copy is dropped before there is a new one.
            self._copy = None
            # A copy that is made in inference mode could not be used in training.
            with torch.inference_mode(False):
                self._copy, self._copied = self._bring(self.source()), state
        return self._copy

    @torch.no_grad()
    def rows(self, first: int, last: int) -> Tensor:
        """Copy rows `first` to `last` (exclusive) to the device; 2-D: the first dimension by all others."""
        rows = self._bring(self.source(slice(first, last))).reshape(last - first, -1)
        if not self._lacks_values():
            return rows
        indices, start = self._mask.indices.long(), first * rows.shape[1]
        inside = slice(*torch.searchsorted(indices, indices.new_tensor([start, start + rows.numel()])).tolist())
        return scatter_entries_(rows.clone(), indices[inside] - start, self._values[inside])

    def overlay_(self, copy: Tensor) -> list[Tensor]:
        """Write the trained values over a copy on the device, in place, rounded to its dtype; return them."""
        if self._values is None:
            return []
        # A change from outside wins over the values, as before the forward of any masked weight.
        linked(self._values).refresh()
        with torch.no_grad():
            overlay_(copy, self._mask.positions, self._values.detach())
        return [self._values]

    def _bring(self, source: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return source.to(self.dtype)
        out = torch.empty(source.shape, dtype=self.dtype, device=self.device)
        copy_pages_([(out, source)])
        return out

    @property
    def tensor(self) -> Tensor:
        """The whole weight in host memory, up to date; not to be written."""
        return self.dense(self.dtype)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight in `dtype`, in host memory, up to date."""
        held = self.source().to(self.dtype)
        if self._lacks_values():
            held = scatter_entries_(held.clone(), self._mask.indices.cpu(), self._values.cpu())
        return held.to(dtype)

    @torch.no_grad()
    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), (k,) in the weight's dtype, on the device of the positions."""
        entries = gather_entries(self.source(), indices.cpu()).to(indices.device, self.dtype)
        if self._lacks_values():
            places, inside = find(self._mask.indices, indices.to(self.device))
            entries[inside.to(entries.device)] = self._values[places[inside]].to(entries)
        return entries

    def holds(self, mask: Mask, values: Tensor) -> bool:
        """Return False: the weight is written when it is used."""
        return False

    @torch.no_grad()
    def write(self, mask: Mask, values: Tensor) -> None:
        """Write `values` (k,) fp32 at `mask`, rounded to the weight's dtype; the attached values are left for later."""
        if values is self._values:
            self._mask = mask
            self._watch()
            self._behind = self.parameter, self._held()._version
            return
        rest = torch.ones(len(mask), dtype=torch.bool)
        if self._values is not None:
            places, inside = find(self._mask.indices, mask.indices.to(self.device))
            places, rest = places[inside], ~inside.cpu()
            self._values[places] = _rounded_to(values.to(self.device)[inside], self._values[places], self.dtype)
        if rest.any():
            self.settle()
            scatter_entries_(self._held(), mask.indices.cpu()[rest], values.cpu()[rest])

    def _lacks_values(self) -> bool:
        """Return whether the parameter lacks the newest of the attached values.

        Raises:
            ValueError: the weight lacked the newest values and was changed without its parameter; raised once per
                change.
        """
        if self._behind is None:
            return False
        parameter, version = self._behind
        if parameter is not self.parameter:
            # It was replaced, as by `load_state_dict(assign=True)`, and the new one wins.
            self._behind = None
            return False
        if self._held()._version != version:
            # The next use keeps both the change and the newest values at the trained entries.
            self._behind = parameter, self._held()._version
            raise ValueError(
                f"{self.name} was changed through a tensor that shared its memory before the last step, as those of an "
                "earlier state_dict() do. The change takes effect from the next use on, but trained entries keep the "
                "values of the last step; to set these too, change the parameter itself, or call load_state_dict."
            )
        return True

    @torch.no_grad()
    def settle(self) -> None:
        """Write the attached values into host memory, if it lacks the newest ones.

        Raises:
            ValueError: the weight lacked the newest values and was changed without its parameter.
        """
        if not self._lacks_values():
            return
        held, indices, values = self._held(), self._mask.indices.cpu(), self._values.detach().cpu()
        # The values are not a change from outside, which version counters tell.
        with _unsafe_preserve_version_counter(held):
            scatter_entries_(held, indices, values)
        # Only now: if memory has run out, the weight still lacks them.
        self._behind = None
        self._writes += 1

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return the values that fit the weight's entries, see `FloatingWeight.read`."""
        found = super().read(indices, values)
        self._watch()
        return found

    def attach(self, mask: Mask, values: nn.Parameter) -> None:
        """Overlay `values` (k,) fp32 at `mask` on all copies from now on."""
        self._mask, self._values = mask, values
        self._watch()

    def release(self, values: nn.Parameter) -> None:
        """Bring the weight up to date, and overlay the values no longer."""
        self.settle()
        self._mask = self._values = None

    def watch(self) -> None:
        """Let the parameter catch up by itself and be copied by whole pages, until `close`."""
        self._is_watched = True
        self._watch()

    def _watch(self) -> None:
        """Watch the parameter that the model has now."""
        parameter = self.parameter
        if self._is_watched and not isinstance(parameter, HostParameter):
            self._kind = type(parameter)
            parameter.__class__, parameter.behind = host_class(self._kind), self

    def close(self) -> None:
        """Give the parameter its own class back."""
        self._is_watched = self._stays = False
        self._copy = None
        parameter = self.parameter
        if isinstance(parameter, HostParameter):
            parameter.__class__ = self._kind
            del parameter.behind

    def __reduce_ex__(self, protocol: int):
        raise ValueError(NOT_COPIED)


def _rounded_to(entries: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return entries, rounded to `dtype`, in fp32; a value that rounds to its entry stays exact."""
    entries = entries.to(dtype)
    return torch.where(values.to(dtype) == entries, values, entries.to(values.dtype))
