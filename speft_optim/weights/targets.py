"""Finds the weights of a model: from the user's `targets` to the modules that hold and use each weight.

A weight shared by several modules (tied embeddings) is one `Target` with several sites, under the first name PyTorch
lists.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.foreign import check_layers, check_parameters
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.verification import WatchedWeight
from speft_optim.weights.wrappers import plain_modules, steps_to

Targets = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


class AddedModule(nn.Module):
    """A module that this library adds to a model; its parameters are not weights of the model."""


@dataclass(frozen=True)
class Target:
    """One weight of a model, found by `find_targets`; it refers to the weight and holds no copy.

    Attributes:
        name: the parameter's full name, which is also that of its mask.
        sites: the (module, attribute) pairs that hold it; several if it is tied.
    """

    name: str
    sites: tuple[tuple[nn.Module, str], ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The model's current parameter."""
        module, attribute = self.sites[0]
        return module._parameters[attribute]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight and its mask; of a quantised weight the dense shape, not that of its storage."""
        return frozen_weight(*self.sites[0]).shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `rows` and of the gradient: the weight's own, or fp32 for a quantised weight."""
        return frozen_weight(*self.sites[0]).dtype

    @property
    def device(self) -> torch.device:
        """The device on which the weight is used."""
        return frozen_weight(*self.sites[0]).device

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The weight as (rows, columns): its first dimension by all others."""
        rows = self.shape[0] if self.shape else 1
        return rows, self.shape.numel() // max(1, rows)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` (exclusive) of the weight as a matrix, (last - first, columns) in `dtype`."""
        return frozen_weight(*self.sites[0]).rows(first, last)

    def dequantized_base(self, dtype: torch.dtype) -> Tensor | None:
        """Return a quantised weight in `dtype` without its trained entries, newly made; None for a dense weight.

        A dense weight holds its trained entries itself, so its entries from before training are only in its checkpoint.
        """
        weight = frozen_weight(*self.sites[0])
        return None if isinstance(weight, FloatingWeight) else weight.dense_base(dtype)


def all_targets(model: nn.Module) -> dict[str, Target]:
    """Return every weight of the model by its name, in the model's order; compact values are left out.

    A shared weight occurs once, under its first name.
    """
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for path, module in plain_modules(model):
        if isinstance(module, AddedModule):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), f"{path}.{attribute}" if path else attribute)
                sites.setdefault(id(parameter), []).append((module, attribute))
    return {name: Target(name, tuple(sites[key])) for key, name in names.items()}


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter by its id, several where it is shared."""
    names: dict[int, list[str]] = {}
    for path, module in plain_modules(model):
        for attribute, parameter in module._parameters.items():
            names.setdefault(id(parameter), []).append(f"{path}.{attribute}" if path else attribute)
    return names


def find_targets(model: nn.Module, targets: Targets = None) -> dict[str, Target]:
    """Return the weights that `targets` selects, as `select_masks` does.

    Use it to build your own masks (`masks = Masks({name: Mask(positions, target.shape)})`), or to see which weights a
    `targets` argument includes before you select masks.

    Args:
        model: any module.
        targets: None for the linear weights of the decoder blocks (including stacked expert weights; no embeddings,
            head, norms or biases); or suffixes of module names, which stand for their `weight` (`"q_proj"`), or of
            parameter names (`"q_proj.bias"`); or a function from a parameter's full name and the parameter to True or
            False.

    Returns:
        Each weight by its full parameter name, in the model's order; a tied weight once, under its first name.

    Raises:
        TypeError: `targets` has another type, or a weight is quantised by another library than bitsandbytes.
        ValueError: nothing matches, a suffix matches nothing or occurs twice, or a match is on the meta device or is
            used where no hook can observe its gradient, or has hooks on its gradient.
    """
    # This check comes first, since a foreign quantiser's tensors may lack the operations that follow.
    check_parameters(model)
    known = all_targets(model)
    if targets is None:
        check_layers(model)
        found = {name: target for name, target in known.items() if _is_block_matrix(model, target)}
        remedy = "the model has no nn.ModuleList of blocks with linear weights; name them with targets=[...]"
    elif callable(targets):
        _check_predicate(targets)
        found = {name: target for name, target in known.items() if targets(name, target.parameter)}
        remedy = "the predicate was true for no parameter; let it be for some"
    else:
        found, remedy = _by_suffix(model, known, targets), "the list of targets is empty; name some"
    if not found:
        raise ValueError(f"No weight to select among the {len(known)} parameters of {type(model).__name__}: {remedy}.")
    for name, target in found.items():
        parameter = target.parameter
        if not parameter.is_floating_point() and not is_quantized_linear(target.sites[0][0]):
            raise TypeError(f"{name} has dtype {parameter.dtype}, and only floating weights train; leave it out.")
        if target.device.type == "meta":
            check_in_memory(name, target.parameter)
        check_called(name, target)
        check_unhooked(name, target.parameter)
    return found


def _check_predicate(predicate: Callable) -> None:
    try:
        inspect.signature(predicate).bind("name", None)
    except TypeError as error:
        raise TypeError(f"targets={predicate!r} must take a parameter's name and the parameter: {error}.") from error
    except ValueError:
        # Some functions written in C have no signature that could be checked.
        pass


def check_in_memory(name: str, parameter: nn.Parameter) -> None:
    """Refuse a weight on the meta device, which has no data.

    Raises:
        ValueError: the parameter is on the meta device.
    """
    if parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device (offloaded to CPU or disk?); load the model without offloading, or pass "
            "offload='cuda' and base=folder with its safetensors."
        )


def check_differentiable(model: nn.Module) -> None:
    """Refuse inference mode, in which autograd cannot work.

    Raises:
        ValueError: inference mode is on, or a parameter of the model was made in it.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, in which nothing can be differentiated; leave it first.")
    made = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made is not None:
        raise ValueError(f"{made} was made in torch.inference_mode(), so nothing can train it; load the model outside.")


