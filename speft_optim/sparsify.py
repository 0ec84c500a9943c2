"""Compact values on a model: `sparsify` attaches them, `desparsify` takes them off and leaves plain weights.

For a masked weight W a `SparseWeight` is added as a submodule beside it (`q_proj.sparse_weight`). It holds the one
trainable tensor there, `values`: the weight itself at the masked entries, 1-D, fp32. W stays the model's own tensor,
frozen, and always holds the current values in its own dtype, so forward and checkpoints are the model's own. A W of
bitsandbytes' codes cannot hold them: there the values are laid over what is dequantised (see `quantized.py`).

Memory at rest per masked entry beyond W: 4 bytes of values and 2 to 4 of positions. A submodule rather than a parameter
of the layer, because a module can keep itself out of `state_dict()`, keep its values in fp32 under
`model.to(bfloat16)`, and be copied and pickled with its model; a bare parameter needs a hook for each of these.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from speft_optim.distributed import is_distributed
from speft_optim.export import original_entries
from speft_optim.frozen import FrozenWeight, find, frozen_weight, is_quantized_linear
from speft_optim.kernels import gather_entries, sampled_gradient, scatter_entries_
from speft_optim.linear import tap_target
from speft_optim.masks import Mask, Masks
from speft_optim.optim import SparseAdamW, link, linked, unlink
from speft_optim.quantized import declare_trainable, hand_back, take_over
from speft_optim.targets import Target, all_targets, check_called, check_in_memory


class CompactValues(nn.Parameter):
    """A parameter that counts how often its `.data` was taken.

    What is written through `.data`, as by the swaps of several libraries for averaged weights, passes the version
    counter by.
    """

    taken = 0

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        self.taken += 1
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)


class SparseWeight(nn.Module):
    """The trained entries of one weight, kept equal to the weight they belong to.

    Attributes:
        name: the weight's full parameter name.
        mask: which entries are trained.
        former: which others were trained before the mask changed, and keep what they learned; None if it never did.
        values: (k,) fp32 parameter, the weight's masked entries.
    """

    former: Mask | None = None

    def __init__(self, model: nn.Module, target: Target, mask: Mask):
        super().__init__()
        self.name = target.name
        self.mask = mask.to(target.parameter.device)
        # In a tuple, since a module kept as an attribute would become a child of its own child.
        self._places = (model, target)
        base = frozen_weight(*target.sites[0])
        self.values = CompactValues(base.gather(self.mask.indices).to(torch.float32))
        base.attach(self.mask, self.values)
        link(self.values, self)
        self._remember()
        self._hooks = [m.register_forward_pre_hook(self._before_forward) for m in {m for m, _ in target.sites}]
        self._hooks += tap_target(target, self.values, self)

    @property
    def weight(self) -> Tensor:
        """The model's parameter, frozen: the dense weight, or its codes.

        Raises:
            ValueError: the model holds another module, or a weight of another shape, where this one was attached.
        """
        if change := self._change():
            raise ValueError(
                f"{self.name} {change}, but was sparsified with shape {tuple(self.mask.shape)} (a resized or replaced "
                f"module, one sharded by fully_shard or FSDP, or offloaded?); {_REMEDY}"
            )
        return self._places[1].parameter

    @property
    def base(self) -> FrozenWeight:
        """The weight, whatever holds it; raises as `weight` does."""
        return frozen_weight(*self._places[1].sites[0]) if self.weight is not None else None

    def _change(self) -> str | None:
        """What became of the weight since it was attached to, if that makes an end of it."""
        model, target = self._places
        module, attribute = target.sites[0]
        weight = module._parameters.get(attribute)
        try:
            found = model.get_submodule(self.name.rpartition(".")[0])
        except AttributeError:
            found = None
        if found is not module or weight is None:
            return "is no longer in the model"
        if any(user._parameters.get(name) is not weight for user, name in target.sites[1:]):
            return "is no longer shared by the modules that shared it"
        if weight.is_meta:
            return "was moved to the meta device (offloaded to CPU or disk?)"
        if (shape := target.shape) != self.mask.shape:
            return f"has shape {tuple(shape)}"
        return "has values that were replaced" if linked(self.values) is not self else None

    def synchronize(self) -> None:
        """Let the newer of weight and values win: write changed values, or read entries changed in the weight."""
        weight = self.weight
        if _state(self.values) != self._values_seen:
            self.write()
        elif weight is not self._weight or _state(weight) != self._weight_seen:
            self.read()

    @torch.no_grad()
    def write(self) -> None:
        """Round the values to the weight's dtype and write them into it."""
        self.base.write(self._indices(), self.values)
        self._remember()

    @torch.no_grad()
    def read(self) -> None:
        """Take over entries that differ in the weight; where it holds a value's rounding, the exact value stays."""
        self.values.copy_(self.base.read(self._indices(), self.values))
        self._remember()

    @torch.no_grad()
    def change_mask(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """Train other entries from now on. Those that leave keep their value; `values` stays the same Parameter.

        Args:
            mask: the new entries, of the same weight; their number may differ.

        Returns:
            For each new entry its place among the old ones, (k,) int64, and whether it has one, (k,) bool.
        """
        self.synchronize()
        mask = mask.to(self.values.device)
        if mask.shape != self.mask.shape:
            raise ValueError(f"The mask of {self.name} is for shape {tuple(mask.shape)}, not {tuple(self.mask.shape)}.")
        indices, base = mask.indices, self.base
        places, stays = find(self._indices(), indices)
        entries = base.gather(indices).to(torch.float32)
        entries[stays] = self.values[places[stays]]
        ever = self.ever_trained().to(self.values.device).indices
        former = ever[~torch.isin(ever, indices, assume_unique=True)]
        base.release(self.values)
        self.values.grad = None
        self.values.data = entries
        self.mask, self.former = mask, Mask(former, mask.shape)
        base.attach(mask, self.values)
        self._remember()
        return places, stays

    def ever_trained(self) -> Mask:
        """The entries that are or were trained."""
        if self.former is None or not len(self.former):
            return self.mask
        both = [mask.to(self.values.device).indices for mask in (self.mask, self.former)]
        return Mask(torch.cat(both), self.mask.shape)

    def _indices(self) -> Tensor:
        # Assigned only where it changes something: inside a compiled graph an assignment would break the graph.
        if self.mask.device != self.values.device:
            self.mask = self.mask.to(self.values.device)
        return self.mask.indices

    def _remember(self) -> None:
        self._weight = self._places[1].parameter
        self._weight_seen, self._values_seen = _state(self._weight), _state(self.values)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # Before forward and not after: once autograd has saved the weight for backward it must not be written.
        # A compiled graph cannot look at version counters; `refresh_all` does it in front of the graph.
        if not torch.compiler.is_compiling():
            self.refresh()

    def refresh(self) -> None:
        """Synchronize if something changed; costs next to nothing if not."""
        if not self._weight_is_as_seen() or _state(self.values) != self._values_seen:
            self.synchronize()

    def from_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Sampled gradient of a linear weight, (k,) fp32."""
        if not len(self.mask):
            return torch.zeros_like(self.values)
        return sampled_gradient(left.flatten(0, -2), right.flatten(0, -2), self._indices())

    def from_dense(self, gradient: Tensor) -> Tensor:
        """Masked entries of a dense gradient, (k,) fp32."""
        return gather_entries(gradient, self._indices()).to(torch.float32)

    def detach_from_model(self) -> None:
        """Take off all hooks and this module; the weight keeps the values, unless it was resized or replaced."""
        if self._change() is None:
            self.synchronize()
            self.base.release(self.values)
        for hook in self._hooks:
            hook.remove()
        _, target = self._places
        module, attribute = target.sites[0]
        delattr(module, _child_name(attribute))
        unlink(self.values)
        self._hooks, self._places, self._weight = [], (), None

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # The weight's entry shares memory with the weight, so a write now still reaches it.
        self.synchronize()

    def _load_from_state_dict(self, *args) -> None:
        # If the weight beside was just loaded, what it holds now wins over values of before, also over newer ones.
        if self._weight_is_as_seen():
            self.synchronize()
        else:
            self.read()

    def _weight_is_as_seen(self) -> bool:
        module, attribute = self._places[1].sites[0]
        weight = module._parameters.get(attribute)
        return weight is self._weight and _state(weight) == self._weight_seen

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but keep the values in fp32 whatever the weights are cast to."""
        if self._change() is None:
            self.synchronize()
        exact = self.values.detach()
        super()._apply(fn, recurse)
        if self.values.dtype != torch.float32:
            self.values.data = exact.to(self.values.device)
            if self.values.grad is not None:
                self.values.grad.data = self.values.grad.data.to(torch.float32)
        # Written again at the next use: a weight cast up from 16 bits would only hold their rounding.
        self._values_seen = None
        return self

    def __getstate__(self):
        """Copied and pickled with weight and values in step: a copy cannot tell which of them is newer."""
        self.refresh()
        return self.__dict__.copy()

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        # Pickle makes a plain Parameter of it.
        self.values.__class__ = CompactValues
        link(self.values, self)
        # Not through the model, of which this copy may be made before the rest. The weight may have been copied before
        # `__getstate__` wrote to it. Codes are never written to.
        if self._weight.is_floating_point():
            scatter_entries_(self._weight.detach(), self.mask.indices, self.values.detach())
        self._weight_seen, self._values_seen = _state(self._weight), _state(self.values)

    def extra_repr(self) -> str:
        """Entries and density, for printed models."""
        return f"entries={len(self.mask):,}, density={self.mask.density:.3%}"


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Mask],
    *,
    original: str | Path | None = None,
    keep_empty: bool = False,
) -> list[nn.Parameter]:
    """Attach compact values for `masks` and freeze all else.

    On a model that bitsandbytes quantised to 8 or 4 bits all its quantised linears are computed as frozen linear layers
    from here on, with the values laid over (see `quantized.py`). transformers' flags `is_quantized` and
    `is_loaded_in_8bit/4bit` are then False until `desparsify`: they mean "its layers are the quantiser's and nothing
    trains", which is no longer so, and Trainer and SFTTrainer take the model like any other. `save_pretrained` writes
    the merged weights, as `export_merged` does.

    Args:
        model: a model in memory; its weights are left in place and in their dtype (fp32, bf16, fp16 or quantised).
        masks: from a parameter's full name to its mask.
        original: None starts the values from the weight's own entries, on a quantised base the dequantised ones: the
            model then computes what it did before. The folder of the checkpoint that the base was quantised from
            starts them from the entries there, which takes the rounding error off the masked entries.
        keep_empty: attach to weights with an empty mask too, so that a `MaskSchedule` can give them entries; else they
            are left as they are.

    Returns:
        The trainable parameters, each (k,) fp32, in the model's order, for `SparseAdamW` or any other optimizer.

    Raises:
        ValueError: a name or shape does not fit the model, the masks are empty, or the model is sparsified already;
            the model is then as it was.
        TypeError: a masked weight is not floating, or `masks` is no mapping to `Mask`.
    """
    # Not at import: its decorator loads the compiler, and Triton with it.
    from speft_optim.eager import refresh_all

    targets = all_targets(model)
    _check_masks(model, masks, targets)
    check_equal_on_all_ranks(masks)
    _follow_optimizers()
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = {n: (m.shape, m.indices) for n, m in masks.items() if len(m)}
    entries = {} if original is None else original_entries(original, found)
    model.requires_grad_(False)
    take_over(model)
    declare_trainable(model)
    weights = []
    for name, target in targets.items():
        if name in masks and (keep_empty or len(masks[name])):
            if name in entries:
                frozen_weight(*target.sites[0]).put(masks[name], entries[name])
            weight = SparseWeight(model, target, masks[name])
            module, attribute = target.sites[0]
            module.add_module(_child_name(attribute), weight)
            weights.append(weight)
    hooks = [model.register_forward_pre_hook(refresh_all), *_let_checkpoints_see_gradients(model)]
    model.__dict__[_BEFORE] = (weights, required_grad, hooks)
    return [weight.values for weight in weights]


