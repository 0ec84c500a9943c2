"""A weight that `fully_shard` shards over processes: each holds some rows, and all hold the compact values.

Between passes the module holds a DTensor; during its forward and backward FSDP replaces it by the gathered weight,
which gradient hooks see. Each process writes the values of a dense weight into its own rows, without communication.
Reading entries needs communication between all processes: in `sparsify`, after a load, and for saving.

The rows of a quantised weight are only read. bitsandbytes' scales and the overlays are replicated on every process.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from speft_optim.distributed import from_owners_
from speft_optim.kernels.entries import gather_entries
from speft_optim.kernels.overlay import overlay_
from speft_optim.masks.mask import Mask
from speft_optim.weights.floating import FloatingWeight


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a parameter is a DTensor; checked without importing DTensor."""
    return hasattr(tensor, "device_mesh")


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the module's own parameters."""
    # Not hasattr, which is slow for a missing attribute of a module: this runs in each forward.
    return "_is_fsdp_managed_module" in module.__dict__


def local_rows(parameter: Tensor) -> Tensor:
    """The rows of a DTensor that this process holds, in the memory where they lie."""
    # `to_local` returns it too where gradients are disabled, but takes longer, and each forward asks for all weights.
    return parameter._local_tensor


def device_of(parameter: Tensor) -> torch.device:
    """Return where a parameter is computed with: under an offload policy the rows of a DTensor lie on the CPU."""
    if not is_sharded(parameter):
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, None if kind == "cpu" else torch.get_device_module(kind).current_device())


def whole(parameter: Tensor) -> Tensor:
    """Return all rows of a parameter, detached, in its own memory if it is whole; all processes ask for a DTensor's."""
    parameter = parameter.detach()
    return parameter.to(device_of(parameter)).full_tensor() if is_sharded(parameter) else parameter


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module itself; class names tell, so that nothing is imported."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def parameter_groups(modules: Iterable[nn.Module]) -> Iterator[list]:
    """The parameters that FSDP gathers together, in its own groups, for each of the modules it was applied to."""
    for module in filter(is_fsdp_unit, modules):
        state = module._get_fsdp_state()
        # torch 2.11 has one group a module.
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        yield [group for group in groups if group is not None]


class ShardedParameter:
    """A parameter of a module, of which this process holds some rows, as the module holds it between passes.

    Args:
        module: the module.
        attribute: the parameter's name in it.
        parameter: the DTensor, if the module holds the gathered weight now.

    Attributes:
        parameter: the DTensor, also while the module holds the gathered weight.
        device: where the weight is computed with, see `device_of`.
    """

    def __init__(self, module: nn.Module, attribute: str, parameter: nn.Parameter | None = None):
        self._site = module, attribute
        self.parameter = module._parameters[attribute] if parameter is None else parameter
        self.shape, self.dtype, self.device = self.parameter.shape, self.parameter.dtype, device_of(self.parameter)

    def held(self) -> Tensor | None:
        """The DTensor that the module holds between passes; what it holds now where that is no gathered weight."""
        module, attribute = self._site
        now = module._parameters.get(attribute)
        if is_sharded(now):
            self.parameter = now
        return self.parameter if self._gathered() is not None else now

    def is_kept_for_backward(self) -> bool:
        """Whether the module holds the copy, divided over fewer processes, that FSDP keeps from forward to backward.

        It keeps one where `reshard_after_forward` is a number.
        """
        module, attribute = self._site
        now = module._parameters.get(attribute)
        return now is not self.parameter and is_sharded(now) and now.device_mesh != self.parameter.device_mesh

    def _gathered(self) -> Tensor | None:
        """The weight of all rows that FSDP put into the module for a pass, or None between passes."""
        module, attribute = self._site
        now = module._parameters.get(attribute)
        fits = now is not None and not is_sharded(now) and now.shape == self.shape
        return now if fits and is_managed(module) else None

    def remember_rows(self) -> None:
        """Do nothing: the rows of a quantised weight hold no values."""

    def rows_are_as_seen(self) -> bool:
        """Return True: the rows of a quantised weight hold no values."""
        return True


