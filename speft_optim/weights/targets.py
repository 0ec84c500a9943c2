"""Where a weight lives in a model: from what the user names to the modules that use it.

A weight shared by several modules (tied embeddings) is one `Target` with several sites, under the first name PyTorch
lists.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.foreign import check_layers, check_parameters
from speft_optim.weights.storage import DenseWeight, frozen_weight
from speft_optim.weights.wrappers import plain_modules, steps_to

Targets = Iterable[str] | Callable[[str, nn.Parameter], bool] | None


class AddedModule(nn.Module):
    """A module that this library adds to a model: its parameters are not weights of the model."""


@dataclass(frozen=True)
class Target:
    """One weight of a model, as `find_targets` finds it; nothing is copied before a method is called.

    Attributes:
        name: the parameter's full name, under which a mask of it goes.
        sites: (module, attribute) pairs that hold it, several where it is shared.
    """

    name: str
    sites: tuple[tuple[nn.Module, str], ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor in the model now."""
        module, attribute = self.sites[0]
        return module._parameters[attribute]

    @property
    def shape(self) -> torch.Size:
        """Shape that a mask of the weight has, whatever shape a quantised weight is stored in."""
        return frozen_weight(*self.sites[0]).shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's own dtype, fp32 of a quantised one: that of its rows and of its gradient."""
        return frozen_weight(*self.sites[0]).dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is computed with."""
        return frozen_weight(*self.sites[0]).device

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The weight as (rows, columns): its first dimension by all others."""
        rows = self.shape[0] if self.shape else 1
        return rows, self.shape.numel() // max(1, rows)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive) of the weight as a matrix, in its own dtype or dequantised to fp32."""
        return frozen_weight(*self.sites[0]).rows(first, last)

    def dequantized_base(self, dtype: torch.dtype) -> Tensor | None:
        """A quantised weight in `dtype` without the trained entries beside it, newly made; None of a dense weight.

        A dense weight holds its trained entries itself, so that what it was before training is in its checkpoint only.
        """
        weight = frozen_weight(*self.sites[0])
        return None if isinstance(weight, DenseWeight) else weight.dense_base(dtype)


def all_targets(model: nn.Module) -> dict[str, Target]:
    """Every weight of the model by its first name, shared ones once, in the model's order; without compact values."""
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


def find_targets(model: nn.Module, targets: Targets = None, *, may_be_sharded: bool = False) -> dict[str, Target]:
    """The weights that `targets` names: those for which `select_masks` and `MaskSchedule` choose entries.

    For masks of one's own (`masks = Masks({name: Mask(positions, target.shape)})`), and to see what an argument
    `targets` takes in before anything is selected.

    Args:
        model: any module.
        targets: None for the linear weights of the blocks (stacked expert weights included; no embeddings, head, norms,
            biases); or suffixes of module names, whose `weight` is meant (`"q_proj"`), or of parameter names
            (`"q_proj.bias"`); or a predicate of a parameter's full name and the parameter.
        may_be_sharded: whether parameters may be DTensors.

    Returns:
        From a parameter's full name to its weight, in the model's order; a shared weight once, under its first name.

    Raises:
        TypeError: `targets` is of another kind, or weights are a quantiser's other than bitsandbytes'.
        ValueError: nothing matches, a suffix matches nothing or occurs twice, or a match is on the meta device
            or used out of sight of hooks.
    """
    # Before anything else looks at them: a quantiser's tensors may lack the very operations of a look.
    check_parameters(model, may_be_sharded=may_be_sharded)
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
    return found


def _check_predicate(predicate: Callable) -> None:
    try:
        inspect.signature(predicate).bind("name", None)
    except TypeError as error:
        raise TypeError(f"targets={predicate!r} must take a parameter's name and the parameter: {error}.") from error
    except ValueError:
        # Of some functions in C nothing tells what they take.
        pass


def check_in_memory(name: str, parameter: nn.Parameter) -> None:
    """Refuse a weight that is only a placeholder.

    Raises:
        ValueError: it is on the meta device.
    """
    if parameter.is_meta:
        raise ValueError(
            f"{name} is on the meta device (offloaded to CPU or disk?); load the model without offloading."
        )


def check_differentiable(model: nn.Module) -> None:
    """Refuse what autograd cannot work on.

    Raises:
        ValueError: inference mode is on, or the model was made in it.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, in which nothing can be differentiated; leave it first.")
    made = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made is not None:
        raise ValueError(f"{made} was made in torch.inference_mode(), so nothing can train it; load the model outside.")


def check_called(name: str, target: Target) -> None:
    """Refuse a weight that is read where no hook sees it.

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
    """Whether the weight is a matrix (or a stack of them) of one of the model's repeated blocks."""
    module, attribute = target.sites[0]
    if len(target.shape) < 2 or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    return any(isinstance(parent, nn.ModuleList) for parent, _, _ in steps_to(model, target.name.rpartition(".")[0]))


def is_product(module: nn.Module, attribute: str) -> bool:
    """Whether the module's forward is a product of its input with the weight, either way round."""
    return is_linear(module, attribute) or is_transposed_linear(module, attribute)


def is_linear(module: nn.Module, attribute: str) -> bool:
    """Whether the module's own forward uses the weight as `x @ W.T`, so that a hook on its output sees it all."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return attribute == "weight" and (plain or is_quantized_linear(module))


def has_other_forward(module: nn.Module, attribute: str) -> bool:
    """Whether a module that `is_product` was true of has got another forward, in its instance or its class.

    The wrapper that accelerate's hooks put around a forward is none.
    """
    own = module.__dict__.get("forward")
    if own is not None and hasattr(module, "_hf_hook"):
        own = None if getattr(module._old_forward, "__func__", None) is type(module).forward else own
    return own is not None or not _is_of_library(type(module).forward)


def _is_of_library(forward: Callable) -> bool:
    # By its code and not its name, which functools.wraps passes on to what stands in for it.
    code, home = getattr(forward, "__code__", None), getattr(forward, "__globals__", {}).get("__name__")
    return code is not None and code.co_name == "forward" and home in (_LINEAR_HOME, _CONV1D_HOME)


_LINEAR_HOME, _CONV1D_HOME = nn.Linear.__module__, "transformers.pytorch_utils"


def is_transposed_linear(module: nn.Module, attribute: str) -> bool:
    """Whether the weight is used as `x @ W`: GPT-2's Conv1D, known by name since transformers is not imported here."""
    return attribute == "weight" and type(module).__name__ == "Conv1D" and type(module).__module__ == _CONV1D_HOME
