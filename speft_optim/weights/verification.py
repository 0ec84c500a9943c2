"""Verifies that a weight is used as its gradient hooks assume, and collects gradients of uses that they cannot see.

The hooks of a linear layer form the gradient of its own product, `x @ W.T`, and nothing else. Other uses are found in
two ways.

* Inside the layer's forward: in the first backward the layer computes with an alias of W that requires a gradient.
  Autograd's own dense gradient of the alias, formed and freed layer by layer, is compared with that of the hooks. If
  both agree, the hooks are trusted from the next optimizer step on, and the layer computes with W detached. If they
  differ, the layer keeps using the alias (see `gradient_hooks.GradientHook`).
* Everywhere else: for autograd, W itself is a leaf that always requires a gradient. A use that the hooks see goes
  through the alias or the detached W, so a gradient that arrives at the leaf comes from another use: a fused loss, a
  penalty before the forward, a module tied later. Its masked entries are added to the values' gradient at once and the
  dense gradient is freed. Without such a use this costs nothing.

In Python, W's `requires_grad` is False (see `WatchedWeight`), so that optimizers, DistributedDataParallel and code that
counts trainable parameters leave it alone. A backward that names its inputs, such as `backward(inputs=values)` or
`autograd.grad`, does not reach the leaf, and a warning is issued. Comparing W's whole gradient at the end of each
backward was rejected: reentrant checkpointing nests backwards, and a difference would have to be corrected after the
reducer of DistributedDataParallel has seen the gradient.
"""

import functools
import logging
from collections.abc import Callable
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)


_ROWS = 64


_VECTORS = 4


