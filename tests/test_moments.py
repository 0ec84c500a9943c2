"""Eight-bit moments, the bytes an optimizer holds, and steps with gradients that are not finite."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from conftest import BytesSince, assert_close, attach, random_masks, tiny_model, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speft_optim import Mask, SparseAdamW, select_masks, sparsify
from speft_optim.kernels.blockwise import BLOCK, code_bounds, dequantize_blockwise, dynamic_codes, quantize_blockwise
from speft_optim.optim.moments import new_moments_, store_moments_, unpack_moments
from speft_optim.optim.state import has_moments
from speft_optim.weights.compact_values import linked

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


# Block-wise codes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("decades", [0, 3, 9])
def test_each_number_gets_the_nearest_code(signed, count, decades):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-decades, 0, count)
    numbers = numbers if signed else numbers.abs()
    codes, scales = quantize_blockwise(numbers, signed)
    assert codes.dtype == torch.uint8 and codes.shape == numbers.shape and scales.shape == (-(-count // BLOCK),)
    book = dynamic_codes(signed, CPU)
    for i in range(count):
        scale = numbers[i // BLOCK * BLOCK : i // BLOCK * BLOCK + BLOCK].abs().max()
        assert scales[i // BLOCK] == scale
        nearest = (numbers[i] / scale - book).abs()
        assert nearest[codes[i].long()] <= nearest.min() * (1 + 1e-6)
    assert torch.equal(
        dequantize_blockwise(codes, scales, signed), book[codes.long()] * scales.repeat_interleave(BLOCK)[:count]
    )


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_come_back_as_zeros_and_roots_beside_large_ones_never_do(signed):
    assert not dequantize_blockwise(*quantize_blockwise(torch.zeros(300), signed), signed).any()
    mixed = torch.zeros(300)
    mixed[7] = 1.0
    read = dequantize_blockwise(*quantize_blockwise(mixed, signed), signed)
    assert read[7] == 1.0 and bool((read[:256] > 0).all()) == (not signed) and read.sum() < 1 + 1e-4


def test_the_code_book_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(dynamic_codes(signed, CPU)[1:], theirs[1:].cpu(), rtol=1e-6, atol=1e-7)


@given(st.integers(1, 600), st.integers(0, 6), st.floats(-20, 20))
@settings(max_examples=40, deadline=None)
def test_moments_survive_packing_to_their_precision(count, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, generator=generator) * 10**magnitude
    second = torch.rand(count, generator=generator) * 10**magnitude
    state = {}
    new_moments_(state, nn.Parameter(torch.zeros(count)), 8)
    assert all(not part.any() for part in unpack_moments(state))
    store_moments_(state, first, second)
    read_first, read_second = unpack_moments(state)
    assert (read_first - first).abs().max() <= 0.02 * first.abs().max()
    assert (read_second - second).abs().max() <= 0.01 * second.max()


# Training with eight bits


def test_eight_bits_reach_the_loss_of_32():
    losses = {}
    for bits in (32, 8):
        model, _, values, optimizer = attach(
            density=0.1, targets=lambda name, parameter: True, lr=5e-3, weight_decay=0.01, state_bits=bits
        )
        data = [token_batch(seed, batch=2) for seed in range(12)]
        for step in range(200):
            loss = model(**data[step % 12]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses[bits] = sum(model(**batch).loss.item() for batch in data) / 12
    start = sum(tiny_model()(**batch).loss.item() for batch in data) / 12
    assert losses[32] < 0.7 * start
    assert losses[8] == pytest.approx(losses[32], rel=0.01)


@pytest.mark.slow
def test_eight_bits_reach_the_loss_of_32_on_a_real_model():
    """Its last two blocks for 100 steps, on what the blocks below make of the text once and for all."""
    from recipes import data, models

    try:
        folder = models.resolve("smollm2", cache=ROOT / "models")
    except ValueError as error:
        pytest.skip(str(error))
    # Not always bf16: without instructions for it a CPU takes ten times as long and more.
    dtype = models.fastest_dtype("cpu")
    whole, tokenizer = models.load(folder, dtype=dtype)
    held_out, learned = (above(whole, texts(data, tokenizer, *some), 28) for some in (("test", 24), ("train", 100)))
    batches = [{key: part[row : row + 1] for key, part in learned.items()} for row in range(100)]
    whole.model.layers, whole.config.use_cache = whole.model.layers[28:], False
    losses = {}
    for bits in (32, 8):
        model = copy.deepcopy(whole)
        with models.products_of(dtype):
            masks = select_masks(model, batches[:8], density=0.02, progress=False)
            optimizer = SparseAdamW(sparsify(model, masks), lr=3e-3, state_bits=bits)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
            losses["start"] = held_out_loss(model, held_out)
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            losses[bits] = held_out_loss(model, held_out)
    assert losses[32] < 0.5 * losses["start"]
    assert losses[8] == pytest.approx(losses[32], rel=0.01)


def texts(data, tokenizer, split, count):
    """A batch of problems, the first 32 tokens of each."""
    from recipes import word_problems

    samples = data.tokenize(tokenizer, word_problems.generate(count, split=split), max_length=200)
    ids = torch.tensor([sample.input_ids[:32] for sample in samples])
    # Labels on all tokens: the answers alone are soon known by heart, and a share of nothing says nothing.
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def above(model, batch, block):
    """The batch as the block of this number sees it."""
    hidden = model.eval().model(batch["input_ids"], output_hidden_states=True, use_cache=False).hidden_states[block]
    model.train()
    return {"inputs_embeds": hidden, "labels": batch["labels"]}


@torch.no_grad()
def held_out_loss(model, batch):
    loss = model.eval()(**batch).loss.item()
    model.train()
    return loss


def test_a_small_gradient_beside_a_large_one_does_not_explode():
    model = nn.Linear(256, 1, bias=False)
    values = sparsify(model, {"weight": Mask(torch.arange(256), model.weight.shape)})
    optimizer = SparseAdamW(values, lr=1e-3, weight_decay=0.0, state_bits=8)
    start = values[0].detach().clone()
    scale = torch.logspace(0, -12, 256)
    for step in range(50):
        values[0].grad = scale * (1e6 if step == 0 else 1.0)
        optimizer.step()
    assert (values[0] - start).abs().max() < 50 * 1.01e-3 * 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_state_resumes_bit_equal_through_safe_loading(tmp_path, dtype):
    results = []
    for resume in (False, True):
        model, _, values, optimizer = attach(dtype=dtype, lr=1e-2, state_bits=8)
        if resume:
            saved = torch.load(tmp_path / "state.pt", weights_only=True)
            optimizer.load_state_dict(saved)
        for step in range(2 * resume, 5):
            if step == 2 and not resume:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            model(**token_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((dict(model.state_dict()), optimizer.state_dict()["state"]))
    (left, left_state), (right, right_state) = results
    assert all(torch.equal(left[name], right[name]) for name in left)
    for key, state in left_state.items():
        for name, part in state.items():
            if isinstance(part, torch.Tensor):
                assert part.dtype == right_state[key][name].dtype and torch.equal(part, right_state[key][name])


def test_damaged_moments_are_refused_and_nothing_changes():
    model, _, values, optimizer = attach(lr=1e-2, state_bits=8)
    model(**token_batch()).loss.backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for damage in (
        lambda state: state.pop("exp_avg_scale"),
        lambda state: state.update(exp_avg_sq_scale=state["exp_avg_sq_scale"][:-1]),
        lambda state: state.update(exp_avg=state["exp_avg"].float()),
    ):
        damaged = copy.deepcopy(saved)
        damage(damaged["state"][1])
        with pytest.raises(ValueError, match="damaged"):
            optimizer.load_state_dict(damaged)
    assert all(
        torch.equal(part, before[1][key])
        for key, part in optimizer.state_dict()["state"][1].items()
        if key not in ("shape", "name")
    )


# Bytes


@pytest.mark.parametrize("bits, limit", [(8, 8.75), (32, 14.75)])
def test_memory_summary_is_what_is_alive(bits, limit):
    """At the density of the demo, in rows as short as those of a model of 135 M weights, which cost the most."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(576, 576, bias=False) for _ in range(3))}).bfloat16()
    masks = random_masks(model, density=0.01)
    for signed in (True, False):
        dynamic_codes(signed, CPU), code_bounds(signed, CPU)
    live_bytes = BytesSince()
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, state_bits=bits)
    for block in model["blocks"]:
        block(torch.randn(2, 576, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    summary = optimizer.memory_summary()
    new = live_bytes()
    steps = 4 * len(values)
    assert new == summary["total"] - summary["positions"] + steps
    assert summary["positions"] == sum(mask.nbytes for mask in masks.values())
    assert summary["total"] == sum(part for kind, part in summary.items() if kind != "total")
    entries = sum(parameter.numel() for parameter in values)
    assert summary["gradients"] == 4 * entries
    assert summary["total"] - summary["gradients"] <= limit * entries
    optimizer.zero_grad()
    assert optimizer.memory_summary()["gradients"] == 0


# Gradients that are not finite


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("bits", [8, 32])
def test_one_bad_gradient_does_not_ruin_the_run(bad, bits, caplog):
    results = []
    for spoiled in (True, False):
        model, _, values, optimizer = attach(dtype=torch.bfloat16, lr=1e-2, state_bits=bits)
        for step in range(8):
            if step == 4 and not spoiled:
                continue
            model(**token_batch(step)).loss.backward()
            if step == 4:
                values[3].grad[0] = bad
                before = copy.deepcopy(optimizer.state_dict()["state"])
            optimizer.step()
            if step == 4:
                after = optimizer.state_dict()["state"]
                parts = [(key, part) for key, state in before.items() for part in state if part != "skipped_steps"]
                for key, part in parts:
                    assert torch.equal(*(torch.as_tensor(state[key][part]) for state in (before, after))), (key, part)
            optimizer.zero_grad()
        results.append((model, optimizer))
    (model, optimizer), (other_model, other) = results
    skipped, clean = model.state_dict(), other_model.state_dict()
    assert optimizer.skipped_steps == 1 and other.skipped_steps == 0
    assert all(torch.equal(skipped[name], clean[name]) for name in clean)
    assert sum("skipped" in record.message for record in caplog.records) == 1
    _, _, _, fresh = attach(dtype=torch.bfloat16)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps == copy.deepcopy(fresh).skipped_steps == 1


def test_a_bad_gradient_can_raise_or_be_ignored():
    for how in ("raise", "ignore"):
        model, _, values, optimizer = attach(lr=1e-2, on_nonfinite=how)
        start = [parameter.detach().clone() for parameter in values]
        model(**token_batch()).loss.backward()
        values[0].grad[0] = float("nan")
        if how == "raise":
            with pytest.raises(FloatingPointError, match="on_nonfinite"):
                optimizer.step()
            assert all(map(torch.equal, start, values)) and not any(map(has_moments, optimizer.state.values()))
        else:
            optimizer.step()
            assert values[0][0].isnan() and values[0][1:].isfinite().all()
        assert optimizer.skipped_steps == 0


def test_large_finite_gradients_are_no_reason_to_skip():
    model, _, values, optimizer = attach(lr=1e-2)
    for parameter in values:
        parameter.grad = torch.full_like(parameter, 1e19)
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_a_bad_gradient_outside_the_mask_is_never_read():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (self.weight * x).sum()

    model = Halves()
    values = sparsify(model, {"weight": Mask(torch.tensor([0, 2]), (4,))})
    optimizer = SparseAdamW(values, lr=1e-2)
    model(torch.tensor([1.0, float("inf"), 1.0, float("nan")])).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 10.0).item() == pytest.approx(2**0.5)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and torch.equal(model.weight[1::2], torch.ones(2)) and model.weight[0] < 1


def test_first_step_names_weights_without_gradient(caplog):
    model, _, values, optimizer = attach(lr=1e-2)
    model(**token_batch()).loss.backward()
    values[2].grad = None
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    named = [record.getMessage() for record in caplog.records if linked(values[2]).name in record.getMessage()]
    assert len(named) == 1


@pytest.mark.parametrize("options", [dict(state_bits=4), dict(state_bits="8"), dict(on_nonfinite="never")])
def test_wrong_options_are_refused(options):
    model, _, values, _ = attach()
    with pytest.raises(ValueError, match=next(iter(options))):
        SparseAdamW(values, **options)


def test_each_group_has_moments_of_its_own_bits():
    model, _, values, _ = attach()
    optimizer = SparseAdamW([{"params": values[:1], "state_bits": 8}, {"params": values[1:]}], lr=1e-2)
    for parameter in values:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[values[0]]["exp_avg"].dtype == torch.uint8
    assert_close(optimizer.state[values[1]]["exp_avg"], torch.full_like(values[1], 0.1))
