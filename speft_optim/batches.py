"""Calibration batches: which of them count, their losses, and a model put in order for them and back.

The model is in eval mode meanwhile, without dropout. Afterwards it is exactly as before.
"""

import contextlib
import functools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from speft_optim.linear import replace_method
from speft_optim.quantized import frozen_forwards

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Batches = Iterable[Batch]
LossFunction = Callable[[nn.Module, Batch], Tensor]

IGNORED_LABEL = -100


def check_batches(batches: Batches | None, passes: int) -> None:
    """Refuse what cannot be iterated as often as needed.

    Raises:
        ValueError: there are none, or they can be iterated only once but `passes` are needed.
        TypeError: they cannot be iterated.
    """
    if batches is None:
        raise ValueError("This salience measure needs calibration batches; pass batches=[...] or a DataLoader.")
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | torch.Tensor):
        raise TypeError(f"batches is a {type(batches).__name__}; pass a list of dicts or a DataLoader.")
    if isinstance(batches, Iterator) and passes > 1:
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be iterated once, but {passes} passes are needed; "
            "pass a list or a DataLoader, or a larger memory_budget."
        )


class _RandomState:
    """What torch, Python and numpy draw next: on the CPU, on CUDA devices and from the generators given.

    Args:
        devices: CUDA devices.
        generators: further ones, as those of a DataLoader.
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[torch.Generator] = ()):
        self._python = random.getstate()
        # A numpy that nobody imported draws nothing.
        self._numpy = sys.modules.get("numpy")
        self._numpy_state = None if self._numpy is None else self._numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Draw from here again."""
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._numpy_state)
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for generator, state in self._generators:
            generator.set_state(state)


