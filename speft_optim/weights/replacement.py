"""Temporary replacement of a module's methods and parameters by attributes of the instance."""

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
    """Replace attributes of a module during each forward by tensors made for that forward, until the stack closes.

    Args:
        module: the module.
        make: returns the tensors by attribute name; called before each forward.
        stack: undoes the replacement when it closes.
        prepend: whether the replacement comes before hooks that are registered already, which then see the new tensors.
    """
    # There is one element for each unfinished call, since a module may call itself.
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


class Covered:
    """A context in which other tensors shadow parameters and buffers of a module.

    Every call of an offloaded module enters one, so that it is no generator, which takes twice the time.

    Args:
        module: the module.
        tensors: the tensors by attribute name.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        self._attributes, self._tensors = module.__dict__, tensors

    def __enter__(self) -> None:
        self._before = {name: self._attributes.get(name) for name in self._tensors}
        self._attributes.update(self._tensors)

    def __exit__(self, *_) -> None:
        for name, tensor in self._before.items():
            self._attributes.pop(name, None)
            if tensor is not None:
                self._attributes[name] = tensor


def replace_method(module: nn.Module, name: str, method: Callable, stack: contextlib.ExitStack) -> None:
    """Replace a method of a module by an instance attribute until the stack closes.

    Args:
        module: the module.
        name: of the method.
        method: the replacement.
        stack: undoes the replacement when it closes.
    """
    before = module.__dict__.get(name)
    module.__dict__[name] = method
    if before is None:
        stack.callback(module.__dict__.pop, name)
    else:
        stack.callback(module.__dict__.__setitem__, name, before)
