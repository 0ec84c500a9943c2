"""The model inside wrappers, and its names without theirs.

Compilers, checkpointing, data parallelism and trainers put a model, or one of its blocks, into a module that adds a
part to every name inside (`module.`, `_orig_mod.`, `_forward_module.`). Masks and adapters carry the plain model's
names, so that what was saved through one wrapper fits the model in any other and in none.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Only wrappers have a child of such a name. Lightning Fabric's is not asked for its `_original_module`, which does not
# show what a strategy put around it.
_CHILDREN = ("_forward_module", "_orig_mod", "_checkpoint_wrapped_module")


# `module` is an ordinary name, so that these wrappers go by their class; by its name where it is not torch's.
_CLASSES = {"DeepSpeedEngine", "AveragedModel"}


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """The module that `module` wraps, None where it is no wrapper."""
    for name in _CHILDREN:
        if isinstance(child := module._modules.get(name), nn.Module):
            return child
    by_class = isinstance(module, DistributedDataParallel | DataParallel) or type(module).__name__ in _CLASSES
    return module._modules.get("module") if by_class else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers, in whatever order they were put on."""
    while (inner := wrapped_by(model)) is not None:
        model = inner
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without wrappers, the model's and its blocks', and without their parts of names."""
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
    """Refuse a model whose gradients are exchanged already: parameters made from here on would not be.

    Raises:
        ValueError: it is in a DistributedDataParallel of several processes.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            raise ValueError(
                f"The model is in a DistributedDataParallel of {module.process_group.size()} processes, which would "
                "leave the values out when it averages gradients; call sparsify first and wrap the model then."
            )


def steps_to(model: nn.Module, path: str) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
    """The (parent, name, child) that lead from a model to the module at a plain path; wrappers have steps of their own.

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
