"""A masked weight of a model: its trained entries as a compact parameter, kept equal to the weight.

`SparseWeight` is a module beside the weight. It holds the values of the masked entries, receives their gradient through
hooks, and writes the values into the weight, or reads them from it, whichever of the two changed last.
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
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.gradient_nodes import Accumulator
from speft_optim.weights.mesh import check_division, gathered_parameter, keep_whole, sharded_parameter
from speft_optim.weights.observation import observe_gradient
from speft_optim.weights.sharded import ShardedWeight, is_managed
from speft_optim.weights.storage import DenseWeight, FrozenWeight, frozen_weight, keep_attached
from speft_optim.weights.targets import AddedModule, Target
from speft_optim.weights.verification import DenseGradient
from speft_optim.weights.wrappers import steps_to

logger = logging.getLogger(__name__)


_REMEDY = "call desparsify, and sparsify again after such changes, and build a new optimizer."


class SparseWeight(AddedModule):
    """The trained entries of one weight, kept equal to the weight.

    Attributes:
        name: the weight's full parameter name.
        mask: which entries are trained.
        previously_trained: the entries that were trained before the mask changed and are not now; they keep what they
            learned. None while the mask has never changed.
        values: (k,) fp32 parameter, the weight's masked entries.
        accumulator: receives the weight's whole gradient in training too, as a `MaskSchedule` needs; None without one.
    """

    previously_trained: Mask | None = None
    accumulator: Accumulator | None = None
    # Whether a use outside the weight's module was warned of, and whether its gradient was not averaged over processes.
    _warned_of_use = _is_unreduced = False
    # Whether it was warned that something set the weights to require gradients.
    _warned_of_thaw = False

    def __init__(self, model: nn.Module, target: Target, mask: Mask, verify: bool = True):
        super().__init__()
        self.name = target.name
        base = frozen_weight(*target.sites[0])
        self.mask = mask.to(base.device)
        # The model is in a tuple: as a plain attribute it would become a child of its own child.
        self._places = (model, target)
        self._path = steps_to(model, self.name.rpartition(".")[0])
        self._shards = base if isinstance(base, ShardedWeight) else None
        # A quantised weight may be stored under a floating dtype, so the dtype does not decide this.
        self._dense = isinstance(base, FloatingWeight)
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
        """Refuse to go on with a weight that was replaced, or whose gradient is not averaged over processes.

        Raises:
            ValueError: the model has another module, or a weight of another shape, in the place of this one; or the
                weight is used outside its module's forward while several processes train.
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
        """The weight behind one interface, dense or quantised."""
        return self._shards or frozen_weight(*self._places[1].sites[0])

    def _change(self) -> str | None:
        """Return what happened to the weight since `sparsify` if it can no longer be trained, else None."""
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
        # The shape of a quantised weight comes from its quantisation state, so it is looked up for a new tensor only.
        known = not self._dense and weight is self._seen[0]()
        if not known and (shape := weight.shape if self._dense else target.shape) != self.mask.shape:
            return f"has shape {tuple(shape)}"
        if not self._dense and not self._is_attached():
            return "was quantised anew, its trained entries with it,"
        return None if self._parameters["values"] is self._linked[0] else "has values that were replaced"

    def _other_owner(self, weight: Tensor) -> str | None:
        """Return the name of another masked weight that is the same tensor, or None."""
        others = (other for other in sparse_weights(self._places[0]) if other is not self)
        return next((other.name for other in others if other.parameter is weight), None)

    def _is_in_model(self, module: nn.Module) -> bool:
        """Return whether the module is still found under its name; the path found before is tried first."""
        for parent, name, child in self._path:
            if parent._modules.get(name) is not child:
                break
        else:
            return True
        try:
            # `get_submodule` goes by attributes, which wrappers of compiled and checkpointed blocks pass on.
            return self._places[0].get_submodule(self.name.rpartition(".")[0]) is module
        except AttributeError:
            return False

    def synchronize(self) -> None:
        """Make weight and values equal: write the values if they changed, else read the entries if the weight changed.

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
        """Write the values into a dense weight, rounded to its dtype; a quantised weight reads them as an overlay."""
        if self._dense:
            self.base.write(self._placed_mask(), self.values)
        self._remember()

    def writable(self) -> Tensor | None:
        """Return the weight if a kernel can write the values into it, or None where `write` must.

        A kernel needs a dense, contiguous weight on the values' device, and a mask in row form.
        """
        weight = self._places[1].parameter
        writable = isinstance(self.base, DenseWeight) and weight.device == self.values.device and launches(weight)
        return weight.detach() if writable and isinstance(self._placed_mask().positions, CSR) else None

    def written(self) -> None:
        """Note that a kernel wrote the values into `writable()`."""
        self._remember()

    @torch.no_grad()
    def read(self) -> None:
        """Read the entries that differ in the weight; a value that still rounds to the weight's entry stays exact."""
        self.values.copy_(self.base.read(self._placed_mask().indices, self.values))
        self._remember()

    @torch.no_grad()
    def change_mask(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """Train other entries from now on. Those that leave keep their value; `values` stays the same Parameter.

        Args:
            mask: the new entries, of the same weight; their number may differ.

        Returns:
            For each new entry its place among the old ones, (k,) int64, and whether it has one, (k,) bool.

        Raises:
            ValueError: the mask has another shape than the weight; or see `check`.
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
        previous = ever[~torch.isin(ever, indices, assume_unique=True)]
        base.release(self.values)
        exchange(self.values, entries)
        self.mask, self.previously_trained = mask, Mask(previous, mask.shape)
        base.attach(mask, self.values)
        self._remember()
        return places, stays

    def ever_trained(self) -> Mask:
        """Return the mask of all entries that are or were trained."""
        if self.previously_trained is None or not len(self.previously_trained):
            return self.mask
        both = [mask.to(self.values.device).indices for mask in (self.mask, self.previously_trained)]
        return Mask(torch.cat(both), self.mask.shape)

    def bytes_held(self) -> tuple[int, int]:
        """Return the bytes of values and of positions, those of untrained overlays of a quantised weight included."""
        beside = [(mask, values) for mask, values in self.base.overlays if values is not self.values]
        masks = [
            self.mask,
            *(mask for mask, _ in beside),
            *([] if self.previously_trained is None else [self.previously_trained]),
        ]
        return sum(v.nbytes for v in [self.values, *(v for _, v in beside)]), sum(mask.nbytes for mask in masks)

    @property
    def weight(self) -> Tensor | None:
        """The masked weight as the model holds it, or None if it is gone."""
        module, attribute = self._places[1].sites[0]
        return module._parameters.get(attribute) if self._shards is None else self._shards.held()

    @property
    def holds_entries(self) -> bool:
        """Whether the weight itself holds its trained entries: a dense one does, a quantised one cannot."""
        return self._dense

    def previous_entries(self) -> Tensor:
        """Return the entries of `previously_trained`, (k,) fp32, of a quantised weight; (0,) of a dense one."""
        return self.values.new_empty(0) if self.holds_entries else self.base.gather(self.previously_trained.indices)

    def restore_previous(self, previous: Mask | None, entries: Tensor | None) -> None:
        """Set `previously_trained`, and in a quantised weight its entries to those of `previous_entries`."""
        self.previously_trained = None if previous is None else previous.to(self.values.device)
        if previous is not None and not self.holds_entries:
            self.base.put(self.previously_trained, entries)

    def _placed_mask(self) -> Mask:
        """Return the mask on the device of the values."""
        # The attribute is set only if the device changed: inside a compiled graph an assignment breaks the graph.
        if self.mask.device != self.values.device:
            self.mask = self.mask.to(self.values.device)
        return self.mask

    def _link(self) -> None:
        """Link the values to this weight, for optimizers."""
        link(self.values, self)
        # The values are in a tuple: as a plain attribute they would be replaced along with the parameter.
        self._linked = (self.values,)

    def _remember(self) -> None:
        """Note the present state of weight and values, as equal."""
        weight = self.weight
        if self._shards is not None:
            self._shards.remember_rows()
        elif self._leaf is not None:
            # The weight may be another tensor now, as after `load_state_dict(assign=True)`.
            self._leaf.open(weight)
        # A weak reference keeps no weight alive that was replaced, as the whole one is by its rows in `fully_shard`.
        self._seen = ref(weight), self._weight_state(weight), _state(self._parameters["values"])

    def _weight_state(self, weight: Tensor) -> tuple | None:
        """Return the state of a dense weight; None for a quantised one, which holds no trained entries."""
        if self._shards is not None:
            return self._shards.state()
        return _state(weight) if self._dense else None

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        # This is done before forward, since a weight that autograd saved for backward must not be written.
        # A compiled graph cannot read version counters; `refresh_all` does this before the graph.
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
        """Synchronize if weight or values changed; costs next to nothing if not."""
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
        if self._shards is not None or not is_managed(module):
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
        """Return whether a quantised weight was replaced by one that contains the trained entries, as merging does.

        The forward of such a model is right, but training cannot go on.
        """
        module, _ = self._places[1].sites[0]
        return not self._dense and not (self._is_in_model(module) and self._is_attached())

    def _is_attached(self) -> bool:
        """Return whether the values are an overlay of the quantised weight."""
        return any(values is self._linked[0] for _, values in self.base.overlays)

    def from_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sampled gradient of a linear weight, (k,) fp32, after `accumulate`; see `Accumulator`."""
        self.accumulate(left, right)
        return self.sample(left, right)

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sampled gradient of a linear weight, (k,) fp32, which need not be verified yet."""
        if not len(self.mask):
            return torch.zeros_like(self.values)
        return self._placed_mask().sampled_gradient(left.flatten(0, -2), right.flatten(0, -2))

    def accumulate(self, left: Tensor, right: Tensor) -> None:
        """Pass the whole gradient, as two factors, to `accumulator`."""
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_product(left, right)

    def from_dense(self, gradient: Tensor) -> Tensor:
        """Return the masked entries of a dense gradient, (k,) fp32, after passing it to `accumulator`."""
        # A weight in host memory may be used there, outside its module.
        gradient = gradient.to(self.values.device)
        if self.accumulator is not None:
            leave_graph()
            self.accumulator.from_dense(gradient)
        return gather_entries(gradient, self._placed_mask().indices).to(torch.float32)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the model has now, in its quantised storage if it is quantised."""
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
        """The weight's name and the modules that hold it."""
        return self._places[1]

    def verify_again(self) -> None:
        """Compare the gradient of the next backward with autograd's own, as in the first."""
        for hook in self._gradient_hooks:
            hook.verify_again()

    def after_step(self) -> None:
        """Adopt what the last backward verified; called after each optimizer step."""
        for hook in self._gradient_hooks:
            hook.promote()

    def _warn_of_thaw(self) -> None:
        """Warn once for a model that its masked weights stay frozen."""
        if self._warned_of_thaw:
            return
        for weight in sparse_weights(self._places[0]):
            weight._warned_of_thaw = True
        logger.warning(
            "%s was set to require gradients after sparsify, as model.requires_grad_(True) does with all parameters. "
            "Masked weights stay frozen, since their masked entries train as values; freeze the other parameters "
            "again if they should not train.",
            self.name,
        )

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add the masked entries of the dense gradient of uses that no hook saw to the gradient of the values."""
        if not self.values.requires_grad:
            return
        # The gradient of a sharded weight's values is averaged at the end of the backward, with all others.
        self._is_unreduced = is_distributed() and self._shards is None
        if not self._warned_of_use and not any(hook.warned for hook in self._gradient_hooks):
            self._warned_of_use = True
            logger.warning(
                "%s is used outside its module's forward, where no hook sees it: the gradient of these uses is formed "
                "densely, one weight at a time, which is correct but slower.",
                self.name,
            )
        entries = self.from_dense(gradient)
        self.values.grad = entries if self.values.grad is None else self.values.grad.add_(entries)

    def detach_from_model(self) -> None:
        """Remove all hooks and this module; the weight keeps the values, unless it was resized or replaced."""
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
        # Rows on the meta device are still to be loaded, as in accelerate where only one process reads the weights.
        if self._shards is None or not self._shards.parameter.is_meta:
            # The state dict's entry of the weight shares its memory, so a write now still reaches it.
            self.synchronize()
            if self._dense:
                self.base.settle()

    def _load_from_state_dict(self, *args) -> None:
        self._follow_sharding()
        # A weight that was just loaded wins over the values of before, even if those changed later.
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
        # The values are written again at the next use: a weight cast up from 16 bits holds only their rounding.
        self._seen = *self._seen[:2], None
        return self

    def __getstate__(self):
        """Return the state for copies and pickle, with equal weight and values: a copy cannot tell which is newer."""
        self.refresh()
        state = self.__dict__.copy()
        state["_seen"] = self._seen and (self._seen[0](), *self._seen[1:])
        # The accumulator belongs to a schedule, whose copy sets it in the weights of a copied model.
        state.pop("accumulator", None)
        return state

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        # Pickle restores the values as a plain Parameter.
        self.values.__class__ = CompactValues
        self._link()
        # The weight is reached without the model, which may be copied later. A dense weight is written, since it may
        # have been copied before `__getstate__` wrote into it.
        weight = self._seen[0]
        if self._dense:
            scatter_entries_(weight.detach(), self.mask.indices, self.values.detach())
        else:
            keep_attached(weight, self.mask, self.values)
        if self._leaf is not None:
            self._leaf.open(weight)
        self._seen = ref(weight), self._weight_state(weight), _state(self.values)

    def extra_repr(self) -> str:
        """Return number of entries and density, for printed models."""
        return f"entries={len(self.mask):,}, density={self.mask.density:.3%}"


keep_whole(SparseWeight)


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """Return the sparsified weights of a model, in the order of its parameters; none for a plain model."""
    return [module for module in model.modules() if isinstance(module, SparseWeight)]


def child_name(attribute: str) -> str:
    """Return the name of the submodule that holds the values of a weight's attribute."""
    return f"sparse_{attribute}"


def _state(tensor: Tensor) -> tuple:
    """Return what changes with each in-place operation on a tensor and each replacement of its storage or view."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), getattr(tensor, "taken", 0)


def attached(root: nn.Module) -> list[SparseWeight]:
    """Return the weights that `sparsify(root, ...)` attached; it must have been called on this very module."""
    return root.__dict__[BEFORE_SPARSIFY][0]


def sparsified_roots(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the model, itself included, that `sparsify` was called on."""
    return [module for module in model.modules() if BEFORE_SPARSIFY in module.__dict__]


BEFORE_SPARSIFY = "_before_sparsify"
