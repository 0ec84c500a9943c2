"""The frozen weight of a bitsandbytes layer, of any layout, with overlays of its trained entries.

A dense weight holds its trained entries itself. Quantised storage cannot, so a quantised weight has a list of overlays,
each a mask with exact fp32 values. The model computes with the dequantised weight on which the overlays are written;
the quantised values and the scales are only read. The overlays are attached to the scales (see `weights/scales.py`),
which everything that dequantises needs.

`weights/int8.py` and `weights/four_bit.py` have the layouts. Each product of code and scale is formed in fp32 and
rounded once to the dtype asked for, so that all ways to read an entry agree to the bit. On a GPU one kernel of ours
makes the whole weight with an overlay. Elsewhere, and where it does not support the length of the rows, bitsandbytes'
kernel dequantises a whole 4-bit weight. Everything else is plain PyTorch: the layouts are small and stable, and
bitsandbytes has no kernel that reads single rows or positions.
"""

import torch
from torch import Tensor, nn

from speft_optim.kernels.csr import CSR
from speft_optim.kernels.entries import scatter_entries_
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask, find, united
from speft_optim.weights.scales import TrainedEntries, TrainedScales, trained_entries

_CHUNK = 2**22


# The attribute in which a layer with our forward has its own name, for messages.
LAYER_NAME = "_name_in_model"


