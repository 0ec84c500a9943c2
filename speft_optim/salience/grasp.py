"""The statistic of `grasp`: H g, the Hessian of the averaged loss times its gradient, over all targeted weights.

Weights moved along g by a scalar step t make the loss a function of t. Its derivative at 0 is the inner product of g
with the gradient, and the gradient of *that* is H g exactly. So a linear layer returns `x @ W.T + t * (x @ G.T)`, the
derivative by t costs one backward that keeps its graph, and a second backward gives H g for the weights of the group.
Only g itself is as large as all targeted weights together, in the dtype of their products. It is kept in memory if it
takes no more than half of the budget for accumulators, and otherwise in a temporary file.

Fused attention cannot be differentiated twice, so this pass uses PyTorch's plain attention, and a warning says so.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speft_optim.distributed import average_, together, total
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.losses import LossFunction, model_loss
from speft_optim.salience.model_state import plain_implementation
from speft_optim.weights.gradient_hooks import input_of
from speft_optim.weights.observation import differentiable
from speft_optim.weights.products import is_linear, is_product
from speft_optim.weights.replacement import shadow
from speft_optim.weights.targets import Target

logger = logging.getLogger(__name__)


class GradientStore:
    """The gradients of all targets, in memory or in one file on disk.

    Args:
        targets: the weights.
        memory_budget: bytes up to which the gradients stay in memory, each on its weight's device.

    Attributes:
        memory_bytes: bytes that they take in memory; 0 if they are in a file.
    """

    def __init__(self, targets: Mapping[str, Target], memory_budget: int):
        sizes = {name: target.shape.numel() for name, target in targets.items()}
        dtype, size = _dtype_of_use(targets), sum(sizes.values())
        fits = size * dtype.itemsize <= memory_budget
        self.memory_bytes = size * dtype.itemsize if fits else 0
        self._folder = None
        if fits:
            self._flat = {name: torch.empty(n, dtype=dtype, device=targets[name].device) for name, n in sizes.items()}
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="speft_optim_")
            path = str(Path(self._folder.name) / "gradients")
            everything = torch.from_file(path, shared=True, size=size, dtype=dtype)
            self._flat = dict(zip(sizes, everything.split(list(sizes.values())), strict=True))

    def put(self, row_slice: RowSlice) -> None:
        """Copy the accumulator of a row slice, rounded to the dtype of the store."""
        start = row_slice.first * row_slice.columns
        self._flat[row_slice.target.name][start : start + row_slice.entries] = row_slice.accumulator.view(-1)

    def get(self, target: Target, dtype: torch.dtype) -> Tensor:
        """Return a weight's gradient, in its shape and on its device."""
        return self._flat[target.name].view(target.shape).to(target.device, dtype)

    def __enter__(self) -> "GradientStore":
        return self

    def __exit__(self, *exception) -> None:
        """Free the memory or remove the file."""
        self._flat = {}
        if self._folder is not None:
            self._folder.cleanup()


def _dtype_of_use(targets: Mapping[str, Target]) -> torch.dtype:
    """Return bf16 or fp16 if all gradients are used in it, so that they may be stored in it; else fp32.

    The product `x @ G.T` has the dtype of the layer's output: for a dense weight the weight's own, or that of autocast;
    for a quantised one that of its input, which only a forward pass shows. Autocast inside the user's loss is not seen;
    the gradient is then stored in the weight's dtype, in which autograd would give it too.
    """
    devices = {target.device.type for target in targets.values()}
    dtypes = {target.dtype for target in targets.values()}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    dtype = dtypes.pop()
    return dtype if not dtypes and dtype in (torch.bfloat16, torch.float16) else torch.float32


