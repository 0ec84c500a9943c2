"""SparseAdamW: AdamW over the compact values of masked entries.

PyTorch's `SparseAdam` takes sparse *gradients* of a dense parameter and keeps dense moments. Here parameter, gradient
and moments all have the length of the mask; the weight itself is written at the masked entries in the same step.
"""

import logging
from collections.abc import Iterator
from weakref import ref

import torch
from torch import Tensor, nn

from speft_optim.distributed import is_distributed
from speft_optim.kernels.csr import CSR
from speft_optim.kernels.entries import gather_entries, scatter_entries_
from speft_optim.kernels.launch import launches
from speft_optim.masks.mask import Mask, find
from speft_optim.weights.compact_values import CompactValues, exchange, leave_graph, link, unlink
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.mesh import check_division, gathered_parameter, keep_whole, sharded_parameter
from speft_optim.weights.observation import observe_gradient
from speft_optim.weights.sharded import ShardedWeight
from speft_optim.weights.storage import DenseWeight, FrozenWeight, frozen_weight, keep_attached
from speft_optim.weights.targets import AddedModule, Target
from speft_optim.weights.verification import DenseGradient
from speft_optim.weights.wrappers import steps_to

logger = logging.getLogger(__name__)


_REMEDY = "call desparsify, and sparsify again after such changes, and build a new optimizer."