def check_called(name: str, target: Target) -> None:
    """Refuse a weight whose gradient no hook can observe, since it is not used by calling its module.

    Raises:
        ValueError: it belongs to the output projection of torch's own attention, or to a recurrent module.
    """
    for module, _ in target.sites:
        if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            raise ValueError(
                f"{name} cannot be trained: nn.MultiheadAttention reads it without calling its module. Leave it out of "
                "targets (in_proj_weight can stay), or use an attention that calls its output projection."
            )
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"{name} cannot be trained: {type(module).__name__} reads its weights from a list of its own. Leave it "
                "out of targets, or unroll nn.LSTMCell, nn.GRUCell or nn.RNNCell."
            )


def check_unhooked(name: str, parameter: nn.Parameter) -> None:
    """Refuse a weight whose gradient something changes or takes: neither its scores nor its values would heed that.

    Raises:
        ValueError: it has hooks on its gradient.
    """
    if isinstance(parameter, WatchedWeight):
        return  # It is masked already: the hook is this library's, and nothing could add another.
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise ValueError(
            f"{name} has hooks on its gradient (register_hook or register_post_accumulate_grad_hook), which neither "
            "its scores nor its compact values would pass through; remove them, and register them on what sparsify "
            "returns."
        )


def _by_suffix(model: nn.Module, known: dict[str, Target], suffixes: Iterable[str]) -> dict[str, Target]:
    if isinstance(suffixes, str):
        raise TypeError(f"targets={suffixes!r} is one string; pass a list, targets=[{suffixes!r}].")
    if not isinstance(suffixes, Iterable):
        raise TypeError(f"targets is a {type(suffixes).__name__}; pass a list of names, a predicate, or None.")
    suffixes = list(suffixes)
    for position, suffix in enumerate(suffixes):
        if not isinstance(suffix, str) or not suffix:
            raise TypeError(f"targets holds {suffix!r}; it takes suffixes of module or parameter names.")
        if suffix in suffixes[:position]:
            raise ValueError(f"targets names {suffix!r} twice; name each once.")
    chosen = set()
    for suffix in suffixes:
        endings = ("." + suffix, "." + suffix + ".weight")
        matches = [name for name in known if ("." + name).endswith(endings)]
        if not matches:
            every = model.named_parameters(remove_duplicate=False)
            shared = {id(p) for name, p in every if ("." + name).endswith(endings)}
            first = next((name for name, target in known.items() if id(target.parameter) in shared), None)
            if first is not None:
                raise ValueError(
                    f"targets names {suffix!r}, whose weight is shared and goes by its first name, {first}."
                )
            check_layers(model, suffix.removesuffix(".weight"))
            examples = ", ".join(list(known)[:3])
            raise ValueError(f"targets names {suffix!r}, which no parameter ends with; there are e.g. {examples}.")
        chosen.update(matches)
    return {name: target for name, target in known.items() if name in chosen}


def _is_block_matrix(model: nn.Module, target: Target) -> bool:
    """Return whether the weight is a matrix (or a stack of them) of one of the model's repeated blocks."""
    module, attribute = target.sites[0]
    if len(target.shape) < 2 or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    return any(isinstance(parent, nn.ModuleList) for parent, _, _ in steps_to(model, target.name.rpartition(".")[0]))
