"""The window of samples of one optimizer step, cut into batches and sent to the device ahead of time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes import processes
from recipes.batch_loss import locate_labels, to_device
from recipes.data import Sample, collate


@dataclass(frozen=True)
class Window:
    """The batches of one optimizer step, on the device.

    Attributes:
        batches: the batches that have a label; of several processes (`recipes.processes`), this one's share of them.
        bare: the number of batches without one, in all processes.
        labels: the number of label tokens of all batches of all processes.
        tokens: the number of their tokens, with prompts and without padding.
    """

    batches: list[dict[str, Tensor | int]]
    bare: int
    labels: int
    tokens: int


def prepare(
    window: Sequence[Sample], batch_size: int, *, pad_id: int, device: torch.device, multiple: int = 1
) -> Window:
    """Cut a window into batches and send them to the device, without waiting for it.

    Args:
        window: the samples of one step.
        batch_size: samples in one forward pass.
        pad_id: token to pad with.
        device: the model's device.
        multiple: lengths are padded to a multiple of this, label tokens to one of eight times this.
    """
    # Similar lengths share a micro-batch: less padding, and the gradient of the window is the same in any order.
    window = sorted(window, key=lambda sample: len(sample.input_ids))
    parts = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    labels = 8 * multiple if multiple > 1 else 1
    batches = [locate_labels(collate(part, pad_id=pad_id, multiple=multiple), multiple=labels) for part in parts]
    labelled = [batch for batch in batches if batch["count"]]
    return Window(
        [to_device(batch, device) for batch in processes.share(labelled)],
        bare=len(batches) - len(labelled),
        labels=sum(batch["count"] for batch in labelled),
        tokens=sum(len(sample.input_ids) for sample in window),
    )
