"""Whether a weight is used as its gradient hooks assume: verified once, then trusted; what they cannot see is gathered.

A linear layer's hooks form the gradient of its own product, `x @ W.T`, and nothing else. Two things keep that honest.

* Inside the layer's forward. In the first backward the layer computes with an alias of W that requires a gradient, and
  autograd's own dense gradient of it, formed and freed layer by layer, is compared with what the hooks saw. Where both
  agree the hooks are trusted from the next optimizer step on, and the layer computes with W detached. Where they differ
  the layer goes on with the alias (see `gradient_hooks.GradientHook`).
* Everywhere else. For autograd W itself is a leaf that requires a gradient, all the time. A use in sight of the hooks
  goes through the alias or the detached W, so a gradient that arrives at the leaf comes from a use that they did not
  see: a fused loss, a penalty before the forward, a module tied later. Its masked entries are added to the values'
  gradient at once and the dense gradient is freed. Where there is no such use this costs nothing.

To Python W says that it requires no gradient (see `WatchedWeight`), so that optimizers, DistributedDataParallel and
whoever counts what trains leave it alone. A backward that names the tensors it is for, as `backward(inputs=values)` and
`autograd.grad` do, does not reach the leaf; a warning says so. Comparing W's whole gradient at the end of each backward
was rejected: reentrant checkpointing nests backwards, and a difference would have to be mended after the reducer of
DistributedDataParallel has seen the gradient.
"""

