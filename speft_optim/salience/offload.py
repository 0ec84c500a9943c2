"""Estimation on a model that is larger than the GPU: weights stay where they are and are copied there as needed.

Each block of the model (an element of an `nn.ModuleList`) is checkpointed, so that its weights are needed only while it
is computed, in forward and again in backward; its inputs are kept in CPU memory meanwhile. A prefetcher
(`salience/prefetch.py`) copies the weights, of at most two blocks at a time. A module outside the blocks gets copies of
its parameters for its own forward. The copies are instance attributes that shadow the parameters. A pass thus needs GPU
memory for the weights of two blocks, the activations of one, the embeddings or the head, and the accumulators. For each
batch a block is copied once in forward and, down to the lowest one with a weight that is scored, once in backward.

Weights are in CPU memory or on disk. In the latter case the model is on the meta device, and its tensors are read from
a checkpoint's safetensors files as they are needed. accelerate's hooks, which move whole modules, were rejected: they
drop their copies before backward, where the weights are needed again.
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
    """A weight in CPU memory or on disk that is copied to a device, whole or in rows.

    Args:
        target: the weight in the model, in CPU memory or on the meta device.
        device: the device of the copies.
        shards: the checkpoint that holds the weight if it is on the meta device.
    """

    def __init__(self, target: Target, device: torch.device, shards: "Shards | None"):
        self.shape, self.dtype, self.device = target.parameter.shape, target.parameter.dtype, device
        self._name, self._parameter, self._shards = target.name, target.parameter, shards

    def source(self, rows: slice = slice(None)) -> Tensor:
        """Return the weight or some rows of it in CPU memory; from disk in the dtype of the checkpoint."""
        if self._parameter.is_meta:
            return self._shards.read(self._name, rows)
        whole = self._parameter.detach()
        return whole if rows == slice(None) else whole[rows]

    def whole(self) -> Tensor:
        """Copy the weight to the device, in the model's dtype."""
        return self._bring(self.source())

    def rows(self, first: int, last: int) -> Tensor:
        """Copy rows `first` to `last` (exclusive) to the device; 2-D: the first dimension by all others."""
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


@contextlib.contextmanager
def streaming(
    model: nn.Module, device: str | torch.device, folder: str | Path | None = None, *, by_block: bool = True
) -> Iterator[None]:
    """Let the model compute on `device` with copies of its weights and buffers while the context lasts.

    For a CUDA device the pages of weights in CPU memory are locked meanwhile, so that copies reach the bus's full
    speed.

    Args:
        model: a model in CPU memory or, with `folder`, on the meta device (but its buffers in memory).
        device: the device that computes.
        folder: the checkpoint with the parameters that are on the meta device.
        by_block: whether blocks are prefetched and recomputed in backward, for passes over batches. If not, each
            module's weights are copied for its own forward, and stay for as long as a graph keeps them.

    Raises:
        ValueError: there is no such device, a parameter on the meta device has no tensor in `folder`, a buffer is on
            the meta device, or the model is quantised.
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
        raise ValueError(
            "A quantised model cannot be offloaded during estimation; move it to the GPU and leave offload out."
        )
    _check_buffers(model)
    with contextlib.ExitStack() as stack:
        blocks = list(dict.fromkeys(_blocks(model))) if by_block else []
        if device.type == "cuda":
            # This comes before the prefetcher, which waits for all copies as it ends: only then are the pages unlocked.
            lock_pages([p for p in model.parameters() if p.device.type == "cpu"], device, stack)
        by_blocks = [{site: weights[site] for part in block.modules() for site in _sites(part)} for block in blocks]
        prefetcher = Prefetcher(by_blocks, device, stack)
        for module in model.modules():
            _copy_for_forward(
                module, {name: weights[module, name] for _, name in _sites(module)}, prefetcher, device, stack
            )
        for number, block in enumerate(blocks):
            _run_by_block(prefetcher, block, number, min(number + 1, len(blocks) - 1), device, stack)
        yield


def _device_of_tensors(device: str | torch.device) -> torch.device:
    """Return the device with its index, as tensors have it: "cuda:0" for "cuda"."""
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
        return []  # No forward reads compact values, so they stay where they are.
    return [(module, name) for name, parameter in module._parameters.items() if parameter is not None]


def _copy_for_forward(
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
        # A module of a block may also be called from outside, while the prefetcher holds another block's weights.
        here = prefetcher.resident
        weights = {name: here[module, name] if (module, name) in here else own[name].whole() for name in own}
        return weights | {name: module._buffers[name].to(device) for name in buffers}

    module.__dict__[STREAMED] = own
    stack.callback(module.__dict__.pop, STREAMED)
    # The copies come before all other hooks, which then see them.
    shadow(module, copies, stack, prepend=True)


def _run_by_block(
    prefetcher: Prefetcher, block: nn.Module, number: int, above: int, device: torch.device, stack: contextlib.ExitStack
) -> None:
    """Replace the block's call: prefetched weights, checkpointed, its inputs kept in CPU memory.

    Args:
        prefetcher: brings the weights.
        block: the block.
        number: its number.
        above: number of the block that follows in forward.
        device: the device that computes.
        stack: undoes it.
    """

    def call(*args, **kwargs):
        # If no input requires a gradient, backward ends here, and block 0 of the next batch comes next.
        goes_on = any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
        below = max(0, number - 1) if goes_on else 0
        # The first call is in forward, later ones are recomputations in backward.
        following = itertools.chain([above], itertools.repeat(below))

        def work(*args, **kwargs):
            with prefetcher.holding(number, next(following)):
                return block._call_impl(*args, **kwargs)

        with save_on_cpu(pin_memory=device.type == "cuda"):
            return checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    # Replaced as `Module.compile` does it, the call includes the block's hooks, also in the recomputation.
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
