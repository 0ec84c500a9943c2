"""Patches for transformers, trl, torch's data parallelism and activation checkpointing.

A quantised model is patched so that its layers compute as frozen linear layers, `save_pretrained` writes the merged
weights, and the flag by which transformers refuses to train a model (`is_quantized`) is set to False.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from speft_optim.checkpoint.export import save_merged
from speft_optim.weights.bnb import needs_our_forward, quantized_linears
from speft_optim.weights.mesh import is_fully_sharded
from speft_optim.weights.quantized_linear import FrozenForward, forward_of
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import all_targets

# transformers reads this flag as "a quantised model, which cannot train". The flags `is_loaded_in_8bit` and
# `is_loaded_in_4bit` stay: peft chooses by them layers that can merge into quantised weights.
_FLAG = "is_quantized"
_FLAG_BEFORE = "_is_quantized_before_sparsify"
_REPLICA_HOOK = "_refuses_to_be_replicated"


def patch_model(model: nn.Module) -> None:
    """Compute every bitsandbytes linear layer as a frozen linear layer: dequantise the weight, multiply, free it.

    `sparsify` and `load_adapter` call this. Call it yourself to measure a loss before training that is comparable with
    the loss afterwards: bitsandbytes' own LLM.int8 layers also quantise activations and therefore give other results.
    The model's `save_pretrained` then writes dequantised weights. Calling it twice, or on a model without such layers,
    has no effect; `desparsify` undoes it.

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
        # Models inside the model, such as the one without its head, can be saved by themselves.
        if hasattr(part, "save_pretrained") and next(quantized_linears(part), None) is not None:
            part.__dict__["save_pretrained"] = _SaveMerged(part)
    for quantizer, inner in _quantizers(model):
        quantizer.__dict__["is_serializable"] = _RefuseQuantized()
        for part in inner:
            # `save_pretrained` of transformers asks the quantiser, which is an attribute of the whole model only.
            part.__dict__.setdefault("hf_quantizer", quantizer)


def save_from_files(model: nn.Module) -> None:
    """Let `save_pretrained` write the weights one at a time; `unpatch_model` undoes it.

    transformers' own needs the whole state dict, in which each page of a mapped weight that has a trained entry is
    memory. It is kept if weights have several floating-point dtypes, since our writer supports only one.

    Args:
        model: a model with weights that are memory-mapped from a checkpoint.
    """
    for part in model.modules():
        dtypes = {target.parameter.dtype for target in all_targets(part).values()}
        if hasattr(part, "save_pretrained") and len(dtypes) == 1:
            part.__dict__["save_pretrained"] = _SaveMerged(part, dtypes.pop())


def refuse_to_save_rows(model: nn.Module) -> None:
    """Let `save_pretrained` of a sharded model ask for the whole weights, which it cannot get from DTensors.

    Args:
        model: a model that `fully_shard` was called on; `unpatch_model` undoes it.
    """
    for part in model.modules():
        if hasattr(part, "save_pretrained"):
            part.__dict__.setdefault("save_pretrained", _SaveWhole(part))


def _quantizers(model: nn.Module) -> Iterator[tuple[object, list[nn.Module]]]:
    """Yield each quantiser of transformers in the model, with the quantised models inside the one that holds it."""
    for outer in list(model.modules()):
        if (quantizer := outer.__dict__.get("hf_quantizer")) is not None:
            parts = [part for part in outer.modules() if part is not outer and hasattr(part, "save_pretrained")]
            yield quantizer, [part for part in parts if next(quantized_linears(part), None) is not None]


