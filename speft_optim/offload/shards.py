"""The tensors of a checkpoint, for a model on the meta device."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from speft_optim.files import tensor_files
from speft_optim.weights.targets import Target


class Shards:
    """The tensors of a checkpoint folder, read one at a time.

    Args:
        folder: a folder of safetensors files.

    Raises:
        ValueError: it holds no such file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = tensor_files(self.folder)

    def check(self, target: Target) -> None:
        """Refuse a weight that the checkpoint does not hold in this shape.

        Raises:
            ValueError: the checkpoint has no tensor of this name, or one of another shape.
        """
        if target.name not in self._files:
            raise ValueError(f"{target.name} is on the meta device and {self.folder} has no tensor of that name.")
        with safe_open(self._files[target.name], "pt") as file:
            shape = tuple(file.get_slice(target.name).get_shape())
        if shape != tuple(target.parameter.shape):
            here = tuple(target.parameter.shape)
            raise ValueError(f"{target.name} has shape {here} in the model and {shape} in {self.folder}.")

    def read(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, or all."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]
