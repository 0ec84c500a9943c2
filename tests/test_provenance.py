"""Masks that were selected on other weights than they train: told of once, and of nothing that is in order."""

import copy
import logging

import pytest
import torch
from conftest import every, random_masks, tiny_model, token_batch
from quantized_models import load_quantized, save_original

from speft_optim import Masks, MaskSchedule, SparseAdamW, desparsify, load_adapter, save_adapter, select_masks, sparsify

WARNING = "selected on other weights"


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: sum(WARNING in record.message for record in caplog.records)


def selected(model, **options):
    return select_masks(model, [token_batch()], **{"density": 0.1, "progress": False, **options})


def steps(model, optimizer, count=2):
    for number in range(count):
        model(**token_batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "sparse": lambda values: SparseAdamW(values, lr=1e-2),
    "torch": lambda values: torch.optim.SGD(values, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("when", ["before sparsify", "after sparsify", "after the optimizer"])
def test_weights_that_are_loaded_after_selection_are_told_of_once(when, optimizer, told):
    model, other = tiny_model(), tiny_model(seed=1).state_dict()
    masks = selected(model)
    if when == "before sparsify":
        model.load_state_dict(other)
    values = sparsify(model, masks)
    if when == "after sparsify":
        model.load_state_dict(other)
    made = OPTIMIZERS[optimizer](values)
    if when == "after the optimizer":
        model.load_state_dict(other)
    steps(model, made, 3)
    assert told() == 1


@pytest.mark.parametrize("salience, density", [("gradient", 0.1), ("magnitude", 0.5), ("snip", 1.0)])
def test_a_resume_of_the_same_run_is_in_order(salience, density, told, tmp_path):
    model = tiny_model()
    selected(model, salience=salience, density=density, targets=every).save(tmp_path / "masks.safetensors")
    masks = Masks.load(tmp_path / "masks.safetensors")
    steps(model, SparseAdamW(sparsify(model, masks), lr=1.0), 5)
    checkpoint = copy.deepcopy(model.state_dict())
    fresh = tiny_model()
    values = sparsify(fresh, masks)
    fresh.load_state_dict(checkpoint)
    steps(fresh, SparseAdamW(values, lr=1e-2))
    # And where the model begins with random weights, of which the masks are not.
    fresh = tiny_model(seed=1)
    values = sparsify(fresh, masks)
    fresh.load_state_dict(checkpoint)
    steps(fresh, SparseAdamW(values, lr=1e-2))
    # And where the checkpoint is loaded before.
    fresh = tiny_model()
    fresh.load_state_dict(checkpoint)
    steps(fresh, SparseAdamW(sparsify(fresh, masks), lr=1e-2))
    assert told() == 0


def test_a_resume_of_moving_masks_is_in_order(told):
    model = tiny_model()
    first = selected(model)
    optimizer = SparseAdamW(sparsify(model, first), lr=0.5)
    MaskSchedule(model, optimizer, [token_batch()], interval=1, salience="random", progress=False)
    steps(model, optimizer, 12)
    fresh = tiny_model()
    resumed = SparseAdamW(sparsify(fresh, first), lr=0.5)
    MaskSchedule(fresh, resumed, [token_batch()], interval=1, salience="random", progress=False)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    steps(fresh, resumed)
    assert told() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_after_selection_is_in_order(dtype, told):
    model = tiny_model()
    masks = selected(model, targets=every)
    model.to(dtype)
    values = sparsify(model, masks)
    model.to(torch.bfloat16)
    steps(model, SparseAdamW(values))
    assert told() == 0


@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_masks_of_the_dense_model_fit_its_quantised_form_and_no_other(kind, told, tmp_path):
    folder = save_original(tmp_path / "base")
    dense = type(tiny_model()).from_pretrained(folder, dtype=torch.bfloat16)
    masks = selected(dense)
    model = load_quantized(folder, kind)
    steps(model, SparseAdamW(sparsify(model, masks)))
    assert told() == 0
    other = load_quantized(save_original(tmp_path / "other", seed=1), kind)
    steps(other, SparseAdamW(sparsify(other, masks)))
    assert told() == 1


def test_random_masks_fit_any_weights_and_an_adapter_in_the_mask_changes_nothing(told, tmp_path):
    model = tiny_model()
    masks = random_masks(model, density=0.1)
    assert all(mask.selected_on is None for mask in masks.values())
    sparsify(tiny_model(seed=1), masks)
    masks = selected(model)
    steps(model, SparseAdamW(sparsify(model, masks), lr=1.0), 5)
    save_adapter(model, tmp_path / "adapter.safetensors")
    desparsify(model)
    base = tiny_model()
    # Selected before on the base; the adapter has moved other entries far.
    others = selected(base, salience="magnitude")
    load_adapter(base, tmp_path / "adapter.safetensors")
    steps(base, SparseAdamW(sparsify(base, others)))
    assert told() == 0


def test_what_a_mask_remembers_is_small_and_survives_files_and_dicts(tmp_path):
    masks = selected(tiny_model(), targets=every)
    assert all(len(mask.selected_on) < 128 for mask in masks.values())
    masks.save(tmp_path / "masks.safetensors")
    for same in (Masks.load(tmp_path / "masks.safetensors"), Masks({**masks}), copy.deepcopy(masks)):
        assert same == masks
        assert all(torch.equal(same[name].selected_on, mask.selected_on) for name, mask in masks.items())