@torch.no_grad()
def agrees(dense: Tensor, left: Tensor, right: Tensor) -> bool | None:
    """Return whether a dense gradient is `left.T @ right`, up to the rounding of its dtype.

    Both are multiplied by random vectors (Freivalds' check), so that no second dense matrix is formed. There are four
    vectors, since the gradient of few tokens can be nearly orthogonal to a single one; rounding alone would then be
    compared.

    Args:
        dense: (m, n), the gradient formed by autograd.
        left: (..., m), one factor.
        right: (..., n), the other factor, of the same dtype.

    Returns:
        None if it cannot be decided: both are zero, or one is not finite.
    """
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(dense.shape[1], _VECTORS, generator=generator).to(dense.device)
    expected = torch.zeros(dense.shape[0], _VECTORS, device=dense.device)
    # Operands are taken a few rows at a time: fp32 copies of all of them would be larger than the gradient.
    for some_left, some_right in zip(_parts(left), _parts(right), strict=True):
        expected += some_left.float().t() @ (some_right.float() @ vectors)
    actual = torch.cat([rows.float() @ vectors for rows in _parts(dense)]) if len(dense) else expected
    scale, error = torch.stack([torch.maximum(actual.norm(), expected.norm()), (actual - expected).norm()]).tolist()
    if not scale or not torch.isfinite(torch.tensor([scale, error])).all():
        return None
    # The limit is eight roundings of the lower precision, or 0.002, since GPUs may form an fp32 product in TF32.
    eps = max(torch.finfo(dtype).eps for dtype in (dense.dtype, left.dtype))
    return error <= max(8 * eps, 2e-3) * scale


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(max(_ROWS, len(matrix) // 32))


class WatchedWeight(nn.Parameter):
    """A frozen weight whose uses autograd records.

    In Python it says that it requires no gradient, since it is not trained itself. Only the compiler gets True, or its
    graphs would leave these uses out. The class of a parameter is changed to this one in place, and back; copies and
    pickles are plain parameters.

    Attributes:
        watcher: receives the dense gradients.
    """

    watcher: "DenseGradient"

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
        """Return an ordinary parameter, for tools such as accelerate that make a parameter of an old one's class."""
        return nn.Parameter(data, requires_grad)

    @property
    def requires_grad(self) -> bool:
        """False, except for the compiler."""
        return torch.compiler.is_compiling() or TracingContext.try_get() is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "WatchedWeight":
        """Change nothing, but tell the watcher that the weight was asked to require gradients."""
        if requires_grad:
            self.watcher.when_thawed()
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(nn.Parameter(self.detach(), requires_grad=False))

    def numpy(self, *, force: bool = False):
        """Return the weight as an array, as for any tensor that requires no gradient."""
        return self.detach().numpy(force=force)

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        if id(self) not in memo:
            copy = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(copy, requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        return nn.Parameter(self.detach(), requires_grad=False).__reduce_ex__(protocol)


@functools.cache
def _watched(kind: type) -> type:
    """Return the watched class for a parameter of class `kind`."""
    return WatchedWeight if kind is nn.Parameter else type(kind.__name__, (WatchedWeight, kind), {})


def is_recorded(tensor: Tensor) -> bool:
    """Return whether autograd records uses of a tensor, whatever `requires_grad` says; always True in compiled code."""
    return torch.compiler.is_compiling() or _REQUIRES_GRAD.__get__(tensor)


def record(tensor: Tensor, value: bool) -> None:
    """Make autograd record uses of a leaf, or stop it."""
    _REQUIRES_GRAD.__set__(tensor, value)


class _WeakCall:
    """Calls a method as long as its object is alive.

    Autograd holds hooks where the garbage collector does not look, so that a model that is reached from a hook of its
    own parameter would never be freed.
    """

    def __init__(self, method: Callable[[Tensor], None] | None):
        # The copy of a hook whose object is gone has no method.
        self._method = (lambda: None) if method is None else WeakMethod(method)

    def __call__(self, leaf: Tensor) -> None:
        if (method := self._method()) is not None:
            method(leaf)

    def __reduce__(self) -> tuple:
        return _WeakCall, (self._method(),)


def hook_gradient(leaf: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a method with a leaf as soon as its gradient is complete, whatever `requires_grad` says now."""
    kind, was_recorded = type(leaf), is_recorded(leaf)
    if isinstance(leaf, WatchedWeight):
        leaf.__class__ = nn.Parameter
    # A hook can be registered only on a tensor that is recorded, and values may be frozen for a time.
    record(leaf, True)
    try:
        return leaf.register_post_accumulate_grad_hook(_WeakCall(hook))
    finally:
        record(leaf, was_recorded)
        leaf.__class__ = kind


def pause(parameter: nn.Parameter, value: bool) -> None:
    """Stop autograd from recording uses of a parameter while its model is calibrated, or make it record them again."""
    record(parameter, not value)
    if isinstance(parameter, WatchedWeight):
        parameter.watcher.is_paused = value


def is_paused(weight: Tensor) -> bool:
    """Return whether a watched weight is paused for calibration, where a measure may make it a leaf of its own."""
    return not torch.compiler.is_compiling() and isinstance(weight, WatchedWeight) and weight.watcher.is_paused


_REQUIRES_GRAD = torch._C.TensorBase.requires_grad


class DenseGradient:
    """Makes a weight a leaf while open, and passes on and frees each dense gradient as soon as it is complete.

    If several are open on one weight, the one opened last gets the gradients.

    Args:
        take: called with each gradient, of the weight's shape and dtype.
        when_thawed: called when something asks the weight to require gradients. If given, the weight is a
            `WatchedWeight` while open, which says that it requires none.
    """

    def __init__(self, take: Callable[[Tensor], None], when_thawed: Callable[[], None] | None = None):
        self.take, self.when_thawed = take, when_thawed
        self._weight: ref | None = None
        self._hook = None
        self._kind: type = nn.Parameter
        self._was_recorded = self.is_paused = False
        self._kept: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight while it is open, held by a weak reference, since `fully_shard` replaces it."""
        return None if self._weight is None else self._weight()

    def open(self, weight: nn.Parameter) -> None:
        """Make autograd record the weight's uses; does nothing if open on this weight already."""
        if self.weight is weight:
            return
        self.close()
        # A gradient from before is set aside until `close`, since the next one would be added to it.
        self._kept, weight.grad = weight.grad, None
        self._weight, self._was_recorded = ref(weight), is_recorded(weight)
        self._kind = type(weight)
        record(weight, True)
        self._hook = hook_gradient(weight, self._move)
        if self.when_thawed is not None:
            weight.__class__, weight.watcher = _watched(self._kind), self
        _takers[weight] = [*_takers.get(weight, ()), ref(self)]

    def close(self) -> None:
        """Freeze the weight again and remove the hook."""
        if (weight := self.weight) is not None:
            self._hook.remove()
            weight.grad = self._kept
            if self.when_thawed is not None:
                weight.__class__ = self._kind
                del weight.watcher
            record(weight, self._was_recorded)
            _takers[weight] = [taker for taker in _takers[weight] if taker() not in (None, self)]
        self._weight = self._hook = self._kept = None

    @torch.no_grad()
    def _move(self, weight: Tensor) -> None:
        # A compiled graph also calls the hooks of weights that it gives no gradient.
        if _taker_of(weight) is not self or self.is_paused or weight.grad is None:
            return
        gradient, weight.grad = weight.grad, None
        self.take(gradient.to_dense() if gradient.is_sparse else gradient)

    def __getstate__(self) -> dict:
        # A copied tensor has no hooks, so a copy of this object is closed.
        return {**self.__dict__, "_weight": None, "_hook": None, "_kept": None}


# For each weight, weak references to the gradients that are open on it, the oldest first. A strong one would lead back
# to the weight and keep it alive.
_takers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _taker_of(weight: Tensor) -> DenseGradient | None:
    """Return what gets the dense gradients of a weight now."""
    return next((taker for held in reversed(_takers.get(weight, ())) if (taker := held()) is not None), None)


@functools.cache
def warn_of_inputs() -> None:
    """Warn once per process of the gradients that a backward with named inputs leaves out."""
    logger.warning(
        "This backward names its inputs, as autograd.grad and backward(inputs=...) do, so gradients of masked weights "
        "are only those of uses inside their modules. If a weight is used elsewhere too, as by a fused loss, call "
        "backward() without inputs."
    )
