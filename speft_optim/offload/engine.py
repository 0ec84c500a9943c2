"""Computing on a device with weights that stay in host memory, or on disk, and are copied to the device as needed.

Each block of the model (an element of an `nn.ModuleList`) is checkpointed, so that its weights are needed only while it
is computed, in forward and again in backward; its inputs are kept in CPU memory meanwhile. A prefetcher
(`offload/prefetch.py`) copies the weights, of at most two blocks at a time, besides those that are to stay there. A
module outside the blocks gets copies of its parameters for its own forward, but an embedding only the rows that are
looked up. The copies are instance attributes that shadow the parameters. A pass thus needs GPU memory for the weights
of two blocks, the activations of one, the head and, in estimation, the accumulators. For each batch a block is copied
once in forward and, down to the lowest one with a weight whose gradient is needed, once in backward.

Of a model on the meta device the tensors come from a checkpoint, whose safetensors files are memory-mapped and read as
they are needed. accelerate's hooks, which move whole modules, were rejected: they drop their copies before backward,
where the weights are needed again.
"""

import contextlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_optim.offload.activations import HostActivations
from speft_optim.offload.buffers import Site
from speft_optim.offload.calls import (
    blocks_of,
    compute_with_copies,
    run_by_block,
    sites_of,
)
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.model_call import head_of, run_model
from speft_optim.offload.pages import lock_pages
from speft_optim.offload.prefetch import Prefetcher, staying_blocks
from speft_optim.offload.quantized import HostQuantized
from speft_optim.offload.shards import check_buffers, mapped_tensors
from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.targets import all_targets

Weights = dict[Site, HostWeight | HostQuantized]

# A model that is offloaded has its device in this attribute.
_DEVICE = "_offloaded_to"


@contextlib.contextmanager
def streaming(
    model: nn.Module, device: str | torch.device, folder: str | Path | None = None, *, by_block: bool = True
) -> Iterator[None]:
    """Let the model compute on `device` with copies of its weights and buffers while the context lasts.

    For a CUDA device the pages of weights in CPU memory are locked meanwhile, so that copies reach the bus's full
    speed. A model that `sparsify` offloaded to this device stays as it is.

    Args:
        model: a model in CPU memory or, with `folder`, on the meta device (but its buffers in memory).
        device: the device that computes.
        folder: the checkpoint with the parameters that are on the meta device.
        by_block: whether blocks are prefetched and recomputed in backward, for passes over batches. If not, each
            module's weights are copied for its own forward, and stay for as long as a graph keeps them.

    Raises:
        ValueError: there is no such device, a parameter on the meta device has no tensor in `folder`, a buffer is on
            the meta device, or the model is offloaded to another device.
    """
    device = device_of_tensors(device)
    with contextlib.ExitStack() as stack:
        if (present := offloaded_to(model)) is None:
            weights = _weights(model, device, folder)
            # This comes before the prefetcher, which waits for all copies as it ends; only then are pages unlocked.
            direct = make_direct(in_memory(weights), device, stack)
            compute_on(model, device, weights, direct, stack, by_block=by_block)
        elif present != device:
            raise ValueError(f"The model is offloaded to {present} by sparsify, not to {device}; leave offload out.")
        yield


def offloaded_to(model: nn.Module) -> torch.device | None:
    """Return the device that the model is offloaded to, or None."""
    return model.__dict__.get(_DEVICE)


def device_of_tensors(device: str | torch.device) -> torch.device:
    """Return the device with its index, as tensors have it: "cuda:0" for "cuda".

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"offload={device!r} is not a device to compute on ({reason}); pass 'cuda'.") from error
    if device.type == "meta":
        raise ValueError("offload='meta' is not a device to compute on; pass one like 'cuda'.")
    return device


def _weights(model: nn.Module, device: torch.device, folder: str | Path | None) -> Weights:
    """Return the model's weights by the places that hold them, after the checks that `streaming` names."""
    mapped = mapped_tensors(model, folder) if folder is not None else {}
    for target in all_targets(model).values():
        if target.parameter.is_meta and target.name not in mapped:
            raise ValueError(f"{target.name} is on the meta device; pass base=folder with its safetensors.")
    check_buffers(model)
    return host_weights(model, device, mapped)


def host_weights(model: nn.Module, device: torch.device, mapped: Mapping[str, Tensor]) -> Weights:
    """Return the model's weights by the places that hold them; a shared one has several.

    Args:
        model: the model.
        device: the device that computes.
        mapped: by name the tensors of weights that are memory-mapped from a checkpoint, see `mapped_tensors`.
    """
    weights = {}
    for target in all_targets(model).values():
        module, attribute = target.sites[0]
        quantised = attribute == "weight" and is_quantized_linear(module)
        weight = HostQuantized(target, device) if quantised else HostWeight(target, device, mapped.get(target.name))
        weights.update(dict.fromkeys(target.sites, weight))
    return weights


def in_memory(weights: Weights) -> list[Tensor]:
    """Return the tensors in CPU memory that copies are made of, but for those mapped from a checkpoint."""
    distinct = dict.fromkeys(weights.values())
    return [source for weight in distinct if not weight.is_mapped for source in weight.sources()]


def make_direct(sources: list[Tensor], device: torch.device, stack: contextlib.ExitStack) -> set[int]:
    """Return the addresses of storages that the device reads directly until the stack closes, see `lock_pages`."""
    if device.type == "cuda":
        return lock_pages(sources, device, stack)
    return {source.untyped_storage().data_ptr() for source in sources}


def compute_on(
    model: nn.Module,
    device: torch.device,
    weights: Weights,
    direct: Set[int],
    stack: contextlib.ExitStack,
    *,
    by_block: bool = True,
    inputs_on_host: bool = True,
    resident_blocks: int = 0,
    resident_head: bool = False,
) -> Prefetcher:
    """Replace the calls of the model's modules by calls on `device` with copies of the weights.

    Args:
        model: the model.
        device: the device that computes.
        weights: its weights, see `host_weights`.
        direct: see `make_direct`.
        stack: undoes it, and frees all that is on the device.
        by_block: see `streaming`.
        inputs_on_host: whether the inputs of blocks are kept in CPU memory until backward, or on the device.
        resident_blocks: how many blocks stay on the device.
        resident_head: whether the head does.
    """
    blocks = blocks_of(model) if by_block else []
    by_blocks = [{site: weights[site] for part in block.modules() for site in sites_of(part)} for block in blocks]
    head = head_of(model, weights) if by_block else None
    if resident_head:
        head[1].stay()
    prefetcher = Prefetcher(by_blocks, device, stack, direct, staying_blocks(len(blocks), resident_blocks), head)
    for module in model.modules():
        own = {name: weights[module, name] for _, name in sites_of(module)}
        compute_with_copies(module, own, prefetcher, device, stack)
    activations = HostActivations(device) if inputs_on_host else None
    for number, block in enumerate(blocks):
        run_by_block(prefetcher, device, activations, block, number, len(blocks), stack)
    run_model(model, blocks, head, device, prefetcher.one_call, stack)
    model.__dict__[_DEVICE] = device
    stack.callback(model.__dict__.pop, _DEVICE)
    return prefetcher