class BatchReader:
    """Iterates the batches that count, on the device that computes.

    All iterations start from the same state of random numbers, so that a DataLoader that shuffles, or a collator that
    draws, gives every pass the same batches.

    Args:
        batches: the user's batches.
        device: where the model wants them.
        bar: shows each batch read.
        labelled: whether batches need labels; those with none that counts are then left out.

    Attributes:
        used: batches handed out in the last iteration.
        went_back: whether the loss of any batch so far could be differentiated.
    """

    def __init__(self, batches: Batches, device: torch.device, bar: tqdm, labelled: bool = True):
        self.batches, self.device, self.bar, self.labelled = batches, device, bar, labelled
        self.used = 0
        self.went_back = False
        self._warned = False
        # Of the last batch.
        self._labels: Tensor | None = None
        self._start: _RandomState | None = None

    def _rewind(self) -> None:
        """Let random numbers begin where they did in the first iteration."""
        if self._start is not None:
            self._start.restore()
            return
        owners = (self.batches, getattr(self.batches, "sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        generators = [generator for generator in generators if isinstance(generator, torch.Generator)]
        self._start = _RandomState([self.device] if self.device.type == "cuda" else [], generators)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that count.

        Raises:
            ValueError: there is no batch, one has no labels, or no label of any counts.
            TypeError: a batch is no mapping.
        """
        self._rewind()
        seen = self.used = 0
        for batch in self.batches:
            seen += 1
            self.bar.update()
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"Calibration batch {seen} is a {type(batch).__name__}; pass dicts that the model takes."
                )
            if self.labelled and batch.get("labels") is None:
                keys = ", ".join(map(str, batch))
                raise ValueError(f"Calibration batch {seen} has no labels (only {keys}); this measure needs a loss.")
            if self.labelled:
                self._labels = labels = batch["labels"]
                if not isinstance(labels, Tensor):
                    raise TypeError(
                        f"The labels of calibration batch {seen} are a {type(labels).__name__}; pass tensors, as a "
                        "collator with return_tensors='pt' makes them."
                    )
                if bool((labels == IGNORED_LABEL).all()):
                    continue
            self.used += 1
            yield {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if not seen:
            raise ValueError("There are no calibration batches; pass at least one dict with input_ids and labels.")
        if not self.used:
            raise ValueError(
                f"All labels of all {seen} calibration batches are {IGNORED_LABEL}, or first ones that a shifted loss "
                "leaves out; are prompts cut too short?"
            )
        if self.used < seen and not self._warned:
            self._warned = True
            logger.warning("%d of %d calibration batches have no label that counts; left out.", seen - self.used, seen)

    def takes(self, loss: Any) -> bool:
        """Check the loss of the last batch.

        Returns:
            Whether the batch counts: it does not where the loss is a mean over no label.

        Raises:
            ValueError: it is not finite, or not a single number.
            TypeError: it is no tensor.
        """
        if is_nan(loss):
            labelled, by_first_only = labelled_examples(self._labels)
            if torch.equal(labelled, by_first_only):
                self.used -= 1
                return False
        _check_loss(loss, self.used)
        return True


def labelled_examples(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which examples have a label that counts, and which of them none but the first; both (batch,) bool.

    For the latter a shifted loss, as of causal models, is a mean over no label, and NaN.
    """
    counted = (labels != IGNORED_LABEL).reshape(len(labels), -1)
    labelled = counted.any(1)
    # Of a single label none can be shifted away.
    by_first_only = labelled & ~counted[:, 1:].any(1) if counted.shape[1] > 1 else torch.zeros_like(labelled)
    return labelled, by_first_only


def is_nan(loss: Any) -> bool:
    """Whether a loss is a tensor of nothing but NaN."""
    return isinstance(loss, Tensor) and bool(loss.detach().isnan().all())


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model itself returns for a batch.

    Raises:
        ValueError: it returns none.
    """
    return loss_of(model(**batch), model)


def loss_of(output: Any, model: nn.Module) -> Tensor:
    """The loss in a model's output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(f"{type(model).__name__} returns no loss for its batch; pass loss=function of (model, batch).")
    return loss


def _check_loss(value: Any, number: int) -> None:
    """Refuse a loss that would make every score NaN, or that is none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"The loss of calibration batch {number} is a {type(value).__name__}; return a scalar tensor.")
    if value.numel() != 1:
        raise ValueError(f"The loss of calibration batch {number} has shape {tuple(value.shape)}; return its mean.")
    if not bool(torch.isfinite(value.detach())):
        raise ValueError(f"The loss of calibration batch {number} is {value.item()}; look for a bad sample or weight.")


@contextlib.contextmanager
def plain_implementation(model: nn.Module, attention: bool) -> Iterator[None]:
    """Stacked experts, and attention if asked for, in plain operations that any dtype and second derivatives allow.

    Scaled dot-product attention stays, for `sdpa_kernel` to choose its plain form.
    """
    config = getattr(model, "config", None)
    settings = {"_experts_implementation": ("eager",)}
    if attention:
        settings["_attn_implementation"] = ("eager", "sdpa")
    before = {name: getattr(config, name, None) for name in settings}
    changed = {name: value for name, value in before.items() if value is not None and value not in settings[name]}
    try:
        for name in changed:
            setattr(config, name, settings[name][0])
        yield
    finally:
        for name, value in changed.items():
            setattr(config, name, value)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place or is the wrapper of `torch.compile`."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without cache and with nothing that requires gradients; all as before afterwards.

    Blocks whose activations transformers checkpoints in training, and in training only, are checkpointed here too.
    """
    training = [module for module in model.modules() if module.training]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with contextlib.ExitStack() as stack:
        stack.callback(_RandomState(devices).restore)
        stack.enter_context(frozen_forwards(model))
        if any(is_compiled(module) for module in model.modules()):
            # A graph that is there already would not call the hooks of the measures.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__):
                # What stands in for a block's call streams its weights, and recomputes it already.
                if module.gradient_checkpointing and module._compiled_call_impl is None:
                    again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
                    replace_method(module, "forward", again, stack)
        try:
            model.eval()
            for parameter in required:
                parameter.requires_grad_(False)
            if use_cache is not None:
                config.use_cache = False
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in required:
                parameter.requires_grad_(True)
            if use_cache is not None:
                config.use_cache = use_cache
