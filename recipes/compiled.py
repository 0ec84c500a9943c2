"""Training with compiled decoder blocks: fewer and larger kernels, where launching them takes longer than they do.

A small model is bound by launches: a step of SmolLM2-135M is some ten thousand kernels of a few microseconds. Each
block is compiled by itself, as transformers' regional compilation does: a graph of all blocks takes minutes to compile
and is little faster. Shapes are symbolic, so that a new length compiles nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from recipes import loss
from speft_optim.weights.sparse_weight import sparsified_roots

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")


def compile_blocks(model: nn.Module, mode: str = "default", *, backend: str = "inductor") -> None:
    """Compile the decoder's blocks and the loss; to be called when masks or adapters are attached.

    Args:
        model: a causal language model of transformers.
        mode: one of `MODES`, of torch.compile; `reduce-overhead` records CUDA graphs.
        backend: of torch.compile.
    """
    blocks = _blocks(model)
    # Each block that has its own masks is its own graph; beyond the limit torch would silently not compile.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
    limit = torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, 64 * len(blocks))
    options = dict(dynamic=True, backend=backend) | ({} if mode == "default" else {"mode": mode})
    for block in blocks:
        block.compile(**options)
    loss.chunk_loss = torch.compile(loss._chunk_loss, **options)
    if sparsified_roots(model):
        from speft_optim.eager import refresh_all

        # A compiled block cannot see whether its values changed, and the loss calls the decoder, not the model.
        hook = model.get_decoder().register_forward_pre_hook(lambda decoder, args: refresh_all(model, args))
        model.__dict__["_refresh_of_compiled"] = hook


def uncompile(model: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in _blocks(model):
        block._compiled_call_impl = None
    loss.chunk_loss = loss._chunk_loss
    if (hook := model.__dict__.pop("_refresh_of_compiled", None)) is not None:
        hook.remove()


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Within the block a model that was compiled computes as it does uncompiled; nothing is compiled for it."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_decoder().layers)
