"""A model put in order for calibration and back: evaluation mode, nothing that requires gradients, random numbers."""

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
    """What torch, Python and numpy draw next: on the CPU, on CUDA devices and from the generators given.

    Args:
        devices: CUDA devices.
        generators: further ones, as those of a DataLoader.
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[torch.Generator] = ()):
        self._python = random.getstate()
        # A numpy that nobody imported draws nothing.
        self._numpy = sys.modules.get("numpy")
        self._numpy_state = None if self._numpy is None else self._numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Draw from here again."""
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
    """Stacked experts, and attention if asked for, in plain operations that any dtype and second derivatives allow.

    Scaled dot-product attention stays, for `sdpa_kernel` to choose its plain form.
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
    """Tell whether a module is compiled in place or is the wrapper of `torch.compile`."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without cache and with nothing that requires gradients; all as before afterwards.

    Blocks whose activations transformers checkpoints in training, and in training only, are checkpointed here too.
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
            # A graph that is there already would not call the hooks of the measures.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__):
                # What stands in for a block's call streams its weights, and recomputes it already.
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
