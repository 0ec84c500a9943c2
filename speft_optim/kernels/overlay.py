"""The overlay: compact values replace a weight's masked entries. Definition in PyTorch, and choice of the kernel."""

from torch import Tensor

from speft_optim.kernels.csr import CSR, flat_positions
from speft_optim.kernels.entries import scatter_entries_
from speft_optim.kernels.launch import launches


def overlay_(weight: Tensor, positions: CSR | Tensor, values: Tensor) -> None:
    """Write `values` (k,) fp32, rounded to the weight's dtype, at `positions` of `weight`, in place.

    Args:
        weight: of any shape and strides; for positions in row form, a row is a run of its last dimension.

        positions: in row form, or flat and row-major, (k,).
        values: (k,) fp32.
    """
    if isinstance(positions, CSR) and launches(weight):
        from speft_optim.kernels import overlay_triton

        overlay_triton.overlay_(weight, positions, values)
    else:
        scatter_entries_(weight, flat_positions(positions, weight.shape[-1] if weight.dim() else 1), values)
