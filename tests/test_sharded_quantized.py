"""Models of bitsandbytes' 4-bit and int8 weights under `fully_shard`, over two processes, with gloo or NCCL.

A run in which these weights are sharded must equal one in which each process has them whole, to the bit: they are
gathered byte by byte, and all else is the same. That run equals one process with all batches up to the order of sums.
"""

import copy
import inspect
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, assert_same_masks, device, equal_states, is_on_gpu, masks_of, token_batch
from processes import FOLDER, assert_passed, failures_of, on_two_gpus
from test_sharded import (
    assert_equal_on_all,
    counted_exchanges,
    fsdp_accelerator,
    mesh,
    part,
    reset_accelerate,
    shard,
    use_fsdp,
)
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.nn.utils import clip_grad_norm_

pytest.importorskip("bitsandbytes")

from quantized_models import load_quantized, save_original

from speft_optim import (
    Masks,
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.compact_values import linked

OPTIONS = dict(lr=1e-2, weight_decay=0.1)
STEPS = 3
# Rows of 41 entries, so that blocks of scales go across rows, and packed weights of 205 numbers of fp32.
ODD = dict(hidden_size=40, intermediate_size=41)
# Each with the dtype that FSDP gathers.
KINDS = {
    "bf16": ("nf4", dict(bnb_4bit_quant_storage=torch.bfloat16)),
    "double fp32": ("double", dict(bnb_4bit_quant_storage=torch.float32)),
    "uint8": ("nf4", {}),
    "int8": ("int8", {}),
}
# Earlier versions of torch let each parameter require gradients as they shard it, which integers cannot.
INTEGERS = "requires_grad=param.requires_grad" in inspect.getsource(FSDPParam)
TOO_OLD = f"fully_shard of torch {torch.__version__} cannot shard integers"


def kinds(*names):
    """Those that this version of torch can shard."""
    return [name for name in names if INTEGERS or name not in ("uint8", "int8")]


def original(**config):
    """The folder of a checkpoint that all processes find."""
    folder = f"{FOLDER[-1]}/original{len(config)}"
    if dist.get_rank() == 0 and not os.path.exists(folder):
        save_original(folder, **config)
    dist.barrier()
    return folder


def load(kind, **config):
    name, options = KINDS[kind]
    return load_quantized(original(**config), name, **options).train()


def codes_of(model):
    return {module.weight for _, module in quantized_linears(model)}


def start(kind, first="sparsify", sharded=True, model=None, **options):
    """A sparsified model of which FSDP shards the quantised weights, or leaves them whole in every process."""
    model = load(kind, **ODD) if model is None else model
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    if not sharded:
        options["ignored_params"] = codes_of(model)
    if first == "sparsify":
        values = sparsify(model, masks)
        shard(model, **options)
    else:
        shard(model, **options)
        values = sparsify(model, masks)
    assert all(hasattr(module.weight, "device_mesh") == sharded for _, module in quantized_linears(model))
    return model, values, SparseAdamW(values, **OPTIONS)


def train(rank, model, optimizer, first=0, steps=STEPS):
    for step in range(first, first + steps):
        model(**part(token_batch(step, batch=4), rank, dist.get_world_size())).loss.backward()
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_values(values, expected, start=None):
    """Equal; on a GPU close, and where products are of 16 bits, moved alike from `start`.

    AdamW makes steps of one length of gradients that are not much more than their rounding.
    """
    assert len(values) == len(expected) > 0
    for value, other in zip(values, expected, strict=True):
        if is_on_gpu() and start is not None:
            moved, wanted = (each.detach() - start[linked(value).name] for each in (value, other))
            assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.95, linked(value).name
        elif is_on_gpu():
            # The library of products may choose another kernel for memory that is aligned otherwise.
            assert_close(value.detach(), other.detach(), atol=1e-4, rtol=0)
        else:
            assert torch.equal(value.detach(), other.detach()), linked(value).name
        assert_equal_on_all(value.detach())


def trains_as_with_whole_weights_in_either_order(rank):
    for kind in kinds(*KINDS):
        model, values, optimizer = start(kind)
        whole, expected, other = start(kind, sharded=False)
        before = [value.detach().clone() for value in values]
        train(rank, model, optimizer)
        train(rank, whole, other)
        assert_equal_values(values, expected)
        assert not any(map(torch.equal, values, before))
        if kind != "int8":
            model, values, optimizer = start(kind, first="shard")
            train(rank, model, optimizer)
            assert_equal_values(values, expected)


def equals_one_process_on_all_batches(rank):
    """Gradients up to the order of sums; of values AdamW amplifies the rounding of the smallest gradients."""
    for kind in kinds(*KINDS):
        model, values, optimizer = start(kind)
        one = load(kind, **ODD)
        one_values = sparsify(one, select_masks(one, salience="random", density=0.05, progress=False))
        one_optimizer = SparseAdamW(one_values, **OPTIONS)
        for step in range(STEPS):
            batch = token_batch(step, batch=4)
            model(**part(batch, rank, dist.get_world_size())).loss.backward()
            one(**batch).loss.backward()
            if step == 0:
                for value, expected in zip(values, one_values, strict=True):
                    assert_close(value.grad, expected.grad, atol=1e-7, rtol=1e-4)
            for each in (optimizer, one_optimizer):
                each.step()
                each.zero_grad()
        for value, expected in zip(values, one_values, strict=True):
            assert_close(value.detach(), expected.detach(), atol=1e-4, rtol=0)


def blocks_computed_again_in_backward(rank):
    _, expected, other = plain = start("bf16", sharded=False)
    train(rank, plain[0], other)
    for reentrant in (False, True):
        model = load("bf16", **ODD)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model, values, optimizer = start("bf16", model=model)
        with counted_exchanges() as sent:
            train(rank, model, optimizer)
        assert sent == [sum(map(len, values)) + len(values)] * STEPS
        assert_equal_values(values, expected)


def compiled_blocks(rank):
    one_block = dict(ODD, num_hidden_layers=1)
    whole, expected, other = start("bf16", sharded=False, model=load("bf16", **one_block))
    train(rank, whole, other)
    model = load("bf16", **one_block)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    model, values, optimizer = start("bf16", model=model)
    train(rank, model, optimizer)
    assert_equal_values(values, expected)


def gradients_added_up_are_sent_once(rank):
    found = []
    for sharded in (True, False):
        model, values, optimizer = start("double fp32", sharded=sharded)
        with counted_exchanges() as sent:
            for step in range(STEPS):
                batch = token_batch(step, batch=8)
                for half in range(2):
                    model.set_requires_gradient_sync(half == 1)
                    (model(**part(part(batch, half, 2), rank, dist.get_world_size())).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert sent == [sum(map(len, values)) + len(values)] * STEPS
        found.append(values)
    assert_equal_values(*found)


def other_ways_to_shard(rank):
    """Hybrid, weights kept gathered between passes, the whole model gathered at once, and rows on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    for kind in kinds("bf16", "int8"):
        whole, expected, other = start(kind, sharded=False)
        train(rank, whole, other)
        offload = CPUOffloadPolicy(pin_memory=is_on_gpu())
        ways = [dict(mesh=mesh(1, 2)), dict(mesh=mesh(2, 1)), dict(reshard_after_forward=False)]
        for options in (*ways, dict(offload_policy=offload)):
            model, values, optimizer = start(kind, **options)
            train(rank, model, optimizer)
            assert_equal_values(values, expected)
        model = load(kind, **ODD)
        values = sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        fully_shard(model, mesh=mesh())
        train(rank, model, SparseAdamW(values, **OPTIONS))
        assert_equal_values(values, expected)


def mixed_precision_never_casts_quantised_values(rank):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in kinds(*KINDS):
        whole, expected, other = start(kind, sharded=False, mp_policy=policy)
        before = {linked(value).name: value.detach().clone() for value in expected}
        train(rank, whole, other)
        # int8 weights lose their scales if they are sharded first.
        for first in ("sparsify", "shard") if kind != "int8" else ("sparsify",):
            model, values, optimizer = start(kind, first=first, mp_policy=policy)
            train(rank, model, optimizer)
            assert_equal_values(values, expected, before)
            assert equal_states(bytes_in_forward(model), bytes_in_forward(whole))
    offload = CPUOffloadPolicy(pin_memory=is_on_gpu())
    model, values, optimizer = start("double fp32", mp_policy=policy, offload_policy=offload)
    whole, expected, other = start("double fp32", sharded=False, mp_policy=policy)
    before = {linked(value).name: value.detach().clone() for value in expected}
    for each, its_optimizer in ((model, optimizer), (whole, other)):
        train(rank, each, its_optimizer)
    assert_equal_values(values, expected, before)


def bytes_in_forward(model):
    """The quantised weights as they are in a forward, by layer."""
    found = {}

    def note(module, *_):
        found[names[module]] = module.weight.detach().flatten().view(torch.uint8).clone()

    names = {module: name for name, module in quantized_linears(model)}
    hooks = [module.register_forward_hook(note) for module in names]
    model(**token_batch())
    for hook in hooks:
        hook.remove()
    return found


def through_fp32(copies, sources, non_blocking=False):
    """Copy as torch copies several tensors of 16 bits at once on a GPU, which makes all NaNs the same one."""
    for copied, source in zip(copies, sources, strict=True):
        copied.copy_(source.float() if source.is_floating_point() else source)


def bytes_are_gathered_as_bytes_in_blocks_of_16_bits(rank):
    """FSDP gathers them as numbers, in which torch's copies on a GPU change NaNs."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    def in_16_bits():
        name, options = KINDS["bf16"]
        return load_quantized(original(**ODD), name, dtype=torch.bfloat16, **options).train()

    copies_of_torch = torch._foreach_copy_
    whole, expected, other = start("bf16", model=in_16_bits(), sharded=False)
    before = {linked(value).name: value.detach().clone() for value in expected}
    train(rank, whole, other)
    stored = bytes_in_forward(whole)
    if not is_on_gpu():
        torch._foreach_copy_ = through_fp32
    try:
        # Without the library they are others. A model that was used so is put right too.
        used = shard(in_16_bits())
        assert not equal_states(bytes_in_forward(used), stored)
        values = sparsify(used, masks_of(whole))
        found = [(used, values, SparseAdamW(values, **OPTIONS))]
        offload = CPUOffloadPolicy(pin_memory=is_on_gpu())
        for options in ({}, dict(first="shard", mesh=mesh(2, 1)), dict(offload_policy=offload)):
            found.append(start("bf16", model=in_16_bits(), **options))
        for model, values, optimizer in found:
            train(rank, model, optimizer)
            assert_equal_values(values, expected, before)
            assert equal_states(bytes_in_forward(model), stored)
        # The root's own weights are gathered before anything of ours runs; and blocks may have no trained entries.
        few = [name for name in masks_of(whole) if "layers.1" in name]
        for divide in (fully_shard, shard):
            model = in_16_bits()
            sparsify(model, Masks({name: masks_of(whole)[name] for name in few}))
            assert equal_states(bytes_in_forward(divide(model, mesh=mesh())), stored)
    finally:
        torch._foreach_copy_ = copies_of_torch


def bytes_are_gathered_as_bytes_from_other_memory(rank):
    """After a load that assigns, a move of the model, and of a model that is not sparsified any more."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, _, _ = start("bf16", mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    stored = bytes_in_forward(model)
    for is_sparsified in (True, False):
        if not is_sparsified:
            desparsify(model)
        model.load_state_dict(copy.deepcopy(model.state_dict(keep_vars=True)), assign=True)
        assert equal_states(bytes_in_forward(model), stored)
        model._apply(torch.clone)
        assert equal_states(bytes_in_forward(model), stored)


def int8_scales_that_fully_shard_would_lose(rank):
    if not INTEGERS:
        pytest.skip(TOO_OLD)
    model = load("int8")
    masks = select_masks(load("int8"), salience="random", density=0.05, progress=False)
    shard(model)
    for refused in (lambda: sparsify(model, masks), lambda: select_masks(model, salience="random", density=0.1)):
        with pytest.raises(ValueError, match="lost its scales in fully_shard; call sparsify first"):
            refused()
    assert not any("sparse" in name for name, _ in model.named_modules())
    # The layers keep them from here on.
    model = load("int8", **ODD)
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    values = sparsify(shard(model), masks)
    whole, expected, other = start("int8", sharded=False)
    train(rank, model, SparseAdamW(values, **OPTIONS))
    train(rank, whole, other)
    assert_equal_values(values, expected)


def whole_weights_are_freed_as_they_are_sharded(rank):
    for kind in kinds(*KINDS):
        model = load(kind)
        sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        before = [weakref.ref(module.weight.untyped_storage()) for _, module in quantized_linears(model)]
        assert before and all(storage() is not None for storage in before)
        shard(model)
        assert not any(storage() is not None for storage in before), kind


def copies_are_sharded_with_their_own_values(rank):
    """The scales of a weight and those of its layer are copied apart by bitsandbytes."""
    for kind in kinds("bf16", "int8"):
        whole, expected, other = start(kind, sharded=False)
        train(rank, whole, other)
        model, values, optimizer = start(kind, model=copy.deepcopy(load(kind, **ODD)))
        train(rank, model, optimizer)
        assert_equal_values(values, expected)
        model = load(kind, **ODD)
        sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        model = shard(copy.deepcopy(model))
        values = [value for value in model.parameters() if linked(value) is not None]
        train(rank, model, SparseAdamW(values, **OPTIONS))
        assert_equal_values(values, expected)


def taken_off_a_sharded_model_leaves_the_trained_function(rank):
    """Layers without trained entries too, whose own forward bitsandbytes has again where it can compute them."""
    for kind in kinds(*KINDS):
        model = load(kind, **ODD)
        masks = select_masks(model, salience="random", density=0.05, targets=["q_proj"], progress=False)
        values = sparsify(model, masks)
        shard(model)
        train(rank, model, SparseAdamW(values, **OPTIONS))
        logits = model(**token_batch(0)).logits.detach()
        desparsify(model)
        assert not any(linked(parameter) for parameter in model.parameters())
        # The forward of bitsandbytes may round otherwise.
        assert_close(model(**token_batch(0)).logits.detach(), logits, atol=1e-5, rtol=1e-4)


def values_that_start_from_the_original_checkpoint(rank):
    model, one = load("bf16", **ODD), load("bf16", **ODD)
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    folder = original(**ODD)
    values, expected = sparsify(model, masks, base=folder), sparsify(one, masks, base=folder)
    assert_equal_values(values, expected)
    shard(model)
    assert_close(model(**token_batch(0)).logits.detach(), one(**token_batch(0)).logits.detach())
    with pytest.raises(ValueError, match="call sparsify with base= first, and fully_shard after it"):
        sparsify(shard(load("bf16", **ODD)), masks, base=folder)


def quantised_weights_stay_frozen_when_all_is_thawed(rank):
    model, values, optimizer = start("bf16", first="shard")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    model(**token_batch(0)).loss.backward()
    assert not any(linked(value).weight.requires_grad for value in values)


def checkpoints_resumed_by_two_processes_and_by_one(rank):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for kind in kinds(*KINDS):
        folder = f"{FOLDER[-1]}/checkpoint {kind}"
        model, values, optimizer = start(kind)
        train(rank, model, optimizer, steps=2)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        train(rank, model, optimizer, first=2, steps=2)
        other, other_values, other_optimizer = start(kind)
        weights, state = get_state_dict(other, other_optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(other, other_optimizer, model_state_dict=weights, optim_state_dict=state)
        train(rank, other, other_optimizer, first=2, steps=2)
        assert_equal_values(other_values, values)
        # Quantised weights and scales too.
        assert equal_states(bytes_of(other), bytes_of(model))
        if rank == 0:
            torch.save([value.detach() for value in values], f"{FOLDER[-1]}/resumed {kind}.pt")
        dist.barrier()


def bytes_of(model):
    """The model's state as bytes: quantised values that are stored as floating numbers may be NaN."""
    state = {name: part.to_local() if hasattr(part, "to_local") else part for name, part in model.state_dict().items()}
    return {name: part.detach().contiguous().flatten().view(torch.uint8) for name, part in state.items()}


def a_state_dict_of_one_process_needs_no_other(rank):
    for kind in kinds("bf16", "int8"):
        model, values, optimizer = start(kind)
        train(rank, model, optimizer, steps=1)
        if rank == 0:
            state = model.state_dict()
            for value in values:
                assert torch.equal(state[f"{linked(value).name.removesuffix('weight')}trained_values"], value)
        dist.barrier()


def full_states_loaded_by_one_process(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    for kind in kinds(*KINDS):
        model, values, optimizer = start(kind)
        train(rank, model, optimizer, steps=1)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        logits = model(**token_batch(0)).logits.detach()
        one = load(kind, **ODD)
        one_values = sparsify(one, select_masks(one, salience="random", density=0.05, progress=False))
        if rank == 0:
            one.load_state_dict(full)
            assert all(map(torch.equal, one_values, values))
            assert_close(one(**token_batch(0)).logits.detach(), logits)
        dist.barrier()


def adapters_and_merged_checkpoints(rank):
    """Those of the first process hold what all processes trained, and fit a model of one process."""
    from transformers import LlamaForCausalLM

    for kind in kinds(*KINDS):
        model, values, optimizer = start(kind)
        train(rank, model, optimizer)
        logits = model(**token_batch(0)).logits.detach()
        adapter, folder = f"{FOLDER[-1]}/adapter {kind}", f"{FOLDER[-1]}/merged {kind}"
        save_adapter(model, adapter)
        export_merged(model, folder, dtype=torch.float32, max_shard_size="10KB")
        for saved in (model, model.model):
            with pytest.raises(ValueError, match="sharded.*export_merged"):
                saved.save_pretrained(f"{FOLDER[-1]}/refused")
        merged = LlamaForCausalLM.from_pretrained(folder).to(device())
        assert_close(merged(**token_batch(0)).logits.detach(), logits, atol=1e-5)
        for sharded in (False, True):
            other = load(kind, **ODD)
            # Scales of int8 are kept where the model came in before it was sharded.
            other = shard(patched(other)) if sharded else other
            masks = load_adapter(other, adapter)
            assert_close(other(**token_batch(0)).logits.detach(), logits, atol=1e-5)
            for value, expected in zip(sparsify(other, masks), values, strict=True):
                assert torch.equal(value.detach(), expected.detach())
            desparsify(other)
            assert_close(other(**token_batch(0)).logits.detach(), logits, atol=1e-5)


def patched(model):
    """A model that has computed its masks, for which its layers keep what they need."""
    select_masks(model, salience="magnitude", density=0.05, progress=False)
    return model


def salience_and_masks_that_move(rank):
    """From batches, and from the training's own gradients, in local scope: as with whole weights in each process."""
    batches = [token_batch(seed) for seed in range(4)]
    mine = batches[rank :: dist.get_world_size()]
    for kind in kinds("bf16", "int8"):
        found = []
        for sharded in (True, False):
            model = patched(load(kind, **ODD))
            shard(model, **({} if sharded else dict(ignored_params=codes_of(model))))
            masks = select_masks(model, mine, salience="snip", density=0.05, progress=False)
            optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
            MaskSchedule(model, optimizer, interval=4, window=2, memory_budget=20_000)
            train(rank, model, optimizer, steps=9)
            assert masks_of(model) != masks
            # Entries that were trained before are saved too, without a word to other processes.
            found.append((masks, masks_of(model), [*optimizer.param_groups[0]["params"]], optimizer.state_dict()))
        for masks, expected in zip(found[0][:2], found[1][:2], strict=True):
            assert_same_masks(masks, expected)
        if not is_on_gpu():
            assert_equal_values(found[0][2], found[1][2])
            assert equal_states(found[0][3]["state"], found[1][3]["state"])


def layers_that_cannot_be_mended_after_fully_shard(rank):
    model = load("bf16")
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    shard(model)
    layer = next(module for _, module in quantized_linears(model))
    state = layer.quant_state
    layer.quant_state = None
    with pytest.raises(ValueError, match="q_proj.weight is a 4-bit weight without its quantisation state"):
        sparsify(model, masks)
    layer.quant_state, state.packing_format_for_cpu = state, True
    with pytest.raises(ValueError, match="rearranged for evaluation on a CPU; call sparsify before"):
        sparsify(model, masks)
    state.packing_format_for_cpu = False
    for _, module in quantized_linears(model):
        module.weight.data = module.weight.data.to(torch.float32)
    with pytest.raises(ValueError, match="a 4-bit weight that was cast to torch.float32"):
        sparsify(model, masks)
    assert not any("sparse" in name for name, _ in model.named_modules())


def trainer_of_transformers(rank):
    """It saves rows, resumes from them, and its run is that of weights left whole."""
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainingArguments

    class UnderFSDP(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            use_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT"))
            self.is_fsdp_enabled = True

    data = [{key: part[0].cpu() for key, part in token_batch(i, batch=1).items()} for i in range(16)]

    def run(kind, resume=None):
        model = load(kind, **ODD)
        values = sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        folder = f"{FOLDER[-1]}/trainer {kind}"
        options = dict(
            use_cpu=not is_on_gpu(), report_to=[], disable_tqdm=True, save_steps=2, logging_strategy="no", max_steps=3
        )
        options.update(per_device_train_batch_size=2, learning_rate=1e-2, max_grad_norm=0.5)
        built = (SparseAdamW, dict(lr=1e-2, weight_decay=0.1))
        arguments = TrainingArguments(folder, **options)
        trainer = UnderFSDP(model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=built)
        with reset_accelerate():
            trainer.train(resume_from_checkpoint=resume)
        dist.barrier()
        return values, folder

    values, folder = run("bf16")
    for kind in kinds("uint8"):
        assert_equal_values(values, run(kind)[0])
    assert_equal_values(run("bf16", f"{folder}/checkpoint-2")[0], values)


def accelerate_of_version_2(rank):
    """Weights that are stored as floating numbers are sharded, those of bytes left whole."""
    whole, expected, other = start("bf16", sharded=False)
    train(rank, whole, other)
    for kind in kinds("bf16", "uint8"):
        model = load(kind, **ODD)
        values = sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        with fsdp_accelerator() as accelerator:
            model, optimizer = accelerator.prepare(model, SparseAdamW(values, **OPTIONS))
            assert all(
                hasattr(module.weight, "device_mesh") == (kind == "bf16") for _, module in quantized_linears(model)
            )
            accelerate_steps(rank, accelerator, model, optimizer)
            assert_equal_values(values, expected)
            accelerator.save_state(f"{FOLDER[-1]}/accelerate {kind}")
            accelerate_steps(rank, accelerator, model, optimizer)
            later = [value.detach().clone() for value in values]
            accelerator.load_state(f"{FOLDER[-1]}/accelerate {kind}")
            assert_equal_values(values, expected)
            accelerate_steps(rank, accelerator, model, optimizer)
            assert all(map(torch.equal, values, later))
    for kind in kinds("bf16", "double fp32"):
        model = load(kind, **ODD)
        values = sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        with fsdp_accelerator(mixed_precision_policy="bf16") as accelerator:
            policy = accelerator.state.fsdp_plugin.mixed_precision_policy
            model, optimizer = accelerator.prepare(model, SparseAdamW(values, **OPTIONS))
            accelerate_steps(rank, accelerator, model, optimizer)
        whole, expected, other = start(kind, sharded=False, mp_policy=policy)
        before = {linked(value).name: value.detach().clone() for value in expected}
        train(rank, whole, other)
        assert_equal_values(values, expected, before)


def accelerate_steps(rank, accelerator, model, optimizer):
    for step in range(STEPS):
        loss = model(**part(token_batch(step, batch=4), rank, dist.get_world_size())).loss
        # Two batches a step would be accumulated.
        accelerator.backward(loss * accelerator.gradient_accumulation_steps)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


SCENARIOS = [
    trains_as_with_whole_weights_in_either_order,
    equals_one_process_on_all_batches,
    blocks_computed_again_in_backward,
    compiled_blocks,
    gradients_added_up_are_sent_once,
    other_ways_to_shard,
    mixed_precision_never_casts_quantised_values,
    bytes_are_gathered_as_bytes_in_blocks_of_16_bits,
    bytes_are_gathered_as_bytes_from_other_memory,
    int8_scales_that_fully_shard_would_lose,
    whole_weights_are_freed_as_they_are_sharded,
    copies_are_sharded_with_their_own_values,
    taken_off_a_sharded_model_leaves_the_trained_function,
    values_that_start_from_the_original_checkpoint,
    quantised_weights_stay_frozen_when_all_is_thawed,
    checkpoints_resumed_by_two_processes_and_by_one,
    a_state_dict_of_one_process_needs_no_other,
    full_states_loaded_by_one_process,
    adapters_and_merged_checkpoints,
    salience_and_masks_that_move,
    accelerate_of_version_2,
    trainer_of_transformers,
    layers_that_cannot_be_mended_after_fully_shard,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def failures(folder):
    return failures_of(SCENARIOS, folder, "forkserver")


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, scenario):
    assert_passed(failures, scenario)


@on_two_gpus
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_gpus(failures_on_gpus, scenario):
    assert_passed(failures_on_gpus, scenario)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_resumes_what_two_saved(failures, folder, kind):
    if kind not in kinds(kind):
        pytest.skip(TOO_OLD)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    name, options = KINDS[kind]
    model = load_quantized(f"{folder}/original{len(ODD)}", name, **options).train()
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint {kind}", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(2, 4):
        model(**token_batch(step, batch=4)).loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for value, expected in zip(values, torch.load(f"{folder}/resumed {kind}.pt"), strict=True):
        assert_close(value.detach(), expected, atol=1e-4, rtol=0)
