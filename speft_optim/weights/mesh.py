"""How torch's FSDP sharded a model: whether masked weights support it, and where their rows are kept."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from speft_optim.distributed import together
from speft_optim.weights.bnb import lost_by_sharding
from speft_optim.weights.sharded import is_fsdp_unit, is_managed, is_sharded, parameter_groups
from speft_optim.weights.wrappers import plain_modules


def check_divisions(model: nn.Module) -> None:
    """Refuse a model that is not divided by `fully_shard`, or of which a weight is divided otherwise than by rows.

    Raises:
        ValueError: says how it is divided; see also `check_division`.
    """
    if (wrapper := _other_wrapper(model)) is not None:
        raise ValueError(
            f"The model is sharded by {wrapper}: a rank holds pieces of its weights, to which masks do not apply. "
            "Shard it with torch.distributed.fsdp.fully_shard (FSDP version 2), or use DistributedDataParallel; "
            "gradients and optimizer state are no longer than the masks."
        )
    for path, module in plain_modules(model):
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if is_sharded(parameter):
                check_division(name, module, parameter)


def _other_wrapper(model: nn.Module) -> str | None:
    """Return the name of what shards the model, if that is not `fully_shard`, by class names, without imports."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FSDPModule" in classes:
        return None
    if "FullyShardedDataParallel" in classes:
        return "FullyShardedDataParallel"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    return "a device mesh (DTensor)" if any(map(is_sharded, model.parameters())) else None


def check_division(name: str, module: nn.Module, parameter: nn.Parameter) -> None:
    """Refuse a weight that is divided otherwise than by rows.

    Raises:
        ValueError: it is divided in two dimensions, over some processes only, by columns or by no FSDP, or the scales
            of a quantised one are lost.
    """
    if lost := lost_by_sharding(module):
        raise ValueError(f"{name} is {lost}.")
    if how := _other_division(module, parameter):
        raise ValueError(
            f"{name} is {how}. Masked weights can be divided by rows, with copies of all rows or without: call "
            "fully_shard with a mesh of all processes, of one dimension or two for hybrid sharding, and without "
            "shard_placement_fn."
        )


def _other_division(module: nn.Module, parameter: nn.Parameter) -> str | None:
    """How a DTensor is divided, if that is not by rows over all processes."""
    mesh, (*others, placement) = parameter.device_mesh, parameter.placements
    if len(others) > 1 or not all(other.is_replicate() for other in others):
        return f"divided as {parameter.placements} on a mesh of {mesh.ndim} dimensions, as of tensor parallelism"
    if mesh.size() != dist.get_world_size():
        return f"on {mesh.size()} of {dist.get_world_size()} processes, as of pipeline or tensor parallelism"
    if not is_managed(module):
        return "a DTensor that no fully_shard made, as of tensor parallelism"
    return None if placement.is_shard(0) else f"divided as {placement}"


def once(model: nn.Module, act: Callable[[], None]) -> None:
    """Let one process act, where all of them came this far with the same sharded model; an error is one in all.

    Of a model that is not sharded each process acts for itself.
    """
    if not is_fully_sharded(model):
        act()
        return
    with together():
        if dist.get_rank() == 0:
            act()


def keep_whole(kind: type[nn.Module]) -> None:
    """Let `fully_shard` pass by the modules of a class, and leave their parameters whole in every process.

    It does so with modules that another of torch's ways to train in parallel was applied to, known by their registry.
    Of the class and not of each module, since the registry's key is another one in each process.
    """
    if dist.is_available():
        from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

        setattr(kind, REGISTRY_KEY, {"replicate": RegistryItem()})


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or on parts of it."""
    return any(map(is_fsdp_unit, model.modules()))


def innermost_units(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each module the one around it that `fully_shard` was called on, if no other lies in that: usually a block."""

    def is_innermost(unit: nn.Module) -> bool:
        return not any(is_fsdp_unit(module) for module in unit.modules() if module is not unit)

    units = [module for module in model.modules() if is_fsdp_unit(module) and is_innermost(module)]
    return {module: unit for unit in units for module in unit.modules()}


def cast_inputs(model: nn.Module) -> torch.dtype | None:
    """The dtype that FSDP casts the inputs of a block to; None if it casts none."""
    policies = [module._get_fsdp_state()._mp_policy for module in model.modules() if is_fsdp_unit(module)]
    dtypes = [policy.param_dtype for policy in policies if policy.cast_forward_inputs]
    return next((dtype for dtype in dtypes if dtype is not None), None)


def reshard(model: nn.Module) -> None:
    """Let FSDP drop the weights that it keeps gathered after a forward, so that the modules hold DTensors."""
    for module in filter(is_fsdp_unit, model.modules()):
        module.reshard()


def prepare_calibration(model: nn.Module) -> None:
    """Let FSDP note what the model trains before that is frozen for a time: it does so in its first forward only."""
    if is_fsdp_unit(model):
        model._get_fsdp_state()._lazy_init()
    reshard(model)


def sharded_parameter(site: tuple[nn.Module, str], parents: Iterable[nn.Module]) -> nn.Parameter | None:
    """The DTensor that `fully_shard` made of a module's parameter, also while the gathered weight is in its place.

    Args:
        site: the module and the parameter's name in it.
        parents: the module and those around it, the innermost first.

    Returns:
        None where it did not.

    Raises:
        ValueError: another FSDP divided the model, or this one a model around it.
    """
    module, attribute = site
    now = module._parameters.get(attribute)
    if is_sharded(now) or not is_managed(module):
        return now if is_sharded(now) else None
    if not (found := list(parameter_groups(parents))):
        raise ValueError(
            f"A {type(module).__name__} was sharded after sparsify by FullyShardedDataParallel (FSDP version 1), or by "
            "a fully_shard of the model around the one that was sparsified; call fully_shard on the very model that "
            "sparsify gets, or on parts of it, or use DistributedDataParallel."
        )
    own = _own_record(site, found)
    return None if own is None else own.sharded_param


def gathered_parameter(site: tuple[nn.Module, str], parents: Iterable[nn.Module]) -> nn.Parameter | None:
    """The parameter that FSDP fills with the gathered weight in each pass; None before the first."""
    return getattr(_own_record(site, parameter_groups(parents)), "_unsharded_param", None)


def reshard_parameter(site: tuple[nn.Module, str], parents: Iterable[nn.Module]) -> None:
    """Let FSDP drop what it gathered of the parameters that it gathers together with this one."""
    owners = (module for module in parents if _own_record(site, parameter_groups([module])) is not None)
    next(owners).reshard()


def _own_record(site: tuple[nn.Module, str], found: Iterable[list]) -> object | None:
    """What FSDP keeps of one parameter, among its groups."""
    for parameter in (parameter for groups in found for group in groups for parameter in group.fsdp_params):
        info = parameter._module_info
        others = zip(info.shared_modules, info.shared_param_names, strict=True)
        if site in [(info.module, info.param_name), *others]:
            return parameter
    return None
