"""Frozen base in 8 and 4 bits: everything that holds on a dense base holds on the dequantised weights."""

import copy
import gc
import io
import pickle
import sys
import weakref

import bitsandbytes as bnb
import pytest
import torch
from conftest import (
    CHANGES_OF_VALUES,
    BytesSince,
    Reference,
    assert_close,
    product_flops,
    random_masks,
    tiny_model,
    token_batch,
    train,
)
from quantized_models import KINDS, SIZES, dequantized_twin, effective, load_quantized, save_original, stored
from torch import nn

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.integrations import patch_model
from speft_optim.masks.collection import Masks
from speft_optim.masks.mask import Mask
from speft_optim.salience.grasp import GradientStore
from speft_optim.salience.measures import MEASURES
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.four_bit import FourBitWeight
from speft_optim.weights.int8 import Int8Weight
from speft_optim.weights.quantized_linear import FrozenForward
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import find_targets


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_original(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def loaded(original):
    """One model of each kind, to be copied by the tests."""
    return {kind: load_quantized(original, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request, loaded):
    return copy.deepcopy(loaded[request.param])


def loss_of(model, seed=0, **options):
    return model(**token_batch(seed, **options)).loss


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def test_sparsified_model_computes_the_dequantised_one(model):
    twin = dequantized_twin(model)
    sparsify(model, random_masks(model))
    batch = token_batch(1, ragged=True)
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_all_quantised_layers_are_computed_so_masked_or_not(model):
    masks = {name: mask for name, mask in random_masks(model).items() if "q_proj" in name}
    sparsify(model, masks)
    assert all(isinstance(module.forward, FrozenForward) for _, module in quantized_linears(model))
    assert not any("forward" in module.__dict__ for module in model.modules() if type(module) is nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_nobody_holds_any_more_is_freed(kind, loaded):
    def use():
        model = copy.deepcopy(loaded[kind])
        train(model, SparseAdamW(sparsify(model, random_masks(model))))
        return weakref.ref(model)

    made = use()
    gc.collect()
    assert made() is None


def test_nothing_dense_is_kept_for_backward(model):
    sparsify(model, random_masks(model))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    name, module = next(quantized_linears(model))
    x = torch.randn(3, module.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert {tuple(tensor.shape) for tensor in kept} <= {(3, module.in_features)}, f"{name} keeps more than its input"
    kept.clear()
    for weight in sparse_weights(model):
        weight.values.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert not [tensor for tensor in kept if tensor.shape == module.weight.shape]


def test_gradients_of_input_and_values_against_a_dense_layer(model):
    name, module = next(quantized_linears(model))
    sparsify(model, Masks({f"{name}.weight": random_masks(model)[f"{name}.weight"]}))
    (sparse,) = sparse_weights(model)
    with torch.no_grad():
        sparse.values.normal_()
    dense = frozen_weight(module).dense(torch.float32).requires_grad_()
    x = torch.randn(2, 5, module.in_features, requires_grad=True)
    y, direction = x.detach().clone().requires_grad_(), torch.randn(2, 5, module.out_features)
    (module(x) * direction).sum().backward()
    (nn.functional.linear(y, dense) * direction).sum().backward()
    assert_close(x.grad, y.grad, atol=1e-5)
    assert_close(sparse.values.grad, dense.grad.view(-1)[sparse.mask.indices], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_count_exactly_at_the_masked_entries(kind, loaded):
    model = copy.deepcopy(loaded[kind])
    before = effective(model)
    masks = random_masks(model)
    sparsify(model, masks)
    with torch.no_grad():
        for weight in sparse_weights(model):
            weight.values.add_(1.25)
    for name, dense in effective(model).items():
        inside = masks[name].indices.long()
        expected = before[name].view(-1).clone()
        expected[inside] += 1.25
        assert torch.equal(dense.view(-1), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
def test_a_quantised_model_of_any_architecture_is_its_dequantised_twin(architecture, tmp_path):
    sizes = dict(n_embd=128, hidden_size=128) if architecture == "gpt2" else {}
    folder = save_original(tmp_path / architecture, architecture, **sizes)
    for kind in ("int8", "nf4"):
        model = load_quantized(folder, kind)
        twin = dequantized_twin(model)
        values = sparsify(model, random_masks(model))
        batch = token_batch(2)
        output = model(**batch)
        assert_close(output.logits, twin(**batch).logits, atol=1e-5)
        output.loss.backward()
        assert all(value.grad is not None for value in values)


def test_bias_can_be_trained_too(tmp_path):
    model = load_quantized(save_original(tmp_path / "qwen2", "qwen2"), "nf4")
    masks = random_masks(model, ["q_proj", "q_proj.bias"], density=0.5)
    reference = Reference(dequantized_twin(model), masks, lr=1e-2)
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    for seed in range(3):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(reference.model, seed).backward()
        reference.step()
    for weight in sparse_weights(model):
        assert_close(weight.values.detach(), reference.parameters[weight.name][reference.dense[weight.name]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compute_dtype_follows_bitsandbytes(kind, original):
    model = load_quantized(original, kind, torch.bfloat16, **({} if kind == "int8" else {"compute": torch.bfloat16}))
    sparsify(model, random_masks(model))
    name, module = next(quantized_linears(model))
    seen = []
    handle = frozen_weight(module)
    dense = type(handle).dense

    def watched(self, dtype):
        seen.append(dtype)
        return dense(self, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(handle), "dense", watched)
        assert module(torch.randn(2, module.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert module(torch.randn(2, module.in_features)).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert module(torch.randn(2, module.in_features)).dtype == torch.float32
    by_input = [torch.bfloat16, torch.float32, torch.bfloat16]
    assert seen == (by_input if kind == "int8" else [torch.bfloat16] * 3)


# ---------------------------------------------------------------------------------------------------------------------
# Selection


@pytest.mark.parametrize("kind", ["nf4", "double"])
def test_every_entry_point_leaves_the_layout_of_evaluation_for_good(kind, tmp_path):
    """Else each read of a weight would unpack a copy of it."""
    # The layout takes rows that are whole numbers of blocks only.
    loaded = load_quantized(save_original(tmp_path / "original", intermediate_size=128), kind)

    def in_evaluation():
        model = copy.deepcopy(loaded).eval()
        with torch.no_grad():
            model(**token_batch())
        layers = [module for _, module in quantized_linears(model)]
        if bnb.functional.has_avx512bf16():
            assert any(is_packed(module) for module in layers)
        return model, layers

    def is_packed(module):
        return getattr(module.weight.quant_state, "packing_format_for_cpu", False)

    # On the way bitsandbytes rounds quantised scales once more, so that the adapter's base has to go it too.
    trained, _ = in_evaluation()
    masks = random_masks(trained)
    sparsify(trained, masks)
    save_adapter(trained, tmp_path / "adapter")
    for enter in (
        lambda model: select_masks(model, salience="magnitude", density=0.1, progress=False),
        lambda model: sparsify(model, Masks(list(masks.items())[:1])),
        lambda model: load_adapter(model, tmp_path / "adapter"),
        lambda model: export_merged(model, tmp_path / "merged"),
    ):
        model, layers = in_evaluation()
        enter(model)
        assert not any(is_packed(module) for module in layers)


def test_a_function_scores_quantised_weights_as_the_measure_it_computes(model, batches):
    for scope in ("local", "global"):
        choose = dict(density=0.03, scope=scope, progress=False)
        own = select_masks(model, batches, salience=lambda w, g: -w * g, **choose)
        assert own == select_masks(model, batches, salience="force", **choose)


@pytest.mark.parametrize("salience", sorted(MEASURES))
def test_masks_are_those_of_the_dequantised_model(model, salience, batches):
    twin = dequantized_twin(model)
    state = stored(model)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    expected = select_masks(twin, batches, salience=salience, density=0.03)
    whole = select_masks(model, batches, salience=salience, density=0.03)
    # fp32 sums in another order can swap neighbours in the ranking; random and magnitude have no sums.
    assert whole.overlap(expected) > (0.99 if MEASURES[salience].statistic != "none" else 0.9999)
    streamed = select_masks(model, batches, salience=salience, density=0.03, memory_budget=2**18)
    assert streamed.overlap(whole) > 0.99
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True)), "selection changed the base"
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    select_masks(model, batches, salience=salience, density=0.03, scope="global")
    # The same holds in training, with overlaid values that equal the quantised weight's own.
    sparsify(model, random_masks(model))
    assert select_masks(model, batches, salience=salience, density=0.03).overlap(whole) > 0.9999


def test_salience_keeps_gradients_of_quantised_weights_in_fp32(model):
    """The dtype of the quantised weight's storage does not matter; products are formed in the input's dtype."""
    targets = find_targets(model)
    with GradientStore(targets, 2**30) as store:
        assert store.memory_bytes == 4 * sum(target.shape.numel() for target in targets.values())


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_agrees_with_the_reference_on_dequantised_weights(model, accumulation):
    state, masks = stored(model), random_masks(model)
    options = dict(lr=3e-3, weight_decay=0.1)
    reference = Reference(dequantized_twin(model), masks, **options)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **options)
    for step in range(4):
        for part in range(accumulation):
            (loss_of(model, 10 * step + part) / accumulation).backward()
            (loss_of(reference.model, 10 * step + part) / accumulation).backward()
        norm = nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert_close(norm, reference.step(clip=1.0))
    for weight in sparse_weights(model):
        inside, expected = reference.dense[weight.name], reference.parameters[weight.name]
        assert_close(weight.values.detach(), expected.detach()[inside], atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = reference.optimizer.state[expected][key]
            assert_close(optimizer.state[weight.values][key], moment[inside], atol=1e-5 * moment.abs().max().item())
    for name, dense in effective(model).items():
        outside = ~reference.dense[name]
        assert torch.equal(dense[outside], reference.start[name][outside])
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True)), "the base changed"


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("change", CHANGES_OF_VALUES)
def test_a_loss_of_former_values_is_refused(model, change, checkpointed):
    """Its gradient was computed with the values at the time of the backward."""
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    sparsify(model, random_masks(model))
    early = loss_of(model)
    change(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="proj changed after this loss was computed.*call backward before that"):
        early.backward()
    loss_of(model).backward()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_loss_may_wait_while_values_stay(model, checkpointed):
    """Evaluation, looks at the values and their states, another loss, and a second backward change nothing."""
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    values = sparsify(model, random_masks(model))
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    expected = [value.grad.clone() for value in values]
    model.zero_grad()
    first = loss_of(model, 0)
    with torch.no_grad():
        loss_of(model, 2)
    second = loss_of(model, 1)
    assert all(value.data.norm() > 0 for value in values) and model.state_dict()
    second.backward(retain_graph=True)
    model.zero_grad()
    first.backward()
    second.backward()
    for value, gradient in zip(values, expected, strict=True):
        assert_close(value.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(model, reentrant):
    values = sparsify(model, random_masks(model))
    model.train()
    loss_of(model).backward()
    expected = [value.grad.clone() for value in values]
    for value in values:
        value.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss_of(model).backward()
    for value, gradient in zip(values, expected, strict=True):
        assert_close(value.grad, gradient, rtol=1e-6)


def test_a_checkpointed_step_multiplies_no_more_than_a_frozen_one_and_each_weight_gradient_once(model, monkeypatch):
    """Nor does recomputation dequantise the last weight of a block, whose product nobody needs again."""
    made = []
    for kind in (Int8Weight, FourBitWeight):
        dense = kind.dense
        monkeypatch.setattr(kind, "dense", lambda self, dtype, dense=dense: made.append(self) or dense(self, dtype))
    model.train().requires_grad_(False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    patch_model(model)
    floor, dequantised = product_flops(lambda: loss_of(model).backward()), len(made)
    made.clear()
    masks = random_masks(model)
    sparsify(model, masks)
    ours = product_flops(lambda: loss_of(model).backward())
    tokens = token_batch()["input_ids"].numel()
    assert ours == floor + sum(2 * tokens * mask.shape.numel() for mask in masks.values())
    assert len(made) == dequantised


def test_quantised_layers_do_get_a_weight_gradient(original):
    """In bf16 within 5 % of that of a model whose weights are the dequantised values."""
    for kind in KINDS:
        model = load_quantized(
            original, kind, torch.bfloat16, **({} if kind == "int8" else {"compute": torch.bfloat16})
        )
        masks = random_masks(model)
        twin = dequantized_twin(model).float()
        values = sparsify(model, masks)
        loss_of(model).backward()
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in masks)
        loss_of(twin).backward()
        expected = torch.cat([twin.get_parameter(n).grad.view(-1)[m.indices] for n, m in masks.items()])
        got = torch.cat([value.grad for value in values])
        assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("density, lr, share", [(0.005, 0.1, 0.95), (0.05, 2e-2, 0.8)])
def test_quantised_layers_do_train_and_only_their_masked_entries_move(model, density, lr, share):
    state, before = stored(model), effective(model)
    masks = random_masks(model, density=density)
    optimizer = SparseAdamW(sparsify(model, masks), lr=lr)
    losses = train(model, optimizer, 20, period=4)
    assert losses[-1] < share * losses[0]
    for name, dense in effective(model).items():
        moved = (dense != before[name]).view(-1).nonzero().squeeze(1)
        assert 0 < len(moved) and torch.isin(moved, masks[name].indices.long()).all()
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True))


def test_resume_is_bit_equal(model, tmp_path):
    fresh, masks = copy.deepcopy(model), random_masks(model)
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    train(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(model, optimizer, 3, first=3)
    resumed = SparseAdamW(sparsify(fresh, masks), lr=1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(fresh, resumed, 3, first=3)
    for one, other in zip(sparse_weights(model), sparse_weights(fresh), strict=True):
        assert torch.equal(one.values, other.values)
    assert torch.equal(model(**token_batch()).logits, fresh(**token_batch()).logits)


def test_original_entries_take_the_rounding_off(model, original):
    masks = random_masks(model)
    before = effective(model)
    twin = copy.deepcopy(model)
    sparsify(twin, masks)
    sparsify(model, masks, base=original)
    import transformers as tf

    plain = tf.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for weight, other in zip(sparse_weights(model), sparse_weights(twin), strict=True):
        indices = weight.mask.indices.long()
        assert torch.equal(weight.values, plain.get_parameter(weight.name).view(-1)[indices])
        assert torch.equal(other.values, before[weight.name].view(-1)[indices])
        assert not torch.equal(weight.values, other.values)
        assert torch.equal(effective(model)[weight.name].view(-1)[indices], weight.values)


# ---------------------------------------------------------------------------------------------------------------------
# Masks chosen again during training


def scheduled(model, masks=None, **options):
    """A sparsified model, its optimizer, and masks that are drawn anew after every second step."""
    optimizer = SparseAdamW(sparsify(model, random_masks(model) if masks is None else masks), lr=1e-2)
    options = {"salience": "random", "batches": None, **options}
    return optimizer, MaskSchedule(model, optimizer, interval=2, progress=False, **options)


def values_by_place(model):
    """The exact value of every trained entry, by weight and flat position."""
    return {
        (weight.name, place): value
        for weight in sparse_weights(model)
        for place, value in zip(weight.mask.indices.tolist(), weight.values.tolist(), strict=True)
    }


def test_entries_that_leave_keep_their_exact_value_over_codes_that_never_change(model):
    state, before, masks = stored(model), effective(model), random_masks(model)
    optimizer, schedule = scheduled(model, masks)
    kept, last = {}, values_by_place(model)
    for step in range(8):
        train(model, optimizer, 1, step)
        now = values_by_place(model)
        assert len(now) == masks.count, "the budget is kept at every step"
        kept = {place: value for place, value in {**kept, **last}.items() if place not in now}
        # What left in this step left after its update: the dense view below tells whether it is the trained value.
        weights = effective(model)
        for weight in sparse_weights(model):
            dense = weights[weight.name].view(-1)
            left = [place for name, place in kept if name == weight.name]
            assert set(weight.ever_trained().indices.tolist()) == {*left, *weight.mask.indices.tolist()}
            assert torch.equal(dense[weight.mask.indices.long()], weight.values.detach())
            never = torch.ones(dense.numel(), dtype=torch.bool)
            never[weight.ever_trained().indices.long()] = False
            assert torch.equal(dense[never], before[weight.name].view(-1)[never])
            if (step + 1) % 2:
                assert [kept[weight.name, place] for place in left] == dense[left].tolist()
            for place, value in zip(left, dense[left].tolist(), strict=True):
                kept[weight.name, place] = value
        last = now
    assert schedule.steps == 8 and len(schedule.history) == 4 and len(kept) > masks.count
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True)), "the base changed"
    logits = model(**token_batch()).logits
    desparsify(model)
    assert torch.equal(model(**token_batch()).logits, logits)


def test_masks_chosen_again_are_those_of_the_dequantised_model(model):
    twin, batches = dequantized_twin(model), [token_batch(100 + seed) for seed in range(2)]
    options = dict(density=0.05, progress=False)
    optimizer, schedule = scheduled(
        model, select_masks(model, batches, **options), salience="gradient", batches=batches
    )
    for step in (0, 2):
        train(model, optimizer, 2, step)
        with torch.no_grad():
            for name, dense in effective(model).items():
                twin.get_parameter(name).copy_(dense)
        chosen = Masks({weight.name: weight.mask for weight in sparse_weights(model)})
        assert chosen.overlap(select_masks(twin, batches, **options)) > 0.99
    assert all(event["overlap"] < 1 for event in schedule.history)


def test_memory_summary_counts_entries_that_left(model):
    live_bytes = BytesSince()
    optimizer, _ = scheduled(model)
    train(model, optimizer, 1)
    before, summary = live_bytes(), optimizer.memory_summary()
    train(model, optimizer, 4, first=1)
    now = optimizer.memory_summary()
    entries = sum(len(weight.previously_trained) for weight in sparse_weights(model))
    assert entries > 0 and now["values"] - summary["values"] >= 4 * entries
    assert live_bytes() - before == now["total"] - summary["total"]


@pytest.mark.parametrize("loads", [["optimizer"], ["model", "optimizer"], ["optimizer", "model"]])
def test_masks_chosen_again_resume_bit_equal(model, loads, tmp_path):
    fresh = copy.deepcopy(model)
    optimizer, _ = scheduled(model)
    train(model, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 4, first=5)
    resumed, schedule = scheduled(fresh)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for part in loads:
        if part == "model":
            fresh.load_state_dict(saved["model"], strict=False)
        else:
            resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, 4, first=5)
    assert schedule.steps == 9 and values_by_place(fresh) == values_by_place(model)
    now = effective(model)
    assert all(torch.equal(dense, now[name]) for name, dense in effective(fresh).items())
    assert torch.equal(model(**token_batch()).logits, fresh(**token_batch()).logits)


def test_entries_that_left_unchanged_keep_the_value_of_the_base_when_a_run_resumes(model):
    fresh = copy.deepcopy(model)
    optimizer, _ = scheduled(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 5)
    resumed, _ = scheduled(fresh)
    resumed.load_state_dict(optimizer.state_dict())
    now = effective(model)
    assert any(len(weight.previously_trained) for weight in sparse_weights(model))
    assert all(torch.equal(dense, now[name]) for name, dense in effective(fresh).items())


# ---------------------------------------------------------------------------------------------------------------------
# Undo, copy, keep


def test_desparsify_keeps_the_trained_function_and_frees_untouched_layers(model):
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    masks = Masks({name: mask for name, mask in random_masks(model).items() if "layers.0" in name})
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    train(model, optimizer, 3)
    logits = model(**token_batch()).logits
    desparsify(model)
    assert not sparse_weights(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    for name, module in quantized_linears(model):
        assert ("forward" in module.__dict__) == ("layers.0" in name)
    for _, module in quantized_linears(model):  # bitsandbytes' own product is another one
        if "forward" not in module.__dict__:
            FrozenForward(module)
    assert torch.equal(model(**token_batch()).logits, logits)
    again = sparsify(model, random_masks(model, seed=5))
    assert torch.equal(model(**token_batch()).logits, logits)
    train(model, SparseAdamW(again, lr=1e-2), 2)
    desparsify(model)
    assert all(len(frozen_weight(module).overlays) <= 1 for _, module in quantized_linears(model))


def test_a_model_without_trained_entries_is_given_back_whole(model):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    sparsify(model, random_masks(model))
    assert not model.is_quantized
    model(**token_batch())
    desparsify(model)
    assert model.is_quantized and model.save_pretrained.__func__ is type(model).save_pretrained
    for name, module in model.named_modules():
        assert before[name].keys() == module.__dict__.keys(), name
        assert not module._state_dict_hooks and len(module._forward_pre_hooks) == 0


def test_copies_and_pickles_train_on_their_own(model):
    optimizer = SparseAdamW(sparsify(model, random_masks(model)), lr=1e-2)
    train(model, optimizer, 2)
    logits = model(**token_batch()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert torch.equal(twin(**token_batch()).logits, logits)
        values = [weight.values for weight in sparse_weights(twin)]
        train(twin, SparseAdamW(values, lr=1e-2), 2)
        assert not torch.equal(twin(**token_batch()).logits, logits)
        assert torch.equal(model(**token_batch()).logits, logits)


def test_state_dict_carries_the_trained_entries(model):
    fresh, masks = copy.deepcopy(model), random_masks(model)
    plain = set(model.state_dict())
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    train(model, optimizer, 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    extra = {key.rpartition(".")[2] for key in state.keys() - plain}
    renamed = {key.replace("SCB", "sealed_SCB") for key in plain}
    assert extra - {"sealed_SCB"} == {"trained_indices", "trained_values"} and renamed <= set(state)
    logits = model(**token_batch()).logits
    with pytest.raises(RuntimeError, match="trained_values"):
        fresh.load_state_dict(state)
    sparsify(fresh, masks)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(**token_batch()).logits, logits)
    for one, other in zip(sparse_weights(model), sparse_weights(fresh), strict=True):
        assert torch.equal(one.values, other.values)


def test_a_loaded_state_is_all_that_was_trained(model):
    """A state of a run with another mask, or of the base, resets what this model trained to the quantised weight."""
    base, other = copy.deepcopy(model), copy.deepcopy(model)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    for run, seed in ((model, 0), (other, 1)):
        train(run, SparseAdamW(sparsify(run, random_masks(run, seed=seed)), lr=1e-2), 2)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(dense, effective(model)[name]) for name, dense in effective(other).items())
    model.load_state_dict(start)
    assert all(torch.equal(dense, effective(model)[name]) for name, dense in effective(base).items())


def test_a_state_with_other_scales_is_refused(model, tmp_path):
    if any(isinstance(frozen_weight(module), Int8Weight) for _, module in quantized_linears(model)):
        pytest.skip("bitsandbytes loads the scales of int8 weights itself")
    sparsify(model, random_masks(model))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = next(key for key in state if key.endswith("up_proj.weight.absmax"))
    state[key] = state[key] + 1
    with pytest.raises(RuntimeError, match="up_proj.weight was quantised otherwise than this model's: its absmax"):
        model.load_state_dict(state)


def test_accelerate_resumes_bit_equal(model, tmp_path):
    from accelerate import Accelerator

    runs, masks = [], random_masks(model)
    for resumed in (False, True):
        run = copy.deepcopy(model)
        values = sparsify(run, masks)
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(run, SparseAdamW(values, lr=3e-2))
        if resumed:
            accelerator.load_state(str(tmp_path))
        for step in range(2 if resumed else 0, 4):
            accelerator.backward(loss_of(prepared, seed=step))
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 and not resumed:
                accelerator.save_state(str(tmp_path))
        runs.append(values)
    assert all(map(torch.equal, *runs))


def test_adapter_applies_to_the_base_again(model, loaded, tmp_path):
    fresh, masks = copy.deepcopy(model), random_masks(model)
    optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
    train(model, optimizer, 3)
    logits = model(**token_batch()).logits
    save_adapter(model, tmp_path / "a.safetensors")
    entries = sum(len(mask) for mask in masks.values())
    assert (tmp_path / "a.safetensors").stat().st_size < 9 * entries + 2**15
    untrained = copy.deepcopy(fresh)
    found = load_adapter(fresh, tmp_path / "a.safetensors")
    assert found == masks and fresh.is_quantized
    assert torch.equal(fresh(**token_batch()).logits, logits)
    # Training goes on from there, and a sparsified model follows the adapter.
    sparsify(fresh, found)
    assert torch.equal(fresh(**token_batch()).logits, logits)
    values = sparsify(untrained, masks)
    load_adapter(untrained, tmp_path / "a.safetensors")
    for value, weight in zip(values, sparse_weights(model), strict=True):
        assert torch.equal(value, weight.values)
    assert torch.equal(untrained(**token_batch()).logits, logits)


def test_adapter_of_another_base_is_refused(loaded, tmp_path):
    for kind, other in (("int8", "nf4"), ("nf4", "int8")):
        model, wrong = copy.deepcopy(loaded[kind]), copy.deepcopy(loaded[other])
        sparsify(model, random_masks(model))
        save_adapter(model, tmp_path / f"{kind}.safetensors")
        logits = wrong(**token_batch()).logits
        with pytest.raises(ValueError, match="fingerprint"):
            load_adapter(wrong, tmp_path / f"{kind}.safetensors")
        assert torch.equal(wrong(**token_batch()).logits, logits)


def test_adapter_after_a_second_selection_holds_the_entries_of_both(loaded, tmp_path):
    model, fresh = copy.deepcopy(loaded["nf4"]), copy.deepcopy(loaded["nf4"])
    train(model, SparseAdamW(sparsify(model, random_masks(model)), lr=1e-2), 2)
    desparsify(model)
    train(model, SparseAdamW(sparsify(model, random_masks(model, seed=1)), lr=1e-2), 2)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(**token_batch()).logits, model(**token_batch()).logits)


def test_a_refused_sparsify_replaces_no_forward(loaded):
    model = copy.deepcopy(loaded["int8"])
    name = next(name for name, _ in quantized_linears(model)) + ".weight"
    with pytest.raises(ValueError, match="is for shape"):
        sparsify(model, {name: Mask(torch.tensor([0]), (3, 3))})
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="holds no safetensors"):
        sparsify(model, random_masks(model), base="/nonexistent")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_loading_peaks_at_the_quantised_size_and_one_shard(tmp_path, monkeypatch):
    """Counted: all tensors alive when a weight has just been quantised, for every twelfth of them."""
    folder, shard = tmp_path / "sharded", 300_000
    whole = tiny_model("llama", torch.bfloat16, **{**SIZES, "num_hidden_layers": 12})
    whole.save_pretrained(folder, max_shard_size=shard)
    dense_bytes = sum(parameter.nbytes for parameter in whole.parameters())
    del whole
    assert dense_bytes > 4 * shard
    for kind, parameter in (("int8", bnb.nn.Int8Params), ("nf4", bnb.nn.Params4bit)):
        calls, peaks, live_bytes = [], [], BytesSince()

        def watched(self, device, quantize=parameter._quantize, calls=calls, peaks=peaks, live_bytes=live_bytes):
            result = quantize(self, device)
            calls.append(1)
            if len(calls) % 12 == 5:
                peaks.append(live_bytes())
            return result

        monkeypatch.setattr(parameter, "_quantize", watched)
        model = load_quantized(folder, kind, torch.bfloat16)
        assert len(peaks) == 7 and max(peaks) <= live_bytes() + shard
        del model


# ---------------------------------------------------------------------------------------------------------------------
# Trainers


def rows():
    return [{key: value[0] for key, value in token_batch(seed, batch=1).items()} for seed in range(4)]


def trainer_options(folder, **options):
    return dict(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )


def test_trainer_does_not_refuse_a_quantised_model_without_adapters(model, tmp_path):
    import transformers as tf

    fresh, masks, state = copy.deepcopy(model), random_masks(model), stored(model)

    def trainer(model, **options):
        optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
        arguments = tf.TrainingArguments(**trainer_options(tmp_path, save_steps=10, **options))
        return tf.Trainer(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))

    first = trainer(model, gradient_checkpointing=True)
    first.train()
    log = [entry for entry in first.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and all(entry["grad_norm"] > 0 for entry in log)
    assert all(weight.values.dtype == torch.float32 for weight in sparse_weights(model))
    trainer(fresh).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for one, other in zip(sparse_weights(model), sparse_weights(fresh), strict=True):
        assert torch.equal(one.values, other.values)
    for trained in (model, fresh):
        assert all(torch.equal(a, b) for a, b in zip(stored(trained), state, strict=True))


def test_trainer_resumes_masks_chosen_again_bit_equal(model, tmp_path):
    """Its checkpoints hold the merged weights rounded to bf16: what left the mask comes back from the optimizer's."""
    import transformers as tf

    results = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        trained = copy.deepcopy(model)
        optimizer, schedule = scheduled(trained)
        arguments = tf.TrainingArguments(**{**trainer_options(tmp_path, save_steps=5), "max_steps": 9})
        trainer = tf.Trainer(trained, arguments, train_dataset=rows(), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.steps == 9
        results.append((values_by_place(trained), effective(trained)))
    (values, weights), (resumed_values, resumed_weights) = results
    assert resumed_values == values
    assert all(torch.equal(dense, weights[name]) for name, dense in resumed_weights.items())


def test_the_best_quantised_model_is_loaded_at_the_end(model, tmp_path):
    import transformers as tf

    state = stored(model)
    # Uphill, so that the best model is not the last.
    optimizer = SparseAdamW(sparsify(model, random_masks(model)), lr=1e-2, maximize=True)
    each_step = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    options = {**trainer_options(tmp_path, load_best_model_at_end=True, **each_step), "max_steps": 4}
    datasets = dict(train_dataset=rows(), eval_dataset=rows())
    trainer = tf.Trainer(model, tf.TrainingArguments(**options), **datasets, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and losses[0] < 0.99 * losses[1]
    # The checkpoint is the merged model in bf16.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True))


def test_replicas_of_data_parallel_are_refused(model, monkeypatch):
    """By torch's own `replicate`, which asks for GPUs only where it copies tensors to them."""
    replicating = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        replicating, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [tensors for _ in devices]
    )
    masks = random_masks(model)
    twin = copy.deepcopy(model)
    sparsify(model, masks)
    for trained in (model, copy.deepcopy(model)):
        for replica in nn.parallel.replicate(trained, [0, 1]):
            with pytest.raises(ValueError, match=r"DataParallel.*LlamaForCausalLM.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
                replica(**token_batch())
        trained(**token_batch())
    desparsify(model)
    assert not model._forward_pre_hooks
    # As long as there are overlays, the layers have our forward.
    train(twin, SparseAdamW(sparsify(twin, masks), lr=1e-2), 1)
    desparsify(twin)
    with pytest.raises(ValueError, match="torchrun"):
        nn.parallel.replicate(twin, [0, 1])[0](**token_batch())


def test_sft_trainer_does_not_refuse_a_quantised_model_without_adapters(model, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    values = sparsify(model, random_masks(model))
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    arguments = trl.SFTConfig(**trainer_options(tmp_path, max_length=16, save_strategy="no"))
    options = dict(train_dataset=data, processing_class=tokenizer(), optimizers=(SparseAdamW(values, lr=1e-2), None))
    trainer = trl.SFTTrainer(model, arguments, **options)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(value.dtype == torch.float32 for value in values), "the trainer cast what trains to bf16"


def tokenizer():
    """Words w0 to w60, enough for a trainer that wants a tokenizer."""
    import tokenizers
    import transformers as tf

    words = {f"w{number}": number for number in range(61)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", eos_token="w1", unk_token="w0")


def test_desparsified_flags_return(model):
    """What peft chooses its layers by stays, and Trainer takes the model meanwhile."""
    flags = {name: getattr(model, name, None) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit")}
    sparsify(model, random_masks(model))
    assert not model.is_quantized and {name: getattr(model, name, None) for name in flags} == flags
    desparsify(model)
    assert model.is_quantized and model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_packed_bytes_that_were_cast_as_numbers_are_refused(tmp_path, cast):
    save_original(tmp_path)
    model = load_quantized(tmp_path, "nf4", bnb_4bit_quant_storage=torch.float32)
    sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
    getattr(model.model.layers[0], cast)()
    with pytest.raises(ValueError, match=r"stored in torch.float32 and was cast to torch.*load the base anew"):
        model(**token_batch())
