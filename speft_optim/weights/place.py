"""The place of a masked weight in its model: the modules that hold it and those around it, while the model changes."""

from collections.abc import Iterator

from torch import Tensor, nn

from speft_optim.weights.attached import name_beside, sparse_weights
from speft_optim.weights.bnb import settle_gathers
from speft_optim.weights.compact_values import version
from speft_optim.weights.floating import FloatingWeight
from speft_optim.weights.mesh import (
    check_division,
    gathered_parameter,
    reshard_parameter,
    sharded_parameter,
)
from speft_optim.weights.sharded import ShardedParameter, ShardedWeight, is_managed, is_sharded
from speft_optim.weights.storage import FrozenWeight, frozen_weight
from speft_optim.weights.targets import AddedModule, Target
from speft_optim.weights.wrappers import steps_to


class Place:
    """Where a weight is in its model, found once and looked up again whenever the weight is wanted.

    Args:
        model: the module that `sparsify` was called on.
        target: the weight's name and the modules that hold it.

    Attributes:
        model: as given.
        target: as given.
        is_dense: whether the weight is floating, and not quantised.
        shards: the rows of the weight in this process, if `fully_shard` divided it; None for a whole weight.
    """

    def __init__(self, model: nn.Module, target: Target):
        self.model, self.target = model, target
        base = frozen_weight(*target.sites[0])
        # A quantised weight may be stored under a floating dtype, so the dtype does not decide this.
        self.is_dense, self._shape = isinstance(base, FloatingWeight), base.shape
        self.shards = self._shards() if is_sharded(target.parameter) else None
        self._path = target.name.rpartition(".")[0]
        self._steps = steps_to(model, self._path)

    @property
    def base(self) -> FrozenWeight:
        """The weight behind one interface, dense or quantised."""
        return self.shards if isinstance(self.shards, ShardedWeight) else frozen_weight(*self.target.sites[0])

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter as the model holds it now, in its quantised storage if it is quantised; None if it is gone."""
        module, attribute = self.target.sites[0]
        return module._parameters.get(attribute) if self.shards is None else self.shards.held()

    def version(self, weight: Tensor) -> tuple | None:
        """Return what changes with each write into a dense weight; None for a quantised one, which is only read."""
        if not self.is_dense:
            return None
        return version(weight) if self.shards is None else self.shards.state()

    def change(self, seen: Tensor | None) -> str | None:
        """Return what happened to the weight since `sparsify` if it can no longer be trained here, else None.

        Args:
            seen: the parameter at the last look.
        """
        weight = self.weight
        if weight is None or not self.is_in_model():
            return "is no longer in the model"
        if not isinstance(weight, nn.Parameter):
            return "was replaced by a tensor that is no parameter, as torch.func.functional_call does"
        if weight is not seen and (other := self._other_owner(weight)):
            return f"was tied to {other}, which is sparsified too"
        for module, attribute in self.target.sites[1:]:
            if module._parameters.get(attribute) is not self.target.parameter:
                return "is no longer shared by the modules that shared it"
        if weight.is_meta:
            return "was moved to the meta device (offloaded to CPU or disk?)"
        # The shape of a quantised weight comes from its quantisation state, so it is looked up for a new tensor only.
        known = not self.is_dense and weight is seen
        if not known and (shape := weight.shape if self.is_dense else self.target.shape) != self._shape:
            return f"has shape {tuple(shape)}"
        return None

    def _other_owner(self, weight: Tensor) -> str | None:
        """Return the name of another masked weight that is the same tensor, or None."""
        others = (other.place for other in sparse_weights(self.model) if other.place is not self)
        return next((other.target.name for other in others if other.weight is weight), None)

    def is_in_model(self) -> bool:
        """Return whether the module is still found under its name; the path found before is tried first."""
        for parent, name, child in self._steps:
            if parent._modules.get(name) is not child:
                break
        else:
            return True
        try:
            # `get_submodule` goes by attributes, which wrappers of compiled and checkpointed blocks pass on.
            return self.model.get_submodule(self._path) is self.target.sites[0][0]
        except AttributeError:
            return False

    def parents(self) -> Iterator[nn.Module]:
        """The modules around the weight, the innermost first."""
        for _, _, child in reversed(self._steps):
            yield child
        yield self.model

    def follow_sharding(self) -> bool:
        """Return whether `fully_shard` was called since the last look; `shards` are the process's own rows then.

        Raises:
            ValueError: the model is divided in a way that masked weights cannot be.
        """
        module, attribute = self.target.sites[0]
        if self.shards is not None and self.shards.is_kept_for_backward():
            # Values are read from the process's own rows and written into them, and not into this copy.
            reshard_parameter((module, attribute), self.parents())
        if self.shards is not None or not is_managed(module):
            return False
        if (parameter := sharded_parameter((module, attribute), self.parents())) is None:
            return False
        # FSDP may have gathered it in this forward already, as numbers that it cast. The first weight that comes here
        # settles blocks without masked weights too.
        others = (module.place for module in self.model.modules() if isinstance(module, AddedModule))
        settle_gathers(self.model.modules() if all(other.shards is None for other in others) else self.parents())
        check_division(self.target.name, module, parameter)
        self.shards = self._shards(parameter)
        return True

    def _shards(self, parameter: nn.Parameter | None = None) -> ShardedParameter:
        """Return the process's own rows, those of a quantised weight in its storage; `parameter` is the DTensor."""
        return (ShardedWeight if self.is_dense else ShardedParameter)(*self.target.sites[0], parameter)

    def gathered(self) -> nn.Parameter | None:
        """The parameter that FSDP fills with the whole weight in each pass; None before the first."""
        return gathered_parameter(self.target.sites[0], self.parents())

    def add(self, child: AddedModule) -> None:
        """Add a module beside the weight, in the module that holds it."""
        module, attribute = self.target.sites[0]
        module.add_module(name_beside(attribute), child)

    def remove(self) -> None:
        """Remove the module that was added beside the weight."""
        module, attribute = self.target.sites[0]
        delattr(module, name_beside(attribute))
