"""The statistic of `synflow`: dR/d|w|, R the sum of the logits of a linearised network on an all-ones input embedding.

The paper does not say how the parts of a transformer are linearised. While the pass lasts:

* Every weight and bias is replaced by its absolute value.
* Activation functions are the identity, so that a gated MLP multiplies its gate and up branches. A soft cap on logits
  is the identity too.
* A norm multiplies by its absolute scale and divides by the root mean square of its input, taken as a constant: without
  centring, which would turn an all-ones input into 0, and without a gradient through the mean square. Magnitudes thus
  stay level from layer to layer; the bare product of 32 gated layers would square them each time and overflow any
  float.
* The input is one position. With equal inputs at all positions attention weights do not matter, so the query and key
  weights get no flow, and score 0, whatever the length.

All of it is computed in fp64, some rows of a weight at a time. The weights are never changed, so that only the forward
methods of modules have to be restored.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.losses import LossFunction
from speft_optim.salience.model_state import plain_implementation
from speft_optim.weights.gradient_hooks import GradientHook
from speft_optim.weights.products import is_product, is_transposed_linear
from speft_optim.weights.replacement import replace_method, shadow
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets

_PANEL_ENTRIES = 2**22


def flow(model: nn.Module, reader: BatchReader | None, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Fill the accumulators of a group with dR/d|w|.

    Args:
        model: the model.
        reader: not used.
        group: the row slices.
        loss: not used.

    Raises:
        ValueError: the model takes no `inputs_embeds` or returns no logits.
    """
    for row_slice in group:
        row_slice.allocate()
    grad_anchor = torch.zeros((), requires_grad=True)
    with contextlib.ExitStack() as stack, torch.enable_grad():
        stack.enter_context(plain_implementation(model, attention=False))
        # Hooks come first, so that the absolute value is taken of the alias by which a hook shadows a weight.
        row_slices = _observe_uses(group, grad_anchor, stack)
        stack.enter_context(linearised(model, row_slices, grad_anchor))
        logits = _logits_of_ones(model)
        if logits.requires_grad:
            logits.sum().backward()


def _observe_uses(
    group: list[RowSlice], grad_anchor: Tensor, stack: contextlib.ExitStack
) -> dict[tuple[nn.Module, str], list[RowSlice]]:
    """Hook the uses of weights that are not products of linear layers, until the stack closes.

    Returns:
        The row slices of linear layers' weights by module and attribute, which `linearised` accumulates.
    """
    products = defaultdict(list)
    for row_slice in group:
        for module, attribute in row_slice.target.sites:
            if is_product(module, attribute):
                products[module, attribute].append(row_slice)
            else:
                stack.callback(GradientHook(module, attribute, grad_anchor, row_slice, row_slice.target.name).remove)
    return products


def _logits_of_ones(model: nn.Module) -> Tensor:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise ValueError(
            f"salience='synflow' passes inputs_embeds, which {type(model).__name__} does not take; choose another."
        )
    weight = frozen_weight(embeddings)
    ones = torch.ones(1, 1, weight.shape[-1], dtype=torch.float64, device=weight.device)
    output = model(inputs_embeds=ones)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"salience='synflow' sums the logits, which {type(model).__name__} does not return; load its head."
        )
    return logits


@contextlib.contextmanager
def linearised(
    model: nn.Module, row_slices: Mapping[tuple[nn.Module, str], list[RowSlice]], grad_anchor: Tensor
) -> Iterator[None]:
    """Let the model compute as the linearised network of its absolute weights, in fp64, while the context lasts.

    Args:
        model: the model.
        row_slices: the row slices that accumulate the gradients of products, by module and attribute.
        grad_anchor: a scalar that requires a gradient, so that products have a backward though no weight requires one.
    """
    targets = {site: target for target in all_targets(model).values() for site in target.sites}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = [attribute for attribute, parameter in module._parameters.items() if parameter is not None]
            if is_product(module, "weight"):
                site = module, "weight"
                _replace(module, _AbsoluteLinear(module, targets[site], row_slices.get(site, []), grad_anchor), stack)
            elif type(module).__name__.endswith("Norm"):
                _replace(module, _scale_of_layer_norm if isinstance(module, nn.LayerNorm) else _scale, stack)
            elif _is_activation(module):
                _replace(module, lambda module, original, x: x, stack)
            elif own:
                _shadow_absolute(module, own, stack)
        stack.enter_context(_NoActivations())
        yield


