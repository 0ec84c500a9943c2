"""Reading the checkpoint that a model was loaded from: entries of it, and whether it is the model's at all."""

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

# As safetensors calls the dtypes of weights. Its F8_E4M3 is none: with 8 bits go scales, which lie beside it.
_FLOATING = ("F64", "F32", "F16", "BF16")


_PROBES = 4096


# Of two weights, |a - b| / sqrt(|a|^2 + |b|^2): 1 for unrelated ones, about 0.07 for one and its 4-bit codes.
_LARGEST_DISTANCE = 0.5


def has_no_tensor(base: str | Path, name: str) -> ValueError:
    """Return the error that says why a checkpoint may lack a tensor."""
    return ValueError(
        f"{base} has no tensor {name}. Either it is another model's checkpoint: give the original's folder. Or the "
        "weight is new (an added head), or this architecture's files store it under other names than the model in "
        "memory has (as Mixtral's experts), so that entries cannot be found in them: leave base= out."
    )


def original_entries(base: str | Path, masks: Mapping[str, Mask], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Entries of an original checkpoint at masks, fp32, one weight in memory at a time.

    Args:
        base: folder of the checkpoint.
        masks: by the tensors' names.
        targets: the weights of these names.

    Raises:
        ValueError: a tensor is missing, has another shape, is a quantiser's codes, or belongs to another model.
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
    """Refuse a checkpoint's tensor that cannot be the weight, before anything is read.

    Raises:
        ValueError: it is a quantiser's codes, or of another shape.
    """
    with safe_open(file, "pt") as opened:
        stored = opened.get_slice(name)
        dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _FLOATING:
        raise ValueError(
            f"{name} has dtype {dtype} in {file.parent}, a quantiser's codes rather than weights; give the folder of "
            f"the unquantised checkpoint, whose tensors are of {', '.join(_FLOATING)}."
        )
    shape = as_stored(target.sites[0][0], torch.empty(shape, device="meta")).shape
    if shape != target.shape:
        raise ValueError(f"{name} has shape {tuple(shape)} in {file.parent}, {tuple(target.shape)} in the model.")


def check_same_model(name: str, tensor: Tensor, weight: FrozenWeight, base: Path) -> None:
    """Refuse a matrix of a checkpoint that the model's own, trained entries of codes aside, clearly does not stem from.

    Raises:
        ValueError: a sample of its entries is about as far from the model's as that of an unrelated matrix.
    """
    # Norms are alike in all models, and biases may start from zero.
    if tensor.dim() < 2:
        return
    places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // _PROBES) | 1)
    here, there = weight.gather_base(places.to(weight.device)).cpu(), gather_entries(tensor, places)
    # Untrained entries of a dense weight are the original's to the bit; where most are, the rest is training.
    if (there.to(here.dtype) == here).float().mean() > 0.5:
        return
    here, there = here.float(), there.float()
    distance = (here - there).norm() / torch.hypot(here.norm(), there.norm())
    if distance > _LARGEST_DISTANCE:
        raise ValueError(
            f"{name} in {base} is at a relative distance of {distance:.2f} from the model's, beyond "
            f"{_LARGEST_DISTANCE} (unrelated weights are at 1), so that it belongs to another model; give the folder "
            "of the checkpoint that this model was loaded from, or none."
        )


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
