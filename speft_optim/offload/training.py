"""Training with the frozen base in host memory, from `sparsify(..., offload=...)` until `desparsify`."""

import contextlib
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_optim.distributed import is_distributed
from speft_optim.offload.calls import blocks_of, replace_call
from speft_optim.offload.engine import (
    Weights,
    compute_on,
    device_of_tensors,
    host_weights,
    in_memory,
    make_direct,
)
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.shards import check_buffers, mapped_tensors
from speft_optim.weights.mesh import is_fully_sharded
from speft_optim.weights.replacement import replace_method
from speft_optim.weights.sharded import is_managed
from speft_optim.weights.storage import STREAMED
from speft_optim.weights.targets import all_targets


def map_checkpoint(model: nn.Module, folder: str | Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """Put the memory-mapped tensors of a checkpoint in the place of the model's weights on the meta device.

    Args:
        model: the model.
        folder: a folder of safetensors files.
        stack: puts the weights on the meta device back.

    Returns:
        The tensors by the names of the weights; none if no weight is on the meta device.

    Raises:
        ValueError: see `mapped_tensors`; or a tensor has another dtype than the weight.
    """
    targets = {name: target for name, target in all_targets(model).items() if target.parameter.is_meta}
    if not targets:
        return {}
    check_buffers(model)
    mapped = mapped_tensors(model, folder)
    for name, target in targets.items():
        if mapped[name].dtype != target.parameter.dtype:
            raise ValueError(
                f"{name} is in {mapped[name].dtype} in {folder} and in {target.parameter.dtype} in the model, and "
                f"weights that stay in files are not cast; build the model in {mapped[name].dtype}."
            )
    for name, target in targets.items():
        before = target.parameter
        parameter = nn.Parameter(mapped[name], before.requires_grad)
        # transformers notes on a parameter that it has been initialised.
        vars(parameter).update(vars(before))
        for module, attribute in target.sites:
            stack.callback(module._parameters.__setitem__, attribute, before)
            module._parameters[attribute] = parameter
    return mapped


def check_offload(model: nn.Module, device: str | torch.device) -> torch.device:
    """Refuse a model that cannot be trained with its base in host memory.

    Args:
        model: the model, not sparsified yet.
        device: the device that is to compute.

    Returns:
        The device with its index.

    Raises:
        ValueError: there is no such device; the model is not wholly in CPU memory, or something else moves its weights;
            it has no list of blocks; it is compiled or sharded; or several processes train.
    """
    device = device_of_tensors(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            remedy = "load it without device_map, do not move it, and leave moving to offload"
            if tensor.is_meta:
                remedy += ", or pass base=folder with its safetensors"
            raise ValueError(
                f"{name} is on {tensor.device}, and offload={str(device)!r} needs the whole model in CPU memory; "
                f"{remedy}."
            )
    if any("_hf_hook" in module.__dict__ for module in model.modules()):
        raise ValueError("accelerate's hooks move this model's weights; load it without device_map to use offload=.")
    if is_fully_sharded(model) or is_distributed():
        raise ValueError("offload= trains on one device in one process; leave it out, or start one process only.")
    if any(module.__dict__.get("_compiled_call_impl") or hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError("The model is compiled, which offload= does not support; build it without torch.compile.")
    if not blocks_of(model):
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of blocks, by which offload= copies weights; leave it out."
        )
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ValueError(f"{name} keeps running statistics, which offload= would lose; leave offload= out.")
    return device


class OffloadedBase:
    """A model's frozen base in host memory, and all that lets a device compute with it.

    Args:
        model: the model, after `check_offload`.
        device: the device that computes.
        mapped: what `map_checkpoint` returned.
        **options: see `compute_on`.

    Attributes:
        prefetcher: what brings the weights of blocks.
    """

    def __init__(self, model: nn.Module, device: torch.device, mapped: Mapping[str, Tensor], **options):
        weights = host_weights(model, device, mapped)
        pages = contextlib.ExitStack()
        # Memory must not be freed while its pages are locked, so they are unlocked as soon as the model is gone.
        self._unlock = weakref.finalize(model, pages.close)
        # The end of the process unlocks all pages.
        self._unlock.atexit = False
        with contextlib.ExitStack() as stack:
            stack.callback(self._unlock)
            # Weights that are replaced stay in memory for as long as their pages are locked.
            sources = in_memory(weights)
            pages.callback(sources.clear)
            direct = make_direct(sources, device, pages)
            if device.type == "cuda":
                pages.callback(torch.cuda.synchronize, device)
            self._weights = list(dict.fromkeys(weights.values()))
            for weight in self._weights:
                stack.callback(weight.close)
                weight.watch()
            self.prefetcher = compute_on(model, device, weights, direct, stack, **options)
            _refuse_dense_training(model, weights, stack)
            _call_eagerly(model, stack)
            for module in model.modules():
                if STREAMED in module.__dict__:
                    replace_method(module, "_apply", _Stay(module, device), stack)
            self._patches = stack.pop_all()

    def settle(self) -> None:
        """Bring all weights in host memory up to date.

        Raises:
            ValueError: see `HostWeight.settle`.
        """
        for weight in self._weights:
            if isinstance(weight, HostWeight):
                weight.settle()

    def remove(self) -> None:
        """Leave the model as it was, on the CPU."""
        self._patches.close()


def _call_eagerly(model: nn.Module, stack: contextlib.ExitStack) -> None:
    """Keep a compiler out of replaced calls, which it could not trace."""
    for module in model.modules():
        if "_compiled_call_impl" in module.__dict__:
            replace_call(module, torch.compiler.disable, stack)


def _refuse_dense_training(model: nn.Module, weights: Weights, stack: contextlib.ExitStack) -> None:
    """Refuse a forward that should give whole weights a gradient, which their copies would not pass on.

    A forward of weights that were sharded meanwhile is refused too: their memory is gone.
    """
    distinct = list(dict.fromkeys(weights.values()))
    modules = list(dict.fromkeys(module for module, _ in weights))

    def make(present: Callable) -> Callable:
        def call(*args, **kwargs):
            thawed = torch.is_grad_enabled() and next((w.name for w in distinct if w.parameter.requires_grad), None)
            if thawed:
                raise ValueError(
                    f"{thawed} requires a gradient, but a weight that stays in host memory gets none; freeze it with "
                    "requires_grad_(False), and give it a mask of all its entries if it should train."
                )
            if any(map(is_managed, modules)):
                raise ValueError(
                    "fully_shard was called on a model whose weights offload= keeps in host memory; leave offload= "
                    "out, or shard with offload_policy=CPUOffloadPolicy() instead."
                )
            return present(*args, **kwargs)

        return call

    replace_call(model, make, stack)


class _Stay:
    """Replaces a module's `_apply`, by which `model.to`, `model.cuda` and trainers move it: the weights stay.

    Args:
        module: the module.
        device: the device that computes.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module, device

    def __call__(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Do nothing for a move to the CPU or to the device that computes.

        Raises:
            ValueError: it is another device, or another dtype.
        """
        tensors = [*self.module._parameters.values(), *self.module._buffers.values()]
        for dtype in {tensor.dtype for tensor in tensors if tensor is not None}:
            moved = fn(torch.empty(0, dtype=dtype))
            if moved.dtype != dtype:
                raise ValueError(
                    f"The model's weights stay in host memory in {dtype} while it is offloaded; cast the model to "
                    f"{moved.dtype} before sparsify."
                )
            if moved.device.type != "cpu" and moved.device != self.device:
                raise ValueError(
                    f"The model is offloaded to {self.device} and cannot move to {moved.device}; sparsify it with "
                    f"offload={str(moved.device)!r}."
                )
        return self.module
