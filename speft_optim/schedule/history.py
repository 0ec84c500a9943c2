"""The saved state of a schedule: its step counter and its latest events, as tensors of fixed size.

Why sizes are fixed is said in `optim/state.py`.
"""

from typing import Any

import torch
from torch import Tensor

_EVENT = ("step", "entries", "overlap")


_KEPT_EVENTS = 256


def to_tensors(steps: int, history: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Encode the counter and the latest events.

    Args:
        steps: how many optimizer steps were counted.
        history: events, each with its `step`, `entries` and `overlap`.

    Returns:
        `schedule_steps`, an int64 scalar, and `schedule_history`, (256, 3) float64: step, entries and overlap of the
        latest 256 events, followed by rows of -1.
    """
    events = torch.full((_KEPT_EVENTS, 3), -1.0, dtype=torch.float64)
    for row, event in zip(events, history[-_KEPT_EVENTS:], strict=False):
        row.copy_(torch.tensor([event[key] for key in _EVENT], dtype=torch.float64))
    return {"schedule_steps": torch.tensor(steps), "schedule_history": events}


def check_tensors(saved: dict[str, Tensor]) -> None:
    """Refuse tensors that `to_tensors` cannot have returned.

    Raises:
        ValueError: a tensor has another dtype, shape or content.
    """
    steps, history = saved["schedule_steps"], saved["schedule_history"]
    if steps.dtype != torch.int64 or steps.dim() or int(steps) < 0:
        raise ValueError(f"The saved schedule_steps is {steps}, not a whole number as int64; load another state.")
    kept = (history.dtype, tuple(history.shape)) == (torch.float64, (_KEPT_EVENTS, 3))
    if not kept or not bool(history.isfinite().all()):
        raise ValueError(
            f"The saved schedule_history is of {history.dtype} and shape {tuple(history.shape)} or not finite; it "
            f"must be of torch.float64, ({_KEPT_EVENTS}, 3) and finite."
        )


def from_tensors(saved: dict[str, Tensor]) -> tuple[int, list[dict[str, Any]]]:
    """Decode the counter and the events in tensors of `to_tensors`."""
    rows = [row for row in saved["schedule_history"].tolist() if row[0] >= 0]
    history = [{"step": int(step), "entries": int(n), "overlap": overlap} for step, n, overlap in rows]
    return int(saved["schedule_steps"]), history
