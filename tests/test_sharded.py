"""Models under torch's `fully_shard`, over several processes with gloo or NCCL: equal to one with all batches."""

import contextlib
import copy
import gc
import itertools
import os
import signal
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import (
    Reference,
    assert_close,
    assert_same_masks,
    device,
    draw,
    equal_states,
    is_on_gpu,
    masks_of,
    random_masks,
    skip_unless_nodes_compile,
    tiny_model,
    token_batch,
)
from processes import FOLDER, assert_passed, failures_of, on_two_gpus
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    distributed,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
    unload_adapter,
)
from speft_optim.distributed import check_equal
from speft_optim.optim import carried_moments
from speft_optim.salience import first_order
from speft_optim.weights import averaging, place
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.compact_values import linked
from speft_optim.weights.sparse_weight import SparseWeight

OPTIONS = dict(lr=1e-2, weight_decay=0.1)
STEPS = 3
# A number of rows that processes do not divide, in a block and, with the vocabulary of 61, in embeddings and head.
UNEVEN = dict(intermediate_size=41)


def mesh(*shape):
    names = ("replicate", "shard")[2 - max(1, len(shape)) :]
    return init_device_mesh(device().type, shape or (dist.get_world_size(),), mesh_dim_names=names)


def shard(model, **options):
    """The model's blocks one by one, then the rest, as torch's documentation has it."""
    from torch.distributed.fsdp import fully_shard

    options = {"mesh": mesh(), **options}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def everything(name, parameter):
    """Every weight with two dimensions, embeddings and head too."""
    return parameter.dim() == 2


def start(kind="llama", first="sparsify", targets=everything, optimizer=SparseAdamW, model=None, **options):
    """A sparsified and sharded model in training, and the reference of one process."""
    model = tiny_model(kind, **(UNEVEN if kind == "llama" else {})) if model is None else model
    masks = select_masks(model, salience="random", density=0.05, targets=targets, progress=False)
    reference = Reference(model, masks, **OPTIONS)
    if first == "sparsify":
        values = sparsify(model, masks)
        shard(model, **options)
    else:
        shard(model, **options)
        values = sparsify(model, masks)
    return model, values, optimizer(values, **OPTIONS), reference


def part(batch, number, of):
    return {key: value[number::of] for key, value in batch.items()}


def train(rank, model, optimizer, reference=None, first=0, steps=STEPS):
    """Steps on this process's part of each batch, with clipping, and those of the reference on all of it."""
    for step in range(first, first + steps):
        batch = token_batch(step, batch=4)
        model(**part(batch, rank, dist.get_world_size())).loss.backward()
        norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)
        optimizer.step()
        optimizer.zero_grad()
        if reference is not None:
            reference.model(**batch).loss.backward()
            assert_close(norm, reference.step(clip=0.05), rtol=1e-5)