def _replace(module: nn.Module, forward: Callable, stack: contextlib.ExitStack) -> None:
    """Replace the module's forward by `forward(module, original forward, x)`, until the stack closes."""
    replace_method(module, "forward", functools.partial(forward, module, module.forward), stack)


class _AbsoluteLinear:
    """`x @ abs(W).T + abs(b)` in fp64."""

    def __init__(self, module: nn.Module, target: Target, row_slices: list[RowSlice], grad_anchor: Tensor):
        self.target, self.row_slices, self.grad_anchor = target, row_slices, grad_anchor
        self.transposed = is_transposed_linear(module, "weight")

    def __call__(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        grad_anchor = self.grad_anchor if self.row_slices else None
        output = _AbsoluteTimes.apply(x.double(), grad_anchor, self.target, self.transposed, self.row_slices)
        return output if module.bias is None else output + module.bias.abs().double()


class _AbsoluteTimes(torch.autograd.Function):
    """`x @ abs(W).T`, or `x @ abs(W)` for a transposed weight; W is read again in backward and not kept.

    The row slices accumulate the gradient of abs(W) from its two factors.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, grad_anchor: Tensor | None, target: Target, transposed: bool, row_slices: list[RowSlice]
    ) -> Tensor:
        ctx.target, ctx.transposed, ctx.row_slices = target, transposed, row_slices
        ctx.save_for_backward(*((x,) if row_slices else ()))
        return _times_rows(x, target) if transposed else _times_columns(x, target)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        for row_slice in ctx.row_slices:
            (x,) = ctx.saved_tensors
            row_slice.from_product(*((x, gradient) if ctx.transposed else (gradient, x)))
        back = _times_columns if ctx.transposed else _times_rows
        return back(gradient, ctx.target), None, None, None, None


def _panels(target: Target) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of abs(W) in fp64, a few at a time."""
    rows, columns = target.matrix_shape
    step = max(1, _PANEL_ENTRIES // max(1, columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield slice(first, last), target.rows(first, last).double().abs()


def _times_columns(x: Tensor, target: Target) -> Tensor:
    """Return `x @ abs(W).T`."""
    return torch.cat([x @ panel.t() for _, panel in _panels(target)], dim=-1)


def _times_rows(x: Tensor, target: Target) -> Tensor:
    """Return `x @ abs(W)`."""
    return sum(x[..., rows] @ panel for rows, panel in _panels(target))


def _scale(module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    """Compute a root-mean-square norm, with the mean square as a constant."""
    # The module maps ones to its scale, whether it stores it as w or, as in Gemma, as w - 1.
    scale = original(torch.ones_like(x[..., :1].expand_as(x)[:1])).abs()
    return x / _root_mean_square(x) * scale.double()


def _scale_of_layer_norm(module: nn.LayerNorm, original: Callable, x: Tensor) -> Tensor:
    """Compute a layer norm without centring, with the mean square as a constant."""
    scaled = x / _root_mean_square(x)
    scaled = scaled if module.weight is None else scaled * module.weight.abs().double()
    return scaled if module.bias is None else scaled + module.bias.abs().double()


def _root_mean_square(x: Tensor) -> Tensor:
    return x.detach().square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def _is_activation(module: nn.Module) -> bool:
    home, name = type(module).__module__, type(module).__name__
    own = home in ("transformers.activations", "torch.nn.modules.activation")
    return own and "Softmax" not in name and "Attention" not in name


def _shadow_absolute(module: nn.Module, attributes: list[str], stack: contextlib.ExitStack) -> None:
    """Let a module that is none of the above see the absolute values of its weights in fp64, until the stack closes."""

    def absolute() -> dict[str, Tensor]:
        # `getattr` also finds an alias or a copy on another device that shadows the parameter.
        weights = {attribute: getattr(module, attribute) for attribute in attributes}
        return {name: weight.abs().double() for name, weight in weights.items() if weight.is_floating_point()}

    shadow(module, absolute, stack)


class _NoActivations(TorchFunctionMode):
    """Lets activation functions that are not modules, such as the tanh of a soft cap, return their input."""

    _identities = {
        torch.tanh,
        Tensor.tanh,
        torch.relu,
        nn.functional.relu,
        nn.functional.gelu,
        nn.functional.silu,
        nn.functional.tanh,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._identities:
            return args[0]
        return function(*args, **(kwargs or {}))