class SparseWeight(AddedModule):
    """The trained entries of one weight, kept equal to the weight they belong to.

    Attributes:
        name: the weight's full parameter name.
        mask: which entries are trained.
        former: which others were trained before the mask changed, and keep what they learned; None if it never did.
        values: (k,) fp32 parameter, the weight's masked entries.
        accumulator: what else gets the weight's whole gradient in training, as a `MaskSchedule` asks for; None usually.
    """

    former: Mask | None = None
    accumulator: Accumulator | None = None
    # Whether a use outside the weight's module was told of, and whether other processes lack its gradient.
    _told_of_use = _is_unreduced = False
    # Whether it was told that something thawed the weights.
    _told_of_thaw = False

    def __init__(self, model: nn.Module, target: Target, mask: Mask, verify: bool = True):
        super().__init__()
        self.name = target.name
        base = frozen_weight(*target.sites[0])
        self.mask = mask.to(base.device)
        # In a tuple, since a module kept as an attribute would become a child of its own child.
        self._places = (model, target)
        self._path = steps_to(model, self.name.rpartition(".")[0])
        self._shards = base if isinstance(base, ShardedWeight) else None
        # Codes may be stored under a floating dtype, so that a look at the tensor does not tell.
        self._dense = isinstance(base, DenseWeight | ShardedWeight)
        self.values = CompactValues(base.gather(self.mask.indices).to(torch.float32))
        base.attach(self.mask, self.values)
        self._link()
        self._leaf = DenseGradient(self.add_gradient, self._warn_of_thaw) if self._dense and verify else None
        self._remember()
        self._hooks = []
        if self._dense:
            self._hooks += [m.register_forward_pre_hook(self._before_forward) for m in {m for m, _ in target.sites}]
        self._gradient_hooks = observe_gradient(target, self.values, self, verify)

    def check(self) -> None:
        """Refuse to go on without the weight.

        Raises:
            ValueError: the model holds another module, or a weight of another shape, where this one was attached.
        """
        if change := self._change():
            raise ValueError(
                f"{self.name} {change}, but was sparsified with shape {tuple(self.mask.shape)} (a resized or replaced "
                f"module, one sharded by FSDP version 1, or offloaded?); {_REMEDY}"
            )
        if self._is_unreduced:
            raise ValueError(
                f"{self.name} is used outside its module's forward, where DistributedDataParallel does not average its "
                "gradient over processes; leave it out of targets, or call its module instead of reading its weight."
            )

    @property
    def base(self) -> FrozenWeight:
        """The weight, whatever holds it."""
        return self._shards or frozen_weight(*self._places[1].sites[0])

    def _change(self) -> str | None:
        """What became of the weight since it was attached to, if that makes an end of it."""
        target, weight = self._places[1], self.weight
        module, _ = target.sites[0]
        if weight is None or not self._is_in_model(module):
            return "is no longer in the model"
        if weight is not self._seen[0]() and (other := self._other_owner(weight)):
            return f"was tied to {other}, which is sparsified too"
        for user, name in target.sites[1:]:
            if user._parameters.get(name) is not target.parameter:
                return "is no longer shared by the modules that shared it"
        if weight.is_meta:
            return "was moved to the meta device (offloaded to CPU or disk?)"
        # Codes know the shape of what they stand for only by way of their quantiser's state.
        known = not self._dense and weight is self._seen[0]()
        if not known and (shape := weight.shape if self._dense else target.shape) != self.mask.shape:
            return f"has shape {tuple(shape)}"
        if not self._dense and not self._is_attached():
            return "was quantised anew, its trained entries with it,"
        return None if self._parameters["values"] is self._linked[0] else "has values that were replaced"

    def _other_owner(self, weight: Tensor) -> str | None:
        """The name of another masked weight that is this very tensor."""
        others = (other for other in sparse_weights(self._places[0]) if other is not self)
        return next((other.name for other in others if other.parameter is weight), None)

    def _is_in_model(self, module: nn.Module) -> bool:
        """Whether the module is still found under its name, at once along the way it was found before."""
        for parent, name, child in self._path:
            if parent._modules.get(name) is not child:
                break
        else:
            return True
        try:
            # By attributes, which the wrappers of compiled and checkpointed blocks hand through.
            return self._places[0].get_submodule(self.name.rpartition(".")[0]) is module
        except AttributeError:
            return False

    def synchronize(self) -> None:
        """Let the newer of weight and values win: write changed values, or read entries changed in the weight.

        Raises:
            ValueError: see `check`.
        """
        self._follow_sharding()
        self.check()
        if _state(self._parameters["values"]) != self._seen[2]:
            self.write()
        elif not self._weight_is_as_seen():
            self.read()

    @torch.no_grad()
    def write(self) -> None:
        """Round the values to the weight's dtype and write them into it; codes read them where they are."""
        if self._dense:
            self.base.write(self._placed_mask(), self.values)
        self._remember()

    def writable(self) -> Tensor | None:
        """The weight as a kernel can write it, or None where only `write` can: a dense one, its mask packed."""
        weight = self._places[1].parameter
        writable = self._dense and self._shards is None and weight.device == self.values.device and launches(weight)
        return weight.detach() if writable and isinstance(self._placed_mask().positions, CSR) else None

    def written(self) -> None:
        """A kernel wrote the values into `writable()`."""
        self._remember()

    @torch.no_grad()
    def read(self) -> None:
        """Take over entries that differ in the weight; where it holds a value's rounding, the exact value stays."""
        self.values.copy_(self.base.read(self._placed_mask().indices, self.values))
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
        places, stays = find(self._placed_mask().indices, indices)
        entries = base.gather(indices).to(torch.float32)
        entries[stays] = self.values[places[stays]]
        ever = self.ever_trained().to(self.values.device).indices
        former = ever[~torch.isin(ever, indices, assume_unique=True)]
        base.release(self.values)
        exchange(self.values, entries)
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

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of values and of positions, with those that are laid over codes for entries that left."""
        beside = [(mask, values) for mask, values in self.base.overlays if values is not self.values]
        masks = [self.mask, *(mask for mask, _ in beside), *([] if self.former is None else [self.former])]
        return sum(v.nbytes for v in [self.values, *(v for _, v in beside)]), sum(mask.nbytes for mask in masks)

    @property
    def weight(self) -> Tensor | None:
        """The masked weight as the model holds it, or None if it is gone."""
        module, attribute = self._places[1].sites[0]
        return module._parameters.get(attribute) if self._shards is None else self._shards.held()

    @property
    def holds_entries(self) -> bool:
        """Whether the weight itself holds its entries, as a dense one does and a quantised one cannot."""
        return self._dense

    def former_entries(self) -> Tensor:
        """What the entries of `former` hold, (k,), on a quantised weight; (0,) on a dense one, which holds them."""
        return self.values.new_empty(0) if self.holds_entries else self.base.gather(self.former.indices)

    def restore_former(self, former: Mask | None, entries: Tensor | None) -> None:
        """Let the entries of `former` hold what `former_entries` gave."""
        self.former = None if former is None else former.to(self.values.device)
        if former is not None and not self.holds_entries:
            self.base.put(self.former, entries)

    def _placed_mask(self) -> Mask:
        """The mask, beside the values."""
        # Assigned only where it changes something: inside a compiled graph an assignment would break the graph.
        if self.mask.device != self.values.device:
            self.mask = self.mask.to(self.values.device)
        return self.mask

    def _link(self) -> None:
        """Tell optimizers of the values."""
        link(self.values, self)
        # In a tuple, as else a replaced parameter would be replaced here too.
        self._linked = (self.values,)

    def _remember(self) -> None:
        weight = self.weight
        if self._shards is not None:
            self._shards.remember_rows()
        elif self._leaf is not None:
            # It may be another tensor, as after a load that assigns.
            self._leaf.open(weight)
        # It keeps no weight alive that was replaced since, as by the rows of it that fully_shard leaves here.
        self._seen = ref(weight), self._weight_state(weight), _state(self._parameters["values"])

    def _weight_state(self, weight: Tensor) -> tuple | None:
        """What changes with a dense weight; codes hold no trained entries, so that no change of theirs matters."""
        if self._shards is not None:
            return self._shards.state()
        return _state(weight) if self._dense else None

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # Before forward and not after: once autograd has saved the weight for backward it must not be written.
        # A compiled graph cannot look at version counters; `refresh_all` does it in front of the graph.
        if not torch.compiler.is_compiling():
            self.refresh()
            self.watch_gathered()

    def watch_gathered(self) -> None:
        """See uses of a sharded weight outside its module: they are of the gathered one, which FSDP keeps for good."""
        if self._shards is not None and self._leaf is not None and self._leaf.weight is None:
            gathered = gathered_parameter(self._places[1].sites[0], self.parents())
            if gathered is not None:
                self._leaf.open(gathered)

    def refresh(self) -> None:
        """Synchronize if something changed; costs next to nothing if not."""
        self._follow_sharding()
        if _state(self._parameters["values"]) != self._seen[2] or not self._weight_is_as_seen():
            if not self._was_merged():
                self.synchronize()
        elif self._shards is not None:
            self._shards.check_rows(self.name, self._placed_mask(), self.values)
        if self._shards is not None and self._shards.parameter.requires_grad:
            self._shards.parameter.requires_grad_(False)
            self._warn_of_thaw()

    def _follow_sharding(self) -> None:
        """Write into the process's own rows from now on, if `fully_shard` was called since.

        Raises:
            ValueError: the model is divided in a way that masked weights cannot be.
        """
        module, attribute = self._places[1].sites[0]
        if self._shards is not None or not getattr(module, "_is_fsdp_managed_module", False):
            return
        if (parameter := sharded_parameter((module, attribute), self.parents())) is None:
            return
        check_division(self.name, module, parameter)
        if self._leaf is not None:
            self._leaf.close()
        self._shards = ShardedWeight(module, attribute, parameter)
        # It moves what it divides to the GPU itself.
        self.values.data = self.values.data.to(self._shards.device)

    def _was_merged(self) -> bool:
        """Whether what took a quantised weight's place has the trained entries in it, as a dequantised or merged one.

        The model is then right as it is; what can no longer be done is to train on.
        """
        module, _ = self._places[1].sites[0]
        return not self._dense and not (self._is_in_model(module) and self._is_attached())

    def _is_attached(self) -> bool:
        """Whether a quantised weight has the values as entries."""
        return any(values is self._linked[0] for _, values in self.base.overlays)

    def from_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Sampled gradient of a linear weight, (k,) fp32."""
        self.accumulate(left, right)
        return self.sample(left, right)

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Sampled gradient of a linear weight, (k,) fp32, which may turn out not to be that of the layer."""
        if not len(self.mask):
            return torch.zeros_like(self.values)
        return self._placed_mask().sampled_gradient(left.flatten(0, -2), right.flatten(0, -2))

    def accumulate(self, left: Tensor, right: Tensor) -> None:
        """Give the whole gradient, as its factors, to the accumulator."""
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_product(left, right)

    def from_dense(self, gradient: Tensor) -> Tensor:
        """Masked entries of a dense gradient, (k,) fp32."""
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_dense(gradient)
        return gather_entries(gradient, self._placed_mask().indices).to(torch.float32)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight in the model now, codes where it is quantised."""
        return self._places[1].parameter if self._shards is None else self._shards.held()

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the weight."""
        return self._shards is not None

    def parents(self) -> Iterator[nn.Module]:
        """The modules around the weight, the innermost first."""
        for _, _, child in reversed(self._path):
            yield child
        yield self._places[0]

    @property
    def target(self) -> Target:
        """The weight by name and modules."""
        return self._places[1]

    def verify_again(self) -> None:
        """Compare the gradient of the next backward with autograd's own, as in the first."""
        for hook in self._gradient_hooks:
            hook.verify_again()

    def after_step(self) -> None:
        """The optimizer took a step: trust what backward verified."""
        for hook in self._gradient_hooks:
            hook.promote()

    def _warn_of_thaw(self) -> None:
        """Say once for a model that its masked weights stay frozen."""
        if self._told_of_thaw:
            return
        for weight in sparse_weights(self._places[0]):
            weight._told_of_thaw = True
        logger.warning(
            "%s was set to require gradients after sparsify, as model.requires_grad_(True) does with all parameters. "
            "Masked weights stay frozen, since their masked entries train as values; freeze the other parameters "
            "again if they shall not train.",
            self.name,
        )

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add the dense gradient of uses that no hook saw to that of the values."""
        if not self.values.requires_grad:
            return
        # Of a sharded one it is averaged at the end of the backward, with all others.
        self._is_unreduced = is_distributed() and self._shards is None
        if not self._told_of_use and not any(hook.told for hook in self._gradient_hooks):
            self._told_of_use = True
            logger.warning(
                "%s is used outside its module's forward, where no hook sees it: the gradient of these uses is formed "
                "densely, one weight at a time, which is right and takes longer.",
                self.name,
            )
        entries = self.from_dense(gradient)
        self.values.grad = entries if self.values.grad is None else self.values.grad.add_(entries)

    def detach_from_model(self) -> None:
        """Take off all hooks and this module; the weight keeps the values, unless it was resized or replaced."""
        if self._change() is None:
            self.synchronize()
            self.base.release(self.values)
        for hook in self._hooks + self._gradient_hooks:
            hook.remove()
        if self._leaf is not None:
            self._leaf.close()
        _, target = self._places
        module, attribute = target.sites[0]
        delattr(module, child_name(attribute))
        unlink(self.values)
        self._hooks, self._gradient_hooks, self._leaf, self.accumulator = [], [], None, None
        self._places, self._path, self._seen, self._linked = (), (), (), ()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._follow_sharding()
        # Of which rows are still to be loaded, as accelerate does where only the first process has read the weights.
        if self._shards is None or not self._shards.parameter.is_meta:
            # The weight's entry shares memory with the weight, so a write now still reaches it.
            self.synchronize()

    def _load_from_state_dict(self, *args) -> None:
        self._follow_sharding()
        # If the weight beside was just loaded, what it holds now wins over values of before, also over newer ones.
        if self._weight_is_as_seen():
            self.synchronize()
        else:
            self.read()

    def _weight_is_as_seen(self) -> bool:
        weight, (seen, weight_seen, _) = self.weight, self._seen
        return weight is seen() and self._weight_state(weight) == weight_seen

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but keep the values in fp32 whatever the weights are cast to."""
        if self._change() is None:
            self.synchronize()
        exact = self.values.detach()
        if fn(exact[:0]).is_meta:
            # They could not come back from there, as a sharded weight can, whose rows are loaded afterwards.
            return self
        super()._apply(fn, recurse)
        if self.values.dtype != torch.float32:
            self.values.data = exact.to(self.values.device)
        if self.values.grad is not None and self.values.grad.dtype != torch.float32:
            self.values.grad.data = self.values.grad.data.to(torch.float32)
        # Written again at the next use: a weight cast up from 16 bits would only hold their rounding.
        self._seen = *self._seen[:2], None
        return self

    def __getstate__(self):
        """Copied and pickled with weight and values in step: a copy cannot tell which of them is newer."""
        self.refresh()
        state = self.__dict__.copy()
        state["_seen"] = self._seen and (self._seen[0](), *self._seen[1:])
        # It belongs to a schedule, whose own copy gives it to the weights of a copied model.
        state.pop("accumulator", None)
        return state

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        # Pickle makes a plain Parameter of it.
        self.values.__class__ = CompactValues
        self._link()
        # Not through the model, of which this copy may be made before the rest. The weight may have been copied before
        # `__getstate__` wrote to it. Codes are never written to.
        weight = self._seen[0]
        if self._dense:
            scatter_entries_(weight.detach(), self.mask.indices, self.values.detach())
        else:
            keep_attached(weight, self.mask, self.values)
        if self._leaf is not None:
            self._leaf.open(weight)
        self._seen = ref(weight), self._weight_state(weight), _state(self.values)

    def extra_repr(self) -> str:
        """Entries and density, for printed models."""
        return f"entries={len(self.mask):,}, density={self.mask.density:.3%}"


keep_whole(SparseWeight)


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """The sparsified weights of a model, in the order of its parameters; none on a plain model."""
    return [module for module in model.modules() if isinstance(module, SparseWeight)]


def child_name(attribute: str) -> str:
    """Name of the submodule that holds the values of a weight's attribute."""
    return f"sparse_{attribute}"


def _state(tensor: Tensor) -> tuple:
    """Changes with every in-place operation on the tensor and every exchange of its storage or of its part in it."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), getattr(tensor, "taken", 0)


def attached(root: nn.Module) -> list[SparseWeight]:
    """What `sparsify(root, ...)` attached, as it was called on this very module."""
    return root.__dict__[BEFORE_SPARSIFY][0]


def sparsified_roots(model: nn.Module) -> list[nn.Module]:
    """The modules in the model, itself included, that `sparsify` was called on."""
    return [module for module in model.modules() if BEFORE_SPARSIFY in module.__dict__]


BEFORE_SPARSIFY = "_before_sparsify"
