"""Gradients of compact values, averaged over processes by one all-reduce at the end of each backward.

FSDP averages the gradients of what it shards. The compact values are a small part of the model and replicated on every
process, so their gradients are averaged as DistributedDataParallel does: before backward returns, and therefore before
clipping and the optimizer's step. Averaging does not change a gradient that is equal in all processes. So with gradient
accumulation, the sum of an averaged gradient and a new one can be averaged as a whole.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from speft_optim.weights.attached import record_of
from speft_optim.weights.mesh import parameter_groups
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.verification import hook_gradient


class GradientAverage:
    """Hooks on a model and its compact values, by which each backward ends with the average.

    Args:
        model: what is called in forward.
        weights: its masked weights, the same in every process.
    """

    def __init__(self, model: nn.Module, weights: list[SparseWeight]):
        self._weights = weights
        self._is_queued = False
        # The end of the outermost backward is wanted, which passes the model's output first; reentrant checkpointing
        # runs backwards within it. A model whose output is not a tensor's, or is not used, has its values.
        self._hooks = [model.register_forward_hook(self._watch), model.register_forward_pre_hook(self._watch_gathered)]
        self._hooks += [hook_gradient(weight.values, self.queue) for weight in weights]
        for weight in weights:
            weight.uses.is_averaged = True
        # A hook that is added while a forward begins is not called in it.
        self._watch_gathered(model, ())

    def remove(self) -> None:
        """Average no longer."""
        for hook in self._hooks:
            hook.remove()

    def _watch_gathered(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        # After FSDP's own hook: what it keeps gathered for the whole forward may be used without a call of its module.
        for weight in self._weights:
            weight.uses.watch_gathered()

    def _watch(self, model: nn.Module, args: tuple, output: object) -> None:
        # Of a compiled forward the values' own hooks queue the average.
        if torch.compiler.is_compiling():
            return
        # A backward that ended in an error never came to its end.
        self._is_queued = False
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self.queue)

    def queue(self, _: Tensor) -> None:
        """Average at the end of the backward that runs now, once."""
        if not self._is_queued:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Average over processes the gradients of the weights for which that is not put off."""
        self._is_queued = False
        trained = [weight for weight in self._weights if weight.values.requires_grad]
        choices = [is_synchronized(weight) for weight in trained]
        for weight, is_averaged in zip(trained, choices, strict=True):
            weight.uses.is_put_off = not is_averaged and dist.get_world_size() > 1
        weights = list(itertools.compress(trained, choices))
        if not weights:
            return
        values = [weight.values for weight in weights]
        # One number more for each weight: in how many processes it has a gradient.
        # Made on the GPU itself, or copied there as by default, they would wait for all of the backward.
        flags = torch.tensor([float(one.grad is not None) for one in values]).to(values[0].device, non_blocking=True)
        flat = torch.cat([*(torch.zeros_like(one) if one.grad is None else one.grad for one in values), flags])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        *averages, flags = flat.split([*map(len, values), len(values)])
        if any(one.grad is None for one in values):
            # Reading the numbers waits for the GPU, so it is done only here.
            for one, has_gradient in zip(values, flags.tolist(), strict=True):
                if one.grad is None and has_gradient:
                    one.grad = torch.empty_like(one)
        pairs = [(one.grad, average) for one, average in zip(values, averages, strict=True) if one.grad is not None]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def average_gradients(model: nn.Module) -> GradientAverage | None:
    """Average the gradients of a model that `sparsify` was called on, until `desparsify`.

    Returns:
        What does so, if this is new: a second call does nothing.
    """
    record = record_of(model)
    if any(isinstance(hook, GradientAverage) for hook in record.hooks):
        return None
    record.hooks.append(average := GradientAverage(model, record.weights))
    return average


def is_under_fsdp(weight: SparseWeight) -> bool:
    """Whether `fully_shard` was called on a module around a weight, which itself may be left whole, as codes are."""
    return any(hasattr(type(parent), "set_requires_gradient_sync") for parent in weight.place.parents())


def is_synchronized(weight: SparseWeight) -> bool:
    """Whether gradients of the block that holds a weight are exchanged in this backward.

    `FSDPModule.set_requires_gradient_sync` says so, for each block.

    Raises:
        ValueError: the block's gradients are to be divided by another number than that of the processes.
    """
    groups = next(parameter_groups(weight.place.parents()), [])
    for group in groups:
        factor = getattr(group, "gradient_divide_factor", None)
        if factor is not None and factor != dist.get_world_size():
            raise ValueError(
                f"set_gradient_divide_factor({factor}) was called on the block of {weight.name}, but gradients of "
                f"compact values are averaged over the {dist.get_world_size()} processes; leave it out, and multiply "
                "the loss instead."
            )
    return all(group.reduce_grads for group in groups)
