"""The saved state of one parameter: tensors only, with the same keys at every step.

Other tools decide what a state may look like. `torch.distributed.checkpoint` keeps nothing but the state of parameters
and the options of their groups, flattens tensors only, asks the optimizer that loads which keys there are, and copies
into tensors of that optimizer's sizes. So text and shapes are tensors, counters stand with every parameter, nothing is
left out because it is still zero, and what grows during training (history, entries that left the mask) has a fixed
size. `values`, `indices` and moments have the length of the mask.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from speft_optim.masks.mask import Mask
from speft_optim.optim.moments import moments_fit

MASK_KEYS = ("values", "indices", "shape", "name")


FORMER_KEYS = ("former", "former_values")


SCHEDULE_KEYS = ("schedule_steps", "schedule_history")


# Of a schedule that selects from the training's own backward passes: where it is, and what it has gathered so far.
TURN_KEYS = ("schedule_turn", "schedule_scores", "schedule_accumulator")


def moment_keys(bits: int) -> tuple[str, ...]:
    """Return the keys of a parameter's moments and their step."""
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if bits == 8 else ()
    return ("step", "exp_avg", "exp_avg_sq", *scales)


def has_moments(state: dict[str, Any] | None) -> bool:
    """Tell whether a parameter took a step since its moments were last reset."""
    return bool(state) and "step" in state and int(state["step"]) > 0


def text_to_tensor(text: str, device: torch.device) -> Tensor:
    """UTF-8 bytes, (n,) uint8."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)


def text_of(tensor: Tensor) -> str:
    """Return the text of `text_to_tensor`."""
    return bytes(tensor.tolist()).decode()


def positions_to_bits(mask: Mask | None, count: int, device: torch.device) -> Tensor:
    """One bit for each of `count` entries of a weight, (ceil(count / 8),) uint8: a size that no mask changes."""
    bits = torch.zeros(_bytes(count), dtype=torch.uint8, device=device)
    if mask is not None:
        positions = mask.indices.to(device).long()
        # Positions are unique, so that a sum of bits is their union.
        bits.index_add_(0, positions // 8, (1 << (positions % 8)).to(torch.uint8))
    return bits


def positions_of(bits: Tensor) -> Tensor:
    """Return the positions of `positions_to_bits`, int64."""
    filled, eight = bits.nonzero(), torch.arange(8, dtype=torch.uint8, device=bits.device)
    # A bit beyond the last entry gives a position that `Mask` refuses.
    return (filled * 8 + eight)[((bits[filled] >> eight) & 1).bool()]


def mask_of(saved: dict[str, Any]) -> Mask:
    """Return the saved mask."""
    return Mask(saved["indices"], saved["shape"].tolist())


def former_of(saved: dict[str, Any]) -> Mask | None:
    """Return the entries that left the saved mask, or None if none did."""
    if "former" not in saved:
        return None
    positions = positions_of(saved["former"])
    return Mask(positions, saved["shape"].tolist()) if len(positions) else None


def check_saved(what: str, parameter: Tensor, saved: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuse the state of a parameter if a key is missing or what it holds cannot be right.

    Args:
        what: the parameter in words, for messages.
        parameter: what the moments must fit: the parameter, or the saved values where the mask may differ.
        saved: its saved state.
        keys: what it must have.

    Raises:
        ValueError: says which key is wrong.
    """
    if isinstance(saved.get("name"), str):
        raise ValueError(
            f"The saved state of {what} is in the format of an older version of speft_optim; go on with that version."
        )
    # A tool that takes the keys from this optimizer passes an empty dict for one that the file lacks.
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
    """Return the saved mask, once it and what goes with it were found whole.

    Args:
        what: the parameter in words, for messages.
        saved: its state, which has passed `check_saved`.
        weight_holds_entries: whether entries that left the mask stand in the weight and are not saved.

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
        if "former" in saved:
            _check_former(mask, saved, weight_holds_entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The saved mask of {what} is damaged; load another state: {error}") from error
    return mask


def _check_former(mask: Mask, saved: dict[str, Any], weight_holds_entries: bool) -> None:
    bits, entries = saved["former"], saved["former_values"]
    if bits.dtype != torch.uint8 or bits.shape != (_bytes(mask.shape.numel()),):
        raise ValueError(f"former is of {bits.dtype} and shape {tuple(bits.shape)}, not one bit for each entry")
    former = None if weight_holds_entries else former_of(saved)
    if entries.dtype != torch.float32 or entries.shape != (0 if former is None else len(former),):
        raise ValueError("the entries that left the mask and their former_values differ in number")


def _check_number(what: str, saved: dict[str, Any], key: str) -> None:
    number = saved[key]
    if number.dtype != torch.int64 or number.dim() or int(number) < 0:
        raise ValueError(f"The saved {key} of {what} is {number}, not a whole number as int64; load another state.")


def check_common(key: str, parts: list[Tensor]) -> None:
    """Refuse what belongs to the whole optimizer but differs between parameters.

    Raises:
        ValueError: it differs.
    """
    if any(not torch.equal(part.cpu(), parts[0].cpu()) for part in parts):
        raise ValueError(f"The saved {key} differs between parameters; load a state that was saved whole.")


def _bytes(count: int) -> int:
    return -(-count // 8)


def _check_tensors(what: str, saved: dict[str, Any]) -> None:
    """Refuse saved tensors that only claim their size, and numbers that would spread from one step to all weights."""
    for key, part in saved.items():
        if part.layout != torch.strided or part.untyped_storage().nbytes() < part.nbytes:
            raise ValueError(f"The saved {key} of {what} has fewer numbers than its shape {tuple(part.shape)} says.")
        # A step takes the root of these; 8-bit codes are never negative.
        negative = key in ("exp_avg_sq", "exp_avg_sq_scale", "step") and bool((part < 0).any())
        # Sums of gradients may hold inf, as after a step that a loss scaler skipped: their window then begins anew.
        if negative or key != "schedule_accumulator" and not bool(part.isfinite().all()):
            raise ValueError(f"The saved {key} of {what} holds numbers that are negative or not finite; load another.")
