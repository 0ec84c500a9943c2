"""The saved state of one parameter: tensors only, with the same keys at every step.

Other tools decide what a state may look like. `torch.distributed.checkpoint` saves only the state of parameters and the
options of their groups, flattens tensors only, takes the keys from the optimizer that loads, and copies into tensors of
that optimizer's sizes. So text and shapes are saved as tensors, counters are saved with every parameter, zeros are
saved too, and what grows during training (history, entries that left the mask) has a fixed size. `values`, `indices`
and moments have the length of the mask.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from speft_optim.masks.mask import Mask
from speft_optim.optim.moments import moments_fit

MASK_KEYS = ("values", "indices", "shape", "name")


PREVIOUS_KEYS = ("previously_trained", "previous_values")


SCHEDULE_KEYS = ("schedule_steps", "schedule_history")


# A schedule without batches also saves its turn, the stored scores and its accumulators.
TURN_KEYS = ("schedule_turn", "schedule_scores", "schedule_accumulator")


def moment_keys(bits: int) -> tuple[str, ...]:
    """Return the keys of a parameter's step count and moments."""
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if bits == 8 else ()
    return ("step", "exp_avg", "exp_avg_sq", *scales)


def has_moments(state: dict[str, Any] | None) -> bool:
    """Tell whether a parameter took a step since its moments were last reset."""
    return bool(state) and "step" in state and int(state["step"]) > 0


def text_to_tensor(text: str, device: torch.device) -> Tensor:
    """Encode text as its UTF-8 bytes, (n,) uint8."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def text_of(tensor: Tensor) -> str:
    """Decode the text in a tensor of `text_to_tensor`."""
    return bytes(tensor.tolist()).decode()


def positions_to_bits(mask: Mask | None, count: int, device: torch.device) -> Tensor:
    """Encode a mask as one bit for each of `count` entries, (ceil(count / 8),) uint8: one size for all masks."""
    bits = torch.zeros(_bytes(count), dtype=torch.uint8, device=device)
    if mask is not None:
        positions = mask.indices.to(device).long()
        # Positions are unique, so the sum of their bits is the union.
        bits.index_add_(0, positions // 8, (1 << (positions % 8)).to(torch.uint8))
    return bits


def positions_of(bits: Tensor) -> Tensor:
    """Decode the positions in a tensor of `positions_to_bits`, (k,) int64."""
    filled, eight = bits.nonzero(), torch.arange(8, dtype=torch.uint8, device=bits.device)
    # Bits beyond the last entry give positions that `Mask` refuses.
    return (filled * 8 + eight)[((bits[filled] >> eight) & 1).bool()]


def mask_of(saved: dict[str, Any]) -> Mask:
    """Return the mask in a saved state."""
    return Mask(saved["indices"], saved["shape"].tolist())


def previous_of(saved: dict[str, Any]) -> Mask | None:
    """Return the entries that left the mask in a saved state, or None if none did."""
    if "previously_trained" not in saved:
        return None
    positions = positions_of(saved["previously_trained"])
    return Mask(positions, saved["shape"].tolist()) if len(positions) else None


def check_saved(what: str, parameter: Tensor, saved: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuse the saved state of a parameter if a key is missing or its tensor is damaged.

    Args:
        what: the parameter in words, for messages.
        parameter: the tensor that the moments must fit: the parameter, or the saved values if the mask may differ.
        saved: the saved state.
        keys: the keys that it must have.

    Raises:
        ValueError: names the key that is wrong.
    """
    if isinstance(saved.get("name"), str) or "former" in saved:
        raise ValueError(
            f"The saved state of {what} is in the format of an older version of speft_optim; load it with that version."
        )
    # A tool that takes the keys from this optimizer passes an empty dict for a key that the file lacks.
    if missing := sorted(key for key in keys if key not in saved or saved[key] == {}):
        raise ValueError(
            f"The saved state of {what} has no {' and no '.join(missing)}; load a state that SparseAdamW saved with "
            "the same options, over sparsify(...)."
        )
    for key, part in saved.items():
        if not isinstance(part, Tensor):
            raise ValueError(f"The saved {key} of {what} is a {type(part).__name__}, not a tensor; load another state.")
    _check_tensors(what, saved)
    for key in ("values", "exp_avg", "exp_avg_sq"):
        if key in saved and saved[key].shape != parameter.shape:
            raise ValueError(
                f"{what} has {parameter.numel():,} entries, its saved {key} {saved[key].numel():,}; use its masks."
            )
    step = saved["step"]
    counted = step.numel() == 1 and not step.is_complex() and 0 <= float(step) < math.inf
    if not counted or not moments_fit(saved, parameter):
        raise ValueError(f"The saved moments of {what} are incomplete or damaged; its keys are {sorted(saved)}.")
    _check_number(what, saved, "skipped_steps")


