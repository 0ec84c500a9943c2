"""Gradients for salience that are whole: what hooks see is compared with the weight's own gradient once.

As in training (see `verification.py`), in the first backward that reaches a dense weight it requires a gradient itself.
Scores exist for all entries, and holding two gradients to compare them would take twice the memory; so a few random
projections of both are compared, which every entry is part of.
"""

import logging

import torch
from torch import Tensor

from speft_optim.frozen import STREAMED, DenseWeight, frozen_weight
from speft_optim.linear import Sink, Tap
from speft_optim.targets import Target
from speft_optim.verification import LeafHook, agree, coarser

logger = logging.getLogger(__name__)

_PROJECTIONS = 8


def can_be_verified(target: Target) -> bool:
    """Whether autograd can form the weight's own gradient: it is dense, and computed with where it lies."""
    module, attribute = target.sites[0]
    if STREAMED in module.__dict__:
        return False
    return isinstance(frozen_weight(module, attribute), DenseWeight) and target.parameter.is_floating_point()


def warn_of_unseen(names: set[str]) -> None:
    """Say which weights are scored by their own dense gradient."""
    if names:
        logger.warning(
            "The gradients of %d weights, e.g. %s, are not what their layers' hooks see: these are used outside their "
            "modules, or their modules are changed by other code. Their own gradients were used, which is right.",
            len(names),
            min(names),
        )


class VerifiedSink:
    """Hands gradients on from a weight's hooks, or from the weight itself if the hooks miss a part.

    Args:
        target: a dense weight.
        sinks: what takes the gradient; their `start_over(gradient)` corrects them where hooks were wrong.
        unseen: gets the weight's name if they were.
    """

    def __init__(self, target: Target, sinks: list[Sink], unseen: set[str]):
        self._target, self._sinks, self._unseen = target, sinks, unseen
        source = torch.Generator().manual_seed(0)
        self._signs = [
            (torch.randint(0, 2, (size, _PROJECTIONS), generator=source) * 2.0 - 1).to(target.device)
            for size in target.matrix_shape
        ]
        self._leaf: LeafHook | None = None
        self._taps: list[Tap] = []
        self._trusted: bool | None = False if target.name in unseen else None
        self._forget()

    def _forget(self) -> None:
        self._seen: Tensor | None = None
        self._dtype, self._uses = torch.float64, 0

    def start(self, taps: list[Tap]) -> None:
        """Compare in the next backward what these hooks give."""
        self._taps, self._leaf = taps, LeafHook(self._target.parameter, self._take)
        if self._trusted is False:
            self._use_weight(None)

    def stop(self) -> None:
        """Freeze the weight again."""
        if self._leaf is not None:
            self._leaf.remove()
            self._leaf = None

    def untap(self) -> None:
        """Take the hooks off."""
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def from_product(self, left: Tensor, right: Tensor) -> None:
        """Hand on one use's gradient, as the product of its factors."""
        if self._trusted is not False:
            if self._trusted is None:
                rows, columns = (
                    _project(side.flatten(0, -2), signs) for side, signs in zip((left, right), self._signs, strict=True)
                )
                self._note((rows * columns).sum(0), left.dtype)
            for sink in self._sinks:
                sink.from_product(left, right)

    def from_dense(self, gradient: Tensor) -> None:
        """Hand on one use's dense gradient."""
        if self._trusted is not False:
            if self._trusted is None:
                self._note(self._projected(gradient), gradient.dtype)
            self._hand_on(gradient)

    def _hand_on(self, gradient: Tensor) -> None:
        for sink in self._sinks:
            sink.from_dense(gradient)

    def _projected(self, gradient: Tensor) -> Tensor:
        matrix = gradient.reshape(self._target.matrix_shape)
        return (_project(matrix, self._signs[1]) * self._signs[0]).sum(0)

    def _note(self, projection: Tensor, dtype: torch.dtype) -> None:
        if self._seen is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._seen = projection if self._seen is None else self._seen + projection
        self._dtype, self._uses = coarser(self._dtype, dtype), self._uses + 1

    def _take(self, gradient: Tensor) -> None:
        if self._trusted is None:
            self._compare(gradient)
        elif not self._trusted:
            self._hand_on(gradient)

    def _finish(self) -> None:
        """End of a backward: where the weight's own gradient has not come, hooks gave one that there is not."""
        if self._trusted is None and self._seen is not None:
            self._compare(None)

    def _compare(self, gradient: Tensor | None) -> None:
        own = torch.zeros(_PROJECTIONS, device=self._target.device) if gradient is None else self._projected(gradient)
        seen = torch.zeros_like(own) if self._seen is None else self._seen
        dtype = self._dtype if gradient is None else coarser(self._dtype, gradient.dtype)
        # What is not finite is refused with the scores.
        self._trusted = agree(seen, own, dtype, self._uses) is not False
        self._forget()
        if self._trusted:
            self.stop()
            return
        self._unseen.add(self._target.name)
        self._use_weight(gradient)

    def _use_weight(self, gradient: Tensor | None) -> None:
        """Take the weight's own gradient from here on, of which this is the first."""
        self.untap()
        for sink in self._sinks:
            sink.start_over(gradient)


def _project(matrix: Tensor, signs: Tensor) -> Tensor:
    """`matrix @ signs` in fp32; signs are exact in any dtype."""
    with torch.autocast(matrix.device.type, enabled=False):
        return (matrix @ signs.to(matrix.dtype)).float()
