"""Whether the hooks of a layer see every use of its weight, verified once against autograd.

A gradient hook assumes how a layer uses its weight. Code around the model can break that: a fused loss that reads the
weight of the head, a forward that was patched, a hook that scales the output, a module tied to another one later. So in
the first backward that reaches a dense weight, the weight itself requires a gradient for once. Autograd then forms its
dense gradient whoever used it, and it is compared with what the hooks gave and freed at once, so that one is alive at a
time. Where the two agree the hooks are trusted from then on. Where they differ the weight stays a leaf that requires a
gradient for good, and its masked entries are taken from the dense gradient: right, at the cost of forming it.

A weight is verified again when the forward or the hooks of a module that holds it change, or when another module comes
to hold it. What is out of sight is a new use by other code that begins later.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)

# Largest relative distance of two gradients that differ by rounding. A dense gradient is rounded to the weight's dtype,
# or under autocast to the dtype of the product, and once more for each use of the weight.
_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TOLERANCE = 1e-3
# So many verifications of one weight are the sign of hooks that come and go with every step.
_MANY = 5


def agree(seen: Tensor, true: Tensor, dtype: torch.dtype, uses: int) -> bool | None:
    """Whether what hooks gave is the true gradient up to rounding; None where that cannot be told.

    Args:
        seen: what the hooks gave, fp32.
        true: the same of the dense gradient.
        dtype: the least precise one on the way.
        uses: how often the weight was used.
    """
    distance, size = float((seen - true).norm()), float(torch.maximum(seen.norm(), true.norm()))
    if not distance < float("inf"):
        return None
    return distance <= _TOLERANCES.get(dtype, _TOLERANCE) * max(1, uses) ** 0.5 * size


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The less precise of two floating dtypes."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


class LeafHook:
    """Lets a frozen weight require a gradient and hands each dense gradient on, which is freed afterwards.

    Args:
        weight: a dense leaf.
        take: called with the dense gradient, of the weight's shape and dtype.
    """

    def __init__(self, weight: Tensor, take: Callable[[Tensor], None]):
        self.weight, self._take = weight, take
        # A gradient that the user holds is put back afterwards.
        self._kept, weight.grad = weight.grad, None
        weight.requires_grad_(True)
        self._handle = weight.register_post_accumulate_grad_hook(self._hand_on)

    def _hand_on(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        # Embeddings made with sparse=True give a sparse one.
        self._take(gradient.to_dense() if gradient.is_sparse else gradient)

    def remove(self) -> None:
        """Freeze the weight again."""
        self.weight.requires_grad_(False)
        self.weight.grad = self._kept
        self._handle.remove()


class Verification:
    """The verification of one masked weight in training.

    Args:
        weight: its `SparseWeight`, kept weakly.

    Attributes:
        general: whether the hooks were found to miss a part, so that the dense gradient is used for good.
    """

    def __init__(self, weight: "SparseWeight"):  # noqa: F821
        self._owner = ref(weight)
        self._leaf: LeafHook | None = None
        self._seen: tuple = ((), None)
        self._pending = True
        self._times = 0
        self._told_of_unfreezing = False
        self.general = False
        self._forget()

    def _forget(self) -> None:
        self._hooked: Tensor | None = None
        self._dtype, self._uses = torch.float64, 0

    @property
    def armed(self) -> bool:
        """Whether the next backward is compared."""
        return self._pending and self._leaf is not None

    def again(self) -> None:
        """Verify once more in the next backward."""
        self._pending = not self.general

    def before_forward(self, arm: bool | None = None) -> None:
        """Arm where that is due; costs a few comparisons if not. Called before forwards of the model's modules.

        Args:
            arm: whether it may be armed now; None for yes where it lies in no compiled module, whose weights `probe`
                verifies.
        """
        weight = self._owner()
        parameter = weight.weight
        if not self._is_trained(weight):
            return
        self._check_unfrozen(weight, parameter)
        uses = self._how_used_now(weight)
        if uses != self._seen[0] or parameter is not self._seen[1]:
            self._seen = uses, parameter
            self.again()
        placed = self._leaf is not None and self._leaf.weight is parameter and parameter.requires_grad
        if placed or not (self._pending or self.general):
            return
        if self.general or (not weight.is_compiled() if arm is None else arm):
            self._arm(weight, parameter)

    @staticmethod
    def _is_trained(weight) -> bool:
        return (
            torch.is_grad_enabled()
            and weight.weight is not None
            and weight.values.requires_grad
            and len(weight.mask) > 0
        )

    @staticmethod
    def _how_used_now(weight) -> tuple:
        return tuple(part for module, _ in weight.sites for part in _how_used(module))

    def _check_unfrozen(self, weight, parameter: Tensor) -> None:
        """Freeze a weight that something let require gradients: it would be trained nowhere and cost memory."""
        if not parameter.requires_grad or self._leaf is not None:
            return
        parameter.requires_grad_(False)
        if not self._told_of_unfreezing:
            self._told_of_unfreezing = True
            _unfrozen.add(weight)

    def _arm(self, weight, parameter: Tensor) -> None:
        self.disarm()
        self._leaf = LeafHook(parameter, self._take)
        self._forget()
        self._times += not self.general
        if self._times == _MANY:
            logger.warning(
                "The hooks of %s changed %d times, and each time its gradient is verified at the cost of a dense one; "
                "register hooks once, or pass sparsify(..., verify=False).",
                weight.name,
                _MANY,
            )

    def note(self, gradient: Tensor, dtype: torch.dtype) -> None:
        """Take in what hooks gave for one use of the weight, (k,) fp32, from operands of `dtype`."""
        if not self.armed:
            return
        if self._hooked is None:
            # After the last node of this backward, where the weight's own gradient has not come it will not.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._hooked = gradient if self._hooked is None else self._hooked + gradient
        self._dtype, self._uses = coarser(self._dtype, dtype), self._uses + 1

    def _take(self, gradient: Tensor) -> None:
        weight = self._owner()
        if weight is None:
            return
        if self.general:
            _add_(weight.values, weight.gather(gradient))
        elif self._pending:
            self._compare(weight, weight.gather(gradient), coarser(self._dtype, gradient.dtype))

    def _finish(self) -> None:
        """End of a backward: hooks that gave a gradient of which autograd knows nothing gave a wrong one."""
        weight = self._owner()
        if weight is not None and self.armed and self._hooked is not None:
            self._compare(weight, torch.zeros_like(self._hooked), self._dtype)

    @torch.no_grad()
    def _compare(self, weight, true: Tensor, dtype: torch.dtype) -> None:
        hooked = torch.zeros_like(true) if self._hooked is None else self._hooked
        same = agree(hooked, true, dtype, self._uses)
        self._forget()
        if same is None:
            # Inf or NaN, as at a first step under loss scaling: the next backward is compared.
            return
        self._pending = False
        if same:
            self.disarm()
            return
        self.general = True
        _refuse_several_processes(weight)
        _add_(weight.values, true - hooked)
        weight.remove_gradient_hooks()
        logger.warning(
            "The gradient of %s that its layer's hooks see is not the weight's whole gradient (relative distance "
            "%.2g): it is used outside its module, or its module's forward or output is changed by other code. From "
            "here on its dense gradient is formed and gathered from, which is right and slower.",
            weight.name,
            float((hooked - true).norm() / torch.maximum(hooked.norm(), true.norm())),
        )

    def due(self) -> bool:
        """Whether the next forward would arm it."""
        weight = self._owner()
        if self.general or not self._is_trained(weight):
            return False
        return self._pending or self._how_used_now(weight) != self._seen[0] or weight.weight is not self._seen[1]

    def stop(self) -> None:
        """End a verification in which the weight was not reached; it is trusted, as it is not used."""
        if not self.general:
            self._pending = False
            self.disarm()

    def disarm(self) -> None:
        """Let the weight be frozen again."""
        if self._leaf is not None:
            self._leaf.remove()
            self._leaf = None


# Masked weights that were found unfrozen since that was last told.
_unfrozen: WeakSet = WeakSet()


def _add_(values: nn.Parameter, gradient: Tensor) -> None:
    """Add to the gradient of the values, as autograd does."""
    if values.grad is None:
        values.grad = gradient.contiguous()
    else:
        values.grad += gradient


def _refuse_several_processes(weight) -> None:
    """Refuse the dense path where another's reducer averages what autograd gives to the values.

    Raises:
        ValueError: there are several processes.
    """
    if processes() > 1:
        raise ValueError(
            f"{weight.name} is used outside its module, or its module is changed by other code, so that its gradient "
            "cannot be averaged over several processes; leave it out of targets=."
        )


def processes() -> int:
    """How many processes take part in training."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def _how_used(module: nn.Module) -> tuple:
    """Changes when another forward or hook comes between a module's weight and its output."""
    return (
        type(module).forward,
        module.__dict__.get("forward"),
        *module._forward_pre_hooks,
        None,
        *module._forward_hooks,
        None,
        *torch_module._global_forward_pre_hooks,
        None,
        *torch_module._global_forward_hooks,
    )