def train_beside(rank, model, alone, optimizers):
    """Steps on this process's part of each batch, and those of a model that is not sharded on all of it."""
    for step in range(STEPS):
        batch = token_batch(step, batch=4)
        model(**part(batch, rank, dist.get_world_size())).loss.backward()
        alone(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(model):
    """The model's state with the rows of all processes."""
    # Rows that are offloaded are gathered on the GPU.
    parts = {name: part.to(device()) for name, part in state(model).items()}
    return {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}


def state(model):
    return {name: part.detach() for name, part in model.state_dict().items()}


def assert_equals(reference, model, values, tolerance=1e-6):
    """Weights of the whole model and values are the reference's, and nothing moved outside the masks."""
    state = whole(model)
    for name, parameter in reference.model.named_parameters(remove_duplicate=False):
        assert_close(state[name], parameter.detach(), atol=tolerance, rtol=0)
    for parameter in values:
        name = linked(parameter).name
        inside = reference.dense[name]
        assert_close(parameter.detach(), reference.parameters[name].detach()[inside], atol=tolerance, rtol=0)
        assert torch.equal(state[name][inside], parameter.detach())
        assert torch.equal(state[name][~inside], reference.start[name][~inside])
        assert_equal_on_all(parameter.detach())


def assert_equal_on_all(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    assert all(torch.equal(tensor, other) for other in others)


def sparsified_and_then_sharded(rank):
    model, values, optimizer, reference = start()
    assert not any(hasattr(parameter, "device_mesh") for parameter in values)
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


def sharded_and_then_sparsified(rank):
    model, values, optimizer, reference = start(first="shard")
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


def blocks_computed_again_in_backward(rank):
    for reentrant in (False, True):
        model = tiny_model(**UNEVEN)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model, values, optimizer, reference = start(model=model.train())
        reference.model.gradient_checkpointing_disable()
        with counted_exchanges() as sent:
            train(rank, model, optimizer, reference)
        assert len(sent) == STEPS, f"one exchange a step, reentrant={reentrant}: {sent}"
        assert_equals(reference, model, values)


def moved_after_it_was_sharded(rank):
    """To the device where it is, as scripts do, and into other memory."""
    for first in ("sparsify", "shard"):
        model, values, optimizer, reference = start(first=first)
        model.to(device())
        train(rank, model, optimizer, reference, steps=1)
        model._apply(torch.clone)
        train(rank, model, optimizer, reference, first=1, steps=2)
        assert_equals(reference, model, values)


def the_whole_model_is_searched_once_after_it_was_sharded(rank):
    """Not once for each weight, which would take minutes where each of many experts has some."""
    model, _, optimizer, _ = start()
    searched, settle_gathers = [], place.settle_gathers

    def counted(modules):
        searched.append(len(modules := list(modules)))
        settle_gathers(modules)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "settle_gathers", counted)
        train(rank, model, optimizer)
    assert len(searched) == len(sparse_weights(model))
    # The others look at the modules around them alone.
    assert searched[0] == len(list(model.modules())) and max(searched[1:]) < 8


def doubled(module, args, output):
    return 2 * output


def a_layer_whose_output_a_hook_changes(rank):
    """Its product is not what the gathered weight's dense gradient says, and that is taken instead."""
    model = tiny_model(**UNEVEN)
    changed = model.model.layers[1].mlp.up_proj
    changed.register_forward_hook(doubled)
    model, values, optimizer, reference = start(model=model)
    # In front of the gradient hook.
    changed._forward_hooks.move_to_end(next(iter(changed._forward_hooks)))
    train(rank, model, optimizer, reference)
    # AdamW amplifies the rounding of its smallest gradients.
    assert_equals(reference, model, values, tolerance=1e-5)
    assert any(hook.warned for hook in changed.sparse_weight.uses.hooks)


def compiled_blocks(rank):
    model = tiny_model(**UNEVEN)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    model, values, optimizer, reference = start(model=model)
    train(rank, model, optimizer, reference, steps=2)
    assert_equals(reference, model, values)


@contextlib.contextmanager
def counted_exchanges():
    """The lengths of what gradients are averaged in."""
    sent, before = [], averaging.dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if tensor.dtype == torch.float32:
            sent.append(len(tensor))
        return before(tensor, *args, **kwargs)

    averaging.dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        averaging.dist.all_reduce = before


def gradients_added_up_are_sent_once_and_four_bytes_an_entry(rank):
    for put_off in (True, False):
        model, values, optimizer, reference = start()
        with counted_exchanges() as sent:
            for step in range(STEPS):
                batch = token_batch(step, batch=8)
                for half in range(2):
                    model.set_requires_gradient_sync(half == 1 or not put_off)
                    (model(**part(part(batch, half, 2), rank, dist.get_world_size())).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
                reference.model(**batch).loss.backward()
                reference.step()
        entries = sum(map(len, values)) + len(values)
        assert sent == [entries] * (STEPS if put_off else 2 * STEPS)
        assert_equals(reference, model, values)


def a_step_with_a_gradient_that_is_not_averaged_is_refused(rank):
    """Processes would write other entries each into their rows, and nothing would tell."""
    for optimizer in (SparseAdamW, torch.optim.AdamW):
        model, values, stepped, reference = start(optimizer=optimizer)
        start_values = [value.detach().clone() for value in values]
        model.model.layers[0].set_requires_gradient_sync(False)
        model(**part(token_batch(0, batch=4), rank, dist.get_world_size())).loss.backward()
        with pytest.raises(ValueError, match=r"layers\.0\..* is not averaged.*set_requires_gradient_sync\(True\)"):
            stepped.step()
        assert all(torch.equal(value.detach(), before) for value, before in zip(values, start_values, strict=True))
        if optimizer is SparseAdamW:
            # What was dropped is no longer to be averaged.
            stepped.zero_grad()
            stepped.step()
            model.set_requires_gradient_sync(True)
            train(rank, model, stepped, reference)
            assert_equals(reference, model, values)


class Encoder(torch.nn.Module):
    """A model that trains by another method than forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def encode(self, inputs):
        return self.second(self.first(inputs).relu())


def a_model_that_is_trained_without_a_call_of_it(rank):
    """FSDP gathers weights for such methods too, but no hook of the model's forward is called in them."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    alone = Encoder().to(device())
    model = copy.deepcopy(alone)
    inputs = draw(4 * dist.get_world_size(), 8, seed=3).to(device())
    runs = []
    for each in (model, alone):
        masks = select_masks(each, salience="random", density=0.5, targets=["first", "second"], progress=False)
        values = sparsify(each, masks)
        runs.append((each, values, torch.optim.SGD(values, lr=0.1)))
    register_fsdp_forward_method(fully_shard(model, mesh=mesh()), "encode")
    for _ in range(STEPS):
        for (each, _, optimizer), own in zip(runs, (inputs[rank :: dist.get_world_size()], inputs), strict=True):
            each.encode(own).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for value, expected in zip(runs[0][1], runs[1][1], strict=True):
        assert_equal_on_all(value.detach())
        assert_close(value.detach(), expected.detach(), atol=1e-6, rtol=0)


def gradients_that_fsdp_is_to_divide_otherwise_are_refused(rank):
    """The average of values would silently be another multiple of the sum than what FSDP makes of dense gradients."""
    model, _, _, _ = start()
    model.set_gradient_divide_factor(1.0)
    with pytest.raises(ValueError, match=r"set_gradient_divide_factor\(1.0\).*averaged over the 2 processes"):
        model(**token_batch()).loss.backward()
    model.set_gradient_divide_factor(2.0)
    model(**token_batch()).loss.backward()


def hybrid_sharding(rank):
    """Rows on all processes, copies of all rows on each and, of four processes, rows on two and copies on two more."""
    count = dist.get_world_size()
    for shape in dict.fromkeys([(1, count), (2, count // 2), (count, 1)]):
        for first in ("sparsify", "shard"):
            model, values, optimizer, reference = start(first=first, mesh=mesh(*shape))
            train(rank, model, optimizer, reference)
            assert_equals(reference, model, values)


def embeddings_tied_to_the_head(rank):
    for first in ("sparsify", "shard"):
        model, values, optimizer, reference = start("qwen2", first)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        train(rank, model, optimizer, reference)
        assert_equals(reference, model, values)


class Narrow(torch.nn.Module):
    """Weights with fewer rows than there are processes, and one that only some processes use in a step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Linear(6, 5), torch.nn.Linear(5, 1), torch.nn.Linear(6, 5)])

    def forward(self, x, other):
        first, second, rare = self.model.layers
        hidden = first(x) + (rare(x) if other else 0)
        return second(hidden.tanh()).mean()


def processes_without_rows_and_weights_that_some_do_not_use(rank):
    from torch.distributed.fsdp import fully_shard

    model = Narrow().to(device())
    masks = select_masks(model, salience="random", density=0.5, progress=False)
    reference = Reference(model, masks, **OPTIONS)
    values = sparsify(model, masks)
    fully_shard(model, mesh=mesh())
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(6):
        uses = [step % 3 == 1, step % 3 == 2]
        inputs = [draw(3, 6, seed=2 * step + i).to(device()) for i in range(2)]
        model(inputs[rank], uses[rank]).backward()
        (sum(reference.model(x, use) for x, use in zip(inputs, uses, strict=True)) / 2).backward()
        reference.mask_gradients()
        for parameter in values:
            expected = reference.parameters[linked(parameter).name].grad
            assert (parameter.grad is None) == (expected is None), (step, linked(parameter).name)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    assert_equals(reference, model, values)


def mixed_precision_computes_in_16_bits_and_keeps_rows_in_32(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, values, optimizer, reference = start(mp_policy=policy)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(rank, model, optimizer)
    assert set(seen) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in model.parameters())
    for step in range(STEPS):
        batch = token_batch(step, batch=4)
        with torch.autocast(device().type, torch.bfloat16):
            reference.model(**batch).loss.backward()
        reference.step(clip=0.05)
    # The rates are some 1e-2 a step, the sign of small gradients is their rounding's.
    state = whole(model)
    for parameter in values:
        name = linked(parameter).name
        moved = parameter.detach() - reference.start[name][reference.dense[name]]
        expected = (reference.parameters[name].detach() - reference.start[name])[reference.dense[name]]
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.95, name
        assert torch.equal(state[name][reference.dense[name]], parameter.detach())


def rows_in_16_bits_hold_the_rounded_values(rank):
    model, values, optimizer, reference = start(model=tiny_model(dtype=torch.bfloat16, **UNEVEN), first="shard")
    train(rank, model, optimizer)
    state = whole(model)
    for parameter in values:
        name = linked(parameter).name
        inside = reference.dense[name]
        assert parameter.dtype == torch.float32
        assert torch.equal(state[name][inside], parameter.detach().bfloat16())
        assert torch.equal(state[name][~inside], reference.start[name][~inside])
        assert_equal_on_all(parameter.detach())


def rows_offloaded_to_the_cpu(rank):
    from torch.distributed.fsdp import CPUOffloadPolicy

    model, values, optimizer, reference = start(offload_policy=CPUOffloadPolicy(pin_memory=is_on_gpu()))
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


def a_norm_is_trained_densely_too(rank):
    """The gradient of a dense parameter is averaged by FSDP itself; a number of one process skips a step in all."""
    from torch.distributed.tensor.experimental import implicit_replication

    def attach():
        model = tiny_model()
        values = sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        model.model.norm.weight.requires_grad_(True)
        return model, values

    for kind in (torch.optim.AdamW, SparseAdamW):
        (model, values), (alone, alone_values) = attach(), attach()
        shard(model)
        optimizers = [
            kind([*v, m.model.norm.weight], **OPTIONS)
            for m, v in zip((model, alone), (values, alone_values), strict=True)
        ]
        train_beside(rank, model, alone, optimizers)
        state = whole(model)
        for name, expected in alone.state_dict().items():
            assert_close(state[name], expected, atol=1e-6, rtol=0)
        assert not torch.equal(alone.model.norm.weight, torch.ones(24, device=device()))
        # torch's own clipping does not take gradients of both kinds without this.
        model(**part(token_batch(9, batch=4), rank, dist.get_world_size())).loss.backward()
        alone(**token_batch(9, batch=4)).loss.backward()
        with implicit_replication():
            norm = clip_grad_norm_([*values, model.model.norm.weight], 0.05).full_tensor()
        assert_close(norm, clip_grad_norm_([*alone_values, alone.model.norm.weight], 0.05), rtol=1e-5)
        expected = alone.model.norm.weight.grad
        assert_close(model.model.norm.weight.grad.full_tensor(), expected, atol=1e-6, rtol=0)
        for parameter, other in zip(values, alone_values, strict=True):
            assert_close(parameter.grad, other.grad, atol=1e-6, rtol=0)
    model(**token_batch(0)).loss.backward()
    if rank == 1:
        model.model.norm.weight.grad.to_local()[-1] = float("nan")
    optimizers[0].step()
    assert optimizers[0].skipped_steps == 1 and equal_states(whole(model), state)
    in_8_bits = SparseAdamW([*values, model.model.norm.weight], state_bits=8)
    with pytest.raises(ValueError, match=r"state_bits=8 .* fully_shard divided, here one of shape \(24,\)"):
        in_8_bits.step()


def a_forward_between_steps_leaves_no_stale_weights(rank):
    """FSDP keeps what it gathered for the outermost module until the next backward."""
    model, values, optimizer, reference = start()
    model(**token_batch(0)).loss.backward()
    with torch.no_grad():
        model(**token_batch(1))
    # Written into the gathered head as well as into its rows.
    optimizer.step()
    plain = tiny_model(**UNEVEN)
    with torch.no_grad():
        actual = model(**token_batch(1)).logits
    plain.load_state_dict(whole(model))
    assert_close(actual, plain(**token_batch(1)).logits.detach())


def weights_that_two_of_four_processes_keep_for_backward(rank):
    """After a forward modules hold this copy, from which values must not be read, and which a step makes stale."""
    for optimizer in (SparseAdamW, torch.optim.AdamW):
        model, values, optimizer, reference = start(optimizer=optimizer, reshard_after_forward=2)
        for step in range(STEPS):
            batch = token_batch(step, batch=4)
            model(**part(batch, rank, 4)).loss.backward()
            with torch.no_grad():
                model(**batch)
            optimizer.step()
            optimizer.zero_grad()
            reference.model(**batch).loss.backward()
            reference.step()
            stepped = [value.detach().clone() for value in values]
            for _ in range(2):
                with torch.no_grad():
                    logits = model(**batch).logits
            assert all(map(torch.equal, values, stepped))
            assert_close(logits, reference.model(**batch).logits.detach(), atol=1e-5)
        assert_equals(reference, model, values)


def packed_weights_that_two_of_four_processes_would_keep_are_refused(rank):
    """FSDP keeps no part of what it gathers as bytes."""
    pytest.importorskip("bitsandbytes")
    from quantized_models import load_quantized, save_original

    folder = f"{FOLDER[-1]}/packed"
    if rank == 0:
        save_original(folder)
    dist.barrier()
    model = load_quantized(folder, "nf4", bnb_4bit_quant_storage=torch.float32)
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    sparsify(model, masks)
    shard(model, reshard_after_forward=2)
    with pytest.raises(ValueError, match="reshard_after_forward cannot gather 4-bit weights.*True"):
        model(**token_batch(0))


def a_state_loaded_later_wins_over_values(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model, values, optimizer, _ = start()
    train(rank, model, optimizer, steps=1)
    other = tiny_model(seed=1, **UNEVEN)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, other.state_dict() if rank == 0 else {}, options=options)
    for parameter in values:
        weight = linked(parameter)
        expected = other.get_parameter(weight.name).detach().flatten()[weight.mask.indices.long()]
        assert torch.equal(parameter.detach(), expected)
    assert_close(model(**token_batch(0)).logits.detach(), other(**token_batch(0)).logits.detach())


def values_changed_by_hand_are_written_before_the_next_forward(rank):
    model, values, optimizer, _ = start(first="shard")
    train(rank, model, optimizer, steps=1)
    with torch.no_grad():
        for parameter in values:
            parameter.mul_(1.5)
    plain = tiny_model(**UNEVEN)
    logits = model(**token_batch(0)).logits.detach()
    plain.load_state_dict(whole(model))
    assert_close(logits, plain(**token_batch(0)).logits.detach())
    for parameter in values:
        weight = linked(parameter)
        assert torch.equal(plain.get_parameter(weight.name).detach().flatten()[weight.mask.indices.long()], parameter)


def taken_off_a_sharded_model_leaves_the_trained_rows(rank):
    model, values, optimizer, reference = start()
    train(rank, model, optimizer, reference)
    desparsify(model)
    state = whole(model)
    for name, parameter in reference.model.named_parameters():
        assert_close(state[name], parameter.detach(), atol=1e-6, rtol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Beside(torch.nn.Module):
    """A head whose weight is used in a call of its module, and once more without one; and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6)])
        self.head, self.uncalled = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.model.layers[0](x)
        other = torch.nn.functional.linear(hidden, self.uncalled.weight)
        return (self.head(hidden) * torch.nn.functional.linear(other, self.head.weight)).mean()


def uses_without_a_call_of_the_module_count(rank):
    for first in ("sparsify", "shard"):
        model, values, optimizer, reference = start(first=first, model=Beside().to(device()))
        for step in range(STEPS):
            x = draw(4, 6, seed=step).to(device())
            model(x[rank::2]).backward()
            (sum(reference.model(x[i::2]) for i in range(2)) / 2).backward()
            reference.mask_gradients()
            for parameter in values:
                name = linked(parameter).name
                expected = reference.parameters[name].grad[reference.dense[name]]
                assert_close(parameter.grad, expected, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
            reference.step()
        assert_equals(reference, model, values, tolerance=1e-5)


def masked_weights_stay_frozen_when_all_is_thawed(rank):
    model, values, optimizer, reference = start(first="shard")
    model.requires_grad_(True)
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)
    assert not any(linked(parameter).weight.requires_grad for parameter in values)


def quantised_weights_that_are_left_whole(rank):
    """As accelerate leaves codes that are not stored as floating numbers; their values are averaged all the same."""
    pytest.importorskip("bitsandbytes")
    from quantized_models import load_quantized, save_original

    from speft_optim.weights.bnb import quantized_linears

    folder = save_original(f"{FOLDER[-1]}/original")
    # The first process alone writes it.
    dist.barrier()
    for kind, first in (("nf4", "sparsify"), ("int8", "shard")):
        model, one = load_quantized(folder, kind), load_quantized(folder, kind)
        masks = select_masks(one, salience="random", density=0.05, progress=False)
        codes = {module.weight for _, module in quantized_linears(model)}
        values = sparsify(model, masks) if first == "sparsify" else None
        shard(model, ignored_params=codes)
        values = values or sparsify(model, masks)
        one_values = sparsify(one, masks)
        optimizers = [SparseAdamW(values, **OPTIONS), SparseAdamW(one_values, **OPTIONS)]
        train_beside(rank, model, one, optimizers)
        for value, expected in zip(values, one_values, strict=True):
            # The entries of least gradient move by the sign of its rounding.
            assert_close(value.detach(), expected.detach(), atol=1e-4, rtol=0)
            assert_equal_on_all(value.detach())


def rows_changed_past_the_dtensor_are_refused(rank):
    model, values, optimizer, _ = start()
    train(rank, model, optimizer, steps=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if hasattr(parameter, "to_local"):
                parameter.to_local().mul_(2.0)
    with pytest.raises(ValueError, match=r"rows of .*weight that this process holds were changed.*load_state_dict"):
        model(**token_batch(0))


def whole_weights_are_freed_as_they_are_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    sparsify(model, select_masks(model, salience="random", density=0.05, targets=everything, progress=False))
    for layer in [*model.model.layers, model]:
        before = [weakref.ref(parameter) for name, parameter in layer.named_parameters() if parameter.dim() == 2]
        assert before
        fully_shard(layer, mesh=mesh())
        assert not any(parameter() is not None and not hasattr(parameter(), "device_mesh") for parameter in before)


def a_model_that_nobody_holds_any_more_is_freed(rank):
    """Its weights, of which FSDP's own objects lead to each other, and its values."""

    def use():
        model, values, optimizer, reference = start()
        train(rank, model, optimizer)
        rows = [parameter.to_local() for parameter in model.parameters() if hasattr(parameter, "to_local")]
        return [weakref.ref(thing) for thing in (model, *values, *rows)]

    made = use()
    gc.collect()
    assert not [ref() for ref in made if ref() is not None]


def salience_of_each_processes_own_batches(rank):
    """The masks are those of one process with all batches, in both scopes and passes of any budget."""
    batches = [token_batch(seed, ragged=True) for seed in range(4)]
    # Passes are those of the statistic, of which each has a first measure here; scores are formed on each entry.
    first, others = ("gradient", "fisher", "synflow", "activation"), ("snip", "magnitude", "random")
    cases = [(salience, "local", None) for salience in (*first, *others)]
    cases += [
        *((salience, "global", 30_000) for salience in first),
        *((salience, "global", None) for salience in others),
    ]
    if dist.get_world_size() > 2:
        cases = [("gradient", "global", 30_000), ("fisher", "local", 30_000), ("synflow", "global", None)]
    for salience, scope, budget in cases:
        options = dict(salience=salience, density=0.1, scope=scope, memory_budget=budget, progress=False)
        options["targets"] = None if salience == "activation" else everything
        model = shard(tiny_model(**UNEVEN))
        model.model.norm.weight.requires_grad_(False)
        before = whole(model)
        masks = select_masks(model, batches[rank :: dist.get_world_size()], **options)
        assert equal_states(whole(model), before)
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert_masks_of_one_process(masks, tiny_model(**UNEVEN), batches, **options)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    reference = Reference(tiny_model(**UNEVEN), masks, **OPTIONS)
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values, tolerance=1e-5)


def salience_between_fully_shard_and_the_first_step(rank):
    """Values are frozen while masks are selected, also in the first forward after `fully_shard`."""
    model, values, optimizer, reference = start()
    batches, count = [token_batch(seed) for seed in range(4)], dist.get_world_size()
    masks = select_masks(model, batches[rank::count], density=0.05, progress=False)
    assert_masks_of_one_process(masks, tiny_model(**UNEVEN), batches, density=0.05, progress=False)
    train(rank, model, optimizer, reference)
    assert_equals(reference, model, values)


def salience_of_quantised_weights_that_are_left_whole(rank):
    """Their sums are divided over the processes as those of other weights are."""
    pytest.importorskip("bitsandbytes")
    from quantized_models import load_quantized, save_original

    from speft_optim.weights.bnb import quantized_linears

    folder, count = save_original(f"{FOLDER[-1]}/whole"), dist.get_world_size()
    dist.barrier()
    batches = [token_batch(seed) for seed in range(2 * count)]
    for salience in ("gradient", "fisher"):
        model = load_quantized(folder, "nf4")
        shard(model, ignored_params={module.weight for _, module in quantized_linears(model)})
        options = dict(salience=salience, density=0.05, progress=False)
        masks = select_masks(model, batches[rank::count], **options)
        assert_masks_of_one_process(masks, load_quantized(folder, "nf4"), batches, **options)


def assert_masks_of_one_process(masks, model, batches, **options):
    """All processes have the masks that one with the whole model and all batches would select; the first selects."""
    check_equal(masks.fingerprint(), "masks", "")
    if dist.get_rank() == 0:
        with alone():
            assert_same_masks(masks, select_masks(model, batches, **options))


class Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def gradients_summed_as_in_one_process(rank):
    """To the last bit, where a weight is used once: processes' batches are added in turn, whoever adds them."""
    count = dist.get_world_size()
    batches = [token_batch(seed, ragged=True) for seed in range(6 if count == 2 else count)]
    one, sharded = tiny_model(**UNEVEN), shard(tiny_model(**UNEVEN))
    for budget in (None, 60_000, 30_000) if count == 2 else (None, 30_000):
        actual = gradients_of(sharded, batches[rank::count], budget)
        assert_equal_on_all(actual)
        if rank == 0:
            with alone():
                expected = gradients_of(one, batches, budget)
            assert len(expected) == sum(parameter.numel() for parameter in one.parameters() if parameter.dim() == 2)
            assert_close(actual, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
            # The least budget cuts weights at other rows, and a product's last rows may be rounded in another way.
            assert torch.equal(actual, expected) or budget == 30_000 or is_on_gpu()
    hybrid = shard(tiny_model(**UNEVEN), mesh=mesh(2, count // 2))
    assert_close(gradients_of(hybrid, batches[rank::count], 30_000), actual, rtol=1e-5, atol=1e-9)
    # Of two uses each process adds its own first.
    actual = gradients_of(shard(tiny_model("qwen2")), batches[rank::count])
    assert_equal_on_all(actual)
    if rank == 0:
        with alone():
            expected = gradients_of(tiny_model("qwen2"), batches)
        assert_close(actual, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def gradients_of(model, batches, budget=None):
    """The mean gradients of all weights with two dimensions, one after the other, as `select_masks` scores them."""
    seen = []

    def salience(weight, gradient):
        seen.append(gradient.clone())
        return gradient.abs()

    options = dict(targets=everything, memory_budget=budget, progress=False)
    select_masks(model, batches, salience=salience, density=0.1, scope="global", **options)
    return torch.cat(seen)


def accumulators_of_own_rows(rank):
    """A process holds sums of its own rows and, for a moment, one block's gradients; so a budget takes fewer passes."""
    batches, own = (Counted([token_batch(rank)]) for _ in range(2))
    model, one = (tiny_model(num_hidden_layers=8, **UNEVEN) for _ in range(2))
    weights = [parameter for layer in one.model.layers for parameter in layer.parameters() if parameter.dim() == 2]
    block = sum(p.nbytes for p in weights) // 8
    options = dict(density=0.01, memory_budget=150_000, progress=False)
    with alone():
        select_masks(one, batches, **options)
    with watched_exchanges() as (of_rows, of_all):
        select_masks(shard(model), own, **options)
    # Chunks of scores and candidates for the masks take a part of the budget, which leaves too little for all sums.
    assert (batches.reads, own.reads) == (2, 1)
    rows = sum(p.to_local().nbytes for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    assert set(of_rows) == {rows}
    assert len(of_all) == len(weights)
    assert max(of_all) <= rows + block + 4 * 24 * (41 + dist.get_world_size()) < options["memory_budget"]


@contextlib.contextmanager
def watched_exchanges():
    """At each exchange the bytes of a process's sums, and those with all gradients and what it receives."""
    of_rows, of_all, live, send = [], [], [], dist.all_to_all_single

    class Watched(first_order.Exchange):
        def __init__(self, group):
            super().__init__(group)
            live[:] = [self]

    def all_to_all(received, gradient, *args, **kwargs):
        (exchange,) = live
        waiting = [each._whole.accumulator for each in exchange.accumulators.values() if not each.is_empty]
        of_rows.append(sum(row_slice.accumulator.nbytes for row_slice in exchange.accumulators))
        of_all.append(of_rows[-1] + sum(part.nbytes for part in [*waiting, received, gradient]))
        return send(received, gradient, *args, **kwargs)

    before, first_order.Exchange, dist.all_to_all_single = first_order.Exchange, Watched, all_to_all
    try:
        yield of_rows, of_all
    finally:
        first_order.Exchange, dist.all_to_all_single = before, send


def squares_of_single_examples(rank):
    """Of batches of different lengths, with an example without labels, and where each example needs its own pass."""
    count = dist.get_world_size()
    batches = [token_batch(seed, batch=2 + seed % 2, ragged=True) for seed in range(2 * count)]
    batches[0]["labels"][1] = -100
    # The first label of an example is not in a causal model's loss.
    batches[1]["labels"][0, 1:] = -100
    batches[1]["labels"][0, 0] = 1

    def loss(model, batch):
        return model(**batch).loss

    for kind, budget, more in (("llama", None, {}), ("qwen2", 60_000, {}), ("llama", None, dict(loss=loss))):
        options = dict(salience="fisher", density=0.1, targets=everything, memory_budget=budget, progress=False, **more)
        masks = select_masks(shard(tiny_model(kind)), batches[rank::count], **options)
        assert_masks_of_one_process(masks, tiny_model(kind), batches, **options)


class Routed(torch.nn.Module):
    """Three blocks, each with a weight that only batches of one kind use, and a frozen embedding before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 6)
        self.layers = torch.nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, ids, kind):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, kind)
        return hidden.square().mean()


class Expert(torch.nn.Module):
    """Adds what the linear layer of its kind makes of its input."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, hidden, kind):
        return hidden + (self.one if kind else self.other)(hidden).tanh()


def experts_that_some_processes_do_not_use(rank):
    """Gradients are sent in the same order by all processes, and those that one of them lacks count as zero."""
    from torch.distributed.fsdp import fully_shard

    def loss(model, batch):
        return model(**batch)

    # The kinds alternate so that each process has one, and a pass serves a single weight.
    count = dist.get_world_size()
    batches = [
        dict(ids=torch.arange(10, device=device()).view(2, 5) % (5 + i % 3), kind=i % 2) for i in range(2 * count)
    ]
    # Squares are not divided over processes, so that 600 bytes are those of one weight.
    cases = [("gradient", None), ("fisher", 600), ("gradient", 1), ("fisher", None), ("fisher", 1)]
    for salience, budget in cases if count == 2 else cases[:2]:
        options = dict(salience=salience, density=0.3, loss=loss, memory_budget=budget, progress=False)
        model = Routed().to(device())
        for layer in model.layers:
            fully_shard(layer, mesh=mesh())
        masks = select_masks(fully_shard(model, mesh=mesh()), batches[rank::count], **options)
        assert_masks_of_one_process(masks, Routed().to(device()), batches, **options)
    # Without blocks there is nothing that all processes could go back to.
    model = fully_shard(Routed().to(device()), mesh=mesh())
    names = ["layers.2.one"]
    with pytest.raises(ValueError, match="losses of calibration batches number 1 differ.*fully_shard of each block"):
        select_masks(model, batches[rank::count], targets=names, density=0.3, loss=loss, progress=False)


def salience_that_is_refused_on_a_sharded_model(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = shard(tiny_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="computes in float64.*casts what each block gets to bfloat16"):
        select_masks(model, salience="synflow", density=0.1, progress=False)
    model = shard(tiny_model())
    with pytest.raises(ValueError, match="grasp' differentiates twice.*select before the model is sharded"):
        select_masks(model, [token_batch()], salience="grasp", density=0.1, progress=False)
    with pytest.raises(ValueError, match="offload= is for a model on one device"):
        select_masks(model, [token_batch()], density=0.1, progress=False, offload="cpu")
    with pytest.raises(ValueError, match="Of 2 processes 1 have a calibration batch"):
        select_masks(model, [token_batch()] * (1 + rank), density=0.1, progress=False)
    names = list(select_masks(model, salience="magnitude", density=0.1, progress=False))
    shared_out = dict.fromkeys(names, 10) | {names[rank]: 20}
    cases = dict(density=0.1 + 0.1 * rank), dict(density=0.1, scope=("local", "global")[rank]), dict(budget=shared_out)
    for options in cases:
        with pytest.raises(ValueError, match="arguments of select_masks differ .* of which .* are kept in"):
            select_masks(model, [token_batch()], progress=False, **options)
    bad = [token_batch(), {"input_ids": torch.ones(2, 4, dtype=torch.long, device=device())}]
    with pytest.raises((ValueError, RuntimeError), match="Process 1 failed.*no labels" if rank == 0 else "no labels"):
        select_masks(model, bad if rank else [token_batch()] * 2, density=0.1, progress=False)
    select_masks(model, [token_batch()], density=0.1, progress=False)


def losses_that_fail_in_one_process(rank):
    """An error after a forward is one in all processes, which then can go on together."""

    def raises(model, batch):
        value = model(**batch).loss
        if rank == 1:
            raise KeyError("weight of the sample")
        return value

    def infinite(model, batch):
        return model(**batch).loss * (float("inf") if rank == 1 else 1)

    def detached(model, batch):
        value = model(**batch).loss
        return value.detach() if rank == 1 else value

    model = shard(tiny_model())
    for salience, (loss, message) in itertools.product(
        ("gradient", "fisher"),
        (
            (raises, "weight of the sample"),
            (infinite, "inf"),
            (detached, "differ between processes.*by rank: depends on the weights, does not depend"),
        ),
    ):
        options = dict(salience=salience, density=0.1, progress=False)
        with pytest.raises((RuntimeError, ValueError, KeyError), match=message) as error:
            select_masks(model, [token_batch()] * 2, loss=loss, **options)
        assert rank == 1 or loss is detached or "Process 1 failed" in str(error.value)
        check_equal("here", "Places", "")
    select_masks(model, [token_batch()], density=0.1, progress=False)


def fail_before_the_forward(model, batch):
    raise KeyError("sample without a weight")


def fail_in_the_forward(model, batch):
    return model(**batch | {"input_ids": batch["input_ids"] + 100}).loss


def fail_in_the_backward(model, batch):
    loss = model(**batch).loss

    def fail(_):
        raise KeyError("no gradient of this")

    loss.register_hook(fail)
    return loss


def selects_with_a_loss_that_fails(rank, salience, loss):
    model = shard(tiny_model(**UNEVEN))
    loss = loss if rank == 1 else lambda model, batch: model(**batch).loss
    select_masks(model, [token_batch()] * 2, salience=salience, loss=loss, density=0.1, progress=False)


def gradient_of_a_loss_that_fails_before_the_forward(rank):
    selects_with_a_loss_that_fails(rank, "gradient", fail_before_the_forward)


def gradient_of_a_loss_that_fails_in_the_forward(rank):
    selects_with_a_loss_that_fails(rank, "gradient", fail_in_the_forward)


def gradient_of_a_loss_that_fails_in_the_backward(rank):
    selects_with_a_loss_that_fails(rank, "gradient", fail_in_the_backward)


def squares_of_a_loss_that_fails_in_the_backward(rank):
    selects_with_a_loss_that_fails(rank, "fisher", fail_in_the_backward)


def activations_of_a_loss_that_fails_before_the_forward(rank):
    selects_with_a_loss_that_fails(rank, "activation", fail_before_the_forward)


def accelerate_of_version_2(rank):
    """Accumulation, clipping, `save_state` and `load_state`, with weights that the first process alone has read too."""
    for read_by_first in (False, True):
        model = tiny_model(**UNEVEN)
        masks = select_masks(model, salience="random", density=0.05, targets=everything, progress=False)
        reference = Reference(model, masks, **OPTIONS)
        if read_by_first and rank:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        values = sparsify(model, masks)
        with fsdp_accelerator(cpu_ram_efficient_loading=read_by_first) as accelerator:
            model, optimizer = accelerator.prepare(model, SparseAdamW(values, **OPTIONS))
            assert all(hasattr(p, "device_mesh") == (linked(p) is None) for p in model.parameters())

            def accumulate(step, model=model, optimizer=optimizer, accelerator=accelerator):
                batch = token_batch(step, batch=8)
                for half in range(2):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(**part(part(batch, half, 2), rank, dist.get_world_size())).loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(model.parameters(), 0.05)
                        optimizer.step()
                        optimizer.zero_grad()
                return norm

            for step in range(STEPS):
                norm = accumulate(step)
                reference.model(**token_batch(step, batch=8)).loss.backward()
                assert_close(norm, reference.step(clip=0.05), rtol=1e-5)
            assert_equals(reference, model, values)
            accelerator.save_state(f"{FOLDER[-1]}/accelerate{read_by_first}")
            accumulate(STEPS)
            expected = whole(model)
            accelerator.load_state(f"{FOLDER[-1]}/accelerate{read_by_first}")
            accumulate(STEPS)
            assert equal_states(whole(model), expected)


def trainers_agree(trainer, arguments, data, targets, options, **rest):
    """A trainer builds SparseAdamW itself under FSDP; its run, saved model and resumed run are those under DDP.

    Args:
        trainer: the trainer's class.
        arguments: the class of its arguments.
        data: a data set of token ids.
        targets: what is masked.
        options: arguments beside the common ones.
        rest: what the trainer takes beside these.
    """
    from transformers import LlamaForCausalLM

    # The documented lines; versions before 5 of transformers hand them on in the environment.
    lines = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
    lines = lines if hasattr(arguments, "_process_fsdp_args") else {}

    class UnderFSDP(trainer):
        def create_accelerator_and_postprocess(self):
            from accelerate import FullyShardedDataParallelPlugin

            options = dict(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
            if lines:
                options, self.args.fsdp_plugin_args = self.args.fsdp_plugin_args, None
            super().create_accelerator_and_postprocess()
            use_fsdp(FullyShardedDataParallelPlugin(**options))
            self.is_fsdp_enabled = True

    def run(kind, resume=None):
        model = tiny_model(**UNEVEN)
        sparsify(model, select_masks(model, salience="random", density=0.05, targets=targets, progress=False))
        folder = f"{FOLDER[-1]}/{trainer.__name__}-{kind.__name__}"
        common = dict(
            use_cpu=not is_on_gpu(), report_to=[], disable_tqdm=True, save_steps=2, logging_strategy="no", max_steps=3
        )
        common.update(per_device_train_batch_size=2, learning_rate=1e-2, max_grad_norm=0.05)
        built = (SparseAdamW, dict(lr=1e-2, weight_decay=0.1))
        given = arguments(folder, **common, **options, **(lines if kind is UnderFSDP else {}))
        made = kind(model=model, args=given, train_dataset=data, optimizer_cls_and_kwargs=built, **rest)
        with reset_accelerate():
            made.train(resume_from_checkpoint=resume)
            if resume is None:
                made.save_model(f"{folder}/final")
        dist.barrier()
        return whole(model), folder

    expected, _ = run(trainer)
    assert not equal_states(expected, dict(tiny_model(**UNEVEN).state_dict()))
    actual, folder = run(UnderFSDP)
    for name, weight in expected.items():
        assert_close(actual[name], weight, atol=1e-6, rtol=0)
    assert equal_states(dict(LlamaForCausalLM.from_pretrained(f"{folder}/final").to(device()).state_dict()), actual)
    assert equal_states(run(UnderFSDP, f"{folder}/checkpoint-2")[0], actual)


def trainer_of_transformers(rank):
    from transformers import Trainer, TrainingArguments

    data = [{key: part[0].cpu() for key, part in token_batch(i, batch=1).items()} for i in range(16)]
    trainers_agree(Trainer, TrainingArguments, data, everything, {})


def trainer_of_trl(rank):
    pytest.importorskip("trl")
    from byte_tokenizer import byte_tokenizer
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"input_ids": [token_batch(i, batch=1)["input_ids"][0].tolist() for i in range(16)]})
    options = dict(bf16=False, gradient_checkpointing=False, max_length=24)
    # Its loss reads the head's weight outside the head, which under DDP would not be averaged.
    trainers_agree(SFTTrainer, SFTConfig, data, None, options, processing_class=byte_tokenizer())


@contextlib.contextmanager
def alone():
    """As before there was a process group: the library asks this one function whether there are others."""
    before, distributed.is_distributed = distributed.is_distributed, lambda: False
    try:
        yield
    finally:
        distributed.is_distributed = before


@contextlib.contextmanager
def fsdp_accelerator(**options):
    """An accelerator under FSDP of version 2, where accelerate itself would choose DDP."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    with reset_accelerate():
        accelerator = Accelerator(cpu=not is_on_gpu(), gradient_accumulation_steps=2)
        use_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2, **options))
        assert accelerator.is_fsdp2
        yield accelerator


@contextlib.contextmanager
def reset_accelerate():
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def use_fsdp(plugin):
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)


def divisions_that_are_refused(rank):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def columns(parameter):
        return Shard(1) if parameter.dim() == 2 else None

    model = tiny_model()
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    shard(model, shard_placement_fn=columns)
    before = {name: part.to_local().clone() for name, part in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"divided as S(hard)?\(.*1\)"):
        sparsify(model, masks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], part.to_local()) for name, part in model.state_dict().items())
    with pytest.raises(ValueError, match=r"divided as S(hard)?\(.*1\)"):
        start(model=tiny_model(), shard_placement_fn=columns)[0](**token_batch())
    model = tiny_model()
    both = mesh(1, 2)
    parallelize_module(model.model.layers[0], both["shard"], {"mlp.up_proj": ColwiseParallel()})
    shard(model, mesh=both["replicate"])
    with pytest.raises(ValueError, match="on 1 of 2 processes, as of pipeline or tensor parallelism"):
        sparsify(model, masks)
    model = tiny_model()
    masks = select_masks(model, salience="random", density=0.05, progress=False)
    parallelize_module(model.model.layers[0], mesh(), {"mlp.up_proj": ColwiseParallel()})
    for refused in (lambda: sparsify(model, masks), lambda: select_masks(model, [token_batch()], density=0.1)):
        with pytest.raises(ValueError, match="sharded by a device mesh.*Shard it with"):
            refused()
    shard(model.eval(), ignored_params=set(model.model.layers[0].mlp.up_proj.parameters()))
    with pytest.raises(ValueError, match="a DTensor that no fully_shard made, as of tensor parallelism"):
        sparsify(model, masks)


def tensor_parallelism_of_a_masked_weight_is_refused_before_it_changes(rank):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = tiny_model()
    masks = random_masks(model, ["q_proj", "up_proj"], density=0.05)
    optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"up_proj.weight is masked.*leave its layer out of the plan.*fully_shard"):
        parallelize_module(model.model.layers[0], mesh(), {"mlp.up_proj": ColwiseParallel()})
    assert equal_states(before, model.state_dict())
    # A layer without a mask can be divided.
    parallelize_module(model.model.layers[0], mesh(), {"mlp.gate_proj": ColwiseParallel(output_layouts=Replicate())})
    model(**token_batch()).loss.backward()
    optimizer.step()


def saved_by_the_first_process_and_loaded_by_one(rank):
    """Adapter, merged checkpoint and full state dict are those of the model of one process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, values, optimizer, reference = start()
    train(rank, model, optimizer, reference)
    # What FSDP keeps gathered after a forward is not taken for the rows.
    model(**token_batch(0))
    adapter, folder = f"{FOLDER[-1]}/adapter", f"{FOLDER[-1]}/merged"
    save_adapter(model, adapter)
    export_merged(model, folder, dtype=torch.float32, max_shard_size="10KB")
    with pytest.raises((ValueError, RuntimeError), match="not empty"):
        export_merged(model, folder)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    assert len(full) == (len(reference.model.state_dict()) if rank == 0 else 0)
    with pytest.raises(ValueError, match="only the rows of a sharded model.*export_merged"):
        model.save_pretrained(f"{FOLDER[-1]}/plain")
    model.save_pretrained(f"{FOLDER[-1]}/plain", is_main_process=rank == 0, state_dict=full)
    expected = whole(model)
    loaded = tiny_model(**UNEVEN)
    load_adapter(loaded, adapter)
    dist.barrier()
    saved = [type(loaded).from_pretrained(path).state_dict() for path in (folder, f"{FOLDER[-1]}/plain")]
    for other in (loaded.state_dict(), *saved, full):
        assert all(torch.equal(expected[name], part.to(device())) for name, part in other.items())
    desparsify(model)
    assert "save_pretrained" not in model.__dict__
    dist.barrier()


def a_full_state_of_moving_masks_is_resumed(rank):
    """A full state is taken only if all of its tensors are on one device; entries may have gone to other weights."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def begin(scope):
        model, values, optimizer, _ = start()
        MaskSchedule(model, optimizer, window=2, interval=2, scope=scope)
        return model, values, optimizer

    # In local scope it ends within a window, where the state has sums of gradients.
    for scope, steps in (("local", 3), ("global", 4)):
        model, values, optimizer = begin(scope)
        sizes = [*map(len, values)]
        train(rank, model, optimizer, steps=steps)
        assert ([*map(len, values)] == sizes) == (scope == "local")
        get = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=get)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=get))
        other, _, resumed = begin(scope)
        put = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, weights, options=put)
        set_optimizer_state_dict(other, resumed, state, options=put)
        assert resumed.schedule.history == optimizer.schedule.history
        assert equal_states(whole(other), whole(model)) and masks_of(other) == masks_of(model)
        # The sums of gradients are those of all processes.
        for each, its in ((model, optimizer), (other, resumed)):
            train(rank, each, its, first=steps, steps=3)
        assert equal_states(whole(other), whole(model)) and masks_of(other) == masks_of(model)


def a_window_is_saved_of_a_model_that_is_sharded_in_part(rank):
    """All weights have the counters of one state, though only those of some blocks are under FSDP."""
    from torch.distributed.fsdp import fully_shard

    def begin():
        model = tiny_model(**UNEVEN)
        optimizer = SparseAdamW(sparsify(model, random_masks(model)), **OPTIONS)
        fully_shard(model.model.layers[1], mesh=mesh())
        MaskSchedule(model, optimizer, window=3, interval=3)
        return model, optimizer

    model, optimizer = begin()
    train(rank, model, optimizer, steps=5)
    other, resumed = begin()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        train(rank, each, its, first=5, steps=3)
    assert equal_states(whole(other), whole(model)) and masks_of(other) == masks_of(model)


def adapters_loaded_on_a_sharded_model(rank):
    model, values, optimizer, reference = start()
    train(rank, model, optimizer, steps=1)
    adapter = f"{FOLDER[-1]}/of_one_step"
    save_adapter(model, adapter)
    other = shard(tiny_model(**UNEVEN))
    before = whole(other)
    masks = load_adapter(other, adapter)
    assert equal_states(whole(other), whole(model))
    sparsify(other, masks)
    desparsify(other)
    unload_adapter(other)
    assert equal_states(whole(other), before)
    with pytest.raises(ValueError, match="weights outside the masks differ"):
        load_adapter(shard(tiny_model(seed=1, **UNEVEN)), adapter)


def adapters_that_one_process_cannot_read_or_has_others_of(rank):
    """All processes exchange what the adapter replaces, so that each must have it, and the same."""
    for number, (seed, moved) in enumerate([(0, 0.0), (1, 0.0), (0, 0.1)]):
        other = tiny_model(**UNEVEN)
        values = sparsify(other, select_masks(other, salience="random", seed=seed, density=0.05, progress=False))
        with torch.no_grad():
            values[-1][-1] += moved
        if rank == 0:
            save_adapter(other, f"{FOLDER[-1]}/other{number}")
    dist.barrier()
    model = shard(tiny_model(**UNEVEN))
    start = whole(model)
    path = f"{FOLDER[-1]}/{('other0', 'missing')[rank]}"
    with pytest.raises((FileNotFoundError, RuntimeError), match="There is no adapter"):
        load_adapter(model, path)
    # Of other masks, or of another step of the same run.
    for different in (rank, 2 * rank):
        with pytest.raises(ValueError, match="adapters differ between processes.*the same file"):
            load_adapter(model, f"{FOLDER[-1]}/other{different}")
    assert equal_states(whole(model), start)
    load_adapter(model, f"{FOLDER[-1]}/other0")


def masks_that_move_with_the_training(rank):
    """From the training's own gradients and from batches, as in one process with all of them, in both scopes."""
    count = dist.get_world_size()
    batches = [token_batch(seed) for seed in range(count)]
    several = dict(interval=4, window=2, memory_budget=20_000)
    given = dict(interval=3, salience="gradient", progress=False)
    cases = [
        several,
        dict(several, scope="global", density=falling),
        dict(given, batches=batches, scope="global", moments="carry"),
        dict(several, scope="global", salience="fisher"),
        dict(given, batches=batches),
        dict(given, batches=batches, density=falling, threshold=1.0),
    ]
    for options in cases if count == 2 else cases[:3]:

        def steps(sharded, options=options):
            model = tiny_model(**UNEVEN)
            masks = select_masks(model, salience="magnitude", density=0.05, targets=everything, progress=False)
            model = shard(model) if sharded else model
            optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
            mine = dict(batches=options["batches"][rank::count]) if sharded and "batches" in options else {}
            # A probe of one batch is one of each process.
            mine.update(dict(probe=1 if sharded else count) if "threshold" in options else {})
            schedule = MaskSchedule(model, optimizer, **{**options, **mine})
            for step in range(9):
                batch = token_batch(step, batch=4)
                # One process passes the parts of all in turn.
                for number in [rank] if sharded else range(count):
                    (model(**part(batch, number, count)).loss / (1 if sharded else count)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return model, masks, schedule.history

        model, masks, history = steps(True)
        assert masks_of(model) != masks, options
        check_equal(f"{masks_of(model).fingerprint()} {history}", "masks and histories", "")
        sizes, before = ({name: len(mask) for name, mask in each.items()} for each in (masks_of(model), masks))
        assert (sizes == before) == (options.get("scope") is None and "density" not in options)
        state = whole(model)
        if rank:
            continue
        with alone():
            expected, _, expected_history = steps(False)
        assert len(history) == len(expected_history) > 2 and (history == expected_history or is_on_gpu())
        assert_same_masks(masks_of(model), masks_of(expected))
        for name, part_ in expected.state_dict().items():
            # An entry that one run trains and the other does not is another.
            alike = (state[name] - part_).abs() <= 1e-4
            assert alike.float().mean() > 0.99 if is_on_gpu() else alike.all(), name


def selections_that_one_process_has_no_room_for(rank):
    """The others changed their masks, or waited for it in an exchange."""
    cases = [
        ("carry", carried_moments, "quantize_blockwise", 3, 1),
        ("carry", SparseWeight, "compare", 3, 1),
        ("reset", SparseWeight, "compare", 3, 1),
    ]
    for moments, holder, name, call, changed in cases:
        model = tiny_model(**UNEVEN)
        masks = random_masks(model)
        optimizer = SparseAdamW(sparsify(shard(model), masks), state_bits=8, **OPTIONS)
        options = dict(interval=100, salience="gradient", progress=False)
        schedule = MaskSchedule(model, optimizer, [token_batch(9)], moments=moments, **options)
        model(**token_batch(1)).loss.backward()
        optimizer.step()
        calls, function = itertools.count(1), getattr(holder, name)

        def failing(*args, calls=calls, function=function, call=call):
            if next(calls) == call and rank == 1:
                raise torch.OutOfMemoryError("no room")
            return function(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(carried_moments, "_JOINED", 1)
            patch.setattr(holder, name, failing)
            with pytest.raises(torch.OutOfMemoryError if rank == 1 else RuntimeError, match="no room"):
                schedule.reselect()
        after = masks_of(model)
        assert [masks[name] != after[name] for name in masks] == [number < changed for number in range(len(masks))]
        check_equal(after.fingerprint(), "masks", "")
        for weight in sparse_weights(model):
            is_reset = moments == "reset" and masks[weight.name] != after[weight.name]
            assert is_reset or optimizer.state[weight.values]["exp_avg"].shape == weight.values.shape
        schedule.reselect()
        optimizer.zero_grad()
        model(**token_batch(2)).loss.backward()
        optimizer.step()
        assert masks_of(model) != after


def a_change_that_one_process_cannot_make(rank):
    """It is an error in the others too, which do not wait in the exchange of the next weight's entries."""
    model = shard(tiny_model(**UNEVEN))
    optimizer = SparseAdamW(sparsify(model, random_masks(model)), **OPTIONS)
    schedule = MaskSchedule(model, optimizer, [token_batch(9)], interval=100, salience="gradient", progress=False)
    calls, function = itertools.count(1), SparseWeight.change_mask

    def failing(*args):
        if next(calls) == 3 and rank == 1:
            raise torch.OutOfMemoryError("no room")
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseWeight, "change_mask", failing)
        with pytest.raises(torch.OutOfMemoryError if rank == 1 else RuntimeError, match="no room"):
            schedule.reselect()


def falling(step):
    return 0.05 - 0.002 * step


def checkpoints_resumed_by_two_processes_and_by_one(rank):
    """`torch.distributed.checkpoint` saves rows and values; the resumed runs go on as the one that was saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, values, optimizer, reference = start()
    train(rank, model, optimizer, reference, steps=2)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{FOLDER[-1]}/checkpoint")
    train(rank, model, optimizer, reference, first=2, steps=2)
    other, other_values, other_optimizer, _ = start(first="shard")
    weights, state = get_state_dict(other, other_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{FOLDER[-1]}/checkpoint")
    set_state_dict(other, other_optimizer, model_state_dict=weights, optim_state_dict=state)
    train(rank, other, other_optimizer, first=2, steps=2)
    assert all(map(torch.equal, values, other_values))
    expected = whole(model)
    assert equal_states(expected, whole(other))
    if rank == 0:
        torch.save(expected, f"{FOLDER[-1]}/resumed.pt")
    dist.barrier()


SCENARIOS = [
    sparsified_and_then_sharded,
    sharded_and_then_sparsified,
    blocks_computed_again_in_backward,
    moved_after_it_was_sharded,
    the_whole_model_is_searched_once_after_it_was_sharded,
    a_layer_whose_output_a_hook_changes,
    compiled_blocks,
    gradients_added_up_are_sent_once_and_four_bytes_an_entry,
    a_step_with_a_gradient_that_is_not_averaged_is_refused,
    a_model_that_is_trained_without_a_call_of_it,
    gradients_that_fsdp_is_to_divide_otherwise_are_refused,
    hybrid_sharding,
    embeddings_tied_to_the_head,
    processes_without_rows_and_weights_that_some_do_not_use,
    mixed_precision_computes_in_16_bits_and_keeps_rows_in_32,
    rows_in_16_bits_hold_the_rounded_values,
    rows_offloaded_to_the_cpu,
    a_norm_is_trained_densely_too,
    a_forward_between_steps_leaves_no_stale_weights,
    a_state_loaded_later_wins_over_values,
    values_changed_by_hand_are_written_before_the_next_forward,
    taken_off_a_sharded_model_leaves_the_trained_rows,
    uses_without_a_call_of_the_module_count,
    masked_weights_stay_frozen_when_all_is_thawed,
    quantised_weights_that_are_left_whole,
    rows_changed_past_the_dtensor_are_refused,
    whole_weights_are_freed_as_they_are_sharded,
    a_model_that_nobody_holds_any_more_is_freed,
    salience_of_each_processes_own_batches,
    salience_between_fully_shard_and_the_first_step,
    salience_of_quantised_weights_that_are_left_whole,
    gradients_summed_as_in_one_process,
    accumulators_of_own_rows,
    squares_of_single_examples,
    experts_that_some_processes_do_not_use,
    salience_that_is_refused_on_a_sharded_model,
    losses_that_fail_in_one_process,
    accelerate_of_version_2,
    trainer_of_transformers,
    trainer_of_trl,
    divisions_that_are_refused,
    tensor_parallelism_of_a_masked_weight_is_refused_before_it_changes,
    saved_by_the_first_process_and_loaded_by_one,
    a_window_is_saved_of_a_model_that_is_sharded_in_part,
    adapters_loaded_on_a_sharded_model,
    adapters_that_one_process_cannot_read_or_has_others_of,
    a_full_state_of_moving_masks_is_resumed,
    masks_that_move_with_the_training,
    selections_that_one_process_has_no_room_for,
    a_change_that_one_process_cannot_make,
    checkpoints_resumed_by_two_processes_and_by_one,
]


# These depend most on how many processes there are: some have no rows of a weight, and sums have other orders.
OF_FOUR = [
    sparsified_and_then_sharded,
    sharded_and_then_sparsified,
    hybrid_sharding,
    embeddings_tied_to_the_head,
    weights_that_two_of_four_processes_keep_for_backward,
    packed_weights_that_two_of_four_processes_would_keep_are_refused,
    gradients_added_up_are_sent_once_and_four_bytes_an_entry,
    salience_of_each_processes_own_batches,
    gradients_summed_as_in_one_process,
    accumulators_of_own_rows,
    squares_of_single_examples,
    experts_that_some_processes_do_not_use,
    masks_that_move_with_the_training,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def failures(folder):
    return failures_of(SCENARIOS, folder, "forkserver")


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, scenario):
    if scenario == compiled_blocks.__name__:
        skip_unless_nodes_compile()
    assert_passed(failures, scenario)


@on_two_gpus
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_gpus(failures_on_gpus, scenario):
    if scenario == compiled_blocks.__name__:
        skip_unless_nodes_compile()
    assert_passed(failures_on_gpus, scenario)


def killed_in_its_third_step(rank):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, _, optimizer, reference = start()
    train(rank, model, optimizer, reference, steps=2)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{FOLDER[-1]}/last")
    loss = model(**part(token_batch(2, batch=4), rank, 2)).loss
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


def resumed_after_that(rank):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, values, optimizer, reference = start(first="shard")
    for step in range(2):
        reference.model(**token_batch(step, batch=4)).loss.backward()
        reference.step(clip=0.05)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{FOLDER[-1]}/last")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(rank, model, optimizer, reference, first=2, steps=2)
    assert_equals(reference, model, values)


def test_processes_of_which_one_was_killed_resume_from_their_last_checkpoint(tmp_path):
    _, killed = failures_of([killed_in_its_third_step], tmp_path, "forkserver")
    assert "SIGKILL" in killed["killed_in_its_third_step"]
    assert failures_of([resumed_after_that], tmp_path, "forkserver") == [{}, {}]


@pytest.fixture(scope="module")
def failures_of_four(tmp_path_factory):
    return failures_of(OF_FOUR, tmp_path_factory.mktemp("four"), "forkserver", 4)


def test_an_error_while_others_gather_weights_says_what_it_is(tmp_path):
    """The process that fails is not in step with the others, and must not exchange its error in place of weights."""
    scenarios = {
        gradient_of_a_loss_that_fails_before_the_forward: "KeyError: 'sample without a weight'",
        gradient_of_a_loss_that_fails_in_the_forward: "IndexError: index out of range in self",
        gradient_of_a_loss_that_fails_in_the_backward: "KeyError: 'no gradient of this'",
        squares_of_a_loss_that_fails_in_the_backward: "KeyError: 'no gradient of this'",
        activations_of_a_loss_that_fails_before_the_forward: "KeyError: 'sample without a weight'",
    }
    _, second = failures_of(list(scenarios), tmp_path, "forkserver")
    for scenario, error in scenarios.items():
        assert second[scenario.__name__].rstrip().endswith(error)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in OF_FOUR])
def test_four_processes(failures_of_four, scenario):
    assert_passed(failures_of_four, scenario)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_resumes_what_two_saved(failures, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = tiny_model(**UNEVEN)
    masks = select_masks(model, salience="random", density=0.05, targets=everything, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for step in range(2, 4):
        model(**token_batch(step, batch=4)).loss.backward()
        clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.load(folder / "resumed.pt")
    for name, part in model.state_dict().items():
        assert_close(part, expected[name], atol=1e-6, rtol=0)
