"""The calls of a model's modules, replaced by calls with copies of their weights on the device.

They are replaced rather than hooked: a call surrounds all hooks, also those registered later, and ends with any
exception, KeyboardInterrupt included, which hooks do not.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speft_optim.offload.activations import HostActivations
from speft_optim.offload.buffers import Site
from speft_optim.offload.caches import without_caches
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.lookup import HostTable, sent
from speft_optim.offload.prefetch import Following, Prefetcher
from speft_optim.offload.quantized import HostQuantized
from speft_optim.weights.gradient_nodes import present_backward
from speft_optim.weights.replacement import Covered, replace_method
from speft_optim.weights.storage import STREAMED
from speft_optim.weights.targets import AddedModule


def sites_of(module: nn.Module) -> list[Site]:
    """Return the weights that a module itself holds, as (module, attribute)."""
    if isinstance(module, AddedModule):
        return []  # No forward reads compact values, so they stay where they are.
    return [(module, name) for name, parameter in module._parameters.items() if parameter is not None]


def replace_call(module: nn.Module, make: Callable[[Callable], Callable], stack: contextlib.ExitStack) -> None:
    """Replace what a call of a module does, its hooks included, as `Module.compile` does it, until the stack closes.

    Args:
        module: the module.
        make: returns the new call for the present one.
        stack: undoes it.
    """
    present = module.__dict__.get("_compiled_call_impl") or module._call_impl
    replace_method(module, "_compiled_call_impl", make(present), stack)


def compute_with_copies(
    module: nn.Module,
    own: dict[str, HostWeight | HostQuantized],
    prefetcher: Prefetcher,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> None:
    """Shadow the module's parameters and buffers by copies on the device during each of its calls."""
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None]
    if not own and not buffers:
        return

    def copy(name: str) -> Tensor:
        # A module of a block may also be called from outside, while the prefetcher holds another block's weights.
        weight, here = own[name], prefetcher.resident.get((module, name))
        if here is not None:
            return here
        if name in module.__dict__:
            # The head's copy is here for the whole call of the model. What the module does with it its hooks see.
            return module.__dict__[name].detach()
        is_table = isinstance(module, nn.Embedding) and not weight.is_overlaid and weight.source().dtype == weight.dtype
        return HostTable.of(weight) if is_table else weight.lasting()

    def make(present: Callable) -> Callable:
        def call(*args, **kwargs):
            with prefetcher.one_call:
                copies = {name: copy(name) for name in own}
                copies.update((name, sent(module._buffers[name], device)) for name in buffers)
                with Covered(module, copies):
                    return present(*args, **kwargs)

        return call

    module.__dict__[STREAMED] = own
    stack.callback(module.__dict__.pop, STREAMED)
    replace_call(module, make, stack)


def _following(number: int, count: int, recorded: bool, goes_on: bool) -> Iterator[Following]:
    """Yield what comes after a block: for its call in forward, then for each recomputation.

    Args:
        number: the block's number.
        count: the number of blocks.
        recorded: whether a backward follows, which begins with the last block.
        goes_on: whether that backward goes on below the block; else block 0 of the next batch comes next.
    """
    upwards, downwards = range(count), range(count - 1, -1, -1)
    yield Following((*upwards[number + 1 :], *(downwards if recorded else upwards)), count - 1 - number)
    while True:
        yield Following((*(downwards[count - number :] if goes_on else ()), *upwards), None)


def run_by_block(
    prefetcher: Prefetcher,
    device: torch.device,
    activations: HostActivations | None,
    block: nn.Module,
    number: int,
    count: int,
    stack: contextlib.ExitStack,
) -> None:
    """Replace the block's call: prefetched weights, checkpointed, its inputs kept in CPU memory if asked for.

    Args:
        prefetcher: brings the weights.
        device: the device that computes.
        activations: keeps the inputs in CPU memory; None leaves them on the device.
        block: the block.
        number: its number.
        count: the number of blocks.
        stack: undoes it.
    """

    def make(present: Callable) -> Callable:
        def call(*args, **kwargs):
            with prefetcher.one_call:
                return call_alone(*args, **kwargs)

        def call_alone(*args, **kwargs):
            if prefetcher.resident:
                # A block that another one calls is a part of that.
                return present(*args, **kwargs)
            recorded = torch.is_grad_enabled()
            # If no input requires a gradient, backward ends here.
            goes_on = any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
            following = _following(number, count, recorded, goes_on)
            in_forward, made_in = None, present_backward()

            def work(_, *args, **kwargs):
                nonlocal in_forward
                with prefetcher.one_call if in_forward is None else prefetcher.one_call.again(made_in):
                    holding = prefetcher.holding(number, next(following), in_forward)
                    with holding as in_forward, without_checkpoints([block]):
                        return present(*args, **kwargs)

            if not recorded:
                return work(None, *args, **kwargs)
            args, kwargs = without_caches(number, args, kwargs)
            # A checkpoint keeps the random state of the devices of its positional arguments.
            on_device = torch.empty(0, device=device)
            with activations.keeping((*args, *kwargs.values())) if activations else contextlib.nullcontext():
                return checkpoint(work, on_device, *args, use_reentrant=False, **kwargs)

        return call

    replace_call(block, make, stack)


@contextlib.contextmanager
def without_checkpoints(blocks: list[nn.Module]) -> Iterator[None]:
    """Keep transformers from checkpointing blocks that are checkpointed already."""
    checkpointed = [block for block in blocks if block.__dict__.get("gradient_checkpointing")]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the model's outermost module lists that have weights."""
    inside: set[int] = set()
    blocks: dict[nn.Module, None] = {}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(id(part) for part in module.modules())
            blocks.update(dict.fromkeys(module))
    return [block for block in blocks if any(sites_of(part) for part in block.modules())]