_verified: WeakIdKeyDictionary = WeakIdKeyDictionary()


def follow(weight: Tensor, verification: Verification) -> None:
    """Verify a weight again when another module comes to hold it."""
    if not _registered:
        _registered.append(torch_module.register_module_parameter_registration_hook(_on_registration))
    _verified[weight] = ref(verification)


_registered: list = []


def _on_registration(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if parameter is not None and (found := _verified.get(parameter)) is not None and (verification := found()):
        verification.again()


class FirstForward:
    """Arms all weights before whichever module of the model is called first, then takes itself off.

    A weight may be read by code that calls neither the model as a whole nor the module that holds it.

    Args:
        weights: the sparse weights.
        modules: those to watch; the ones that hold the weights watch themselves.
    """

    def __init__(self, weights: list, modules: Iterable[nn.Module]):
        self._weights = weights
        self._handles = [module.register_forward_pre_hook(self) for module in modules]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for weight in self._weights:
                weight.before_forward()
            self.remove()

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def freeze_again(model: nn.Module, weights: list) -> None:
    """Tell once of masked weights that were found to require gradients; `Verification` froze them again."""
    if not (found := [weight.name for weight in weights if weight in _unfrozen]):
        return
    _unfrozen.difference_update(weights)
    values = {id(weight.values) for weight in weights}
    held = {id(weight.weight) for weight in weights}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in values and id(p) not in held]
    logger.warning(
        "%d masked weights, e.g. %s, were made to require gradients after sparsify, and are frozen again: only their "
        "values train. %d other parameters with %d entries require gradients too and take the memory of dense ones; "
        "call requires_grad_(False) on those that are not to be trained.",
        len(found),
        found[0],
        len(others),
        sum(parameter.numel() for parameter in others),
    )