def desparsify(model: nn.Module) -> None:
    """Undo `sparsify`: plain weights with the trained values, each requiring gradients as it did before.

    A quantised weight keeps its trained entries laid over, untrained from here on; without any it is bitsandbytes' own.

    Args:
        model: the model that was sparsified, or a wrapper around it.

    Raises:
        ValueError: the model is not sparsified.
    """
    roots = _sparsified(model)
    if not roots:
        raise ValueError(f"{type(model).__name__} is not sparsified; there is nothing to undo.")
    for root in roots:
        weights, required_grad, hooks = root.__dict__.pop(_BEFORE)
        for weight in weights:
            weight.detach_from_model()
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(required_grad.get(name, parameter.requires_grad))
        for hook in hooks:
            hook.remove()
        hand_back(root)


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """The sparsified weights of a model, in the order of its parameters; none on a plain model."""
    return [module for module in model.modules() if isinstance(module, SparseWeight)]


def _sparsified(model: nn.Module) -> list[nn.Module]:
    """The modules in the model, itself included, that `sparsify` was called on."""
    return [module for module in model.modules() if _BEFORE in module.__dict__]


_BEFORE = "_before_sparsify"
_REMEDY = "call desparsify, and sparsify again after such changes, and build a new optimizer."


def _state(tensor: Tensor) -> tuple[int, int, int]:
    """Changes with every in-place operation on the tensor and every exchange of its storage."""
    return tensor._version, tensor.data_ptr(), getattr(tensor, "taken", 0)


