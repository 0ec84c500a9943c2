"""Compact values and the weights they belong to: never out of step, never in a checkpoint, never left behind."""

import copy
import gc
import io
import logging
import pickle
import re
import sys
import weakref

import pytest
import torch
from conftest import (
    assert_close,
    attach,
    compiles_nodes,
    equal_states,
    every,
    random_masks,
    skip_before,
    tiny_model,
    token_batch,
    train,
)
from safetensors import safe_open
from torch import nn

from speft_optim import Mask, Masks, MaskSchedule, SparseAdamW, desparsify, select_masks, sparsify
from speft_optim.weights import attached
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.compact_values import linked
from speft_optim.weights.quantized_state import STATE_KEYS
from speft_optim.weights.verification import DenseGradient

BATCH = token_batch()


def assert_in_step(model):
    """Every weight holds the rounding of its values."""
    weights = sparse_weights(model)
    assert weights
    for weight in weights:
        entries = weight.base.tensor.flatten()[weight.mask.indices.long()]
        assert torch.equal(entries, weight.values.detach().to(entries.dtype)), weight.name


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"]).logits


def everything(model):
    """What attaching and detaching must leave as it was, comparable."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    modules = {
        path: (type(module), module.training, sorted(module.__dict__), [list(getattr(module, kind)) for kind in kinds])
        for path, module in model.named_modules()
    }
    parameters = {
        name: (id(p), p.requires_grad, p.is_leaf, p.detach().tolist()) for name, p in model.named_parameters()
    }
    return modules, parameters, list(model.state_dict())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert", "mixtral"])
def test_state_dict_is_that_of_the_base(kind):
    model = tiny_model(kind)
    before = copy.deepcopy(model.state_dict())
    masks = random_masks(model, every)
    values = sparsify(model, masks)
    assert len(values) == len(masks) and all(v.shape == (len(m),) for v, m in zip(values, masks.values(), strict=True))
    attached = model.state_dict()
    assert list(attached) == list(before) and equal_states(attached, before)
    assert all(attached[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters() if name in attached)
    plain = tiny_model(kind, seed=1)
    assert plain.load_state_dict(attached).missing_keys == []
    train(model, SparseAdamW(values, lr=1e-2))
    trained = model.state_dict()
    assert list(trained) == list(before) and not equal_states(trained, before)
    assert_in_step(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen2", True), ("gpt2", True), ("gemma2", True)])
def test_saved_checkpoint_is_ordinary_and_gives_the_same_logits(kind, tied, dtype, tmp_path):
    import transformers

    tiny_model(kind, dtype).save_pretrained(tmp_path / "base")
    # Loaded and not cast, which would round the frequencies of its rotary embedding too.
    load = getattr(transformers, type(tiny_model(kind)).__name__).from_pretrained
    model = load(tmp_path / "base", dtype="auto").eval()
    values = sparsify(model, random_masks(model, every))
    train(model, SparseAdamW(values, lr=1e-2))
    with torch.no_grad():
        # Changed last of all, and in the file nevertheless.
        values[0].add_(1)
    model.save_pretrained(tmp_path / "trained")
    assert {p.name for p in (tmp_path / "base").iterdir()} == {p.name for p in (tmp_path / "trained").iterdir()}
    contents = []
    for folder in ("base", "trained"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            contents.append(
                {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}
            )
    assert contents[0] == contents[1]
    loaded = load(tmp_path / "trained", dtype="auto").eval()
    assert loaded.dtype == dtype and not sparse_weights(loaded)
    shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert shared == tied
    assert torch.equal(logits(loaded), logits(model))
    desparsify(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_desparsify_leaves_nothing_but_the_trained_weights(kind):
    model = tiny_model(kind).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = everything(model)
    values = sparsify(model, random_masks(model, every))
    assert [p for p in model.parameters() if p.requires_grad] == values
    desparsify(model)
    assert everything(model) == before
    values = sparsify(model, random_masks(model))
    train(model, SparseAdamW(values, lr=1e-2))
    with torch.no_grad():
        values[0].add_(1)
    expected = copy.deepcopy(model.state_dict())
    desparsify(model)
    assert equal_states(model.state_dict(), expected)
    assert [part[:3] for part in everything(model)[1].values()] == [part[:3] for part in before[1].values()]
    assert everything(model)[0] == before[0]
    with pytest.raises(ValueError, match="is not sparsified; there is nothing to undo"):
        desparsify(model)


def test_desparsify_reaches_through_a_wrapper():
    model, *_ = attach()
    wrapper = nn.Sequential(model)
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(wrapper, {"0." + name: mask for name, mask in random_masks(model).items()})
    desparsify(wrapper)
    assert not sparse_weights(wrapper) and all(p.requires_grad for p in wrapper.parameters())
    sparsify(model, random_masks(model))


def test_values_come_in_the_models_order_and_empty_masks_attach_nothing():
    model = tiny_model()
    masks = random_masks(model)
    names = list(masks)
    masks[names[1]] = Mask(torch.tensor([], dtype=torch.int64), masks[names[1]].shape)
    values = sparsify(model, dict(reversed(masks.items())))
    assert [weight.name for weight in sparse_weights(model)] == [names[0], *names[2:]]
    assert [weight.values for weight in sparse_weights(model)] == values
    assert all(value.dtype == torch.float32 and value.is_leaf for value in values)
    assert "entries=115, density=19.965%" in repr(model)


@torch.no_grad()
def in_place(values):
    for value in values:
        value.mul_(1.5)


@torch.no_grad()
def through_detach(values):
    for value in values:
        value.detach().mul_(1.5)


def through_data(values):
    """The way in which diffusers and torch-ema swap averaged weights in."""
    for value in values:
        value.data.copy_(value.detach() * 1.5)


def by_exchange(values):
    for value in values:
        value.data = value.detach() * 1.5


@torch.no_grad()
def by_foreach(values):
    torch._foreach_mul_(values, 1.5)


@torch.no_grad()
def by_vector(values):
    vector = nn.utils.parameters_to_vector(values)
    nn.utils.vector_to_parameters(vector * 1.5, values)


def past_every_counter(values):
    """As a collective of all processes does."""
    for value in values:
        value.data.numpy()[:] *= 1.5


def refresh(values):
    """As before a forward."""
    for value in values:
        linked(value).refresh()


def through_a_backup(values):
    """Averages are swapped in and out, and what was there before is changed afterwards."""
    backups = [value.data for value in values]
    for value in values:
        value.data = value.data * 2.0
    refresh(values)
    for value, backup in zip(values, backups, strict=True):
        value.data = backup
    refresh(values)
    for backup in backups:
        backup.mul_(1.5)


WAYS = [
    in_place,
    through_detach,
    through_data,
    by_exchange,
    by_foreach,
    by_vector,
    past_every_counter,
    through_a_backup,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", WAYS)
def test_any_change_of_values_reaches_the_weights(change, dtype):
    model, masks, values, _ = attach(dtype=dtype)
    start = copy.deepcopy(model.state_dict())
    for reader in (lambda: logits(model), model.state_dict, lambda: SparseAdamW(values).state_dict()):
        expected = [value.detach() * 1.5 for value in values]
        change(values)
        reader()
        assert_in_step(model)
        assert all(map(torch.equal, values, expected))
    for name, mask in masks.items():
        outside = torch.ones(mask.shape.numel(), dtype=torch.bool).index_fill_(0, mask.indices.long(), False)
        assert torch.equal(model.state_dict()[name].flatten()[outside], start[name].flatten()[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_the_weight_from_outside_wins_where_it_changed_something(dtype):
    model, masks, values, _ = attach(dtype=dtype)
    with torch.no_grad():
        # Values that no bf16 number equals.
        for value in values:
            value.add_(1e-4)
    logits(model)
    exact = values[0].detach().clone()
    weight = model.get_parameter(next(iter(masks)))
    first = masks[next(iter(masks))].indices[0]
    with torch.no_grad():
        weight.view(-1)[first] = 7.0
    logits(model)
    assert values[0][0] == 7.0 and torch.equal(values[0][1:], exact[1:])
    assert_in_step(model)
    optimizer = SparseAdamW(values, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        weight.view(-1)[first] = 9.0
    train(model, optimizer, 1)
    assert values[0][0] == 9.0


def test_values_changed_after_forward_do_not_break_its_backward():
    model, _, values, _ = attach()
    loss = model(**BATCH).loss
    in_place(values)
    loss.backward()
    assert all(value.grad is not None for value in values)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("pending", [False, True])
def test_a_loaded_checkpoint_wins_over_values(assign, pending):
    model, _, values, _ = attach("llama")
    other = tiny_model("llama", seed=1)
    if pending:
        in_place(values)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_in_step(model)
    assert torch.equal(logits(model), logits(other))
    assert [p for p in model.parameters() if p.requires_grad] == values
    train(model, SparseAdamW(values, lr=1e-2), 1)
    assert_in_step(model)
    assert not torch.equal(logits(model), logits(other))


def test_a_look_at_the_values_writes_nothing():
    model, masks, values, _ = attach(dtype=torch.bfloat16)
    train(model, SparseAdamW(values, lr=1e-4))
    versions = [model.get_parameter(name)._version for name in masks]
    early = model(**token_batch()).loss
    assert all(value.data.norm() > 0 for value in values)
    logits(model)
    assert versions == [model.get_parameter(name)._version for name in masks]
    early.backward()


def test_a_model_that_is_not_sharded_needs_no_fsdp(monkeypatch):
    """As where torch was built without it."""
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    model = tiny_model()
    assert sparsify(model, random_masks(model))


def test_values_of_a_broken_model_can_be_copied():
    model = tiny_model()
    values = sparsify(model, random_masks(model, every))
    model.resize_token_embeddings(100)
    copies = copy.deepcopy(values)
    assert all(map(torch.equal, copies, values))
    with pytest.raises(ValueError, match="has shape"):
        logits(model)


def test_loading_something_else_keeps_pending_values():
    model, _, values, _ = attach()
    expected = [value.detach() * 1.5 for value in values]
    in_place(values)
    model.load_state_dict({"model.norm.weight": torch.ones(24)}, strict=False)
    assert all(map(torch.equal, values, expected))
    assert_in_step(model)


@pytest.mark.parametrize("order", [["model", "optimizer"], ["optimizer", "model"]])
def test_checkpoint_and_optimizer_load_in_either_order_to_the_exact_bf16_values(order):
    model, masks, values, _ = attach(dtype=torch.bfloat16)
    optimizer = SparseAdamW(values, lr=1e-5)
    train(model, optimizer)
    saved = {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    # Otherwise the order would not matter.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values)
    other = tiny_model("llama", torch.bfloat16, seed=1)
    other_values = sparsify(other, masks)
    parts = {"model": other, "optimizer": SparseAdamW(other_values)}
    for part in order:
        parts[part].load_state_dict(saved[part])
    assert all(map(torch.equal, other_values, values)) and equal_states(other.state_dict(), saved["model"])


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("newer", ["values", "weight"])
def test_copies_are_made_in_step_and_follow_their_own_values(newer, through):
    model, masks, values, _ = attach(dtype=torch.bfloat16)
    in_place(values)
    logits(model)
    if newer == "values":
        in_place(values)
    else:
        with torch.no_grad():
            model.get_parameter(next(iter(masks))).fill_(3.0)
    other = through(model)
    assert_in_step(other), assert_in_step(model)
    assert newer == "values" or (model.get_parameter(next(iter(masks))) == 3.0).all(), "the newer wins"
    assert equal_states(other.state_dict(), model.state_dict()) and torch.equal(logits(other), logits(model))
    before = copy.deepcopy(model.state_dict())
    other_values = [weight.values for weight in sparse_weights(other)]
    assert all(type(ours) is type(theirs) for ours, theirs in zip(other_values, values, strict=True))
    # The versions of a copy start from zero: one change must not look like the state of the original.
    for change in (in_place, through_data, in_place):
        change(other_values)
        logits(other)
        assert_in_step(other)
    assert equal_states(model.state_dict(), before)
    desparsify(other)
    assert len(sparse_weights(model)) == len(values)


def test_a_whole_model_in_a_file_trains_on():
    model, _, values, _ = attach()
    file = io.BytesIO()
    torch.save(model, file)
    other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    before = copy.deepcopy(model.state_dict())
    for one in (other, model):
        train(one, SparseAdamW([weight.values for weight in sparse_weights(one)], lr=1e-2))
        assert one is model or equal_states(model.state_dict(), before)
    assert equal_states(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("path", [["bfloat16"], ["bfloat16", "float32"], ["half", "bfloat16", "float32"], ["float64"]])
def test_casting_the_model_keeps_the_exact_values(path):
    model, _, values, _ = attach()
    in_place(values)
    exact = [value.detach() * 1.0 for value in values]
    model(**BATCH).loss.backward()
    for dtype in path:
        model.to(getattr(torch, dtype))
        assert all(map(torch.equal, values, exact))
        assert all(value.dtype == value.grad.dtype == torch.float32 for value in values)
        model.state_dict()
        assert_in_step(model)
    assert [weight.values for weight in sparse_weights(model)] == values


def test_casting_a_model_up_writes_the_exact_values():
    model, _, values, _ = attach(dtype=torch.bfloat16)
    train(model, SparseAdamW(values, lr=1e-5))
    exact = [value.detach().clone() for value in values]
    model.float()
    logits(model)
    assert all(map(torch.equal, values, exact)) and any(not torch.equal(v, v.bfloat16().float()) for v in exact)
    assert_in_step(model)


def test_casting_keeps_a_pending_change_of_the_weight():
    model, masks, *_ = attach()
    weight = model.get_parameter(next(iter(masks)))
    with torch.no_grad():
        weight.fill_(3.0)
    model.to(torch.bfloat16)
    model.state_dict()
    assert bool((weight == 3).all())


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("grads", ["kept", "none"])
@pytest.mark.parametrize("optimizer_type", [SparseAdamW, torch.optim.AdamW])
def test_an_optimizer_of_a_replaced_layer_refuses_to_step(optimizer_type, grads, collected):
    """Also where the layer is long gone, and where its values have no gradient any more."""
    model, masks, values, _ = attach(targets=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"])
    optimizer = optimizer_type(values, lr=1e-2)
    train(model, optimizer, 1)
    model(**BATCH).loss.backward()
    model.model.layers[1].mlp.up_proj = nn.Linear(24, 40, bias=False)
    before = copy.deepcopy(model.state_dict())
    if grads == "none":
        values[1].grad = None
    if collected:
        gc.collect()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is no longer in the model.*sparsify again"):
        optimizer.step()
    if optimizer_type is SparseAdamW:
        assert equal_states(model.state_dict(), before)
    # The way out that the message names.
    desparsify(model)
    values = sparsify(model, masks)
    train(model, SparseAdamW(values, lr=1e-2), 1)
    assert_in_step(model)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_are_named_and_can_be_attached_to_again(tied):
    model, _, values, _ = attach(tiny_model("qwen2", tie_word_embeddings=tied), targets=["embed_tokens"])
    optimizer = SparseAdamW(values)
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight .*sparsify again"):
        train(model, optimizer, 1)
    desparsify(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.zero_grad()
    values = sparsify(model, random_masks(model, ["embed_tokens"]))
    train(model, SparseAdamW(values), 1)


def test_values_replaced_by_another_parameter_are_named():
    model, masks, values, _ = attach()
    weight = sparse_weights(model)[0]
    weight.values = nn.Parameter(values[0].detach().clone())
    with pytest.raises(ValueError, match=f"{next(iter(masks))} has values that were replaced"):
        SparseAdamW(values).step()


def test_weights_untied_after_attaching_are_named():
    model, _, values, _ = attach("qwen2", targets=["embed_tokens"])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="embed_tokens.weight is no longer shared by the modules that shared it"):
        SparseAdamW(values).step()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("optimizer_type", [SparseAdamW, torch.optim.SGD])
def test_an_optimizer_left_over_from_desparsify_says_so(optimizer_type, held):
    """Selecting again and forgetting the optimizer would train nothing."""
    model, _, values, _ = attach()
    optimizer = optimizer_type(values, lr=1e-2)
    train(model, optimizer, 1)
    # Whether or not someone still holds them.
    kept = sparse_weights(model) if held else []
    desparsify(model)
    new_values = sparsify(model, random_masks(model, seed=1))
    model(**BATCH).loss.backward()
    with pytest.raises(ValueError, match=r"q_proj.weight is no longer sparsified.*build a new optimizer"):
        optimizer.step()
    with pytest.raises(ValueError, match="no longer sparsified"):
        SparseAdamW(values)
    SparseAdamW(new_values).step()
    assert len(kept) == (len(values) if held else 0)


def test_a_weight_that_gets_no_gradient_is_told_of_once(caplog):
    class Branching(nn.Module):
        """Takes one of two branches."""

        def __init__(self):
            super().__init__()
            self.called, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(x)

    model = Branching()
    optimizer = SparseAdamW(sparsify(model, random_masks(model, ["called", "other"])))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    (record,) = caplog.records
    assert "1 masked weights have no gradient at the first step, e.g. other.weight" in record.message


@pytest.mark.slow
def test_attaching_and_detaching_again_and_again_leaves_nothing_behind():
    model = tiny_model()
    masks = random_masks(model)
    before = everything(model)[0]
    kept, alive, counts = [], [], []
    gc.freeze()  # so that only what comes from here on is walked
    for _ in range(10):
        values = sparsify(model, masks)
        optimizer = SparseAdamW(values, lr=1e-3)
        train(model, optimizer, 1)
        alive += [weakref.ref(weight) for weight in sparse_weights(model)]
        kept.append(weakref.ref(values[0]))
        desparsify(model)
        del values, optimizer
        gc.collect()
        counts.append(sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)))
    gc.unfreeze()
    assert not any(ref() for ref in kept) and not any(ref() for ref in alive)
    assert counts[-1] <= counts[1]
    assert everything(model)[0] == before


def trained():
    model, _, _, optimizer = attach()
    train(model, optimizer)
    return [model, optimizer]


def trained_on_weights_in_host_memory():
    model = tiny_model()
    optimizer = SparseAdamW(sparsify(model, random_masks(model), offload="cpu"))
    train(model, optimizer)
    return [model, optimizer]


def trained_on_masks_that_move():
    model, _, _, optimizer = attach()
    schedule = MaskSchedule(model, optimizer, interval=2, window=2)
    train(model, optimizer, 4)
    assert schedule.history
    return [model, optimizer, schedule]


def trained_where_hooks_do_not_see_all():
    model, _, _, optimizer = attach("gpt2", targets=every)
    (model(**BATCH).loss + sum(parameter.sum() for parameter in model.parameters())).backward()
    optimizer.step()
    return [model, optimizer]


def scored_in_training():
    """With accumulators for uses outside the modules too, opened on weights that are watched already."""
    model, _, _, optimizer = attach()
    train(model, optimizer)
    select_masks(model, [BATCH], density=0.1, progress=False)
    train(model, optimizer)
    return [model, optimizer]


def copied():
    model, _, _, optimizer = attach()
    train(model, optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return [model, copy.deepcopy(model), averaged, pickle.loads(pickle.dumps(model))]


def taken_off():
    model, _, _, optimizer = attach()
    train(model, optimizer)
    desparsify(model)
    return [model, optimizer]


@pytest.mark.parametrize(
    "use",
    [
        trained,
        trained_on_weights_in_host_memory,
        trained_on_masks_that_move,
        trained_where_hooks_do_not_see_all,
        scored_in_training,
        copied,
        taken_off,
    ],
)
def test_what_nobody_holds_any_more_is_freed(use):
    """`del model` left a sparsified model in memory for good: autograd's hooks of its weights led back to it."""
    made = [weakref.ref(thing) for thing in use()]
    gc.collect()
    assert not [ref() for ref in made if ref() is not None]


