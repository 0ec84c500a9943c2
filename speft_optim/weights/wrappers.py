"""Finds the model inside wrappers, and the names of its modules without the wrappers' prefixes.

Compilers, checkpointing, data parallelism and trainers put a model, or one of its blocks, into a module that adds a
part to every name inside (`module.`, `_orig_mod.`, `_forward_module.`). Masks and adapters use the plain model's names,
so that what was saved through one wrapper fits the model in any other wrapper or without one.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Only wrappers have a child of such a name. Lightning Fabric also has `_original_module`, which is not used here, since
# it leaves out the wrapper of a strategy in between.
_CHILDREN = ("_forward_module", "_orig_mod", "_checkpoint_wrapped_module")


# Other wrappers name their child `module`, which is an ordinary name, so they are known by class: these by its name.
_CLASSES = {"DeepSpeedEngine", "AveragedModel"}


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """Return the module that `module` wraps, or None if it is no wrapper."""
    for name in _CHILDREN:
        if isinstance(child := module._modules.get(name), nn.Module):
            return child
    by_class = isinstance(module, DistributedDataParallel | DataParallel) or type(module).__name__ in _CLASSES
    return module._modules.get("module") if by_class else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all its wrappers, in whatever order they are nested."""
    while (inner := wrapped_by(model)) is not None:
        model = inner
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `model.named_modules()` would without wrappers: plain paths, and modules that are no wrappers."""
    seen, todo = set(), [("", model)]
    while todo:
        path, module = todo.pop()
        module = unwrapped(module)
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = [(f"{path}.{name}" if path else name, child) for name, child in module._modules.items()]
        todo += [(path, child) for path, child in reversed(children) if child is not None]


def check_not_parallel(model: nn.Module) -> None:
    """Refuse a model in DistributedDataParallel, which would not average gradients of parameters that are added now.

    Raises:
        ValueError: the model is in a DistributedDataParallel of several processes.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            raise ValueError(
                f"The model is in a DistributedDataParallel of {module.process_group.size()} processes, which would "
                "leave the values out when it averages gradients; call sparsify first and wrap the model then."
            )


def check_averaged(values: Iterable[Tensor]) -> None:
    """Refuse a call by a DistributedDataParallel that was built before the values, and leaves out their gradients.

    Raises:
        ValueError: it is such a call, in one of several processes.
    """
    parallel = DistributedDataParallel._active_ddp_module
    if parallel is None or parallel.process_group.size() == 1 or not torch.is_grad_enabled():
        return
    # One of the trained values tells, since all are added together.
    first = next((one for one in values if one.requires_grad), None)
    if first is not None and not any(known is first for known in parallel._module_parameters):
        raise ValueError(
            "The model was sparsified inside a DistributedDataParallel, which leaves the values out when it averages "
            "gradients; build DistributedDataParallel anew around the sparsified model."
        )


def steps_to(model: nn.Module, path: str) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
    """Return the (parent, name, child) steps from a model to the module at a plain path; each wrapper is a step too.

    Raises:
        KeyError: there is no such module.
    """
    steps = []

    def step(parent: nn.Module, name: str) -> nn.Module:
        steps.append((parent, name, parent._modules[name]))
        return parent._modules[name]

    def unwrap(module: nn.Module) -> nn.Module:
        while (inner := wrapped_by(module)) is not None:
            module = step(module, next(name for name, child in module._modules.items() if child is inner))
        return module

    module = unwrap(model)
    for part in path.split(".") if path else ():
        module = unwrap(step(module, part))
    return tuple(steps)


class RefuseReducer:
    """Refuses DistributedDataParallel where moving masks cannot work with it.

    Its buffers keep the lengths that gradients had when it was built, and replicas drift apart without a word when
    these change. In its `join()` a process that has no more batches answers the exchange of gradients only, and not
    that of a selection, so that all would hang. Only its forward shows that it is there, and evaluation may come before
    its first one.

    Args:
        model: the model inside.
        may_resize: whether weights will change in their numbers of entries.
    """

    def __init__(self, model: nn.Module, may_resize: bool):
        self._may_resize = may_resize
        self._handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: tuple) -> None:
        """Do nothing, unless the model is called by DistributedDataParallel.

        Raises:
            ValueError: it is, in one of several processes, and lengths may change or processes may join.
        """
        parallel = DistributedDataParallel._active_ddp_module
        if parallel is None or parallel.process_group.size() == 1:
            return
        if self._may_resize:
            raise ValueError(
                "In DistributedDataParallel each weight must keep its number of entries, since its buffers have a "
                "fixed size; use scope='local' and density=None in MaskSchedule, or shard the model with fully_shard."
            )
        if parallel._join_config.enable:
            raise ValueError(
                "MaskSchedule selects masks in all processes together, which DistributedDataParallel's join() does not "
                "allow; give all processes equally many batches and leave join() out, or train with static masks."
            )

    def remove(self) -> None:
        """Refuse it no longer."""
        self._handle.remove()
