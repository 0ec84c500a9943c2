"""Optimizer steps on windows of samples, and their history.

A step's loss stays on the device until `read_losses`: the norm of its gradient is the only number in a step that the
CPU waits for.
"""

import math
import warnings

import torch
from torch import Tensor, nn

from recipes import processes
from recipes.passes import Passes
from recipes.training_state import History
from recipes.windows import Window


class Updates:
    """Takes optimizer steps, each in three calls: `set_rates`, `backward` and `step`.

    Args:
        optimizer: over the trained tensors; the rates in its groups are the peak rates.
        passes: runs forward and backward of batches.
        clip: largest norm of the gradient over all trained tensors; None does not clip.

    Attributes:
        history: the numbers of the steps so far.

    Raises:
        ValueError: nothing that the optimizer has requires a gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, passes: Passes, clip: float | None):
        self.optimizer, self.passes, self.clip = optimizer, passes, clip
        # The optimizer tells what is trained, since masked weights may require gradients for a time too.
        self.trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not self.trained:
            raise ValueError(
                "nothing in the model requires a gradient; attach a mask with sparsify, or unfreeze weights"
            )
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.history = History()
        self._unread: list[Tensor] = []

    def set_rates(self, factor: float) -> None:
        """Set the learning rates to `factor` times the peak rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def backward(self, window: Window) -> Tensor | float:
        """Compute the gradient of a window over all processes, clipped; return its norm before, NaN without labels."""
        self._unread.append(accumulate(self.passes, window, self.history))
        processes.average_gradients(self.trained)
        if not window.labels:
            return math.nan
        return nn.utils.clip_grad_norm_(self.trained, math.inf if self.clip is None else self.clip)

    def step(self, step: int, norm: Tensor | float, window: Window) -> None:
        """Take step `step` (from 0) with the gradient of `window`, or skip it if the norm is not finite."""
        norm = float(norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self.passes.after_step()
        else:
            self._skip(step, f"a gradient of norm {norm}" if window.labels else "no label in its window")
        self.optimizer.zero_grad(set_to_none=not self.passes.keeps_gradients)
        self.history.grad_norm.append(norm)
        self.history.lr.append(self.optimizer.param_groups[0]["lr"])
        self.history.tokens.append(window.tokens)

    def _skip(self, step: int, reason: str) -> None:
        self.history.skipped_steps += 1
        if self.history.skipped_steps == 1:
            warnings.warn(
                f"step {step + 1} is skipped because of {reason}; later ones are counted silently", stacklevel=4
            )

    def read_losses(self) -> None:
        """Add the losses of the last steps, over all processes, to the history."""
        losses = torch.stack(self._unread)
        processes.add([losses])
        self.history.loss += losses.tolist()
        self._unread.clear()


def accumulate(passes: Passes, window: Window, history: History) -> Tensor:
    """Run backward for all micro-batches of a window; return its mean loss per label token, NaN without labels.

    Of several processes each returns its share of the mean.
    """
    if window.bare:
        if not history.skipped_batches:
            warnings.warn("a batch has no label at all and is skipped; later ones are counted silently", stacklevel=4)
        history.skipped_batches += window.bare
    mean = torch.full((), 0.0 if window.labels else math.nan, dtype=torch.float64, device=passes.device)
    # The average of the gradients of all processes is that of the window. Gradients that moving masks sum up, which are
    # averaged too, then have one scale whatever the number of processes, also if another number resumes the run.
    labels = window.labels / processes.count()
    for batch in window.batches:
        mean += passes.backward(batch, labels).double() / window.labels
    return mean