def probe(model: nn.Module, args: tuple, kwargs: dict, weights: list, waiting: list) -> None:
    """Verify weights by an eager forward and backward of their own; the gradients there are stay as they were.

    Args:
        model: the model.
        args: of its forward.
        kwargs: of its forward.
        weights: its sparse weights.
        waiting: those to verify.
    """
    before = [weight.values.grad for weight in weights]
    devices = {weight.values.device for weight in weights if weight.values.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            for weight in waiting:
                weight.verification.before_forward(arm=True)
            output = model.forward(*args, **kwargs)
            found = next((part for part in _tensors(output) if part.requires_grad), None)
            if found is not None:
                leaves = [weight.values for weight in weights] + [weight.weight for weight in waiting]
                found.backward(_directions(found), inputs=[leaf for leaf in leaves if leaf.requires_grad])
    finally:
        for weight, gradient in zip(weights, before, strict=True):
            weight.values.grad = gradient
        for weight in waiting:
            weight.verification.stop()


def _tensors(output: object) -> Iterator[Tensor]:
    """The floating tensors of a model's output, a loss before all others."""
    parts = [part for part in tree_leaves(output) if isinstance(part, Tensor) and part.is_floating_point()]
    yield from sorted(parts, key=lambda part: part.numel() != 1)


def _directions(output: Tensor) -> Tensor:
    """A fixed gradient to go back from: of ones and minus ones, so that no part cancels by design."""
    draws = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return draws.to(output.device, output.dtype) * 2 - 1