def test_an_optimizer_keeps_what_it_trains():
    """As any optimizer keeps its parameters; without their weights it could neither step nor be saved."""
    model, _, values, optimizer = attach()
    train(model, optimizer)
    model, before = weakref.ref(model), optimizer.state_dict()
    gc.collect()
    assert equal_states(before["state"][0], optimizer.state_dict()["state"][0])
    optimizer.step()
    del optimizer, values
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_optimizer_keeps_what_it_trains_from_its_first_step_on(copy_of):
    model, _, _, optimizer = attach()
    train(model, optimizer)
    model, optimizer = copy_of((model, optimizer))
    train(model, optimizer)
    model = weakref.ref(model)
    gc.collect()
    optimizer.step()
    del optimizer
    gc.collect()
    assert model() is None


def test_an_optimizer_no_longer_keeps_a_model_whose_group_was_taken_out():
    model, kept = tiny_model(), tiny_model()
    optimizer = SparseAdamW([{"params": sparsify(each, random_masks(each))} for each in (model, kept)])
    del optimizer.param_groups[0]
    train(kept, optimizer)
    model = weakref.ref(model)
    gc.collect()
    assert model() is None


def test_values_whose_weight_is_gone_say_so():
    model = tiny_model()
    values = sparsify(model, random_masks(model))
    del model
    gc.collect()
    with pytest.raises(ValueError, match="nothing holds the model any more.*build a new optimizer"):
        SparseAdamW(values)