import functools
import logging
from collections.abc import Callable
from weakref import ref

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
    """Whether a dense gradient is `left.T @ right`, up to the rounding of its dtype.

    Both are multiplied by a few random vectors (Freivalds), so that no second dense matrix is formed. A gradient of few
    tokens can lie nearly at right angles to one vector, where nothing but its rounding would be compared.

    Args:
        dense: (m, n), a gradient as autograd gave it.
        left: (..., m), one operand.
        right: (..., n), the other operand, of the same dtype.

    Returns:
        None where nothing can be told: both are zero, or one is not finite.
    """
    left, right = left.flatten(0, -2), right.flatten(0, -2)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(dense.shape[1], _VECTORS, generator=generator).to(dense.device)
    expected = torch.zeros(dense.shape[0], _VECTORS, device=dense.device)
    # Rows at a time, since fp32 copies of all operands would be larger than the gradient.
    for some_left, some_right in zip(_parts(left), _parts(right), strict=True):
        expected += some_left.float().t() @ (some_right.float() @ vectors)
    actual = torch.cat([rows.float() @ vectors for rows in _parts(dense)]) if len(dense) else expected
    scale, error = torch.stack([torch.maximum(actual.norm(), expected.norm()), (actual - expected).norm()]).tolist()
    if not scale or not torch.isfinite(torch.tensor([scale, error])).all():
        return None
    # Eight roundings of the lower precision; on GPUs an fp32 product may be formed in TF32.
    eps = max(torch.finfo(dtype).eps for dtype in (dense.dtype, left.dtype))
    return error <= max(8 * eps, 2e-3) * scale


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(max(_ROWS, len(matrix) // 32))


class WatchedWeight(nn.Parameter):
    """A frozen weight whose uses autograd records.

    It says that it requires no gradient, since it is not to be trained. Only the compiler hears the truth, else its
    graphs would leave these uses out. The class is put on a parameter in place and taken off again; copies and pickles
    are plain parameters.
    """

    watcher: "DenseGradient"

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
        """An ordinary parameter, for tools that make a new one of an old one's class, as accelerate does."""
        return nn.Parameter(data, requires_grad)

    @property
    def requires_grad(self) -> bool:
        """False, but for the compiler."""
        return torch.compiler.is_compiling() or TracingContext.try_get() is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "WatchedWeight":
        """Change nothing, and tell whoever watches that the weight was asked to require gradients."""
        if requires_grad:
            self.watcher.when_thawed()
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(nn.Parameter(self.detach(), requires_grad=False))

    def numpy(self, *, force: bool = False):
        """The weight as an array, as of any tensor that requires no gradient."""
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
    """The class of a watched parameter of some class."""
    return WatchedWeight if kind is nn.Parameter else type(kind.__name__, (WatchedWeight, kind), {})


def is_recorded(tensor: Tensor) -> bool:
    """Whether autograd records uses of a tensor, whatever it says of itself; inside a graph it may."""
    return torch.compiler.is_compiling() or _REQUIRES_GRAD.__get__(tensor)


def record(tensor: Tensor, value: bool) -> None:
    """Let autograd record uses of a leaf, or not."""
    _REQUIRES_GRAD.__set__(tensor, value)


def hook_gradient(leaf: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `hook` with a recorded leaf, whatever that says of itself, as soon as its gradient is complete."""
    kind = type(leaf)
    if isinstance(leaf, WatchedWeight):
        leaf.__class__ = nn.Parameter
    try:
        return leaf.register_post_accumulate_grad_hook(hook)
    finally:
        leaf.__class__ = kind


def pause(parameter: nn.Parameter, value: bool) -> None:
    """Let autograd record no uses of a parameter while its model is calibrated, or record them again."""
    record(parameter, not value)
    if isinstance(parameter, WatchedWeight):
        parameter.watcher.is_paused = value


def is_paused(weight: Tensor) -> bool:
    """Whether a watched weight belongs to a model that is calibrated, where a measure may make it a leaf of its own."""
    return not torch.compiler.is_compiling() and isinstance(weight, WatchedWeight) and weight.watcher.is_paused


_REQUIRES_GRAD = torch._C.TensorBase.requires_grad


class DenseGradient:
    """While it is open, a weight is a leaf whose dense gradients are passed on and freed as soon as they are complete.

    Of several on one weight the last one opened gets the gradients until it is closed.

    Args:
        take: what a gradient, of the weight's shape and dtype, is passed to.
        when_thawed: called when something asks the weight to require gradients; with it the weight says meanwhile that
            it requires none.
    """

    def __init__(self, take: Callable[[Tensor], None], when_thawed: Callable[[], None] | None = None):
        self.take, self.when_thawed = take, when_thawed
        self._weight: ref | None = None
        self._hook = None
        self._kind: type = nn.Parameter
        self._was_recorded = self.is_paused = False
        self._before: DenseGradient | None = None
        self._kept: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight while it is open, which this does not keep alive: `fully_shard` leaves the rest of it behind."""
        return None if self._weight is None else self._weight()

    def open(self, weight: nn.Parameter) -> None:
        """Let autograd record the weight's uses; does nothing twice."""
        if self.weight is weight:
            return
        self.close()
        # A gradient from before would be added to the next one; it is put back afterwards.
        self._kept, weight.grad = weight.grad, None
        self._weight, self._before, self._was_recorded = ref(weight), _takers.get(weight), is_recorded(weight)
        self._kind = type(weight)
        # A hook needs this first.
        record(weight, True)
        self._hook = hook_gradient(weight, self._move)
        if self.when_thawed is not None:
            weight.__class__, weight.watcher = _watched(self._kind), self
        _takers[weight] = self

    def close(self) -> None:
        """Let the weight be frozen again, without a hook."""
        if (weight := self.weight) is not None:
            self._hook.remove()
            weight.grad = self._kept
            if self.when_thawed is not None:
                weight.__class__ = self._kind
                del weight.watcher
            record(weight, self._was_recorded)
            if self._before is None:
                _takers.pop(weight, None)
            else:
                _takers[weight] = self._before
        self._weight = self._hook = self._before = self._kept = None

    @torch.no_grad()
    def _move(self, weight: Tensor) -> None:
        # A compiled graph calls hooks of weights that get no gradient from it, too.
        if _takers.get(weight) is not self or self.is_paused or weight.grad is None:
            return
        gradient, weight.grad = weight.grad, None
        self.take(gradient.to_dense() if gradient.is_sparse else gradient)

    def __getstate__(self) -> dict:
        # A copied tensor has no hooks.
        return {**self.__dict__, "_weight": None, "_hook": None, "_before": None, "_kept": None}


_takers: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def warn_of_inputs() -> None:
    """Say, once per process, what a backward leaves out that was told which tensors it is for."""
    logger.warning(
        "This backward was told its inputs, as by autograd.grad or backward(inputs=...): gradients of masked weights "
        "are those of uses inside their modules alone. If a weight is used elsewhere too, as by a fused loss, call "
        "backward() without inputs."
    )
