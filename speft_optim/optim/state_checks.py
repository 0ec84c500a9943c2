"""Checks that refuse saved optimizer states that are damaged or belong to other parameters, masks or runs."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from speft_optim.masks.mask import Mask
from speft_optim.optim.moments import moments_fit
from speft_optim.optim.schedule_protocol import Schedule
from speft_optim.optim.state import PREVIOUS_KEYS, bit_bytes, mask_of, own_keys, previous_checksum, previous_of, text_of
from speft_optim.weights.compact_values import linked
from speft_optim.weights.sparse_weight import SparseWeight

logger = logging.getLogger(__name__)


def check_origin(parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
    """Refuse a state that another optimizer saved.

    Args:
        parameters: the parameters of this optimizer.
        states: the saved states of parameters.

    Raises:
        ValueError: parameters belong to masked weights, but no state has compact values.
    """
    names = [weight.name for parameter in parameters if (weight := linked(parameter)) is not None]
    if names and not any("values" in saved for saved in states):
        raise ValueError(
            f"The saved optimizer state has no values of {names[0]}: the state of a dense run, or of another "
            "optimizer, cannot be used; start without it."
        )


def check_common(key: str, parts: list[Tensor]) -> None:
    """Refuse a number of the whole optimizer that differs between parameters.

    Raises:
        ValueError: it differs.
    """
    if any(not torch.equal(part.cpu(), parts[0].cpu()) for part in parts):
        raise ValueError(f"The saved {key} differs between parameters; load a state that was saved whole.")


def check_parameter(parameter: Tensor, saved: dict[str, Any], schedule: Schedule | None) -> None:
    """Refuse the saved state of a parameter that is damaged, of another weight or, without a schedule, another mask.

    Args:
        parameter: the parameter.
        saved: its saved state.
        schedule: the schedule that changes the masks of this optimizer, or None.

    Raises:
        ValueError: says what is wrong.
    """
    weight = linked(parameter)
    if weight is None:
        if saved or parameter.requires_grad:
            what = f"a parameter of shape {tuple(parameter.shape)}"
            _check_saved(what, parameter, saved, ("step", "exp_avg", "exp_avg_sq", *own_keys(None, schedule)))
        return
    weight.check()
    if schedule is None and "schedule_steps" in saved:
        raise ValueError(
            "The saved run had a MaskSchedule, this optimizer has none; build that MaskSchedule before loading."
        )
    if schedule is not None and "values" in saved and "schedule_steps" not in saved:
        raise ValueError(
            "The saved state has no schedule_steps: that run had no MaskSchedule; load the state first, then build "
            "the MaskSchedule."
        )
    kept = [key for key in own_keys(weight, schedule) if schedule is not None or key not in PREVIOUS_KEYS]
    fits = saved["values"] if schedule is not None and isinstance(saved.get("values"), Tensor) else parameter
    _check_saved(weight.name, fits, saved, ("step", "exp_avg", "exp_avg_sq", *kept))
    mask = _check_saved_mask(weight.name, saved, weight.holds_entries)
    _check_mask(weight, mask, text_of(saved["name"]), may_differ=schedule is not None)
    if schedule is not None and "schedule_steps" in saved:
        schedule.check_state_of(weight, saved)


def warn_of_lost_entries(checksums: Iterable[tuple[Tensor, int]]) -> None:
    """Warn of entries that left their masks and are not in the weights as they were saved.

    Args:
        checksums: each parameter with that of these entries, as saved.
    """
    lost = []
    for parameter, checksum in checksums:
        weight = linked(parameter)
        # Zero is that of a weight that was divided over processes, or of none that left.
        if checksum and weight.place.shards is None and checksum != int(previous_checksum(weight)):
            lost.append(weight.name)
    if lost:
        logger.warning(
            "%d weights, e.g. %s, lack the trained values of entries that left their masks. The optimizer's state has "
            "only the entries that are trained now; the others are in the saved model: load its state too.",
            len(lost),
            lost[0],
        )


def _check_mask(weight: SparseWeight, mask: Mask, name: str, may_differ: bool) -> None:
    fits = mask.shape == weight.mask.shape if may_differ else mask == weight.mask
    if name != weight.name or not fits:
        raise ValueError(
            f"{weight.name} has mask {weight.mask.fingerprint()} ({len(weight.mask):,} entries), the saved state "
            f"is of {name} with mask {mask.fingerprint()} ({len(mask):,} entries); sparsify the model with the "
            "saved run's masks (Masks.load) before loading, or build the run's MaskSchedule before loading if it "
            "had one."
        )


def _check_saved(what: str, parameter: Tensor, saved: dict[str, Any], keys: Iterable[str]) -> None:
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
                f"{what} has {parameter.numel():,} entries, its saved {key} {saved[key].numel():,}; sparsify the "
                "model with the saved run's masks (Masks.load) before loading."
            )
    step = saved["step"]
    counted = step.numel() == 1 and not step.is_complex() and 0 <= float(step) < math.inf
    if not counted or not moments_fit(saved, parameter):
        raise ValueError(f"The saved moments of {what} are incomplete or damaged; its keys are {sorted(saved)}.")
    _check_number(what, saved, "skipped_steps")


def _check_saved_mask(what: str, saved: dict[str, Any], weight_holds_entries: bool) -> Mask:
    """Check the mask in a saved state, with its values and the entries that left it, and return it.

    Args:
        what: the parameter in words, for messages.
        saved: the saved state, which has passed `_check_saved`.
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
    bits, entries, checksum = (saved[key] for key in PREVIOUS_KEYS)
    if bits.dtype != torch.uint8 or bits.shape != (bit_bytes(mask.shape.numel()),):
        raise ValueError(
            f"previously_trained is of {bits.dtype} and shape {tuple(bits.shape)}, not one bit for each entry"
        )
    if checksum.dtype != torch.int64 or checksum.dim():
        raise ValueError(f"previous_checksum is of {checksum.dtype} and shape {tuple(checksum.shape)}, not one int64")
    previous = previous_of(saved)
    own = mask.indices
    if previous is not None and bool(torch.isin(previous.indices.to(own.device), own, assume_unique=True).any()):
        raise ValueError("previously_trained has entries that the mask has too")
    if weight_holds_entries:
        previous = None
    if entries.dtype != torch.float32 or entries.shape != (0 if previous is None else len(previous),):
        raise ValueError("the entries that left the mask and their previous_values differ in number")


def _check_number(what: str, saved: dict[str, Any], key: str) -> None:
    number = saved[key]
    if number.dtype != torch.int64 or number.dim() or int(number) < 0:
        raise ValueError(f"The saved {key} of {what} is {number}, not a whole number as int64; load another state.")


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
