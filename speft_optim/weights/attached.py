"""What `sparsify` attached to a model: the masked weights in it, and the record by which `desparsify` undoes all.

These are all the attributes that this library leaves on objects of others. `desparsify` or `unload_adapter` remove
them, except for what quantised layers need to keep what they learned.

* The module that `sparsify` was called on: `_before_sparsify`, its record. With `offload`: `_offloaded_to`.
* A module with a masked weight: the module `sparse_weight` (for a weight of another name, `sparse_` and that) and,
  while its forward runs, an alias in the place of the weight and `_uses_of_weight_1`. The masked parameter has a class
  of its own and a `watcher` of its uses (`verification.WatchedWeight`), with `offload` one that is `behind`.
* A module inside a sparsified model: `compile`, and `_compiled_call_impl` once it is compiled (`eager.py`). With
  `offload`: `_compiled_call_impl`, `_apply`, `_streamed_weights`, and copies of its parameters while its forward runs.
* A bitsandbytes layer: `forward` (under accelerate's hooks `_old_forward`), `_name_in_model`, and the names that its
  state dict adds (`quantized_state.STATE_KEYS`). The object that has its scales: `trained_entries`.
* A model of transformers with such layers: `save_pretrained`, `is_quantized`, `_is_quantized_before_sparsify`,
  `_refuses_to_be_replicated`, and a copy of its `hf_quantizer` with `is_serializable`.
* A sharded model of transformers: `save_pretrained`.
* A model with adapters: `_loaded_adapters`.
* The process: hooks before and after the steps of all optimizers, and one on the registration of parameters.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from speft_optim.distributed import is_distributed
from speft_optim.weights.targets import AddedModule
from speft_optim.weights.wrappers import RefuseReducer

if TYPE_CHECKING:
    from speft_optim.weights.sparse_weight import SparseWeight

# The attribute of the module that `sparsify` was called on which has its `Record`.
_RECORD = "_before_sparsify"


class Record(NamedTuple):
    """What a call of `sparsify` did to a model.

    Attributes:
        weights: the masked weights that it attached.
        required_grad: whether each weight of the model required gradients before, by name.
        hooks: what it hooked to the model, each with a method `remove`.
    """

    weights: "list[SparseWeight]"
    required_grad: dict[str, bool]
    hooks: list


def keep_record(root: nn.Module, record: Record) -> None:
    """Keep the record with the module that `sparsify` was called on."""
    root.__dict__[_RECORD] = record


def record_of(root: nn.Module) -> Record:
    """Return the record of the very module that `sparsify` was called on."""
    return root.__dict__[_RECORD]


def take_record(root: nn.Module) -> Record:
    """Remove the record from the module that `sparsify` was called on, and return it."""
    return root.__dict__.pop(_RECORD)


def sparsified_roots(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the model, itself included, that `sparsify` was called on."""
    return [module for module in model.modules() if _RECORD in module.__dict__]


def refuse_reducer(model: nn.Module, may_resize: bool) -> None:
    """Refuse DistributedDataParallel where moving masks cannot work with it, until `desparsify` or the next call.

    Args:
        model: the sparsified model.
        may_resize: whether weights will change in their numbers of entries.
    """
    for root in sparsified_roots(model):
        hooks = record_of(root).hooks
        for earlier in [hook for hook in hooks if isinstance(hook, RefuseReducer)]:
            earlier.remove()
            hooks.remove(earlier)
        if is_distributed():
            hooks.append(RefuseReducer(root, may_resize))


def sparse_weights(model: nn.Module) -> "list[SparseWeight]":
    """Return the sparsified weights of a model, in the order of its parameters; none for a plain model."""
    # They are the only modules that this library adds to a model.
    return [module for module in model.modules() if isinstance(module, AddedModule)]


def is_told_first(weight: "SparseWeight", what: str) -> bool:
    """Return whether a message about a weight's model is the first of its kind, and record it as logged."""
    if what in weight.told:
        return False
    for other in sparse_weights(weight.place.model):
        other.told |= {what}
    return True


def name_beside(attribute: str) -> str:
    """Return the name of the module that is added beside a weight's attribute."""
    return f"sparse_{attribute}"


def weight_beside(module: nn.Module, attribute: str) -> "SparseWeight | None":
    """Return the masked weight that was added beside a module's attribute, or None."""
    added = module._modules.get(name_beside(attribute))
    return added if isinstance(added, AddedModule) else None
