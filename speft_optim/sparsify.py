"""Compact values on a model: `sparsify` attaches them, `desparsify` removes them and leaves plain weights.

For a masked weight W a `SparseWeight` is added as a submodule beside it (`q_proj.sparse_weight`). It holds one
trainable tensor, `values`: the weight itself at the masked entries, 1-D, fp32. W stays the model's own tensor, frozen,
and always holds the current values in its own dtype, so forward and checkpoints are the model's own. A quantised W
cannot hold them: there the values are an overlay on the dequantised weight (see `weights/quantized_linear.py`).

Beyond W each masked entry takes 4 bytes of values and 2 to 4 of positions. They are in a submodule rather than a
parameter of the layer, because a module can keep itself out of `state_dict()`, keep its values in fp32 under
`model.to(bfloat16)`, and be copied and pickled with its model; a bare parameter would need a hook for each of these.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from speft_optim.checkpoint.base import original_entries
from speft_optim.checkpoint.save import LOADED
from speft_optim.distributed import check_equal_masks, together
from speft_optim.integrations import (
    declare_trainable,
    let_checkpoints_see_gradients,
    patch_model,
    refuse_to_save_rows,
    save_from_files,
    unpatch_model,
)
from speft_optim.masks.mask import Mask
from speft_optim.offload.training import OffloadedBase, check_offload, map_checkpoint
from speft_optim.optim.adamw import SparseAdamW
from speft_optim.preconditions import check_masks, check_model, check_placement, check_resident
from speft_optim.weights.attached import (
    Record,
    keep_record,
    record_of,
    sparsified_roots,
    take_record,
)
from speft_optim.weights.averaging import average_gradients
from speft_optim.weights.bnb import settle_storage
from speft_optim.weights.compact_values import linked, warn_if_built_before
from speft_optim.weights.mesh import is_fully_sharded, reshard
from speft_optim.weights.provenance import compare_at_first_step, note_masks
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import Target, all_targets, check_differentiable
from speft_optim.weights.wrappers import check_not_parallel, unwrapped


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Mask],
    *,
    base: str | Path | None = None,
    keep_empty: bool = False,
    verify: bool = True,
    offload: str | torch.device | None = None,
    activations: str = "host",
    resident_blocks: int | str = 0,
    resident_head: bool = False,
) -> list[nn.Parameter]:
    """Attach trainable compact values for `masks`, and freeze all other parameters.

    If bitsandbytes quantised the model to 8 or 4 bits, all its quantised linear layers are computed as frozen linear
    layers from now on, with the values as an overlay (see `weights/quantized_linear.py`). transformers' flag
    `is_quantized`, by which it refuses to train a model, is then False until `desparsify`, so that Trainer and
    SFTTrainer accept the model. `save_pretrained` writes the merged weights, as `export_merged` does.

    Under torch's `fully_shard`, called before or after this function, the values are replicated on every process and
    their gradients are averaged at the end of each backward. All processes must call this function with the same masks.
    int8 weights lose their scales in `fully_shard`, unless this function or `select_masks` was called before it.

    Args:
        model: a model in memory; its weights stay in place and in their dtype (fp32, bf16, fp16 or quantised).
        masks: a mask for each weight to train, by full parameter name, as `select_masks` returns them.
        base: None initialises the values from the model's own entries (dequantised for a quantised weight), so that the
            model's outputs do not change. The folder of the checkpoint that the model was quantised from initialises
            them from the entries there, which have no rounding error. With `offload`, it can also be the folder of the
            checkpoint of a model on the meta device, for a model that does not fit in CPU memory either: its
            safetensors files are memory-mapped, and nothing may change them meanwhile. Only pages that are written to
            then use memory; `desparsify`, `load_state_dict`, `state_dict` and moving masks write pages, `save_adapter`,
            `load_adapter`, `export_merged` and `save_pretrained` do not.
        keep_empty: whether weights with an empty mask get (empty) values too, so that a `MaskSchedule` can give them
            entries.
        verify: whether to compare the gradient of each dense linear weight once, in its first backward, with autograd's
            own, and to detect uses of dense weights outside their modules (see `weights/verification.py`). Such uses
            are included in the gradient, and a warning names the weight. The first backward then holds one dense
            gradient at a time. With False, only the use in a weight's own module contributes to the gradient.
        offload: device to compute on while the frozen weights of a model in CPU memory stay there, for a model that
            does not fit on the device: they are copied to it block by block, in forward and again in backward, where
            each block is recomputed. Values, moments and gradients are on the device. `model.to(device)` moves nothing
            from now on, and weights in CPU memory are updated when they are read or saved. One process only; not for
            compiled models.
        activations: where `offload` keeps the inputs of blocks between forward and backward. "host" is pinned CPU
            memory, to which they are copied asynchronously; this adds a few percent to the transfers of the weights.
            "device" avoids these copies, and keeps batch * length * width entries per block on the device.
        resident_blocks: the number of blocks that `offload` keeps on the device, or "all", if the device has room for
            more than two: each is copied once, so that fewer bytes are copied in a step. They are recomputed as the
            others are.
        resident_head: whether `offload` keeps the head's weight on the device too, instead of copying it in each
            forward. A head with a mask is copied nevertheless.

    Returns:
        The trainable parameters, each (k,) fp32, in the model's order, for `SparseAdamW` or any other optimizer.

    Raises:
        ValueError: a name or shape does not fit the model, the masks are empty or differ between processes, or the
            model is already sparsified; the model is then unchanged.
        TypeError: a masked weight is not floating-point, a weight is quantised by another library than bitsandbytes,
            `masks` is not a mapping to `Mask`, or an option has the wrong type.
        RuntimeError: another process of the group failed; the model is then unchanged.
    """
    wrapper, model = model, unwrapped(model)
    with contextlib.ExitStack() as undo:
        with together():
            check_not_parallel(wrapper)
            check_placement(activations, resident_blocks, resident_head, offload)
            mapped = {} if base is None or offload is None else map_checkpoint(model, base, undo)
            targets = _prepare(model, masks)
            options = dict(inputs_on_host=activations == "host", resident_head=resident_head)
            if offload is not None:
                offload = check_offload(model, offload)
                options["resident_blocks"] = check_resident(model, resident_blocks, resident_head)
            unread = {name: mask for name, mask in masks.items() if name not in mapped}
            entries = {} if base is None else _base_entries(model, base, unread, targets)
        check_equal_masks(masks)
        # This is the first change, since the device may lack memory for it.
        offloaded = [] if offload is None else [OffloadedBase(model, offload, mapped, **options)]
        weights = _attach_all(model, masks, targets, entries, offloaded, keep_empty=keep_empty, verify=verify)
        if mapped:
            save_from_files(model)
        undo.pop_all()
    note_masks(weights)
    return [weight.values for weight in weights]


def _attach_all(
    model: nn.Module,
    masks: Mapping[str, Mask],
    targets: dict[str, Target],
    entries: dict[str, Tensor],
    offloaded: list[OffloadedBase],
    *,
    keep_empty: bool,
    verify: bool,
) -> list[SparseWeight]:
    """Freeze the model and attach the values of all masks; an error leaves the model as it was."""
    # This import loads the compiler and Triton, which importing the package must not.
    from speft_optim.eager import refresh_before_forward, refresh_compiled_layers

    _follow_optimizers()
    required_grad = {name: target.parameter.requires_grad for name, target in targets.items()}
    model.requires_grad_(False)
    patch_model(model)
    declare_trainable(model)
    chosen = [name for name in targets if name in masks and (keep_empty or len(masks[name]))]
    weights = []
    try:
        for name in chosen:
            weights.append(_attach(model, targets[name], masks[name], entries.get(name), verify))
    except BaseException:
        # The device may lack memory for the values.
        keep_record(model, Record(weights, required_grad, offloaded))
        desparsify(model)
        raise
    is_sharded = is_fully_sharded(model)
    # In front of the hook that gathers the weights, which takes them as they are then.
    hooks = [*refresh_before_forward(model, weights, prepend=is_sharded), *let_checkpoints_see_gradients(model)]
    # The calls of an offloaded model are replaced already, and stay out of compilers.
    hooks += offloaded or refresh_compiled_layers(model, weights)
    keep_record(model, Record(weights, required_grad, hooks))
    if is_sharded:
        average_gradients(model)
        refuse_to_save_rows(model)
    return weights


def desparsify(model: nn.Module) -> None:
    """Undo `sparsify`: leave plain weights with the trained values and their former `requires_grad`.

    A quantised weight keeps its trained entries as a frozen overlay; a layer without trained entries becomes
    bitsandbytes' own again.

    Args:
        model: the model that was sparsified, or a wrapper around it.

    Raises:
        ValueError: the model is not sparsified.
    """
    roots = sparsified_roots(model)
    if not roots:
        raise ValueError(f"{type(model).__name__} is not sparsified; there is nothing to undo.")
    for base in (hook for root in roots for hook in record_of(root).hooks if isinstance(hook, OffloadedBase)):
        # What is refused here is refused before anything is undone.
        base.settle()
    for root in roots:
        weights, required_grad, hooks = take_record(root)
        for weight in weights:
            weight.detach_from_model()
        # `all_targets` gives plain names, since blocks may have been wrapped meanwhile.
        for name, target in all_targets(root).items():
            target.parameter.requires_grad_(required_grad.get(name, target.parameter.requires_grad))
        for hook in hooks:
            hook.remove()
        unpatch_model(root)


def _prepare(model: nn.Module, masks: Mapping[str, Mask]) -> dict[str, Target]:
    """Settle how the model holds its weights, refuse what `sparsify` cannot do, and return all weights by name."""
    check_differentiable(model)
    if (loaded := model.__dict__.get(LOADED)) is not None and not loaded.is_written:
        raise ValueError(
            "A change of this model's adapters was interrupted, so that its weights are a mixture; call use_adapters "
            "or unload_adapter first."
        )
    settle_storage(model)
    reshard(model)
    targets = all_targets(model)
    check_model(model)
    check_masks(model, masks, targets)
    return targets


def _base_entries(
    model: nn.Module, base: str | Path, masks: Mapping[str, Mask], targets: dict[str, Target]
) -> dict[str, Tensor]:
    """Return the entries of the checkpoint in `base` at the masks, by name."""
    if is_fully_sharded(model):
        raise ValueError(
            "base= is compared with whole weights; call sparsify with base= first, and fully_shard after it."
        )
    return original_entries(base, {name: mask for name, mask in masks.items() if len(mask)}, targets)


def _attach(model: nn.Module, target: Target, mask: Mask, entries: Tensor | None, verify: bool) -> SparseWeight:
    """Attach the values of one weight, which start from `entries` (k,), or from the weight's own where it is None."""
    if entries is not None:
        frozen_weight(*target.sites[0]).put(mask, entries)
    weight = SparseWeight(model, target, mask, verify)
    weight.place.add(weight)
    return weight


def _follow_optimizers() -> None:
    """Hook the steps of all optimizers, once per process: gradients are checked, and new values written into weights.

    Version counters would do for torch's optimizers, but not for those that update through a pointer (bitsandbytes).
    """
    if not _following:
        _following.append(register_optimizer_step_pre_hook(_check_before_step))
        _following.append(register_optimizer_step_post_hook(_write_after_step))


_following: list = []


def _check_before_step(optimizer, args, kwargs) -> None:
    # SparseAdamW does so itself, after its closure.
    if not isinstance(optimizer, SparseAdamW):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if (weight := linked(parameter)) is not None:
                weight.check_average()


def _write_after_step(optimizer, args, kwargs) -> None:
    compare_at_first_step(optimizer)
    warn_if_built_before(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (weight := linked(parameter)) is not None:
                if not isinstance(optimizer, SparseAdamW):
                    weight.check()
                    # Again, since a closure computes gradients within the step.
                    weight.check_average()
                    if parameter.grad is None:
                        weight.synchronize()
                    else:
                        # Some optimizers bypass the version counter, as torch's fused ones do.
                        torch.autograd.graph.increment_version(parameter)
                        weight.write()
                weight.uses.promote()
