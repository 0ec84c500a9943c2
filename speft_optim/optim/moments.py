"""Adam's two moments between steps: fp32, or 8-bit codes with one scale per block of 256.

The code book of the second moment has no zero. An entry with small gradients in a block with a large one then moves too
little; with a zero, as in bitsandbytes, its update would be divided by eps alone. Two alternatives were tried on tiny
models: codes for the root of the second moment lost more precision than its wider range gained, and stochastic rounding
gained a little, but a resumed run would need its random state.
"""

from typing import Any

import torch
from torch import Tensor

from speft_optim.kernels.blockwise import dequantize_blockwise, quantize_blockwise

STATE_BITS = (8, 32)

# The keys of the moments in a state, and whether a quantised one may be negative.
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def new_moments_(state: dict[str, Any], parameter: Tensor, bits: int) -> None:
    """Put zero moments for `parameter` into its optimizer state."""
    zeros = torch.zeros_like(parameter, dtype=torch.float32 if bits == 8 else parameter.dtype)
    if bits == 8:
        _pack_(state, zeros, zeros)
    else:
        state.update(exp_avg=zeros, exp_avg_sq=zeros.clone())


def unpack_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return both moments, dequantised if need be, to update in place; `store_moments_` puts them back."""
    if "exp_avg_scale" not in state:
        return state["exp_avg"], state["exp_avg_sq"]
    shape = state["exp_avg"].shape
    first, second = (
        dequantize_blockwise(state[key].view(-1), state[f"{key}_scale"], signed).view(shape)
        for key, signed in SIGNED.items()
    )
    return first, second


def stored_moments(state: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return both moments as stored, fp32 or uint8 codes, and the scales of the codes (none for fp32)."""
    scales = [state[f"{key}_scale"] for key in SIGNED if f"{key}_scale" in state]
    return [state[key] for key in SIGNED], scales


def store_moments_(state: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Store updated moments of `unpack_moments` in the form that the state has."""
    if "exp_avg_scale" in state:
        _pack_(state, exp_avg, exp_avg_sq)


def moment_bytes(state: dict[str, Any]) -> int:
    """Return the bytes that the stored moments take."""
    return sum(part.nbytes for key, part in state.items() if key.startswith("exp_avg"))


def moments_fit(saved: dict[str, Any], parameter: Tensor) -> bool:
    """Tell whether a saved state holds no moments, or complete ones for `parameter`, in fp32 or 8 bits."""
    parts = {key: part for key, part in saved.items() if key.startswith("exp_avg")}
    expected = {}
    if parts:
        new_moments_(expected, parameter.detach(), 8 if "exp_avg_scale" in parts else 32)
    return parts.keys() == expected.keys() and all(
        part.shape == expected[key].shape and part.dtype == expected[key].dtype for key, part in parts.items()
    )


def _pack_(state: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    for (key, signed), moment in zip(SIGNED.items(), (exp_avg, exp_avg_sq), strict=True):
        codes, scales = quantize_blockwise(moment.reshape(-1), signed)
        state.update({key: codes.view(moment.shape), f"{key}_scale": scales})
