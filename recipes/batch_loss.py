"""The loss of a batch, summed over its label tokens, without the logits of other tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from recipes import processes
from recipes.compiled import eagerly
from recipes.data import Sample, make_batches
from recipes.loss import IGNORED, frozen_head, head_loss, is_known


def locate_labels(batch: dict[str, Tensor], *, multiple: int = 1) -> dict[str, Tensor | int]:
    """Find the label tokens of a batch; best done while it is on the CPU, since this waits for a GPU.

    Args:
        batch: `input_ids`, `attention_mask`, `labels`, each (batch, length).
        multiple: pad `places` and `targets` to a length that this divides, so that shapes repeat.

    Returns:
        The batch with `places`, the positions in (batch * length) that predict a label token, `targets`, these tokens,
        and their number `count`. It has no attention mask if padding is on the right: in a causal model no token
        attends to padding behind it, and attention without a mask is faster.
    """
    length, counted = batch["labels"].shape[1], batch["labels"][:, 1:] != IGNORED
    rows, columns = counted.nonzero(as_tuple=True)
    found = {"places": rows * length + columns, "targets": batch["labels"][:, 1:][counted], "count": len(rows)}
    missing = -len(rows) % multiple
    found["places"] = functional.pad(found["places"], (0, missing))
    found["targets"] = functional.pad(found["targets"], (0, missing), value=IGNORED)
    hidden = ("attention_mask",) if batch["attention_mask"][:, 0].all() else ()
    return {key: value for key, value in batch.items() if key not in hidden} | found


def summed_loss(model: nn.Module, batch: dict[str, Tensor | int]) -> tuple[Tensor, int]:
    """Compute cross-entropy summed over the label tokens of a batch, and their number.

    With a large vocabulary logits are a good part of the work and most of the memory. They are computed for label
    tokens only, and in chunks if the head is frozen. For an architecture that is not known they are computed for all
    tokens from the first label on.

    Args:
        model: a causal language model of transformers.
        batch: a batch of `collate` or of `locate_labels`.
    """
    batch = batch if "places" in batch else locate_labels(batch)
    targets, count = batch["targets"], batch["count"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    if not is_known(model):
        return _loss_of_logits(model, batch, inputs), count
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    # The backward of `index_select` adds at these places; that of an index would sort them first.
    hidden = hidden.index_select(0, batch["places"])
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if (head := frozen_head(model)) is not None:
        return head_loss(head, hidden, targets, softcap=softcap), count
    logits = model.get_output_embeddings()(hidden).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED), count


def _loss_of_logits(model: nn.Module, batch: dict[str, Tensor | int], inputs: dict[str, Tensor]) -> Tensor:
    """Compute the summed loss from the model's own logits, from the first label on."""
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    first = int(counted.any(0).int().argmax())
    # Position i predicts token i + 1. A count from the end instead of positions would give a strided view of the hidden
    # states, for which torch copies the whole vocabulary matrix once per row of the batch.
    positions = torch.arange(first, targets.shape[1], device=targets.device)
    logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits[counted[:, first:]]
    return functional.cross_entropy(logits.float(), targets[counted], reduction="sum")


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy over the label tokens of a batch: the model's own loss, at less cost."""
    loss, count = summed_loss(model, batch)
    return loss / count


def device_of(model: nn.Module) -> torch.device:
    """Return the device that computes: where masked values are, if the weights themselves are in host memory."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def evaluate(model: nn.Module, samples: Sequence[Sample], *, batch_size: int, pad_id: int) -> float:
    """Return the mean loss over the label tokens of all samples, in evaluation mode, without gradients.

    Several processes share the batches.
    """
    device, was_training = device_of(model), model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), eagerly(model):
            batches = processes.share(make_batches(samples, batch_size, pad_id=pad_id))
            for batch in tqdm(
                batches, desc="held-out loss", disable=None if processes.is_first() else True, leave=False
            ):
                batch = locate_labels(batch)
                if batch["count"]:
                    sums[0] += summed_loss(model, to_device(batch, device))[0]
                    sums[1] += batch["count"]
    finally:
        model.train(was_training)
    processes.add([sums])
    total, count = sums.tolist()
    if not count:
        raise ValueError("none of the held-out samples has a label; give samples whose answers are not empty")
    return total / count


def to_device(batch: dict[str, Tensor | int], device: torch.device) -> dict[str, Tensor | int]:
    """Copy the batch to the device; to a GPU from pinned memory, without waiting for it."""
    if device.type != "cuda":
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return {
        key: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