class _RefuseQuantized:
    """Replaces the quantiser's `is_serializable`; it can be pickled, so that the model can be copied."""

    def __call__(self, *args, **kwargs) -> bool:
        """Refuse to save; transformers asks before it writes anything.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "The quantised weights alone are not the trained model, whose trained entries are beside them. Save with "
            "model.save_pretrained(folder), called on the model itself, or export_merged(model, folder)."
        )


def _refuse_replica(model: nn.Module, args: tuple) -> None:
    """Refuse a replica of nn.DataParallel; a forward pre-hook of the whole model.

    The replaced `forward` of a layer is bound to the original layer, so a replica's would compute on the first GPU. It
    cannot detect this itself, but a hook gets the replica.
    """
    if getattr(model, "_is_replica", False):
        raise ValueError(
            f"nn.DataParallel, which Trainer uses when one process sees several GPUs, cannot replicate the quantised "
            f"layers of {type(model).__name__}; start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0."
        )


def declare_trainable(model: nn.Module) -> None:
    """Set the flag by which transformers refuses to train the model to False; `unpatch_model` restores it."""
    if _FLAG in model.__dict__:
        model.__dict__[_FLAG_BEFORE], model.__dict__[_FLAG] = model.__dict__[_FLAG], False


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model` and `declare_trainable`, except on layers whose overlay still holds trained entries.

    Int8 layers that were sharded meanwhile keep our forward too.
    """
    kept = False
    for _, module in quantized_linears(model):
        if frozen_weight(module).overlays or needs_our_forward(module):
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
        if isinstance(part.__dict__.get("save_pretrained"), _SaveMerged | _SaveWhole):
            del part.__dict__["save_pretrained"]
    for quantizer, inner in _quantizers(model):
        quantizer.__dict__.pop("is_serializable", None)
        for part in inner:
            if part.__dict__.get("hf_quantizer") is quantizer:
                del part.__dict__["hf_quantizer"]


class _SaveMerged:
    """Replaces `save_pretrained`, which would write the quantised weights without the trained entries.

    It is an object rather than a closure, so that it can be pickled and the model copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16):
        self.model, self.dtype = model, dtype

    def __call__(self, save_directory, is_main_process: bool = True, max_shard_size="5GB", **options) -> None:
        """Write an ordinary checkpoint of the merged weights; a `state_dict` that is passed is not used.

        Raises:
            ValueError: an option asks for more than writing a folder, or the model is sharded: trainers call this in
                one process only, which cannot get the rows of the others.
        """
        if is_fully_sharded(self.model):
            raise ValueError(
                "save_pretrained is not possible on a sharded quantised model, of which each process has some rows; "
                "call export_merged(model, folder) in all processes, and let a Trainer save "
                "state_dict_type='SHARDED_STATE_DICT'."
            )
        if refused := [name for name, value in options.items() if value and name not in _HARMLESS]:
            raise ValueError(
                f"save_pretrained({refused[0]}=...) is not possible on a sparsified model that is quantised or whose "
                "weights stay in files; write the folder first, with export_merged(model, folder)."
            )
        if is_main_process:
            save_merged(self.model, save_directory, dtype=self.dtype, max_shard_size=max_shard_size)


class _SaveWhole:
    """Replaces `save_pretrained` of a sharded model, which fails on DTensors for want of their memory."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **options) -> None:
        """Save as the model's class does, if the whole weights are given.

        Raises:
            ValueError: they are not.
        """
        if state_dict is None and is_fully_sharded(self.model):
            raise ValueError(
                "save_pretrained has only the rows of a sharded model that its own process holds; call "
                "export_merged(model, folder) in all processes, or pass it a full state_dict, which "
                "accelerator.get_state_dict(model) returns, or get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict."
            )
        type(self.model).save_pretrained(
            self.model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options
        )


_HARMLESS = ("state_dict", "safe_serialization", "save_function", "save_original_format", "save_peft_format")


def let_checkpoints_see_gradients(model: nn.Module) -> list:
    """Let the outputs of input embeddings, of encoder and decoder, require gradients under checkpointing.

    Reentrant checkpointing drops all gradients of a block whose inputs require none, as with frozen embeddings.

    Returns:
        The handles of the hooks.
    """
    found = []
    for part in model.modules():
        # Some models raise in this method since they have no embeddings.
        with contextlib.suppress(NotImplementedError, AttributeError):
            found.append(part.get_input_embeddings())
    unique = dict.fromkeys(module for module in found if isinstance(module, nn.Module))
    return [module.register_forward_hook(_RequireGradient(model)) for module in unique]


class _RequireGradient:
    def __init__(self, model: nn.Module):
        # These are listed once, since a search in each forward would slow a small model.
        self.parts = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        checkpointing = any(part.gradient_checkpointing for part in self.parts)
        if checkpointing and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)
