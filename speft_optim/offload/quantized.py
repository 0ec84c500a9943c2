"""A bitsandbytes weight in host memory: its quantised values and scales are copied, and dequantised on the device."""

import copy

import torch
from torch import Tensor, nn

from speft_optim.masks.mask import Mask
from speft_optim.offload.pages import copy_pages_
from speft_optim.weights.bnb import quantized_weight
from speft_optim.weights.four_bit import FourBitWeight
from speft_optim.weights.quantized_weight import LAYER_NAME, QuantizedWeight
from speft_optim.weights.scales import TrainedEntries, TrainedScales, plain_scales
from speft_optim.weights.targets import Target


class HostQuantized:
    """The quantised weight of a layer in CPU memory, with the interface of `QuantizedWeight`.

    Trained entries are an overlay, as on a resident layer. Overlays are kept on the device, where copies need them;
    what is read of the weight comes from the host.

    Args:
        target: the weight in the model.
        device: the device of the copies.
    """

    is_overlaid = is_mapped = False

    def __init__(self, target: Target, device: torch.device):
        self.name, self.device, self._module = target.name, device, target.sites[0][0]
        self._read: QuantizedWeight | None = None
        self.shape, self.dtype = self._host.shape, self._host.dtype
        self.forms = [(source.shape, source.dtype) for source in self.sources()]
        # Tables of 16 and 256 numbers and an offset are copied once.
        self._constants: dict[str, Tensor] = {}

    @property
    def _host(self) -> QuantizedWeight:
        if self._read is None or not self._read.is_current:
            self._read = quantized_weight(self._module)
        return self._read

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter with the quantised values."""
        return self._module._parameters["weight"]

    def sources(self) -> list[Tensor]:
        """Return quantised values, scales and, under double quantisation, the scales' own scales, in CPU memory."""
        return [part.detach() for part in self._host.parts]

    def state(self) -> tuple:
        """Return what changes whenever the weight in host memory does; a change of overlays does not count."""
        return tuple((part.data_ptr(), part._version) for part in self._host.parts)

    def whole(self) -> Tensor:
        """Copy the weight to the device, see `assemble`."""
        parts = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.forms]
        copy_pages_(zip(parts, self.sources(), strict=True))
        copied = self.assemble(parts)
        self.overlay_(copied)
        return copied

    def lasting(self) -> Tensor:
        """Return what `whole` does, since no copy of a weight outside the blocks stays on the device."""
        return self.whole()

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Return quantised values that carry their scales as bitsandbytes' parameters do, from copies of `sources`."""
        codes, scales, *second = parts
        host = self._host
        if not isinstance(host, FourBitWeight):
            codes.SCB = scales
            return codes
        state = copy.copy(host.state)
        state.absmax, state.code = scales, self._constant("code", state.code)
        if second:
            state.state2, state.offset = copy.copy(state.state2), self._constant("offset", state.offset)
            state.state2.absmax, state.state2.code = *second, self._constant("second code", state.state2.code)
        codes.quant_state = state
        return codes

    def _constant(self, name: str, tensor: Tensor) -> Tensor:
        # A copy from memory that is not locked waits for all work of the device.
        if name not in self._constants:
            self._constants[name] = tensor.to(self.device)
        return self._constants[name]

    def overlay_(self, copied: Tensor) -> list[Tensor]:
        """Let a copy have the trained entries of now, and return their values."""
        state = getattr(copied, "quant_state", None)
        holder, attribute = (copied, "SCB") if state is None else (state, FourBitWeight.attribute)
        scales, overlays = getattr(holder, attribute), self.overlays
        if not (overlays and isinstance(scales, TrainedScales) and scales.entries.overlays is overlays):
            scales = plain_scales(scales)
            if overlays:
                scales = TrainedScales(TrainedEntries(scales, overlays, self._module.__dict__.get(LAYER_NAME, "")))
            setattr(holder, attribute, scales)
        return [values for _, values in overlays]

    @property
    def overlays(self) -> list[tuple[Mask, Tensor]]:
        """The overlays, see `QuantizedWeight.overlays`."""
        return self._host.overlays

    @property
    def attached(self) -> list[Tensor]:
        """The values of the overlays."""
        return self._host.attached

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight with its overlays in `dtype`, in CPU memory."""
        return self._host.dense(dtype)

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight without its overlays in `dtype`, in CPU memory."""
        return self._host.dense_base(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) with their overlays, in fp32 on the device."""
        return self._host.rows(first, last).to(self.device)

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) with the overlays, (k,) fp32."""
        return self._host.gather(indices.cpu()).to(indices.device)

    def own_entries(self, indices: Tensor) -> Tensor:
        """Return the same, see `QuantizedWeight.own_entries`."""
        return self.gather(indices)

    def complete_(self, entries: Tensor) -> None:
        """Do nothing, see `QuantizedWeight.complete_`."""

    def overlaid(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) that all have overlays, (k,) fp32."""
        return self._host.overlaid(indices)

    def gather_base(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) without the overlays, (k,) fp32."""
        return self._host.gather_base(indices.cpu()).to(indices.device)

    def entries(self, mask: Mask | None = None) -> tuple[Mask, Tensor]:
        """Return the mask of all overlaid entries and their values, see `QuantizedWeight.entries`."""
        mask, entries = self._host.entries(mask)
        return mask.to(self.device), entries.to(self.device)

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return the attached values, see `QuantizedWeight.read`."""
        return values

    def attach(self, mask: Mask, values: Tensor) -> None:
        """Overlay the weight at `mask` with `values` (k,) fp32, which may change in place from now on."""
        self._host.attach(mask, values)
        self._place(self.device)

    def release(self, values: Tensor) -> None:
        """Detach `values`; the entries keep their present values in an overlay."""
        # It is on the device before the values are detached, since memory may run out there.
        self._host.overlay_alone(*self.entries())

    def drop_unchanged(self) -> None:
        """Drop the overlays of entries that are the base's own."""
        self._host.drop_unchanged()
        self._place(self.device)

    def put(self, mask: Mask, values: Tensor) -> None:
        """Set the entries at `mask` to `values` (k,), see `QuantizedWeight.put`."""
        self._host.put(mask, values)
        self._place(self.device)

    def _place(self, device: torch.device) -> None:
        """Move the overlays to a device, in place, since all copies of the scales share the list."""
        self.overlays[:] = [(mask.to(device), values.to(device)) for mask, values in self.overlays]

    def watch(self) -> None:
        """Do nothing: the trained entries are an overlay, so the weight is always up to date."""

    def close(self) -> None:
        """Bring the overlays back to the host."""
        self._place(torch.device("cpu"))

    def __reduce_ex__(self, protocol: int):
        raise ValueError(NOT_COPIED)


NOT_COPIED = (
    "A model whose weights stay in host memory (offload=) cannot be copied or pickled, for its copy would compute with "
    "this one's weights; copy its state_dict(), or call desparsify first."
)
