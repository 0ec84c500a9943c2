"""The saved state of one parameter: tensors only, with the same keys at every step.

Other tools decide what a state may look like. `torch.distributed.checkpoint` saves only the state of parameters and the
options of their groups, flattens tensors only, takes the keys from the optimizer that loads, and copies into tensors of
that optimizer's sizes. So text and shapes are saved as tensors, counters are saved with every parameter, zeros are
saved too, and what grows during training (history, entries that left the mask) has a fixed size. `values`, `indices`
and moments have the length of the mask.
"""

from typing import Any

import torch
from torch import Tensor

from speft_optim.masks.mask import Mask
from speft_optim.optim.schedule_protocol import Schedule
from speft_optim.weights.sparse_weight import SparseWeight

MASK_KEYS = ("values", "indices", "shape", "name")


PREVIOUS_KEYS = ("previously_trained", "previous_values", "previous_checksum")


SCHEDULE_KEYS = ("schedule_steps", "schedule_history")


# A schedule without batches also saves its turn, the stored scores and its accumulators.
TURN_KEYS = ("schedule_turn", "schedule_scores", "schedule_accumulator")


def moment_keys(bits: int) -> tuple[str, ...]:
    """Return the keys of a parameter's step count and moments."""
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if bits == 8 else ()
    return ("step", "exp_avg", "exp_avg_sq", *scales)


def own_keys(weight: SparseWeight | None, schedule: Schedule | None) -> list[str]:
    """Return the keys of a parameter's saved state other than moments."""
    keys = ["skipped_steps"]
    if weight is not None:
        keys += MASK_KEYS
        if schedule is not None:
            keys += schedule.keys
        if schedule is not None or weight.previously_trained is not None:
            keys += PREVIOUS_KEYS
    return keys


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
    bits = torch.zeros(bit_bytes(count), dtype=torch.uint8, device=device)
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


def previous_checksum(weight: SparseWeight) -> Tensor:
    """Return a checksum of the entries that left the mask and that the weight itself holds, () int64.

    The model's state has these, and a run that loads the optimizer's alone would go on without what they learned. It
    is 0 where there are none, and for weights divided over processes, which would have to exchange them.
    """
    previous, device = weight.previously_trained, weight.values.device
    if previous is None or not weight.holds_entries or weight.place.shards is not None:
        return torch.zeros((), dtype=torch.int64, device=device)
    positions = previous.indices.long()
    bits = weight.base.gather(previous.indices).to(positions.device, torch.float32).view(torch.int32)
    return (bits * (positions % 65521 + 1)).sum().to(device)


def bit_bytes(count: int) -> int:
    """Return the bytes that one bit for each of `count` entries takes."""
    return -(-count // 8)
