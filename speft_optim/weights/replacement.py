"""Methods and parameters of a module replaced by others for a time, as attributes of the instance."""

import contextlib
from collections.abc import Callable, Mapping

from torch import Tensor, nn


def shadow(
    module: nn.Module,
    make: Callable[[], Mapping[str, Tensor]],
    stack: contextlib.ExitStack,
    *,
    prepend: bool = False,
) -> None:
    """While the stack is open, let tensors newly made for each forward stand before the module's own of these names.

    Args:
        module: the module.
        make: from nothing to tensors by attribute; called before each forward.
        stack: undoes it.
        prepend: before hooks that are there already, which then see the shadows.
    """
    # One element a call, since a module may call itself.
    covered: list[dict[str, Tensor | None]] = []

    def before(module: nn.Module, args: tuple) -> None:
        made = make()
        covered.append({name: module.__dict__.get(name) for name in made})
        module.__dict__.update(made)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        for name, tensor in covered.pop().items() if covered else ():
            module.__dict__.pop(name, None)
            if covered and tensor is not None:
                module.__dict__[name] = tensor

    stack.callback(module.register_forward_pre_hook(before, prepend=prepend).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def replace_method(module: nn.Module, name: str, method: Callable, stack: contextlib.ExitStack) -> None:
    """While the stack is open, let `method` stand in for the module's own of this name, as an instance attribute."""
    before = module.__dict__.get(name)
    module.__dict__[name] = method
    if before is None:
        stack.callback(module.__dict__.pop, name)
    else:
        stack.callback(module.__dict__.__setitem__, name, before)