def test_a_hook_whose_weight_is_gone_is_saved_and_copied_with_the_model():
    model, _, _, optimizer = attach()
    weight = sparse_weights(model)[0]
    other = copy.copy(weight)
    other._watch_gradient()
    del other
    gc.collect()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(copied), logits(model))


def test_gradients_go_to_the_one_below_if_the_last_is_gone():
    weight, taken = nn.Parameter(torch.ones(3), requires_grad=False), []
    below, above = (DenseGradient(lambda gradient, name=name: taken.append(name)) for name in ("below", "above"))
    below.open(weight)
    above.open(weight)
    weight.sum().backward()
    del above
    gc.collect()
    weight.sum().backward()
    assert taken == ["above", "below"] and weight.grad is None
    below.close()
    assert not weight.requires_grad


def good_masks(model):
    return random_masks(model, ["q_proj"])


def mask_for(name, shape):
    return lambda model: {**good_masks(model), name: Mask(torch.tensor([0]), shape)}


@pytest.mark.parametrize(
    "kind, masks, error, message",
    [
        (
            "llama",
            mask_for("model.layers.9.mlp.up_proj.weight", (40, 24)),
            ValueError,
            "layers.9.*no parameter of that name",
        ),
        ("llama", mask_for("model.layers.0.mlp.up_proj", (40, 24)), ValueError, "no parameter of that name"),
        ("llama", mask_for("model.layers.0.mlp.up_proj.weight", (24, 40)), ValueError, r"\(24, 40\).*\(40, 24\)"),
        (
            "qwen2",
            mask_for("lm_head.weight", (61, 24)),
            ValueError,
            "shared and goes by its first name, model.embed_tok",
        ),
        ("llama", lambda model: Masks(), ValueError, "masks hold no entry"),
        (
            "llama",
            lambda model: {"model.norm.weight": Mask(torch.tensor([], dtype=torch.int64), (24,))},
            ValueError,
            "hold no entry",
        ),
        (
            "llama",
            lambda model: [*good_masks(model).values()],
            TypeError,
            "a dict from parameter names to Mask, got a list",
        ),
        (
            "llama",
            lambda model: {"model.norm.weight": torch.tensor([0])},
            TypeError,
            "a dict from parameter names to Mask",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_happens(kind, masks, error, message):
    model = tiny_model(kind)
    masks, before = masks(model), everything(model)
    with pytest.raises(error, match=message):
        sparsify(model, masks)
    assert everything(model) == before
    sparsify(model, good_masks(model))
    with pytest.raises(ValueError, match=r"call desparsify\(model\) first"):
        sparsify(model, good_masks(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_values_cannot_follow_are_refused(dtype):
    layer = nn.Linear(3, 4, bias=False).to(dtype)
    with pytest.raises(TypeError, match=f"weight has dtype {dtype}"):
        sparsify(layer, {"weight": Mask(torch.tensor([0]), (4, 3))})
    assert layer.weight.requires_grad


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_block_may_be_wrapped_after_attaching(how):
    """Wrappers that hand attributes through leave every name as it was."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    results = []
    for wrapped in (False, True):
        model, masks, values, _ = attach(targets=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"])
        # A recomputation would lengthen the cache of keys; transformers 4 turns it off for its own checkpoints only.
        model.config.use_cache = False
        if wrapped:
            block = model.model.layers[1]
            model.model.layers[1] = (
                torch.compile(block, backend="eager") if how == "compiled" else checkpoint_wrapper(block)
            )
        optimizer = SparseAdamW(values, lr=1e-2)
        train(model, optimizer, 2)
        results.append(torch.cat([value.detach() for value in values]))
    assert_close(*results)


def test_a_weight_cut_in_place_is_named():
    """`.data` of another part of the same storage keeps version and address."""
    model, masks, values, _ = attach(targets=["layers.0.mlp.up_proj"])
    optimizer = SparseAdamW(values, lr=1e-2)
    train(model, optimizer, 1)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data[:20]
    values[0].grad = torch.ones_like(values[0])
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \(20, 24\)"):
        optimizer.step()


broken = skip_before("transformers", "5", "has a Whisper that reentrant checkpoints break, dense models too")


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=broken), False])
def test_encoder_and_decoder_both_get_gradients_through_checkpoints(reentrant):
    """Each has inputs of its own, which no frozen embedding makes require gradients."""
    import transformers as tf

    sizes = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes |= dict(d_model=24, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20, max_target_positions=20)
    tokens = dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    model = tf.WhisperForConditionalGeneration(tf.WhisperConfig(num_mel_bins=8, dropout=0.0, **sizes, **tokens)).train()
    values = sparsify(model, random_masks(model, density=0.1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_features=torch.randn(2, 8, 40), labels=torch.randint(3, 60, (2, 7))).loss.backward()
    assert all(value.grad is not None for value in values)


def test_inference_mode_is_refused_and_the_model_left_as_it_was():
    with torch.inference_mode():
        made_inside = tiny_model()
    model = tiny_model()
    masks = random_masks(model, density=0.1)
    for call in (lambda m: sparsify(m, masks), lambda m: select_masks(m, [token_batch()], density=0.1)):
        with pytest.raises(ValueError, match="was made in torch.inference_mode"):
            call(made_inside)
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.. is on"):
            call(model)
    assert all(parameter.requires_grad for m in (made_inside, model) for parameter in m.parameters())


def held(model):
    """The names of the attributes of each module, parameter and quantiser's object of a model."""
    objects = [*model.modules(), *model.parameters(), *filter(None, [getattr(model, "hf_quantizer", None)])]
    objects += [part.quant_state for part in model.parameters() if hasattr(part, "quant_state")]
    return {id(thing): set(vars(thing)) for thing in objects}


@pytest.mark.parametrize("kind", ["dense", "int8", "double"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_all_attributes_that_others_get_are_listed(kind, offload, tmp_path):
    if kind == "dense":
        model = tiny_model()
    else:
        pytest.importorskip("bitsandbytes")
        from quantized_models import load_quantized, save_original

        model = load_quantized(save_original(tmp_path), kind)
    before, new = held(model), set()

    def look(*_):
        new.update(*(names - before.get(thing, names) for thing, names in held(model).items()))

    values = sparsify(model, random_masks(model), offload=offload)
    if offload is None and compiles_nodes():
        model.model.layers[0].compile(backend="eager")
    for module in model.model.layers[1].modules():
        module.register_forward_hook(look)
    model(**token_batch()).loss.backward()
    SparseAdamW(values, lr=1e-3).step()
    look()
    # torch's compiler marks the modules that it has seen.
    new -= {*STATE_KEYS, "weight", "_dynamo_static_input_type"}
    listed = set(re.findall("`([a-z_0-9]+)`", attached.__doc__, re.IGNORECASE))
    assert new and {re.sub(r"\d+$", "1", name) for name in new} <= listed