class ShardedWeight(ShardedParameter, FloatingWeight):
    """A floating parameter of a module, of which this process holds some rows. Arguments are as above."""

    def __init__(self, module: nn.Module, attribute: str, parameter: nn.Parameter | None = None):
        super().__init__(module, attribute, parameter)
        # The last one of the mesh: in hybrid sharding the dimension before it holds copies.
        self._dimension = self.parameter.device_mesh.ndim - 1
        self._own: tuple[Mask, slice, Mask] | None = None
        self._rows_seen: tuple[int, int] = (0, 0)

    def state(self) -> tuple:
        """Changes with every operation on the DTensor, in all processes alike, so that all begin an exchange."""
        return id(self.parameter), self.parameter._version

    def remember_rows(self) -> None:
        """What the rows hold is what the values are."""
        self._rows_seen = self._rows_now()

    def rows_are_as_seen(self) -> bool:
        """Whether the rows are untouched since the values were last written into them, or read from them."""
        return self._rows_now() == self._rows_seen

    def _rows_now(self) -> tuple[int, int]:
        rows = local_rows(self.parameter)
        return rows._version, rows.data_ptr()

    @torch.no_grad()
    def check_rows(self, name: str, mask: Mask, values: Tensor) -> None:
        """Refuse rows that are not as seen and were changed past the DTensor, of which other processes do not know.

        Raises:
            ValueError: they no longer hold the values.
        """
        rows = local_rows(self.parameter)
        places, own = self._own_entries(mask, rows)
        if not torch.equal(gather_entries(rows, own.indices), values[places].to(rows)):
            raise ValueError(
                f"The rows of {name} that this process holds were changed without the DTensor they belong to, as "
                "torch.distributed.checkpoint.load does; let it know with set_model_state_dict or load_state_dict, in "
                "all processes."
            )
        # FSDP moves them as it pads what processes do not divide.
        self.remember_rows()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in `dtype`; all processes ask for it."""
        return whole(self.parameter).to(dtype)

    @property
    def tensor(self) -> Tensor:
        """The whole weight; all processes ask for it."""
        return whole(self.parameter)

    @torch.no_grad()
    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), the first dimension by all others; all processes ask for the same."""
        rows, columns = local_rows(self.parameter), self.shape[1:].numel()
        start, stop = (place // max(1, columns) for place in self._range(rows))
        found = torch.zeros(last - first, columns, dtype=torch.float32, device=self.device)
        begin, end = max(first, start), min(last, stop)
        if begin < end:
            found[begin - first : end - first] = rows.reshape(-1, columns)[begin - start : end - start]
        return self._from_owners(found)

    def gather(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,), in the weight's dtype; all processes ask for the same."""
        return self._from_owners(self.own_entries(indices))

    @torch.no_grad()
    def own_entries(self, indices: Tensor) -> Tensor:
        """Entries at flat positions (k,) that lie in the process's own rows, and zeros for others, (k,) fp32."""
        rows = local_rows(self.parameter)
        first, last = self._range(rows)
        inside = (indices >= first) & (indices < last)
        entries = torch.zeros(len(indices), dtype=torch.float32, device=self.device)
        own = gather_entries(rows, (indices[inside] - first).to(rows.device))
        entries[inside.to(self.device)] = own.to(self.device, torch.float32)
        return entries

    def complete_(self, entries: Tensor) -> None:
        """Fill in what other processes hold of `own_entries`; all of them call this."""
        from_owners_(entries, self.parameter.device_mesh.get_group(self._dimension))

    def holds(self, mask: Mask, values: Tensor) -> bool:
        """Return False: other processes would have to ask too."""
        return False

    def _from_owners(self, entries: Tensor) -> Tensor:
        """Entries that are zero in all processes but one, from that, in the weight's dtype."""
        self.complete_(entries)
        return entries.to(self.dtype)

    @torch.no_grad()
    def write(self, mask: Mask, values: Tensor) -> None:
        """Bring the process's own rows at `mask` up to the attached `values`.

        So is the gathered weight, while the module holds it.
        """
        rows = local_rows(self.parameter)
        places, own = self._own_entries(mask, rows)
        if len(own):
            overlay_(rows, own.positions, values.detach()[places].to(rows.device))
        if (gathered := self._gathered()) is not None:
            overlay_(gathered.detach(), mask.positions, values.detach())

    def writable(self) -> tuple[Tensor | None, int]:
        """Return the process's own rows and the number of the first; None where the gathered weight is written too."""
        if self._gathered() is not None or len(self.shape) < 2:
            return None, 0
        rows = local_rows(self.parameter)
        return rows, self._range(rows)[0] // max(1, self.shape[-1])

    def _range(self, rows: Tensor) -> tuple[int, int]:
        """The flat positions of the process's own rows, first and last (exclusive)."""
        mesh = self.parameter.device_mesh
        # As torch.chunk divides: all parts but the last ones have the same number of rows.
        part = -(-self.shape[0] // mesh.size(self._dimension))
        first = min(mesh.get_local_rank(self._dimension) * part, self.shape[0]) * self.shape[1:].numel()
        return first, first + rows.numel()

    def _own_entries(self, mask: Mask, rows: Tensor) -> tuple[slice, Mask]:
        """The places of the process's own entries among those of the mask, and their mask within the own rows."""
        if self._own is None or self._own[0] is not mask:
            first, last = self._range(rows)
            indices = mask.indices.long()
            edges = torch.tensor([first, last], device=indices.device)
            begin, end = torch.searchsorted(indices, edges).tolist()
            own = Mask((indices[begin:end] - first).to(rows.device), rows.shape)
            self._own = mask, slice(begin, end), own
        return self._own[1:]
