"""How FSDP gathers 4-bit weights: as bytes, whatever floating dtype bitsandbytes stores them under.

`fully_shard` divides a 4-bit weight only if its bytes are stored under a floating dtype (`bnb_4bit_quant_storage`), and
then treats them as numbers. It casts them to the `param_dtype` of a `MixedPrecisionPolicy`. In blocks whose weights all
have one 16-bit dtype it collects them by `torch._foreach_copy_`, which on a GPU makes all NaNs the same one
(bitsandbytes' issue 1945). FSDP lets a class of tensors say by two methods what is gathered in its place: here the
bytes. They travel in the same collective, and nothing is copied once more.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from speft_optim.weights.sharded import parameter_groups


class PackedRows(Tensor):
    """The rows of a packed 4-bit weight that this process holds, with FSDP's two methods for what is gathered.

    Everything else that is done with it returns plain tensors, so that checkpoints hold no class of ours.

    Attributes:
        padded: the bytes that each process contributes, as many as the process with the most rows.
    """

    padded: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, rows: Tensor, padded: int) -> "PackedRows":
        """Return the same memory as a tensor of this class."""
        packed = rows.as_subclass(cls)
        packed.padded = padded
        return packed

    def to(self, *args, **kwargs) -> "PackedRows":
        """Move the rows, as FSDP does before it asks for what to gather where they lie on the CPU."""
        return PackedRows.of(super().to(*args, **kwargs), self.padded)

    def __deepcopy__(self, memo: dict) -> Tensor:
        """Copy the plain tensor."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickle the plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    # FSDP passes the mesh alone to a function of one argument. With its five it would want as many numbers as the
    # padded weight has, where processes do not divide the rows; those of 16 bits could only be floating, since NCCL
    # has no other.
    def fsdp_pre_all_gather(self, mesh: object) -> tuple[tuple[Tensor], torch.dtype]:
        """Return what this process contributes, (padded,) uint8, and what `fsdp_post_all_gather` needs to know."""
        own = self.detach().view(-1).view(torch.uint8)
        if missing := self.padded - len(own):
            own = nn.functional.pad(own, (0, missing))
        return (own,), self.dtype

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], dtype: torch.dtype, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple] | None:
        """Return the bytes of all processes in the dtype that they are stored under, in the memory they were put in.

        Args:
            gathered: one tensor, (padded * processes,) uint8.
            dtype: as `fsdp_pre_all_gather` returned it.
            param_dtype: what FSDP would have cast numbers to; bytes are not cast.
            out: what the first pass returned, which has the same memory; None in the first pass.
        """
        return (gathered[0].view(dtype), ()) if out is None else None


def gather_as_bytes(modules: Iterable[nn.Module], is_packed: Callable[[nn.Module], bool]) -> None:
    """Let FSDP gather the packed weights of modules as bytes from now on.

    Args:
        modules: those that `fully_shard` may have been applied to.
        is_packed: tells whether a module's weight is packed.

    Raises:
        ValueError: FSDP is to divide them over fewer processes after a forward, which it cannot do with bytes.
    """
    for group in (group for groups in parameter_groups(modules) for group in groups):
        found = [one for one in group.fsdp_params if _holds_bytes(one, is_packed)]
        if not all(isinstance(one._sharded_local_tensor, PackedRows) for one in found):
            _convert(group, found)


def _holds_bytes(parameter: object, is_packed: Callable[[nn.Module], bool]) -> bool:
    """Whether a parameter of FSDP has the bytes of a packed weight under a floating dtype; integers are not cast."""
    info = parameter._module_info
    return info.param_name == "weight" and parameter.sharded_param.is_floating_point() and is_packed(info.module)


def _convert(group: object, packed: list) -> None:
    """Convert the rows of a group's packed weights, and gather the group again if a pass through it has begun."""
    if group._use_post_forward_mesh:
        raise ValueError(
            "fully_shard with a number as reshard_after_forward cannot gather 4-bit weights as bytes; set it to True, "
            "which takes less memory, or to False."
        )
    group.wait_for_unshard()
    if group.is_unsharded:
        group._to_sharded()
    for one in packed:
        _pack(one)
        one.reset_sharded_param = partial(_reset, one)
        one._init_extensions()
        # What earlier passes gathered into is of another dtype.
        one.all_gather_outputs = []
        one.__dict__.pop("_unsharded_param", None)
    # Between passes nothing is gathered, since one process may have failed before it came here.
    if group._training_state.name == "FORWARD":
        group.unshard()
        group.wait_for_unshard()


def _pack(parameter: object) -> None:
    """Let the rows of a parameter of FSDP be of our class."""
    rows = parameter._sharded_local_tensor
    padded = parameter._sharded_param_data.numel() * rows.itemsize
    parameter.sharded_param._local_tensor = PackedRows.of(rows, padded)


def _reset(parameter: object) -> None:
    """Do what FSDP's own `reset_sharded_param` does, which takes rows that a load or a move put in place of ours."""
    type(parameter).reset_sharded_param(parameter)
    _pack(parameter)
