"""The statistic of `activation`: the squares of a layer's input features, summed over tokens in forward passes."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_optim.distributed import average_
from speft_optim.salience.accumulators import RowSlice
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.losses import LossFunction
from speft_optim.weights.gradient_hooks import input_of
from speft_optim.weights.products import is_product, is_transposed_linear


@dataclass
class _Attention:
    """The attention mask of the current forward pass, for the hooks on the layers."""

    mask: Tensor | None = None

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the mask; a forward pre-hook of the model."""
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) else None


def squared_input(model: nn.Module, reader: BatchReader, group: list[RowSlice], loss: LossFunction | None) -> None:
    """Sum the squares of each input feature over all tokens but padding, in forward passes without gradients.

    The attention mask that the model is called with, by us or by the user's loss, tells which tokens are padding.

    Args:
        model: the model.
        reader: yields the calibration batches.
        group: the row slices whose accumulators are filled.
        loss: runs the model on a batch; None calls the model itself.

    Raises:
        ValueError: a weight is not that of a linear layer, so that its entries have no input feature.
    """
    attention = _Attention()
    with contextlib.ExitStack() as stack, reader.together(model), torch.no_grad():
        for row_slice in group:
            _watch_inputs(row_slice, attention, stack)
        # The user's loss may call the model without its head.
        for part in {model, getattr(model, "base_model", model)}:
            stack.callback(part.register_forward_pre_hook(attention.see, with_kwargs=True).remove)
        for batch in reader:
            attention.mask = None
            model(**batch) if loss is None else loss(model, batch)
    average_([row_slice.accumulator for row_slice in group], 1)


def _watch_inputs(row_slice: RowSlice, attention: _Attention, stack: contextlib.ExitStack) -> None:
    """Let each forward pass add to the accumulator, which has one number for each input feature."""
    for module, attribute in row_slice.target.sites:
        if not is_product(module, attribute):
            raise ValueError(
                f"salience='activation' needs linear weights, unlike {row_slice.target.name}; choose targets=[...]."
            )
    # The rows of a transposed weight are its input features, and the slice holds some of them.
    transposed = is_transposed_linear(module, attribute)
    features = slice(row_slice.first, row_slice.last) if transposed else slice(None)
    count = row_slice.last - row_slice.first if transposed else row_slice.columns
    sums = torch.zeros(count, dtype=torch.float32, device=row_slice.target.device)
    row_slice.accumulator = sums[:, None] if transposed else sums[None]

    def add(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = input_of(args, kwargs).detach()[..., features].float()
        if attention.mask is not None and x.shape[:-1] == attention.mask.shape:
            x = x * attention.mask.unsqueeze(-1)
        sums.add_(x.flatten(0, -2).square().sum(0))

    for module, _ in row_slice.target.sites:
        stack.callback(module.register_forward_hook(add, with_kwargs=True).remove)