class QuantizedWeight:
    """The weight of a bitsandbytes linear layer: quantised values, scales, and overlays of exact values.

    Subclasses dequantise: `_launch` and `_dequantize` the whole weight, `_panel` rows, `_at` flat positions. The scales
    are where bitsandbytes has them, in `attribute` of `holder`.

    Args:
        module: the layer.
        holder: the object of bitsandbytes that has the scales.
    """

    # The dtype of rows, entries and the gradient; that of a product is decided by its input.
    dtype = torch.float32
    attribute: str

    def __init__(self, module: nn.Module, holder: object):
        self.module, self.holder = module, holder

    @property
    def is_current(self) -> bool:
        """Whether the layer still has the weight and the scales that this reads."""
        raise NotImplementedError

    @property
    def parts(self) -> list[Tensor]:
        """The quantised values as bitsandbytes stores them, and all scales that belong to this weight alone."""
        raise NotImplementedError

    @property
    def overlays(self) -> list[tuple[Mask, Tensor]]:
        """The overlays as (mask, values (k,) fp32) pairs; a later one is written over earlier ones."""
        entries = trained_entries(self.holder, self.attribute)
        return [] if entries is None else entries.overlays

    @property
    def attached(self) -> list[Tensor]:
        """The values of the overlays."""
        return [values for _, values in self.overlays]

    @property
    def scales(self) -> Tensor:
        """The plain scales on the weight's device; a copy where they are on another one, see `place_scales`."""
        entries = trained_entries(self.holder, self.attribute)
        scales = getattr(self.holder, self.attribute) if entries is None else entries.scales
        return scales if scales.device == self.device else scales.to(self.device)

    def place_scales(self) -> None:
        """Move scales and overlays to the weight's device.

        bitsandbytes leaves the scales behind when an int8 weight moves, and `fully_shard` moves parameters alone. The
        values that train move by themselves.
        """
        entries = trained_entries(self.holder, self.attribute)
        before = getattr(self.holder, self.attribute) if entries is None else entries.scales
        if (scales := self.scales) is not before:
            kept = scales if entries is None else TrainedScales(TrainedEntries(scales, entries.overlays, entries.layer))
            setattr(self.holder, self.attribute, kept)
        if entries is not None and not torch.compiler.is_compiling():
            for place, (mask, values) in enumerate(entries.overlays):
                if mask.device != self.device:
                    values = values if isinstance(values, nn.Parameter) else values.to(self.device)
                    entries.overlays[place] = mask.to(self.device), values

    def _carry(self, overlays: list[tuple[Mask, Tensor]]) -> None:
        """Attach these overlays to the scales in place of the present ones; without any, the scales are plain again."""
        held, entries = getattr(self.holder, self.attribute), trained_entries(self.holder, self.attribute)
        if entries is None:
            if overlays:
                name = self.module.__dict__.get(LAYER_NAME, "")
                setattr(self.holder, self.attribute, TrainedScales(TrainedEntries(held, overlays, name)))
        else:
            # The list is changed in place, since copies of the scales on another device share it.
            entries.overlays[:] = overlays
            if not overlays:
                setattr(self.holder, self.attribute, entries.scales)
        trained_entries(self.holder, self.attribute)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight with its overlays, (out, in) in `dtype`, newly made."""
        overlays = [(mask.to(self.device), values.detach().to(self.device)) for mask, values in self.overlays]
        fused = len(overlays) > 0 and isinstance(overlays[0][0].positions, CSR)
        weight = self._launch(dtype, *(overlays[0] if fused else (None, None)))
        if weight is None:
            weight, fused = self._dequantize(dtype), False
        for mask, values in overlays[fused:]:
            overlay_(weight, mask.positions, values)
        return weight

    def dense_base(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight without its overlays, (out, in) in `dtype`, newly made."""
        return self._dequantize(dtype)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) with their overlays, in fp32, newly made."""
        panel, columns = self._panel(first, last), self.shape[1]
        for mask, values in self.overlays:
            indices = mask.to(panel.device).indices
            bounds = torch.tensor([first * columns, last * columns], device=panel.device, dtype=indices.dtype)
            begin, end = torch.searchsorted(indices, bounds).tolist()
            inside = values.detach()[begin:end].to(panel.device)
            scatter_entries_(panel, indices[begin:end] - first * columns, inside)
        return panel

    def gather(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) with the overlays, (k,) fp32."""
        return self._overlay(self.gather_base(indices), indices)

    def own_entries(self, indices: Tensor) -> Tensor:
        """Return the same: scales and overlays are whole in every process."""
        return self.gather(indices)

    def complete_(self, entries: Tensor) -> None:
        """Do nothing: no other process holds entries of the weight."""

    def overlaid(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) that all have overlays, (k,) fp32; the weight is not read."""
        return self._overlay(torch.zeros(len(indices), device=indices.device), indices)

    def _overlay(self, entries: Tensor, indices: Tensor) -> Tensor:
        """Set the entries (k,) at flat positions (k,) that have an overlay to its values, in place."""
        for mask, values in self.overlays:
            place, inside = find(mask.to(indices.device).indices, indices)
            entries[inside] = values.detach().to(entries.device)[place[inside]]
        return entries

    def gather_base(self, indices: Tensor) -> Tensor:
        """Return the entries at flat positions (k,) without the overlays, (k,) fp32."""
        return torch.cat([self._at(part.long()) for part in indices.split(_CHUNK)]) if len(indices) else self._none()

    def _none(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def attach(self, mask: Mask, values: Tensor) -> None:
        """Overlay the weight at `mask` with `values` (k,) fp32, which may change in place from now on."""
        self._carry([*self.overlays, (mask, values)])

    def release(self, values: Tensor) -> None:
        """Detach `values`, which need not be kept any longer; the entries keep their present values in an overlay."""
        mask, entries = self.entries()
        # All entries go into one overlay, so that selecting masks again does not pile overlays up.
        self.overlay_alone(mask.to(self.device), entries)

    def overlay_alone(self, mask: Mask, entries: Tensor) -> None:
        """Overlay the weight at `mask` with `entries` (k,) fp32, and with nothing else."""
        self._carry([(mask, entries)] if len(mask) else [])

    def drop_unchanged(self) -> None:
        """Drop the overlays of entries that are the base's own; no values that train may be attached."""
        mask, entries = self.entries()
        indices = mask.indices.to(self.device)
        moved = entries != self.gather_base(indices)
        self._carry([(Mask(indices[moved], self.shape), entries[moved])] if bool(moved.any()) else [])

    def read(self, indices: Tensor, values: Tensor) -> Tensor:
        """Return the attached values: quantised storage, unlike a dense weight, cannot have changed them."""
        return values

    @torch.no_grad()
    def put(self, mask: Mask, values: Tensor) -> None:
        """Set the entries at `mask` to `values` (k,): in the overlays that have them, the rest in a new lowest one."""
        indices, values = mask.indices.to(self.device), values.to(self.device, torch.float32)
        missing = torch.ones_like(indices, dtype=torch.bool)
        for own, held in self.overlays:
            place, inside = find(own.to(self.device).indices, indices)
            held[place[inside].to(held.device)] = values[inside].to(held.device)
            missing &= ~inside
        if bool(missing.any()):
            rest = (Mask(indices[missing], self.shape), values[missing])
            self._carry([rest, *self.overlays])

    def entries(self, mask: Mask | None = None) -> tuple[Mask, Tensor]:
        """Return what an adapter must hold for this weight: the mask of all overlaid entries, and their values, fp32.

        `mask` is not used: it is for dense weights, which have no overlays.
        """
        masks = [own.to(self.device) for own, _ in self.overlays]
        mask = united(masks) if masks else Mask(self._none().int(), self.shape)
        return mask, self.overlaid(mask.indices)
