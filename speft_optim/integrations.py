"""What a sparsified model needs where transformers, trl, torch's data parallelism and activation checkpointing meet it.

Quantised models are patched so that their layers compute as frozen ones, `save_pretrained` writes the merged
weights, and flags that mean "nothing trains" are lowered.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.export import save_merged
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.quantized_linear import FrozenForward, forward_of
from speft_optim.weights.storage import frozen_weight

# transformers reads this as "a purely quantised model, which cannot train". The flags `is_loaded_in_8bit` and
# `is_loaded_in_4bit` stay: by them peft chooses layers that know how to merge into quantised weights.
_FLAG = "is_quantized"
_FLAG_BEFORE = "_is_quantized_before_sparsify"
_REPLICA_HOOK = "_refuses_to_be_replicated"


def patch_model(model: nn.Module) -> None:
    """Compute every bitsandbytes linear layer as a frozen linear layer: dequantised, multiplied, and dropped.

    `sparsify` and `load_adapter` do this by themselves. It is for a loss that is measured before them and compared with
    one after training: bitsandbytes' own LLM.int8 layers quantise activations too and compute something else.
    `save_pretrained` of the model then writes dequantised weights. A second call does nothing, as does one on a model
    without such layers; `desparsify` undoes it.

    Args:
        model: a model in memory; changed in place.
    """
    layers = dict(quantized_linears(model))
    for name, module in layers.items():
        if forward_of(module) is None:
            FrozenForward(module, name)
    if layers and _REPLICA_HOOK not in model.__dict__:
        model.__dict__[_REPLICA_HOOK] = model.register_forward_pre_hook(_refuse_replica, prepend=True)
    for part in model.modules():
        # The model and those in it, as the one without its head.
        if hasattr(part, "save_pretrained") and next(quantized_linears(part), None) is not None:
            part.__dict__["save_pretrained"] = _SaveMerged(part)
    for quantizer, inner in _quantizers(model):
        quantizer.__dict__["is_serializable"] = _RefuseQuantized()
        for part in inner:
            # The save that transformers defines asks the quantiser, which it finds on the whole model only.
            part.__dict__.setdefault("hf_quantizer", quantizer)


def _quantizers(model: nn.Module) -> Iterator[tuple[object, list[nn.Module]]]:
    """Each quantiser of transformers' that the model holds, with the quantised models inside the one that holds it."""
    for outer in list(model.modules()):
        if (quantizer := outer.__dict__.get("hf_quantizer")) is not None:
            parts = [part for part in outer.modules() if part is not outer and hasattr(part, "save_pretrained")]
            yield quantizer, [part for part in parts if next(quantized_linears(part), None) is not None]


class _RefuseQuantized:
    """Answers for the quantiser whether the model can be saved as it is; picklable, so that the model can be copied."""

    def __call__(self, *args, **kwargs) -> bool:
        """Refuse; transformers asks before it writes anything.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "The quantised weights alone are not the trained model: its trained entries lie beside them. Save with "
            "model.save_pretrained(folder), called on the model itself, or export_merged(model, folder)."
        )


def _refuse_replica(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the whole model: a replica shares its layers' `forward`, which compute on the first GPU.

    These cannot tell, since they know the layer that they stand in for and not its replica; a hook is called with it.
    """
    if getattr(model, "_is_replica", False):
        raise ValueError(
            f"nn.DataParallel, which Trainer uses when one process sees several GPUs, cannot replicate the quantised "
            f"layers of {type(model).__name__}; start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0."
        )


def declare_trainable(model: nn.Module) -> None:
    """Lower the flag by which transformers knows a model that cannot train; `unpatch_model` raises it again."""
    if _FLAG in model.__dict__:
        model.__dict__[_FLAG_BEFORE], model.__dict__[_FLAG] = model.__dict__[_FLAG], False


def unpatch_model(model: nn.Module) -> None:
    """Undo these, but for layers that carry trained entries: these go on computing with them."""
    kept = False
    for _, module in quantized_linears(model):
        if frozen_weight(module).overlays:
            kept = True
        elif (forward := forward_of(module)) is not None:
            forward.remove()
    if _FLAG_BEFORE in model.__dict__:
        model.__dict__[_FLAG] = model.__dict__.pop(_FLAG_BEFORE)
    if kept:
        return
    if _REPLICA_HOOK in model.__dict__:
        model.__dict__.pop(_REPLICA_HOOK).remove()
    for part in model.modules():
        if isinstance(part.__dict__.get("save_pretrained"), _SaveMerged):
            del part.__dict__["save_pretrained"]
    for quantizer, inner in _quantizers(model):
        quantizer.__dict__.pop("is_serializable", None)
        for part in inner:
            if part.__dict__.get("hf_quantizer") is quantizer:
                del part.__dict__["hf_quantizer"]


class _SaveMerged:
    """Stands in for `save_pretrained`, which would write the codes alone: writes the merged model, as on a dense base.

    A picklable object rather than a closure, so that the model can be copied.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory, is_main_process: bool = True, max_shard_size="5GB", **options) -> None:
        """Write an ordinary checkpoint of the merged weights; a `state_dict` passed along is the model's and not used.

        Raises:
            ValueError: an option asks for something else than writing a folder.
        """
        if refused := [name for name, value in options.items() if value and name not in _HARMLESS]:
            raise ValueError(
                f"save_pretrained({refused[0]}=...) is not possible on a quantised sparsified model; write the folder "
                "first, with export_merged(model, folder)."
            )
        if is_main_process:
            save_merged(self.model, save_directory, max_shard_size=max_shard_size)


_HARMLESS = ("state_dict", "safe_serialization", "save_function", "save_original_format", "save_peft_format")


def sharding_wrapper(model: nn.Module) -> str | None:
    """What shards the model over processes, told by class names so that nothing is imported for the question."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FSDPModule" in classes:
        return "fully_shard"
    if "FullyShardedDataParallel" in classes:
        return "FullyShardedDataParallel"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    return "a device mesh (DTensor)" if any(hasattr(p, "device_mesh") for p in model.parameters()) else None


def let_checkpoints_see_gradients(model: nn.Module) -> list:
    """Hook the input embeddings, of an encoder and a decoder both, if the model tells which they are.

    Reentrant checkpointing drops all gradients of a block whose inputs need none, as happens once embeddings are
    frozen.
    """
    found = []
    for part in model.modules():
        # Some have the method only to say that they have no embeddings.
        with contextlib.suppress(NotImplementedError, AttributeError):
            found.append(part.get_input_embeddings())
    unique = dict.fromkeys(module for module in found if isinstance(module, nn.Module))
    return [module.register_forward_hook(_RequireGradient(model)) for module in unique]


class _RequireGradient:
    def __init__(self, model: nn.Module):
        # Not searched in each forward, which a small model would feel.
        self.parts = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        checkpointing = any(part.gradient_checkpointing for part in self.parts)
        if checkpointing and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)
