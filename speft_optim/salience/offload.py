"""Estimation on a model that is larger than the accelerator: weights stay where they are and visit it in turn.

Each block of the model (an element of an `nn.ModuleList`) is recomputed in backward, so that its weights are wanted
only while it is at work. A prefetcher (`salience/prefetch.py`) brings them, two blocks' at most; what a block started
from is kept off the device. A module outside the blocks gets copies of its parameters for the time of its forward.
Either way they come as instance attributes that shadow the parameters. So a pass needs the device for two blocks, the
activations of one, the embeddings or head, and the accumulators. A batch moves each block once in forward and, down to
the lowest with a weight that is scored, once more in backward.

Weights may lie in CPU memory, or on disk: then the model is on the meta device and its tensors are read from a
checkpoint's safetensors shards as they are needed. Moving whole models with accelerate's hooks was rejected: its copies
are gone before backward, where the weights are needed again.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from speft_optim.files import tensor_files
from speft_optim.salience.prefetch import Prefetcher, Site, copy_pages_, lock_pages
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.replacement import replace_method, shadow
from speft_optim.weights.storage import STREAMED
from speft_optim.weights.targets import AddedModule, Target, all_targets


class StreamedWeight:
    """A weight that lies elsewhere; read on the device in whole or in rows.

    Args:
        target: the weight in the model, in CPU memory or on the meta device.
        device: where it is wanted.
        shards: the checkpoint that holds it if it is on the meta device.
    """

    def __init__(self, target: Target, device: torch.device, shards: "Shards | None"):
        self.shape, self.dtype, self.device = target.parameter.shape, target.parameter.dtype, device
        self._name, self._parameter, self._shards = target.name, target.parameter, shards

    def source(self, rows: slice = slice(None)) -> Tensor:
        """Return the weight where it lies, or some rows of it; from disk in the dtype of the checkpoint."""
        if self._parameter.is_meta:
            return self._shards.read(self._name, rows)
        whole = self._parameter.detach()
        return whole if rows == slice(None) else whole[rows]

    def whole(self) -> Tensor:
        """Return the weight on the device, in the model's dtype."""
        return self._bring(self.source())

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), the first dimension by all others, on the device."""
        return self._bring(self.source(slice(first, last))).reshape(last - first, -1)

    def _bring(self, source: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return source.to(self.dtype)
        out = torch.empty(source.shape, dtype=self.dtype, device=self.device)
        copy_pages_(out, source)
        return out


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
        """Return some rows of a tensor, or all."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]


@contextlib.contextmanager
def streaming(
    model: nn.Module, device: str | torch.device, folder: str | Path | None = None, *, by_block: bool = True
) -> Iterator[None]:
    """Let the model compute on `device`, with weights and buffers that visit it; as before afterwards.

    For a CUDA device the pages of weights in CPU memory are locked meanwhile, so that copies run at the bus's speed.

    Args:
        model: a model in CPU memory or, with `folder`, on the meta device (buffers in memory).
        device: where to compute.
        folder: checkpoint with the tensors of parameters that are on the meta device.
        by_block: whether batches will pass through the model, with blocks prefetched and recomputed in backward;
            without, each module's weights come for its own forward, and stay for as long as a graph keeps them.

    Raises:
        ValueError: there is no such device, a parameter is on the meta device without a tensor in `folder`, a buffer is
            on the meta device, or the model is quantised.
    """
    device = _device_of_tensors(device)
    weights = {}
    shards = Shards(folder) if folder is not None else None
    for target in all_targets(model).values():
        if target.parameter.is_meta:
            if shards is None:
                raise ValueError(f"{target.name} is on the meta device; pass base=folder with its safetensors.")
            shards.check(target)
        for site in target.sites:
            weights[site] = StreamedWeight(target, device, shards)
    if next(quantized_linears(model), None) is not None:
        raise ValueError("A quantised model cannot be offloaded during estimation; it is small enough to be resident.")
    _check_buffers(model)
    with contextlib.ExitStack() as stack:
        blocks = list(dict.fromkeys(_blocks(model))) if by_block else []
        if device.type == "cuda":
            # Ahead of the prefetcher, whose end waits for all work: no copy is under way when pages are unlocked.
            lock_pages([p for p in model.parameters() if p.device.type == "cpu"], device, stack)
        by_blocks = [{site: weights[site] for part in block.modules() for site in _sites(part)} for block in blocks]
        prefetcher = Prefetcher(by_blocks, device, stack)
        for module in model.modules():
            _visit(module, {name: weights[module, name] for _, name in _sites(module)}, prefetcher, device, stack)
        for number, block in enumerate(blocks):
            _put_on(prefetcher, block, number, min(number + 1, len(blocks) - 1), device, stack)
        yield


def _device_of_tensors(device: str | torch.device) -> torch.device:
    """Return the device as tensors there name theirs: not "cuda" but "cuda:0"."""
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"offload={device!r} is no device to compute on ({reason}); pass one like 'cuda'.") from error
    if device.type == "meta":
        raise ValueError("offload='meta' is no device to compute on; pass one like 'cuda'.")
    return device


def _sites(module: nn.Module) -> list[Site]:
    if isinstance(module, AddedModule):
        return []  # Compact values stay where they are: no forward reads them.
    return [(module, name) for name, parameter in module._parameters.items() if parameter is not None]


def _visit(
    module: nn.Module,
    own: dict[str, StreamedWeight],
    prefetcher: Prefetcher,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> None:
    """Shadow the module's parameters and buffers by copies on the device during each forward."""
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None]
    if not own and not buffers:
        return

    def copies() -> dict[str, Tensor]:
        # A part of a block may also be called from outside of it, when the prefetcher has another block's weights.
        here = prefetcher.at_hand
        weights = {name: here[module, name] if (module, name) in here else own[name].whole() for name in own}
        return weights | {name: module._buffers[name].to(device) for name in buffers}

    module.__dict__[STREAMED] = own
    stack.callback(module.__dict__.pop, STREAMED)
    # Before any other hook, so that these see the weights on the device.
    shadow(module, copies, stack, prepend=True)


def _put_on(
    prefetcher: Prefetcher, block: nn.Module, number: int, above: int, device: torch.device, stack: contextlib.ExitStack
) -> None:
    """Let the block run with prefetched weights, checkpointed, its inputs kept in CPU memory."""

    def call(*args, **kwargs):
        # Where no input requires a gradient backward ends here, and block 0 of the next batch follows.
        goes_on = any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
        below = max(0, number - 1) if goes_on else 0
        # First in forward, later in backward.
        following = itertools.chain([above], itertools.repeat(below))

        def work(*args, **kwargs):
            with prefetcher.visit(number, next(following)):
                return block._call_impl(*args, **kwargs)

        with save_on_cpu(pin_memory=device.type == "cuda"):
            return checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    # As `Module.compile` replaces a call: hooks of the block itself run in the recomputation too.
    replace_method(block, "_compiled_call_impl", call, stack)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of the model's outermost module lists."""
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