def _child_name(attribute: str) -> str:
    return f"sparse_{attribute}"


def _check_masks(model: nn.Module, masks: Mapping[str, Mask], targets: dict[str, Target]) -> None:
    if sparse_weights(model) or _sparsified(model):
        raise ValueError("The model is sparsified already; call desparsify(model) first.")
    if wrapper := _sharding_wrapper(model):
        raise ValueError(
            f"The model is sharded by {wrapper}: a rank holds pieces of its weights, to which masks do not apply. "
            "Use DistributedDataParallel; gradients and optimizer state are no longer than the masks."
        )
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Mask) for mask in masks.values()):
        raise TypeError(f"sparsify needs a dict from parameter names to Mask, got {type(masks).__name__}.")
    for name, mask in masks.items():
        if name not in targets:
            shared = dict(model.named_parameters(remove_duplicate=False)).get(name)
            first = next((n for n, target in targets.items() if target.parameter is shared), None)
            raise ValueError(
                f"There is a mask for {name}, but {type(model).__name__} has no parameter of that name"
                + (f": the weight is shared and goes by its first name, {first}." if first else ".")
            )
        parameter, shape = targets[name].parameter, targets[name].shape
        if shape != mask.shape:
            shapes = f"{tuple(mask.shape)}, the parameter {tuple(shape)}"
            raise ValueError(f"The mask of {name} is for shape {shapes}; select the masks on this model.")
        floating = parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not floating and not is_quantized_linear(targets[name].sites[0][0]):
            raise TypeError(
                f"{name} has dtype {parameter.dtype}; weights of fp32, bf16 and fp16 and those of bitsandbytes' linear "
                "layers can be sparsified."
            )
        check_in_memory(name, parameter)
        check_called(name, targets[name])
    if not any(len(mask) for mask in masks.values()):
        raise ValueError(f"The {len(masks)} masks hold no entry, so nothing would train; raise density or budget.")


