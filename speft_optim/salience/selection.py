"""`select_masks`: its arguments are checked, the weights scored, and the best entries kept."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from speft_optim.checks import check_callable, check_choice, check_flag, check_whole
from speft_optim.distributed import check_equal, largest, smallest, together
from speft_optim.masks.collection import Masks
from speft_optim.offload.engine import offloaded_to, streaming
from speft_optim.salience.amounts import amount_kept, candidate_bytes, check_amount
from speft_optim.salience.batches import Batches, check_max_batches
from speft_optim.salience.best_masks import best_masks
from speft_optim.salience.calibration import default_memory_budget, stream_scores
from speft_optim.salience.losses import LossFunction
from speft_optim.salience.measures import Measure, measure_of
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.mesh import cast_inputs, check_divisions, is_fully_sharded, prepare_calibration
from speft_optim.weights.provenance import note_weights
from speft_optim.weights.targets import Target, Targets, check_differentiable, find_targets
from speft_optim.weights.wrappers import unwrapped


def select_masks(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    salience: str | Callable[[Tensor, Tensor], Tensor] = "gradient",
    density: float | None = None,
    budget: int | Mapping[str, int] | None = None,
    scope: Literal["local", "global"] = "local",
    targets: Targets = None,
    memory_budget: int | None = None,
    loss: LossFunction | None = None,
    max_batches: int | None = None,
    offload: str | torch.device | None = None,
    base: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Masks:
    """Choose which entries to train (SPEFT, Sections 3.1 to 3.3).

    With several processes, each passes its own batches, and all get the masks that one process would select from all of
    them. Under `fully_shard` they read their batches in step and need equally many.

    Load the weights first: masks selected on other weights are no better than random masks. A pass needs the memory of
    a forward and backward pass of the model in its current configuration. Trainers enable activation checkpointing and
    autocast only when training begins. So if memory is short, call `model.gradient_checkpointing_enable()` before this
    function; for autocast, call it inside `with torch.autocast("cuda", torch.bfloat16):`.

    Args:
        model: the model; it is unchanged afterwards, also after an error.
        batches: calibration data: a list, DataLoader or other iterable of dicts of the model's arguments, with labels,
            or of batches in any form that `loss` accepts. Use training data, since the entries are selected for it; the
            paper uses 64 batches of 16 examples. `magnitude`, `random` and `synflow` need none.
        salience: name of the measure, see `speft_optim.salience.measures`; or a function `salience(weight, gradient)`
            that scores a chunk of a weight's entries, each one independently of the others. Both arguments are fp32 of
            shape (entries,); the gradient is the signed mean over the batches. It returns floating-point scores of that
            shape, of which the highest are kept.
        density: share of the targeted entries to keep, in (0, 1]; per weight in local scope, rounded to whole entries.
        budget: number of entries to keep over all targets, instead of `density`. In local scope it is divided among the
            targets in proportion to their sizes, or can be a dict with a number for each target's name.
        scope: "local" keeps the same share of each weight, "global" the best entries over all weights.
        targets: which weights are targeted; see `find_targets`. Default: the linear weights of the decoder blocks.
        memory_budget: bytes that estimation may hold beyond the model and one batch; default half of the free memory.
            Less memory needs more passes over the batches and gives the same masks. The budget includes the candidates
            for the masks: about 10 bytes for each entry that is kept, over all targets in global scope. At least an
            eighth of the budget, and one row of a weight, is used for the accumulators of a pass; if the budget is too
            small for these and the candidates, it is exceeded.
        loss: a function from (model, batch) to a scalar tensor; default the loss that the model returns. With your own
            function a batch can have any form, also without labels: tensors in dicts, lists, tuples and dataclasses are
            moved to the model's device. The function gets the model without its wrappers, so that none of them
            communicates gradients. `fisher` calls it with single examples: one row of each tensor that has as many rows
            as the labels or, without labels, as most tensors of the batch.
        max_batches: the largest number of batches to read, the same ones in each pass; None for all, that is a
            DataLoader's whole data set.
        offload: device to compute on while the weights stay in CPU memory and are copied to it block by block, for a
            model that does not fit on the device; the masks are the same. Not for `grasp`.
        base: with `offload`, the checkpoint folder whose safetensors files hold the weights of a model on the meta
            device.
        seed: seed of the `random` measure.
        progress: whether to show a progress bar (on terminals only).

    Returns:
        The masks by parameter name, in the model's order. A weight whose share rounds to zero entries has an empty
        mask. The masks store a few entries of the weights, so that a warning can be issued if training begins with
        other weights.

    Raises:
        ValueError: an argument is out of range, the data cannot be used, or scores are not finite.
        TypeError: an argument is of the wrong kind.
        RuntimeError: another process of the group failed.
    """
    model = unwrapped(model)
    with contextlib.ExitStack() as stack:
        with together():
            measure = check_together(salience, scope, offload, base)
            check_max_batches(max_batches)
            check_callable("loss", loss, "(model, batch)")
            found = _prepare(model, measure, targets, offload, base, stack)
            sizes = {name: target.shape.numel() for name, target in found.items()}
            check_amount(density, budget, sizes, scope)
            if memory_budget is None:
                memory_budget = default_memory_budget(next(iter(found.values())).device)
            check_whole("memory_budget", memory_budget, least=1, usual="2 * 2**30 bytes")
            check_whole("seed", seed, usual=0)
            check_flag("progress", progress)
        amount = amount_kept(sizes, scope, density, budget)
        # Processes with other arguments would average accumulators of other weights, or gather other rows.
        choice = f"{measure.name} of {sum(sizes.values()):,} entries in {len(sizes)} weights"
        if is_fully_sharded(model):
            kept = sum(amount.values()) if isinstance(amount, Mapping) else amount
            by_weight = hashlib.sha256(repr(amount).encode()).hexdigest()[:8]
            choice += f", of which {kept:,} are kept in {scope} scope (hash of the amounts by weight: {by_weight})"
        check_equal(choice, "The arguments of select_masks", "pass the same in all of them.")
        # Products of numpy integers can overflow, those of Python integers cannot.
        memory_budget = smallest(int(memory_budget))
        # All processes must cut the weights into the same groups, whatever number of entries each keeps.
        candidates = largest(candidate_bytes(sizes, amount, measure.score_bytes))
        options = dict(loss=loss, max_batches=max_batches, seed=seed, progress=progress)
        options.update(memory_budget=memory_budget, candidates=candidates)
        scores = stream_scores(model, batches, found, measure, **options)
        # The traceback of an error would keep the generator open, and with it the model changed, so it is closed here.
        stack.enter_context(contextlib.closing(scores))
        masks = best_masks(scores, found, amount, memory_budget)
    if measure.statistic != "random":
        note_weights(masks, found)
    return masks


def check_together(
    salience: str | Callable[[Tensor, Tensor], Tensor],
    scope: str,
    offload: str | torch.device | None = None,
    base: str | Path | None = None,
) -> Measure:
    """Refuse a measure or scope that is not known, and arguments that exclude each other.

    Returns:
        The measure.

    Raises:
        ValueError: a name is not known, or two arguments exclude each other.
        TypeError: `salience` is neither a name nor a function.
    """
    measure = measure_of(salience)
    check_choice("scope", scope, ("local", "global"))
    if offload is None and base is not None:
        raise ValueError("base is read only with offload; pass offload='cuda' too, or load the model.")
    if offload is not None and measure.differentiates_twice:
        raise ValueError(f"salience={salience!r} differentiates twice, which offload does not support; choose another.")
    return measure


def _prepare(
    model: nn.Module,
    measure: Measure,
    targets: Targets,
    offload: str | torch.device | None,
    base: str | Path | None,
    stack: contextlib.ExitStack,
) -> dict[str, Target]:
    """Bring the weights into the form in which they are scored, until the stack closes, and return those to score."""
    check_differentiable(model)
    if offloaded_to(model) is not None:
        _check_recomputed(measure)
    settle_storage(model)
    if is_fully_sharded(model):
        _check_sharded(model, measure, offload)
        prepare_calibration(model)
    # Pieces of weights are no targets, so that this is checked before these are looked for.
    check_divisions(model)
    if offload is not None:
        # The graph of `synflow` keeps no weights, and its torch function mode would be off in a recomputation.
        stack.enter_context(streaming(model, offload, base, by_block=measure.takes_batches))
    return find_targets(model, targets)


def _check_recomputed(measure: Measure) -> None:
    """Refuse a measure whose passes go wrong where blocks are recomputed, as on a model that `sparsify` offloaded.

    Raises:
        ValueError: the measure differentiates twice, or changes how the model computes.
    """
    if measure.differentiates_twice or measure.statistic == "flow":
        raise ValueError(
            f"salience='{measure.name}' is not possible on a model that sparsify offloaded; select before sparsify, or "
            "choose another."
        )


def _check_sharded(model: nn.Module, measure: Measure, offload: str | torch.device | None) -> None:
    """Refuse what a model under `fully_shard` cannot be scored by.

    Raises:
        ValueError: the measure differentiates twice, or in fp64 what FSDP casts down; or the weights are to visit
            another device.
    """
    if offload is not None:
        raise ValueError("offload= is for a model on one device, and this one is sharded over several; leave it out.")
    if measure.differentiates_twice:
        raise ValueError(
            f"salience='{measure.name}' differentiates twice, and a model under fully_shard has its weights gathered "
            "for one backward alone; choose another measure, or select before the model is sharded."
        )
    if measure.statistic == "flow" and (dtype := cast_inputs(model)) is not None:
        raise ValueError(
            f"salience='{measure.name}' computes in float64, and the model's MixedPrecisionPolicy casts what each "
            f"block gets to {str(dtype).removeprefix('torch.')}; choose another measure, or select before the model is "
            "sharded."
        )
