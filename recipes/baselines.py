"""What sparse training is compared with, attached by peft to the same weights: LoRA and its variants.

Every method trains the seven projections of each block, or whatever weights are targeted, and is given the number of
numbers that LoRA of some rank trains. Adapters are fp32 on a base of any dtype, as peft makes them, scaled as their
papers do. `merge` leaves an ordinary model with their change in its weights.
"""

from collections.abc import Iterable

import torch
from torch import nn

METHODS = ("lora", "rslora", "dora", "pissa", "shira")
# LoRA's usual alpha = 2 r; rsLoRA with the same alpha divides by the root of r; PiSSA's factors are not scaled.
_SCALE = {"lora": 2, "rslora": 2, "dora": 2, "pissa": 1}


def numbers_of_rank(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA of a rank trains.

    Args:
        shapes: (rows, columns) of each adapted weight.
        rank: of the two factors.
    """
    return sum(rank * (rows + columns) for rows, columns in shapes)


def rank_of_numbers(shapes: Iterable[tuple[int, int]], count: int) -> int:
    """The rank with which LoRA trains nearest to `count` numbers; at least 1."""
    return max(1, round(count / numbers_of_rank(shapes, 1)))


def attach(model: nn.Module, method: str, rank: int, targets: list[str], *, seed: int = 0) -> nn.Module:
    """Add an adapter and freeze all else.

    Args:
        model: a model of transformers.
        method: one of `METHODS`.
        rank: of the adapter; SHiRA trains as many entries as LoRA of this rank has numbers.
        targets: full names of the modules to adapt.
        seed: of the adapter's random numbers.

    Returns:
        peft's wrapper around the model, which trains as the model does.

    Raises:
        ValueError: the method is not known, or the installed peft does not have it.
    """
    config = _config(method, rank, targets, seed)
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    if method != "dora" and (found := trained_numbers(wrapped)) != (wanted := _wanted(model, targets, rank)):
        raise ValueError(f"{method} of rank {rank} trains {found:,} numbers instead of {wanted:,}; use another peft.")
    return wrapped


def merge(wrapped: nn.Module) -> nn.Module:
    """The model with the adapter's change in its weights, and without the adapter."""
    return wrapped.merge_and_unload()


def trained_numbers(model: nn.Module) -> int:
    """How many numbers of the model require gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _wanted(model: nn.Module, targets: list[str], rank: int) -> int:
    modules = [model.get_submodule(name) for name in targets]
    layers = [getattr(module, "base_layer", module) for module in modules]
    return numbers_of_rank([(layer.out_features, layer.in_features) for layer in layers], rank)


def _config(method: str, rank: int, targets: list[str], seed: int):
    import peft

    common = dict(r=rank, target_modules=targets, task_type="CAUSAL_LM")
    if method == "shira":
        if not hasattr(peft, "ShiraConfig"):
            raise ValueError(f"peft {peft.__version__} has no SHiRA; install peft 0.16 or later.")
        return peft.ShiraConfig(**common, mask_type="random", random_seed=seed)
    if method not in METHODS:
        raise ValueError(f"{method!r} is no baseline; choose from {', '.join(METHODS)}.")
    variants = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa_niter_8"},
    }
    return peft.LoraConfig(**common, lora_alpha=_SCALE[method] * rank, lora_dropout=0.0, **variants.get(method, {}))
