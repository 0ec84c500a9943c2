"""The adapters that sparse training is compared with, by peft: LoRA, rsLoRA, DoRA, PiSSA and SHiRA.

Each trains the same linear weights as a mask would, and about as many values as a budget asks for: the rank is chosen
whose number of trained values is nearest. Settings are the common ones: alpha is twice the rank, for PiSSA the rank
itself; no dropout; adapters in fp32 over a base in its own dtype. At the end an adapter is merged, so that what is
scored and saved is an ordinary checkpoint.

On a GPU adapters, and `full`, train under bf16 autocast, as transformers' Trainer with `bf16=True` does: parameters and
moments in fp32, products in bf16. `full` is what its users do as well: all weights, loaded in fp32.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from speft_optim import find_targets

# From a method to a function of rank, layer names and seed that makes the configuration.
ADAPTERS: dict[str, Callable] = {
    "lora": lambda rank, names, seed: _lora(rank, names, lora_alpha=2 * rank),
    "rslora": lambda rank, names, seed: _lora(rank, names, lora_alpha=2 * rank, use_rslora=True),
    "dora": lambda rank, names, seed: _lora(rank, names, lora_alpha=2 * rank, use_dora=True),
    "pissa": lambda rank, names, seed: _lora(rank, names, lora_alpha=rank, init_lora_weights="pissa_niter_8"),
    "shira": lambda rank, names, seed: _peft("ShiraConfig", r=rank, target_modules=names, random_seed=seed),
}
METHODS = ("sparse", *ADAPTERS, "full")


def _lora(rank: int, names: list[str], **options):
    return _peft("LoraConfig", r=rank, target_modules=names, **options)


def _peft(kind: str, **options):
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"adapters need peft, which is missing ({error}); pip install peft") from error
    if not hasattr(peft, kind):
        version = importlib.metadata.version("peft")
        raise ValueError(f"peft {version} has no {kind}; install peft 0.21 or later, or choose another --method")
    return getattr(peft, kind)(**options)


def check_available(method: str) -> None:
    """Refuse a method if peft is missing or too old for it.

    Raises:
        ValueError: names what to install.
    """
    if method in ADAPTERS:
        ADAPTERS[method](1, ["q_proj"], 0)


def linear_layers(model: nn.Module, targets: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """Return the layers whose weights are trained, by name: those that `select_masks` takes for the same `targets`.

    Raises:
        ValueError: a target is not a linear layer, which an adapter needs.
    """
    layers = {name.removesuffix(".weight"): target.sites[0][0] for name, target in find_targets(model, targets).items()}
    if other := next((name for name, layer in layers.items() if not isinstance(layer, nn.Linear)), None):
        raise ValueError(f"{other} is not a linear layer, which adapters need; name linear layers with --targets")
    return layers


def trained_values(layers: Mapping[str, nn.Linear], rank: int, method: str = "lora") -> int:
    """Return the number of values that a method trains at this rank.

    DoRA has a magnitude for each row beside LoRA's two matrices. SHiRA has no matrices of a rank; peft gives it as many
    values as LoRA has at the rank that is passed.
    """
    sizes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    return sum(rank * (rows + columns) + rows * (method == "dora") for rows, columns in sizes)


def nearest_rank(layers: Mapping[str, nn.Linear], budget: int, method: str) -> int:
    """Return the rank, at least 1, at which a method trains a number of values nearest to the budget."""
    fixed = trained_values(layers, 0, method)
    each = trained_values(layers, 1, method) - fixed
    below = max(1, (budget - fixed) // each)
    return min(below, below + 1, key=lambda rank: abs(trained_values(layers, rank, method) - budget))


def attach_adapter(
    model: nn.Module, method: str, *, budget: int, targets: Sequence[str] | None = None, seed: int = 0
) -> tuple[nn.Module, dict[str, int]]:
    """Wrap linear layers of the model in peft's layers, in place, and freeze all else.

    Args:
        model: a transformers model with dense weights.
        method: a key of `ADAPTERS`.
        budget: number of values to train, met as closely as a rank can.
        targets: suffixes of module names; None for the linear layers of the blocks.
        seed: seed of the random start.

    Returns:
        peft's wrapper, whose `merge_and_unload` gives the model its plain layers back, and the `rank`, the `budget` and
        the `trained` values.

    Raises:
        ValueError: peft lacks the method, or no rank trains a number within a factor of 2 of the budget.
    """
    layers = linear_layers(model, targets)
    rank = nearest_rank(layers, budget, method)
    expected = trained_values(layers, rank, method)
    if not budget / 2 <= expected <= 2 * budget:
        raise ValueError(
            f"a budget of {budget:,} values is out of reach of {method}: rank {rank} trains {expected:,}; "
            "choose a budget nearer to that"
        )
    config = ADAPTERS[method](rank, list(layers), seed)
    from peft import get_peft_model

    torch.manual_seed(seed)
    wrapper = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    count = sum(parameter.numel() for parameter in trained)
    if count != expected:
        raise ValueError(
            f"{method} of rank {rank} trains {count:,} values, not {expected:,}; this peft counts otherwise"
        )
    print(f"{method} of rank {rank}: {count:,} trained values, {count / budget:.1%} of the budget of {budget:,}")
    return wrapper, {"rank": rank, "budget": budget, "trained": count}


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Take the adapters' layers out of the model while the context lasts, without merging them."""
    wrapped = {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}
    try:
        for name, module in wrapped.items():
            _put(model, name, module.get_base_layer())
        yield
    finally:
        for name, module in wrapped.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def optimizer_over(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Return AdamW over all parameters that require a gradient, fused on a GPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=trained[0].is_cuda)


@contextmanager
def casts_by_autocast(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Let autocast alone cast what adapters multiply, while the context lasts.

    peft casts the input of LoRA's matrices to fp32, and autocast casts it back: two copies of all activations for the
    same numbers. DoRA and SHiRA are left as they are, since what they form of weights has the dtype of the input.
    """
    wrapped = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    plain = [module for module in wrapped if hasattr(module, "lora_A") and not module.lora_magnitude_vector]
    if autocast is None or not plain or len(plain) < len(wrapped):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model):
        yield


def autocast_dtype(method: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of training: bf16 on a GPU; None for `sparse`, whose weights have that dtype."""
    return torch.bfloat16 if method != "sparse" and device.type == "cuda" else None
