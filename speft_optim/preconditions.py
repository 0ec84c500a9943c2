"""Requirements of `sparsify` on a model and its masks, checked before anything is changed."""

from collections.abc import Mapping

import torch
from torch import nn

from speft_optim.checks import check_choice, check_flag, check_whole
from speft_optim.masks.mask import Mask
from speft_optim.offload.calls import blocks_of
from speft_optim.offload.model_call import head_module
from speft_optim.weights.attached import sparse_weights, sparsified_roots
from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.foreign import check_layers, check_parameters
from speft_optim.weights.mesh import check_divisions
from speft_optim.weights.targets import Target, check_called, check_in_memory, check_unhooked


def check_placement(
    activations: str, resident_blocks: int | str, resident_head: bool, offload: str | torch.device | None
) -> None:
    """Refuse options of `offload` that are unknown, or that nothing would read.

    Raises:
        TypeError: a number or a flag is something else.
        ValueError: says which.
    """
    check_choice("activations", activations, ("host", "device"))
    if resident_blocks != "all":
        check_whole("resident_blocks", resident_blocks, least=0, usual="8, or 'all'")
    check_flag("resident_head", resident_head)
    usual = {"activations": "host", "resident_blocks": 0, "resident_head": False}
    given = {"activations": activations, "resident_blocks": resident_blocks, "resident_head": resident_head}
    for name, value in given.items():
        if offload is None and value != usual[name]:
            raise ValueError(f"{name}={value!r} is read only with offload; pass offload='cuda' too, or leave it.")


def check_resident(model: nn.Module, resident_blocks: int | str, resident_head: bool) -> int:
    """Return how many blocks of a model stay on the device.

    Raises:
        ValueError: the model has fewer, or has no head that could stay there.
    """
    count = len(blocks_of(model))
    number = count if resident_blocks == "all" else int(resident_blocks)
    if number > count:
        raise ValueError(f"resident_blocks={number} is above {count}, the model's blocks; pass 'all' for all of them.")
    if resident_head and head_module(model) is None:
        raise ValueError(
            f"resident_head=True needs a head that get_output_embeddings() of {type(model).__name__} returns and that "
            "is not quantised; leave it out."
        )
    return number


def check_model(model: nn.Module) -> None:
    """Refuse a model that is sparsified already, or divided in a way that masked weights cannot be.

    Raises:
        ValueError: says which.
    """
    if sparse_weights(model) or sparsified_roots(model):
        raise ValueError("The model is sparsified already; call desparsify(model) first.")
    check_divisions(model)


def check_masks(model: nn.Module, masks: Mapping[str, Mask], targets: dict[str, Target]) -> None:
    """Refuse masks that do not fit the model's weights.

    Args:
        model: the model.
        masks: from the full names of parameters to their masks.
        targets: all weights of the model by name.

    Raises:
        TypeError: `masks` is not a mapping to `Mask`, or a masked weight has no floating dtype.
        ValueError: a name or shape does not fit, or no mask has an entry.
    """
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Mask) for mask in masks.values()):
        given = type(masks).__name__
        if isinstance(masks, Mapping):
            other = next(type(mask).__name__ for mask in masks.values() if not isinstance(mask, Mask))
            given += f" with a {other}; write Mask(t.flatten().nonzero().squeeze(1), t.shape) of a bool tensor t"
        raise TypeError(f"sparsify needs a dict from parameter names to Mask, got a {given}.")
    check_parameters(model)
    for name, mask in masks.items():
        if name not in targets:
            check_layers(model, str(name).removesuffix(".weight"))
            _refuse_name(model, name, targets)
        _check_mask(targets[name], mask)
    if not any(len(mask) for mask in masks.values()):
        raise ValueError(f"The {len(masks)} masks hold no entry, so nothing would train; raise density or budget.")


def _refuse_name(model: nn.Module, name: str, targets: dict[str, Target]) -> None:
    shared = dict(model.named_parameters(remove_duplicate=False)).get(name)
    first = next((n for n, target in targets.items() if target.parameter is shared), None)
    remedy = f": the weight is shared and goes by its first name, {first}; use that."
    raise ValueError(
        f"There is a mask for {name}, but {type(model).__name__} has no parameter of that name"
        + (remedy if first else "; select the masks on this model.")
    )


def _check_mask(target: Target, mask: Mask) -> None:
    name, parameter, shape = target.name, target.parameter, target.shape
    if shape != mask.shape:
        shapes = f"{tuple(mask.shape)}, the parameter {tuple(shape)}"
        raise ValueError(f"The mask of {name} is for shape {shapes}; select the masks on this model.")
    floating = parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not floating and not is_quantized_linear(target.sites[0][0]):
        raise TypeError(
            f"{name} has dtype {parameter.dtype}; weights of fp32, bf16 and fp16 and those of bitsandbytes' linear "
            "layers can be sparsified."
        )
    check_in_memory(name, parameter)
    check_called(name, target)
    check_unhooked(name, parameter)
