"""Losses of calibration batches: the model's own, whether a loss can be used, and one loss for each example."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# From the model and a batch of any kind to a scalar tensor.
LossFunction = Callable[[nn.Module, Any], Tensor]

# PyTorch and transformers leave labels of this value out of the loss.
IGNORED_LABEL = -100


def labelled_examples(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tell which examples have labels that are not ignored.

    Args:
        labels: (batch,) or (batch, ...).

    Returns:
        Two (batch,) bool tensors: whether the example has such a label, and whether its only one is the first. The loss
        of causal models shifts labels by one and leaves the first out, so for the latter it is a mean over none: NaN.
    """
    counted = (labels != IGNORED_LABEL).reshape(len(labels), -1)
    labelled = counted.any(1)
    # Single labels, as for classification, are not shifted.
    by_first_only = labelled & ~counted[:, 1:].any(1) if counted.shape[1] > 1 else torch.zeros_like(labelled)
    return labelled, by_first_only


def is_nan(loss: Any) -> bool:
    """Tell whether a loss is a tensor in which all numbers are NaN."""
    return isinstance(loss, Tensor) and bool(loss.detach().isnan().all())


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Run the model on a batch and return its own loss.

    Raises:
        ValueError: the model returns no loss.
    """
    return loss_of(model(**batch), model)


def loss_of(output: Any, model: nn.Module) -> Tensor:
    """Return the loss in a model's output.

    Raises:
        ValueError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for its batch; pass loss=function of (model, batch).")
    return loss


def check_loss(value: Any, number: int) -> None:
    """Refuse a loss that would make every score NaN.

    Args:
        value: the loss.
        number: number of the batch, for the message.

    Raises:
        ValueError: it is not finite, or not a single number.
        TypeError: it is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"The loss of calibration batch {number} is a {type(value).__name__}; return a scalar tensor.")
    if value.numel() != 1:
        raise ValueError(f"The loss of calibration batch {number} has shape {tuple(value.shape)}; return its mean.")
    if not bool(torch.isfinite(value.detach())):
        raise ValueError(f"The loss of calibration batch {number} is {value.item()}; look for a bad sample or weight.")


def example_losses(logits: Tensor | None, labels: Tensor, loss: Tensor) -> tuple[Tensor, Tensor] | None:
    """Compute the mean loss of each example, if the model's loss is the mean of cross-entropies over labels.

    Causal models shift labels by one. Whether this one does is found by computing the mean both ways: the one that
    equals the model's own loss is right. With nearly uniform logits both may equal it within the rounding of its dtype.

    Args:
        logits: (batch, length, classes) or (batch, classes).
        labels: (batch, length) or (batch,), ignored ones -100.
        loss: the model's own loss of the batch, a scalar.

    Returns:
        The losses, (batch,) fp32 with a graph to the logits, 0 for examples whose labels are all ignored; and which
        examples have other labels, (batch,) bool. None if neither way gives the model's loss, or both do.
    """
    if logits is None or logits.dim() != labels.dim() + 1 or logits.shape[: labels.dim()] != labels.shape:
        return None
    if labels.is_floating_point() or not bool(((labels < logits.shape[-1]) & (labels >= 0) | _ignored(labels)).all()):
        return None
    candidates = [labels]
    if labels.dim() > 1:
        candidates.append(nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:])
    own = loss.detach().float()
    log_probabilities = nn.functional.log_softmax(logits.flatten(0, -2).float(), -1)
    found = []
    for candidate in candidates:
        each = nn.functional.nll_loss(
            log_probabilities, candidate.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        ).view(labels.shape)
        mean = each.detach().sum() / (~_ignored(candidate)).sum()
        # The mean is NaN if no label is left.
        found.append(((mean - own).abs().nan_to_num(torch.inf).item(), candidate, each))
    (off, candidate, each), *other = sorted(found, key=lambda one: one[0])
    if off > 1e-5 + 1e-3 * own.abs().item():
        return None
    # Within the rounding of the model's own loss, both ways may be right.
    if other and other[0][0] <= max(1e-5, torch.finfo(loss.dtype).eps) * own.abs().item():
        return None
    counts = (~_ignored(candidate)).view(len(labels), -1).sum(1)
    return each.view(len(labels), -1).sum(1) / counts.clamp(min=1), counts > 0


def _ignored(labels: Tensor) -> Tensor:
    return labels == IGNORED_LABEL
