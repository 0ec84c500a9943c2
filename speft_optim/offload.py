"""Estimation on a model that is larger than the accelerator: weights stay where they are and visit it in turn.

A module that owns parameters gets copies of them on the device for the time of its forward, as instance attributes that
shadow the parameters. Each block of the model (an element of an `nn.ModuleList`) is recomputed in backward, so that the
copies of one block at a time are alive; what a block started from is kept off the device. So a pass needs the device
for one block, its activations, the embeddings or head, and the accumulators.

Weights may lie in CPU memory, or on disk: then the model is on the meta device and its tensors are read from a
checkpoint's
safetensors shards as they are needed. Moving whole models with accelerate's hooks was rejected: its copies are gone
before backward, where the weights are needed again.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from speft_optim.files import tensor_files
from speft_optim.frozen import STREAMED, quantized_linears
from speft_optim.linear import replace_forward, shadow
from speft_optim.targets import Target, all_targets


class StreamedWeight:
    """A weight that lies elsewhere; read on the device in whole or in rows.

    Args:
        target: the weight in the model, in CPU memory or on the meta device.
        device: where it is wanted.
        shards: the checkpoint that holds it if it is on the meta device.
    """

    def __init__(self, target: Target, device: torch.device, shards: "Shards | None"):
        self.shape, self.device = target.parameter.shape, device
        self._name, self._parameter, self._shards = target.name, target.parameter, shards

    def whole(self) -> Tensor:
        """The weight on the device, in the model's dtype."""
        if self._parameter.is_meta:
            return self._shards.read(self._name, slice(None)).to(self.device, self._parameter.dtype)
        return self._parameter.detach().to(self.device)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), the first dimension by all others, on the device."""
        if self._parameter.is_meta:
            part = self._shards.read(self._name, slice(first, last))
        else:
            part = self._parameter.detach()[first:last]
        return part.to(self.device, self._parameter.dtype).reshape(last - first, -1)


class Shards:
    """The tensors of a checkpoint folder, read one at a time.

    Args:
        folder: holds safetensors files.

    Raises:
        ValueError: it holds none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = tensor_files(self.folder)

    def check(self, target: Target) -> None:
        """Refuse a weight that the checkpoint does not hold in this shape.

        Raises:
            ValueError: name or shape is not in the checkpoint.
        """
        if target.name not in self._files:
            raise ValueError(f"{target.name} is on the meta device and {self.folder} has no tensor of that name.")
        with safe_open(self._files[target.name], "pt") as file:
            shape = tuple(file.get_slice(target.name).get_shape())
        if shape != tuple(target.parameter.shape):
            here = tuple(target.parameter.shape)
            raise ValueError(f"{target.name} has shape {here} in the model and {shape} in {self.folder}.")

    def read(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, or all."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]


@contextlib.contextmanager
def streaming(
    model: nn.Module, device: str | torch.device, folder: str | Path | None = None, *, recompute: bool = True
) -> Iterator[None]:
    """Let the model compute on `device`, with weights and buffers that visit it; as before afterwards.

    Args:
        model: a model in CPU memory or, with `folder`, on the meta device (buffers in memory).
        device: where to compute.
        folder: checkpoint with the tensors of parameters that are on the meta device.
        recompute: whether blocks are recomputed in backward; not needed where the graph keeps no weights.

    Raises:
        ValueError: a parameter is on the meta device without a tensor in `folder`, a buffer is on the meta device, or
            the model is quantised.
    """
    device = torch.device(device)
    weights = {}
    shards = Shards(folder) if folder is not None else None
    for target in all_targets(model).values():
        if target.parameter.is_meta:
            if shards is None:
                raise ValueError(f"{target.name} is on the meta device; pass checkpoint=folder with its safetensors.")
            shards.check(target)
        for site in target.sites:
            weights[site] = StreamedWeight(target, device, shards)
    if next(quantized_linears(model), None) is not None:
        raise ValueError("A quantised model cannot be offloaded during estimation; it is small enough to be resident.")
    _check_buffers(model)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = {name: weights[module, name] for name, p in module._parameters.items() if p is not None}
            _visit(module, own, device, stack)
        for block in _blocks(model) if recompute else ():
            _recompute(block, device, stack)
        yield


def _visit(
    module: nn.Module, own: dict[str, StreamedWeight], device: torch.device, stack: contextlib.ExitStack
) -> None:
    """Shadow the module's parameters and buffers by copies on the device during each forward."""
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None]
    if not own and not buffers:
        return

    def copies() -> dict[str, Tensor]:
        weights = {attribute: weight.whole() for attribute, weight in own.items()}
        return weights | {name: module._buffers[name].to(device) for name in buffers}

    module.__dict__[STREAMED] = own
    stack.callback(module.__dict__.pop, STREAMED)
    # Before any other hook, so that these see the weights on the device.
    shadow(module, copies, stack, prepend=True)


def _recompute(block: nn.Module, device: torch.device, stack: contextlib.ExitStack) -> None:
    """Checkpoint the block's forward, its inputs kept in CPU memory."""
    original: Callable = block.forward

    def forward(*args, **kwargs):
        with save_on_cpu(pin_memory=device.type == "cuda"):
            return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    replace_forward(block, forward, stack)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the model's outermost module lists."""
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(id(part) for part in module.modules())
            yield from module


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ValueError(
                f"Buffer {name} is on the meta device and in no checkpoint; build the model under "
                "accelerate's init_empty_weights(include_buffers=False)."
            )
