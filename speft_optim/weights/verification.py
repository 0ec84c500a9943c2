"""Whether a weight is used as its gradient hooks assume: verified once, then trusted; what they cannot see is gathered.

A linear layer's hooks form the gradient of its own product, `x @ W.T`, and nothing else. Two things keep that honest.

* Inside the layer's forward. In the first backward the layer computes with an alias of W that requires a gradient, and
  autograd's own dense gradient of it, formed and freed layer by layer, is compared with what the hooks saw. Where both
  agree the hooks are trusted from the next optimizer step on, and the layer computes with W detached. Where they differ
  the layer goes on with the alias (see `gradient_hooks.Tap`).
* Everywhere else. From a forward to the optimizer's step W itself is a leaf that requires a gradient. A use in sight of
  the hooks goes through the alias or the detached W, so a gradient that arrives at the leaf comes from a use that they
  did not see: a fused loss, a parent's forward, a module tied later. Its masked entries are added to the values'
  gradient at once and the dense gradient is freed. Where there is no such use this costs nothing.

W requires no gradient between a step and the next forward, as then optimizers and DistributedDataParallel collect what
does. So a use before the step's first call of a module of the model is not seen, nor any that autograd is told to leave
out, as by `backward(inputs=values)`. Comparing W's whole gradient at the end of each backward was rejected: reentrant
checkpointing nests backwards, and a difference would have to be mended after the reducer of DistributedDataParallel has
seen the gradient.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
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


class DenseGradient:
    """While it is open, a weight is a leaf whose dense gradients are passed on and freed as soon as they are complete.

    Of several on one weight the last one opened gets the gradients until it is closed.

    Args:
        take: what a gradient, of the weight's shape and dtype, is passed to.
    """

    def __init__(self, take: Callable[[Tensor], None]):
        self.take = take
        self.weight: Tensor | None = None
        self._hook = None
        self._before: DenseGradient | None = None
        self._kept: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether the weight has the hook."""
        return self._hook is not None

    def open(self, weight: nn.Parameter) -> None:
        """Let the weight require a gradient; does nothing twice."""
        if self.weight is not weight or not self.is_open:
            self.close()
            # A gradient from before would be added to the next one; it is put back afterwards.
            self._kept, weight.grad = weight.grad, None
            # A hook needs this first.
            weight.requires_grad_(True)
            self.weight, self._hook = weight, weight.register_post_accumulate_grad_hook(self._move)
            self._before, _takers[weight] = _takers.get(weight), self
        weight.requires_grad_(True)

    def rest(self) -> None:
        """Freeze the weight until it is opened again; its hook stays, as putting it there takes longer."""
        if self.is_open:
            self.weight.requires_grad_(False)

    def close(self) -> None:
        """Let the weight be frozen again, without a hook."""
        if self.is_open:
            self._hook.remove()
            self.weight.requires_grad_(False)
            self.weight.grad = self._kept
            if self._before is None:
                _takers.pop(self.weight, None)
            else:
                _takers[self.weight] = self._before
        self.weight = self._hook = self._before = self._kept = None

    @torch.no_grad()
    def _move(self, weight: Tensor) -> None:
        # A compiled graph calls hooks of weights that get no gradient from it, too.
        if _takers.get(weight) is not self or weight.grad is None:
            return
        gradient, weight.grad = weight.grad, None
        self.take(gradient.to_dense() if gradient.is_sparse else gradient)

    def __getstate__(self) -> dict:
        # A copied tensor has no hooks.
        return {"take": self.take, "weight": None, "_hook": None, "_before": None, "_kept": None}


_takers: WeakIdKeyDictionary = WeakIdKeyDictionary()


class GradientWindow:
    """The time from a forward to the optimizer's step, in which the dense masked weights of a model are leaves.

    Args:
        model: the sparsified model.
        weights: its `SparseWeight`s.
    """

    def __init__(self, model: nn.Module, weights: list):
        self.model, self.weights = model, [weight for weight in weights if weight.is_verified]
        self.is_open = self._told = False

    def __getstate__(self) -> dict:
        # In a copied model no weight is a leaf yet.
        return {**self.__dict__, "is_open": False}

    def hooks(self) -> list:
        """Register what opens the window: a forward of the model, its upper modules, or any that leads to a weight."""
        # A loss may call only the decoder, and read the head's weight.
        modules = {module: None for name, module in self.model.named_modules() if name.count(".") < 2}
        for weight in self.weights:
            modules.update((module, None) for module in weight.modules_on_path())
        return [module.register_forward_pre_hook(self.before_forward) for module in modules] if self.weights else []

    def before_forward(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook: open the window unless it is open."""
        # In front of a compiled graph `refresh_all` opens it.
        if not torch.compiler.is_compiling():
            self.open()

    def open(self) -> None:
        """Let the weights require gradients if a graph is recorded; says once if they did already."""
        if self.is_open or not torch.is_grad_enabled():
            return
        # None does while the model is calibrated.
        if not any(weight.values.requires_grad for weight in self.weights):
            return
        self.is_open = True
        thawed = [weight.name for weight in self.weights if weight.open()]
        if thawed and not self._told:
            self._told = True
            known = {id(weight.values) for weight in self.weights} | {id(weight.parameter) for weight in self.weights}
            others = sum(p.requires_grad and id(p) not in known for p in self.model.parameters())
            logger.warning(
                "%d masked weights, e.g. %s, were set to require gradients after sparsify, as "
                "model.requires_grad_(True) does; they are frozen again, since their masked entries train as values. "
                "%d other parameters require gradients too; freeze them if they shall not train.",
                len(thawed),
                thawed[0],
                others,
            )