def check_saved_mask(what: str, saved: dict[str, Any], weight_holds_entries: bool) -> Mask:
    """Check the mask in a saved state, with its values and the entries that left it, and return it.

    Args:
        what: the parameter in words, for messages.
        saved: the saved state, which has passed `check_saved`.
        weight_holds_entries: whether the weight itself holds the entries that left the mask, so that they are not
            saved.

    Raises:
        ValueError: says what is wrong.
    """
    for key, dtype in (("values", torch.float32), ("shape", torch.int64), ("name", torch.uint8)):
        if saved[key].dtype != dtype or saved[key].dim() != 1:
            raise ValueError(
                f"The saved {key} of {what} are of {saved[key].dtype} with {saved[key].dim()} dimensions, not of "
                f"{dtype} with one; load another state."
            )
    try:
        mask = mask_of(saved)
        if len(mask) != len(saved["values"]):
            raise ValueError(f"it has {len(mask)} entries, but there are {len(saved['values'])} values")
        text_of(saved["name"])
        if "previously_trained" in saved:
            _check_previous(mask, saved, weight_holds_entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The saved mask of {what} is damaged; load another state: {error}") from error
    return mask


def _check_previous(mask: Mask, saved: dict[str, Any], weight_holds_entries: bool) -> None:
    bits, entries = saved["previously_trained"], saved["previous_values"]
    if bits.dtype != torch.uint8 or bits.shape != (_bytes(mask.shape.numel()),):
        raise ValueError(
            f"previously_trained is of {bits.dtype} and shape {tuple(bits.shape)}, not one bit for each entry"
        )
    previous = None if weight_holds_entries else previous_of(saved)
    if entries.dtype != torch.float32 or entries.shape != (0 if previous is None else len(previous),):
        raise ValueError("the entries that left the mask and their previous_values differ in number")


def _check_number(what: str, saved: dict[str, Any], key: str) -> None:
    number = saved[key]
    if number.dtype != torch.int64 or number.dim() or int(number) < 0:
        raise ValueError(f"The saved {key} of {what} is {number}, not a whole number as int64; load another state.")


def check_common(key: str, parts: list[Tensor]) -> None:
    """Refuse a number of the whole optimizer that differs between parameters.

    Raises:
        ValueError: it differs.
    """
    if any(not torch.equal(part.cpu(), parts[0].cpu()) for part in parts):
        raise ValueError(f"The saved {key} differs between parameters; load a state that was saved whole.")


def _bytes(count: int) -> int:
    return -(-count // 8)


def _check_tensors(what: str, saved: dict[str, Any]) -> None:
    """Refuse tensors with less memory than their shape needs, and numbers that would make a step NaN."""
    for key, part in saved.items():
        if part.layout != torch.strided or part.untyped_storage().nbytes() < part.nbytes:
            raise ValueError(f"The saved {key} of {what} has fewer numbers than its shape {tuple(part.shape)} says.")
        # A step takes roots of these; 8-bit codes are unsigned anyway.
        negative = key in ("exp_avg_sq", "exp_avg_sq_scale", "step") and bool((part < 0).any())
        # Accumulators may hold inf, as after a step that a loss scaler skipped; their window then begins again.
        if negative or key != "schedule_accumulator" and not bool(part.isfinite().all()):
            raise ValueError(f"The saved {key} of {what} holds numbers that are negative or not finite; load another.")
