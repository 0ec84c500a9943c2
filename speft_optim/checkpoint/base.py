"""Reads the original checkpoint that a model was loaded from, and checks that it is that model's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from speft_optim.files import tensor_files
from speft_optim.kernels.entries import gather_entries
from speft_optim.masks.mask import Mask
from speft_optim.weights.storage import FrozenWeight, as_stored, frozen_weight
from speft_optim.weights.targets import Target

# Names of the dtypes of weights in safetensors. F8_E4M3 is left out: 8-bit numbers need scales, in another tensor.
_FLOATING = ("F64", "F32", "F16", "BF16")


_PROBES = 4096


# The distance of two weights is |a - b| / sqrt(|a|^2 + |b|^2): 1 if unrelated, about 0.07 if one is 4-bit quantised.
_LARGEST_DISTANCE = 0.5


def has_no_tensor(base: str | Path, name: str) -> ValueError:
    """Return the error for a checkpoint without a tensor, which says what the reason may be."""
    return ValueError(
        f"{base} has no tensor {name}. Either it is another model's checkpoint: give the original's folder. Or the "
        "weight is new (an added head), or this architecture's files store it under other names than the model in "
        "memory has (as Mixtral's experts), so that entries cannot be found in them: leave base= out."
    )


def original_entries(base: str | Path, masks: Mapping[str, Mask], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Read the masked entries of an original checkpoint, one weight in memory at a time.

    Args:
        base: folder of the checkpoint.
        masks: by the tensors' names.
        targets: the model's weights of the same names.

    Returns:
        (k,) fp32 for each mask.

    Raises:
        ValueError: a tensor is missing, has another shape, is quantised, or belongs to another model.
    """
    files, entries = tensor_files(base), {}
    for name, mask in masks.items():
        if name not in files:
            raise has_no_tensor(base, name)
        check_is_weight(name, files[name], targets[name])
        module, attribute = targets[name].sites[0]
        tensor = as_stored(module, read_tensor(files[name], name))
        check_same_model(name, tensor, frozen_weight(module, attribute), Path(base))
        entries[name] = gather_entries(tensor, mask.indices.cpu()).float()
    return entries


def check_is_weight(name: str, file: Path, target: Target) -> None:
    """Refuse a checkpoint's tensor that cannot be the weight, by dtype and shape alone.

    Raises:
        ValueError: it is quantised, or of another shape.
    """
    with safe_open(file, "pt") as opened:
        stored = opened.get_slice(name)
        dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _FLOATING:
        raise ValueError(
            f"{name} has dtype {dtype} in {file.parent}, as a quantised weight has; give the folder of the "
            f"unquantised checkpoint, whose tensors are of {', '.join(_FLOATING)}."
        )
    shape = as_stored(target.sites[0][0], torch.empty(shape, device="meta")).shape
    if shape != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)} in {file.parent}, but {tuple(target.shape)} in the model; give the "
            "folder of the model's own checkpoint."
        )


def check_same_model(name: str, tensor: Tensor, weight: FrozenWeight, base: Path) -> None:
    """Refuse a checkpoint's matrix if the model's weight clearly does not come from it.

    Args:
        name: the tensor's name, for the message.
        tensor: the checkpoint's tensor, in the shape of the weight; vectors are not compared.
        weight: the model's weight; of a quantised one the entries below its overlays are compared.
        base: folder of the checkpoint, for the message.

    Raises:
        ValueError: a sample of the entries is about as far from the model's as that of an unrelated matrix.
    """
    # The scales of norms are alike in all models, and biases may start from zero.
    if tensor.dim() < 2:
        return
    places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // _PROBES) | 1)
    here, there = weight.gather_base(places.to(weight.device)).cpu(), gather_entries(tensor, places)
    # Untrained entries of a dense weight equal the original's to the bit. If most do, training changed the rest.
    if (there.to(here.dtype) == here).float().mean() > 0.5:
        return
    here, there = here.float(), there.float()
    distance = (here - there).norm() / torch.hypot(here.norm(), there.norm())
    if distance > _LARGEST_DISTANCE:
        raise ValueError(
            f"{name} in {base} is at a relative distance of {distance:.2f} from the model's, beyond "
            f"{_LARGEST_DISTANCE} (unrelated weights are at 1), so it belongs to another model; give the folder of the "
            "checkpoint that this model was loaded from, or leave base= out."
        )


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
