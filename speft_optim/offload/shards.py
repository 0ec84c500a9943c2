"""The tensors of a checkpoint, memory-mapped, for a model on the meta device.

A mapping is private: the pages of a file are read as they are needed and can be dropped again, and a page that is
written becomes memory of the process. The files never change.
"""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from speft_optim.files import tensor_files
from speft_optim.weights.targets import Target, all_names, all_targets


def mapped_tensors(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """Map the tensors of a checkpoint that the model's weights on the meta device stand for.

    Args:
        model: the model.
        folder: a folder of safetensors files.

    Returns:
        By the weights' names, in the dtype of the files.

    Raises:
        ValueError: the folder holds no such file, no tensor of a weight's name, or one of another shape.
    """
    files, names = tensor_files(folder), all_names(model)
    opened, found = {}, {}
    for target in all_targets(model).values():
        if target.parameter.is_meta:
            name = next((name for name in names[id(target.parameter)] if name in files), None)
            if name is None:
                raise ValueError(f"{target.name} is on the meta device and {folder} has no tensor of that name.")
            if files[name] not in opened:
                # All tensors of a file are views of one mapping, which is there for as long as one of them is.
                opened[files[name]] = safe_open(files[name], "pt")
            found[target.name] = _checked(opened[files[name]].get_tensor(name), target, folder)
    return found


def check_buffers(model: nn.Module) -> None:
    """Refuse buffers on the meta device.

    Raises:
        ValueError: there is one.
    """
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"Buffer {name} is on the meta device and in no checkpoint; build the model under "
                "accelerate's init_empty_weights(include_buffers=False)."
            )


def _checked(tensor: Tensor, target: Target, folder: str | Path) -> Tensor:
    if tensor.shape != target.parameter.shape:
        here, there = tuple(target.parameter.shape), tuple(tensor.shape)
        raise ValueError(f"{target.name} has shape {here} in the model and {there} in {folder}.")
    return tensor