def _sharding_wrapper(model: nn.Module) -> str | None:
    """What shards the model over processes, told by class names so that nothing is imported for the question."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FSDPModule" in classes:
        return "fully_shard"
    if "FullyShardedDataParallel" in classes:
        return "FullyShardedDataParallel"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    return "a device mesh (DTensor)" if any(hasattr(p, "device_mesh") for p in model.parameters()) else None


def check_equal_on_all_ranks(masks: Mapping[str, Mask]) -> None:
    """Replicas whose masks differ would average gradients of different entries, and nothing would say so.

    Raises:
        ValueError: they differ.
    """
    if not is_distributed():
        return
    fingerprints: list = [None] * dist.get_world_size()
    dist.all_gather_object(fingerprints, Masks(masks).fingerprint())
    if len(set(fingerprints)) > 1:
        raise ValueError(
            f"The masks differ between processes (fingerprints by rank: {', '.join(fingerprints)}); select them once "
            "and share the file (Masks.save, Masks.load), or let all processes calibrate on the same batches and seed."
        )


def _follow_optimizers() -> None:
    """Write through after the step of *any* optimizer, once per process.

    Version counters would do for torch's own, but not for optimizers that update through a pointer (bitsandbytes).
    """
    if not _following:
        _following.append(register_optimizer_step_post_hook(_write_after_step))


_following: list = []


def _write_after_step(optimizer, args, kwargs) -> None:
    if isinstance(optimizer, SparseAdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (weight := linked(parameter)) is not None:
                weight.synchronize() if parameter.grad is None else weight.write()


def _let_checkpoints_see_gradients(model: nn.Module) -> list:
    """Hook the input embeddings, if the model tells which they are.

    Reentrant checkpointing drops all gradients of a block whose inputs need none, as happens once embeddings are
    frozen.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        return []
    return [embeddings.register_forward_hook(_RequireGradient(model))]


class _RequireGradient:
    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        if checkpointing and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)
