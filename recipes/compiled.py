"""Training with compiled parts, for models whose kernels take less time than their launches.

A small model is bound by launches, of which norms and rotary embeddings make up more than half. There are two modes,
and both compile the loss too:

* `parts` compiles norms and rotary embeddings alone. These are alike in all blocks and for all methods, so that two
  small graphs serve a whole process.
* `blocks` compiles each decoder block, masks and adapters included, as transformers' regional compilation does. Every
  block has its own masks and is a graph of its own, which takes seconds to compile each; one graph of all blocks takes
  minutes and is little faster.

Shapes are symbolic, so that a new length compiles nothing.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

from recipes import loss

MODES = ("parts", "blocks")
_ROTARY = "apply_rotary_pos_emb"


def compile_model(model: nn.Module, how: str = "parts", *, backend: str = "inductor") -> None:
    """Compile a model for training; call it after masks or adapters are attached.

    Args:
        model: a causal language model of transformers.
        how: one of `MODES`.
        backend: the backend of torch.compile.
    """
    modules = _norms(model) if how == "parts" else _blocks(model)
    _raise_limits(len(modules))
    options = dict(dynamic=True, backend=backend)
    for module in modules:
        module.compile(**options)
    loss.chunk_loss = torch.compile(loss._chunk_loss, **options)
    if how == "parts" and (rotary := getattr(_code_of(model), _ROTARY, None)) is not None:
        model.__dict__["_rotary_before"] = rotary
        setattr(_code_of(model), _ROTARY, torch.compile(rotary, **options))


def uncompile(model: nn.Module) -> None:
    """Undo `compile_model`."""
    for module in model.modules():
        module._compiled_call_impl = None
    loss.chunk_loss = loss._chunk_loss
    if (rotary := model.__dict__.pop("_rotary_before", None)) is not None:
        setattr(_code_of(model), _ROTARY, rotary)


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Let a compiled model compute uncompiled while the context lasts."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _raise_limits(modules: int) -> None:
    """Let torch compile as many graphs as there are modules; beyond its limit it would silently stop."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * modules)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * modules)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_decoder().layers)


def _norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms without hooks; one with a hook, such as a masked one, would need a graph of its own."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    return [norm for norm in norms if not norm._forward_pre_hooks and not norm._forward_hooks]


def _code_of(model: nn.Module) -> ModuleType:
    """Return the Python module of the architecture, in which its blocks look up the rotary function."""
    return sys.modules[type(model).__module__]
