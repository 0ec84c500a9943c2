"""A model's state around calibration: evaluation mode, frozen parameters and random numbers, restored afterwards."""

import contextlib
import functools
import random
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_optim.weights.quantized_linear import frozen_forwards
from speft_optim.weights.replacement import replace_method
from speft_optim.weights.verification import is_recorded, pause


class RandomState:
    """A copy of the random states of torch, Python and numpy.

    Args:
        devices: CUDA devices whose states are copied too.
        generators: further generators whose states are copied, such as that of a DataLoader.
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[torch.Generator] = ()):
        self._python = random.getstate()
        # If numpy was not imported, nothing draws from it.
        self._numpy = sys.modules.get("numpy")
        self._numpy_state = None if self._numpy is None else self._numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Put all generators back to the copied states."""
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._numpy_state)
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for generator, state in self._generators:
            generator.set_state(state)


@contextlib.contextmanager
def plain_implementation(model: nn.Module, attention: bool) -> Iterator[None]:
    """Let transformers compute stacked experts, and attention if asked to, with plain PyTorch while the context lasts.

    Plain operations work in any dtype and can be differentiated twice. Scaled dot-product attention stays:
    `sdpa_kernel` chooses its plain form.
    """
    config = getattr(model, "config", None)
    settings = {"_experts_implementation": ("eager",)}
    if attention:
        settings["_attn_implementation"] = ("eager", "sdpa")
    before = {name: getattr(config, name, None) for name in settings}
    changed = {name: value for name, value in before.items() if value is not None and value not in settings[name]}
    try:
        for name in changed:
            setattr(config, name, settings[name][0])
        yield
    finally:
        for name, value in changed.items():
            setattr(config, name, value)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module was compiled, in place or as the wrapper that `torch.compile` returns."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without cache and without gradients of parameters, and restore all of it afterwards.

    transformers checkpoints activations in training mode alone; here blocks that it would checkpoint are checkpointed
    in eval mode too.
    """
    training = [module for module in model.modules() if module.training]
    required = [parameter for parameter in model.parameters() if is_recorded(parameter)]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with contextlib.ExitStack() as stack:
        stack.callback(RandomState(devices).restore)
        stack.enter_context(frozen_forwards(model))
        if any(is_compiled(module) for module in model.modules()):
            # An existing graph would not call the hooks of the measures.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__):
                # A block with a replaced call is offloaded (see `offload/engine.py`) and recomputed already.
                if module.gradient_checkpointing and module._compiled_call_impl is None:
                    again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
                    replace_method(module, "forward", again, stack)
        try:
            model.eval()
            for parameter in required:
                pause(parameter, True)
            if use_cache is not None:
                config.use_cache = False
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in required:
                pause(parameter, False)
            if use_cache is not None:
                config.use_cache = use_cache