def warn_of_plain_attention(model: nn.Module) -> None:
    """Warn that passes without fused attention take longer, and more memory for long texts."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention != "eager":
        logger.warning(
            "salience='grasp' differentiates attention twice, so it runs plain attention instead of %s, with a "
            "matrix of length by length; shorten the calibration batches if memory runs out.",
            attention or "fused",
        )


def hessian_gradient(
    model: nn.Module,
    reader: BatchReader,
    group: list[RowSlice],
    loss: LossFunction | None,
    targets: Mapping[str, Target],
    store: GradientStore,
    dense: Collection[str] = (),
) -> None:
    """Fill the accumulators of a group with H g, averaged over the batches.

    Args:
        model: the model.
        reader: yields the calibration batches.
        group: the row slices.
        loss: from model and batch to a scalar; None for the model's own loss.
        targets: all targeted weights.
        store: holds g of all of them.
        dense: names of weights that are used in other ways than in their layers' products. These are not moved along g;
            the inner product is taken with autograd's own gradient of them.
    """
    step = torch.zeros((), requires_grad=True)
    for row_slice in group:
        row_slice.allocate()
    moved = {name: target for name, target in targets.items() if name not in dense}
    others = {name: targets[name] for name in sorted(dense)}
    with _twice_differentiable(model), contextlib.ExitStack() as stack:
        for target in moved.values():
            for module, attribute in target.sites:
                _move_along(target, module, attribute, step, store, stack)
        known = {row_slice.target.name for row_slice in group}
        for name, target in others.items():
            if name not in known:
                # The second backward does not ask for their gradients, so none is formed.
                stack.enter_context(differentiable(target, lambda gradient: None))
        leaves = [stack.enter_context(differentiable(row_slice.target, row_slice.from_dense)) for row_slice in group]
        stack.enter_context(together())
        for batch in reader:
            value = (loss or model_loss)(model, batch)
            if not reader.takes(value):
                continue
            along = _derivative_along(value, step, others, store)
            if along is not None and along.requires_grad:
                along.backward(inputs=leaves)
    average_([row_slice.accumulator for row_slice in group], total(reader.used))


@contextlib.contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Let the model compute with operations whose backward has a backward."""
    with plain_implementation(model, attention=True), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def _derivative_along(value: Tensor, step: Tensor, dense: Mapping[str, Target], store: GradientStore) -> Tensor | None:
    """Return the inner product of g with the gradient of the loss, with its graph; None if no weight is used."""
    inputs = [step, *(target.parameter for target in dense.values())]
    along, *gradients = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    parts = [] if along is None else [along]
    for target, gradient in zip(dense.values(), gradients, strict=True):
        if gradient is not None:
            parts.append((gradient.float() * store.get(target, torch.float32)).sum().to(step.device))
    return sum(parts) if parts else None


class _Times(torch.autograd.Function):
    """`x @ V` or `x @ V.T` for a stored V, which is fetched for each use and never kept in the graph."""

    @staticmethod
    def forward(ctx, x: Tensor, fetch: Callable[[], Tensor], transposed: bool) -> Tensor:
        ctx.fetch, ctx.transposed = fetch, transposed
        matrix = fetch()
        return x @ (matrix.t() if transposed else matrix)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Times.apply(gradient, ctx.fetch, not ctx.transposed), None, None


def _move_along(
    target: Target, module: nn.Module, attribute: str, step: Tensor, store: GradientStore, stack: contextlib.ExitStack
) -> None:
    """Let the module compute with its weight moved by `step` times the stored gradient, until the stack closes."""
    if is_product(module, attribute):

        def add(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            x = input_of(args, kwargs).to(output.dtype)
            moved = _Times.apply(x, lambda: store.get(target, output.dtype), is_linear(module, attribute))
            return output + step.to(output) * moved

        stack.callback(module.register_forward_hook(add, prepend=True, with_kwargs=True).remove)
    else:

        def moved_weight() -> dict[str, Tensor]:
            weight = module._parameters[attribute]
            return {attribute: weight + step.to(weight) * store.get(target, weight.dtype)}

        shadow(module, moved_weight, stack)
