"""A weight in host memory, or on disk, of which a device computes with copies.

In training the host's weight falls behind the trained values, which are on the device, and copies of it get them as an
overlay. The weight catches up when it is used (see `offload/host_parameter.py`).
"""

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from speft_optim.kernels.entries import gather_entries, scatter_entries_
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask
from speft_optim.offload.host_parameter import HostParameter, host_class, plainly
from speft_optim.offload.pages import copy_pages_
from speft_optim.offload.quantized import NOT_COPIED
from speft_optim.offload.shards import Shards
from speft_optim.weights.compact_values import linked
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.targets import Target


class HostWeight(FloatingWeight):
    """A floating parameter in CPU memory or on disk that is copied to a device, whole or in rows.

    Args:
        target: the weight in the model, in CPU memory or on the meta device.
        device: the device of the copies.
        shards: the checkpoint that holds the weight if it is on the meta device.

    Attributes:
        device: where the weight is computed with, and where its values and mask are.
        forms: shape and dtype of each tensor of a copy; a floating weight is one.
    """

    def __init__(self, target: Target, device: torch.device, shards: Shards | None = None):
        parameter = target.parameter
        self.name, self.shape, self.dtype, self.device = target.name, parameter.shape, parameter.dtype, device
        self.forms = [(self.shape, self.dtype)]
        self._site, self._shards = target.sites[0], shards
        self._mask: Mask | None = None
        self._values: nn.Parameter | None = None
        # The parameter that lacks the newest values, and its version when it was left behind.
        self._behind: tuple[nn.Parameter, int] | None = None
        self._writes = 0
        self._kind: type = nn.Parameter

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the model has now."""
        module, attribute = self._site
        return module._parameters[attribute]

    @property
    def is_overlaid(self) -> bool:
        """Whether copies get trained values as an overlay."""
        return self._values is not None

    def _held(self) -> Tensor:
        """The parameter's own memory, up to date or not."""
        return plainly(self.parameter.detach)

    def state(self) -> tuple:
        """Return what changes whenever the weight in host memory does."""
        parameter = self.parameter
        if parameter.is_meta:
            return ()
        held = self._held()
        return held.data_ptr(), held._version, self._writes

    def source(self, rows: slice = slice(None)) -> Tensor:
        """Return the weight or some rows of it in CPU memory, perhaps behind; from disk in the checkpoint's dtype."""
        if self.parameter.is_meta:
            return self._shards.read(self.name, rows)
        held = self._held()
        return held if rows == slice(None) else held[rows]

    def sources(self) -> list[Tensor]:
        """Return the tensors in CPU memory of which copies are made."""
        return [self.source()]

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Return the copy of the weight, of copies of `sources`."""
        return parts[0]

    def whole(self) -> Tensor:
        """Copy the weight to the device, in the model's dtype, with the trained values."""
        out = self._bring(self.source())
        if self.is_overlaid and out.data_ptr() == self._held().data_ptr():
            out = out.clone()
        self.overlay_(out)
        return out

    def rows(self, first: int, last: int) -> Tensor:
        """Copy rows `first` to `last` (exclusive) to the device; 2-D: the first dimension by all others."""
        self.settle()
        return self._bring(self.source(slice(first, last))).reshape(last - first, -1)

    @torch.no_grad()
    def overlay_(self, copy: Tensor) -> None:
        """Write the trained values, rounded to the weight's dtype, over a copy on the device, in place."""
        if self._values is not None:
            # A change from outside wins over the values, as before the forward of any masked weight.
            linked(self._values).refresh()
            overlay_(copy, self._mask.positions, self._values.detach())

    def _bring(self, source: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return source.to(self.dtype)
        out = torch.empty(source.shape, dtype=self.dtype, device=self.device)
        copy_pages_(out, source)
        return out

    @property
    def tensor(self) -> Tensor:
        """The whole weight in host memory, up to date."""
        self.settle()
        return self.source()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight in `dtype`, in host memory, up to date."""
        return self.tensor.to(dtype)

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), (k,) in the weight's dtype, on the device of the positions."""
        return gather_entries(self.tensor, indices.cpu()).to(indices.device, self.dtype)

    @torch.no_grad()
    def write(self, mask: Mask, values: Tensor) -> None:
        """Write `values` (k,) fp32 at `mask`, rounded to the weight's dtype; the attached values are left for later."""
        if values is self._values:
            self._mask = mask
            self._watch()
            self._behind = self.parameter, self._held()._version
        else:
            self.settle()
            scatter_entries_(self._held(), mask.indices.cpu(), values.cpu())

    @torch.no_grad()
    def settle(self) -> None:
        """Write the attached values into host memory, if it lacks the newest ones.

        Raises:
            ValueError: the weight was changed past its parameter while it was behind.
        """
        if self._behind is None:
            return
        (parameter, version), self._behind = self._behind, None
        if parameter is not self.parameter:
            # It was replaced, as by `load_state_dict(assign=True)`, and the new one wins.
            return
        held = self._held()
        if held._version != version:
            raise ValueError(
                f"{self.name} was changed through a tensor that shared its memory before the last step, as those of an "
                "earlier state_dict() do; change the parameter itself, or call load_state_dict."
            )
        # The values are not a change from outside, which version counters tell.
        with _unsafe_preserve_version_counter(held):
            scatter_entries_(held, self._mask.indices.cpu(), self._values.detach().cpu())
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

    def _watch(self) -> None:
        """Let the parameter that the model has now catch up by itself."""
        parameter = self.parameter
        if self._values is not None and not isinstance(parameter, HostParameter):
            self._kind = type(parameter)
            parameter.__class__, parameter.behind = host_class(self._kind), self

    def close(self) -> None:
        """Give the parameter its own class back."""
        parameter = self.parameter
        if isinstance(parameter, HostParameter):
            parameter.__class__ = self._kind
            del parameter.behind

    def __reduce_ex__(self, protocol: int):
        raise ValueError(NOT_COPIED)
