"""Nested containers of tensors and plain values, as JSON beside a flat list of tensors, and a checksum over both."""

import hashlib

import torch
from torch import Tensor


def to_plan(value, tensors: dict[str, Tensor]):
    """Return JSON from which `from_plan` restores `value`, and add its tensors to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: JSON would turn the numbers that optimizers use for keys into text
        return {"dict": [[key, to_plan(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [to_plan(item, tensors) for item in value]}
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"a training state holds a {type(value).__name__}; it takes tensors, numbers and text")
    return value


def from_plan(plan, tensors: dict[str, Tensor]):
    """Return the value of which `to_plan` returned the plan."""
    if not isinstance(plan, dict):
        return plan
    ((kind, content),) = plan.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: from_plan(item, tensors) for key, item in content}
    items = [from_plan(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def digest(plan: str, tensors: dict[str, Tensor]) -> str:
    """Return a checksum over the plan and over names, dtypes, shapes and bytes of the tensors."""
    checksum = hashlib.sha256(plan.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()
