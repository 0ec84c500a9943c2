"""Selection against one sort over everything, on models whose arithmetic is exact so that ties are really ties."""

import collections
import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import random_masks, restacks, tiny_model, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from speft_optim import Mask, MaskSchedule, SparseAdamW, select_masks, sparsify
from speft_optim.salience.amounts import share_out
from speft_optim.salience.calibration import default_memory_budget
from speft_optim.salience.topk import BestEntries, _kth_best
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.targets import all_targets, find_targets

examples = settings(max_examples=60, deadline=None, database=None)


@examples
@given(
    st.lists(st.sampled_from([-3.0, -1.5, -0.0, 0.0, 1e-40, 1e-3, 2.0, 3e38]), min_size=1, max_size=40),
    st.integers(0, 40),
    st.lists(st.integers(1, 12), min_size=40, max_size=40),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_best_entries_are_those_of_a_stable_sort_in_any_chunks(scores, k, chunks, step, dtype):
    scores, k = torch.tensor(scores, dtype=dtype), min(k, len(scores))
    best, first = BestEntries(k, len(scores), step), 0
    for size in chunks:
        if first < len(scores):
            best.update(scores[first : first + size], first)
        first += size
    expected = scores.argsort(descending=True, stable=True)[:k].sort().values
    assert best.positions.tolist() == expected.tolist()
    assert torch.equal(best.scores, scores[expected])


@pytest.mark.parametrize("entries, dtype", [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_positions_are_as_narrow_as_all_of_them_allow(entries, dtype):
    best = BestEntries(5, entries, 4)
    for first in range(0, 30, 10):
        best.update(torch.arange(10.0) - first, entries - 30 + first)
    assert best.positions.dtype == dtype
    assert best.positions.tolist() == [entries - 30 + place for place in range(5, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_best_of_any_bits(dtype):
    """Random bit patterns: all exponents and signs, and in fp64 scores that differ in the last bits alone."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.iinfo(torch.int32 if dtype == torch.float32 else torch.int64)
    scores = torch.randint(bits.min, bits.max, (3000,), generator=generator, dtype=getattr(torch, bits.dtype))
    scores = scores.view(dtype)
    scores = torch.cat([scores[scores.isfinite()], 1 + torch.finfo(dtype).eps * torch.arange(50).to(dtype)])
    best = scores.sort(descending=True).values
    for k in (1, 7, 1000, 1490, 1500, 2000, len(scores)):
        worst, better, tied = _kth_best(scores, k, 700)
        assert worst == best[k - 1].item()
        assert better == int((scores > worst).sum()) and tied == int((scores == worst).sum())


def allocated_at_most(call):
    """Bytes that a call allocates beyond what is there, at their peak; what operators take inside themselves too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("entries", [2**24, 2**31], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [torch.rand, torch.zeros], ids=["distinct", "tied"])
def test_the_best_are_kept_in_the_bytes_that_are_planned_for(scores, dtype, entries):
    """Sums of bools are taken as int64, so that counting took eight times what it was thought to."""
    k = 2**20
    part = scores(k // 64, dtype=dtype)

    def keep():
        best = BestEntries(k, entries, 2**10)
        for number in range(80):  # after 72 it is full
            best.update(part, number * len(part))
        assert len(best.positions) == len(best.scores) == k

    assert allocated_at_most(keep) <= BestEntries.bytes(k, entries, dtype.itemsize)


@examples
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.data())
def test_a_budget_is_shared_out_by_size_and_used_up(sizes, data):
    sizes = {str(number): size for number, size in enumerate(sizes)}
    budget = data.draw(st.integers(1, sum(sizes.values())))
    shares = share_out(sizes, None, budget)
    assert sum(shares.values()) == budget
    for name, size in sizes.items():
        exact = budget * size / sum(sizes.values())
        assert math.floor(exact) <= shares[name] <= math.ceil(exact) and shares[name] <= size


class Exact(nn.Module):
    """Small whole numbers throughout, so that gradients are exact in any order and scores are full of ties."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).float()

    def forward(self, ids, labels):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return {"loss": (self.head(x) * labels.unsqueeze(-1)).sum()}


def exact_batches(sizes=(4, 3, 1)):
    """Batches of unequal size, the last column of each without weight as padding would be."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        labels = torch.randint(-2, 3, (size, 6), generator=generator).float()
        labels[:, -1] = 0
        batches.append({"ids": torch.randint(0, 9, (size, 6), generator=generator), "labels": labels})
    return batches


def dense_scores(model, names, batches, salience):
    """Mean gradient by plain backward over everything at once, and the formulas of the paper's Table 1."""
    total = sum(model(**batch)["loss"] for batch in batches)
    parameters = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(total, parameters)
    formulas = {
        "magnitude": lambda w, g: w.abs(),
        "gradient": lambda w, g: g.abs(),
        "snip": lambda w, g: (g * w).abs(),
        "force": lambda w, g: -(g * w),
        "taylor_fo": lambda w, g: (g * w) ** 2,
    }
    pairs = zip(names, parameters, gradients, strict=True)
    return {name: formulas[salience](p.detach(), g / len(batches)).flatten() for name, p, g in pairs}


def dense_selection(scores, scope, density):
    """One stable sort per weight, or one over all."""
    groups = [[name] for name in scores] if scope == "local" else [list(scores)]
    kept = {}
    for group in groups:
        flat = torch.cat([scores[name] for name in group])
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[: round(density * flat.numel())]] = True
        parts = chosen.split([scores[name].numel() for name in group])
        kept.update({name: part.nonzero().squeeze(1).tolist() for name, part in zip(group, parts, strict=True)})
    return kept


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("salience", ["magnitude", "gradient", "snip", "force", "taylor_fo"])
@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 1.0])
def test_masks_equal_one_dense_sort_at_any_memory_budget(salience, scope, density):
    model, batches = Exact(), exact_batches()
    names = [name for name, _ in model.named_parameters()]
    expected = dense_selection(dense_scores(model, names, batches, salience), scope, density)
    for memory_budget in (1, 97, 700, None):
        masks = select_masks(
            model,
            batches,
            salience=salience,
            density=density,
            scope=scope,
            targets=lambda name, parameter: True,
            memory_budget=memory_budget,
            progress=False,
        )
        assert {name: mask.indices.tolist() for name, mask in masks.items()} == expected
        assert [mask.shape for mask in masks.values()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("salience", ["gradient", "random", "magnitude"])
def test_budget_is_kept_to_the_entry(salience, scope):
    model, batches = tiny_model("llama"), [token_batch()]
    total = sum(target.shape.numel() for target in find_targets(model).values())
    for budget in (1, 13, 1000, total):
        masks = select_masks(model, batches, salience=salience, budget=budget, scope=scope, progress=False)
        assert masks.count == budget and len(masks) == 14


def test_a_share_that_rounds_to_nothing_is_an_empty_mask():
    model = nn.ModuleDict({"small": nn.Linear(1, 100), "large": nn.Linear(40, 50)})
    masks = select_masks(
        model, salience="magnitude", density=0.001, targets=["small.bias", "large.weight"], progress=False
    )
    assert {name: len(mask) for name, mask in masks.items()} == {"small.bias": 0, "large.weight": 2}


def test_all_equal_scores_keep_exactly_the_first_k():
    model = nn.ModuleDict({"a": nn.Linear(6, 5, bias=False), "b": nn.Linear(3, 3, bias=False)})
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    for scope, expected in [("local", [list(range(15)), list(range(4))]), ("global", [list(range(20)), []])]:
        masks = select_masks(
            model, salience="magnitude", density=0.5, scope=scope, targets=["a", "b"], memory_budget=64, progress=False
        )
        assert [mask.indices.tolist() for mask in masks.values()] == expected


def test_more_entries_than_quantile_takes():
    """torch.quantile refuses 2^24 values; one MLP weight of a 2B model has more."""
    layer, kept = nn.Linear(5000, 5000, bias=False), 250_000
    masks = select_masks(layer, salience="magnitude", density=0.01, targets=lambda *_: True, progress=False)
    scores = layer.weight.detach().abs().numpy().ravel()
    threshold = -np.partition(-scores, kept - 1)[kept - 1]
    chosen = set(masks["weight"].indices.tolist())
    # Of equals at the threshold numpy's choice is its own.
    assert len(chosen) == kept and set(np.flatnonzero(scores > threshold)) <= chosen
    assert chosen <= set(np.flatnonzero(scores >= threshold))


def test_taylor_selects_as_snip_does():
    model, batches = tiny_model("llama"), [token_batch(seed, ragged=True) for seed in range(3)]
    for scope in ("local", "global"):
        choose = dict(density=0.1, scope=scope, progress=False)
        taylor = select_masks(model, batches, salience="taylor_fo", **choose)
        assert taylor == select_masks(model, batches, salience="snip", **choose)
        assert taylor.overlap(select_masks(model, batches, salience="force", **choose)) < 0.9


def test_random_depends_on_seed_and_name_alone():
    model = tiny_model("llama")
    choose = dict(salience="random", density=0.2, progress=False)
    first = select_masks(model, **choose)
    torch.manual_seed(77)
    for memory_budget in (1, 1000, None):
        assert select_masks(model, memory_budget=memory_budget, **choose) == first
    other = select_masks(model, seed=1, **choose)
    # Two independent draws share a fifth of their entries.
    assert other != first and 0.15 < other.overlap(first) < 0.25
    names = [name for name in first if "down_proj" in name]
    assert first[names[0]] != first[names[1]]
    places = torch.cat([mask.indices / mask.shape.numel() for mask in first.values()])
    assert torch.allclose(places.histc(5, 0, 1) / len(places), torch.tensor(0.2), atol=0.03)
    alone = select_masks(model, targets=["layers.1.mlp.down_proj"], **choose)
    assert alone[names[1]] == first[names[1]]


@pytest.mark.parametrize(
    "kind, targets, expected",
    [
        ("llama", None, 14),
        ("qwen2", None, 14),
        ("gemma2", None, 14),
        ("gpt2", None, 8),
        ("opt", None, 12),
        ("bert", None, 12),
        pytest.param("mixtral", None, 14, marks=restacks),
        ("llama", ["q_proj", "v_proj"], 4),
        ("llama", ("layers.0.mlp.up_proj",), 1),
        ("qwen2", ["q_proj", "q_proj.bias"], 4),
        ("qwen2", ["embed_tokens"], 1),
        ("llama", ["layers.0.self_attn.q_proj.weight"], 1),
        ("llama", lambda name, parameter: parameter.dim() == 1, 5),
        pytest.param("mixtral", ["experts.down_proj"], 2, marks=restacks),
    ],
)
def test_targets_name_weights_in_three_ways(kind, targets, expected):
    model = tiny_model(kind)
    masks = random_masks(model, targets, density=0.1)
    order = [name for name, _ in model.named_parameters()]
    assert len(masks) == expected and list(masks) == sorted(masks, key=order.index)
    if targets is None:
        assert not any(word in name for name in masks for word in ("embed", "head", "norm", "ln_", "bias", "wte"))


BATCH = token_batch()
UNLABELLED = {key: value for key, value in BATCH.items() if key != "labels"}
IGNORED = {**BATCH, "labels": torch.full_like(BATCH["labels"], -100)}


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(), ValueError, "exactly one of density and budget"),
        (dict(density=0.1, budget=5), ValueError, "exactly one of density and budget"),
        (dict(density=0.0), ValueError, r"density=0.0 is outside \(0, 1\]"),
        (dict(density=1.5), ValueError, "density=1.5 is outside"),
        (dict(density=-0.1), ValueError, "density=-0.1 is outside"),
        (dict(density=float("nan")), ValueError, "density=nan is outside"),
        (dict(density="1%"), TypeError, "density='1%' is a str"),
        (dict(density=True), TypeError, "density=True is a bool"),
        (dict(budget=0), ValueError, "budget=0 is outside"),
        (dict(budget=10**9), ValueError, r"budget=1,000,000,000 is outside 1\.\.9,216"),
        (dict(budget=2.5), TypeError, "budget=2.5 is a float"),
        (dict(density=0.1, scope="layer"), ValueError, "scope='layer'.*'local' or 'global'"),
        (dict(density=0.1, salience="wanda"), ValueError, "salience='wanda' is not known.*gradient"),
        (dict(density=0.1, salience=5), TypeError, "salience=5 is a int; pass one of .*gradient.*function"),
        (dict(density=0.1, salience=lambda w: w), TypeError, r"must take a weight's entries and their gradient"),
        (dict(density=0.1, salience=lambda w, g: 3), TypeError, "returned a int for model.*; return a floating"),
        (dict(density=0.1, salience=lambda w, g: w > 0), TypeError, "returned a tensor of torch.bool for model"),
        (
            dict(density=0.1, salience=lambda w, g: w[1:]),
            ValueError,
            r"of shape .*\d+,\) entries of model.*_proj",
        ),
        (dict(density=0.1, salience=lambda w, g: w * math.nan), ValueError, "NaN for .* entries of model.*_proj"),
        (dict(density=0.1, salience=lambda w, g: w * math.inf), ValueError, "scores of model.*_proj.* are not finite"),
        (dict(density=0.1, memory_budget=0), ValueError, "memory_budget=0 must be a whole number of at least 1.*bytes"),
        (dict(density=0.1, memory_budget=1.5), TypeError, "memory_budget=1.5"),
        (dict(density=0.1, targets=["r_proj"]), ValueError, "'r_proj', which no parameter ends with.*model.embed"),
        (dict(density=0.1, targets=["proj"]), ValueError, "'proj', which no parameter ends with"),
        (dict(density=0.1, targets=["q_proj", "q_proj"]), ValueError, "names 'q_proj' twice"),
        (dict(density=0.1, targets=[]), ValueError, "the list of targets is empty"),
        (dict(density=0.1, targets="q_proj"), TypeError, r"pass a list, targets=\['q_proj'\]"),
        (dict(density=0.1, targets=[3]), TypeError, "targets holds 3"),
        (dict(density=0.1, targets=lambda *_: False), ValueError, "predicate was true for no parameter"),
        (dict(density=0.1, batches=None), ValueError, "needs calibration batches"),
        (dict(density=0.1, batches=[]), ValueError, "There are no calibration batches"),
        (dict(density=0.1, batches=BATCH), TypeError, "batches is a dict"),
        (dict(density=0.1, batches=7), TypeError, "batches is a int"),
        (dict(density=0.1, batches=[BATCH, BATCH["input_ids"]]), TypeError, "batch 2 is a Tensor"),
        (dict(density=0.1, batches=[BATCH, UNLABELLED]), ValueError, "batch 2 has no labels.*attention_mask"),
        (dict(density=0.1, batches=[{**BATCH, "labels": None}]), ValueError, "batch 1 has no labels"),
        (dict(density=0.1, batches=[IGNORED] * 8), ValueError, "All labels of all 8 calibration batches are -100"),
        (dict(density=0.1, batches=iter([BATCH]), memory_budget=9999), ValueError, "passes are needed; pass a list"),
        (dict(density=0.1, batches=[{**BATCH, "labels": [[1]]}]), TypeError, "labels of .* 1 are a list; pass tensors"),
        (dict(density=0.1, loss=5), TypeError, "loss=5 is not callable; pass a function"),
        (dict(density=0.1, seed="0"), TypeError, "seed='0' is a str; pass a whole number"),
        (dict(density=0.1, progress=None), TypeError, "progress=None is a NoneType; pass True or False"),
        (dict(density=0.1, targets=lambda name: True), TypeError, "must take a parameter's name and the parameter"),
        (dict(density=0.1, loss=lambda *_: torch.tensor(math.nan)), ValueError, "loss of calibration batch 1 is nan"),
        (dict(density=0.1, loss=lambda m, b: m(**b).loss * math.inf), ValueError, "batch 1 is inf"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(options, error, message):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        select_masks(model, **{"batches": [BATCH], "progress": False, **options})
    assert snapshot(model) == before


@pytest.mark.parametrize("salience", ["gradient", "fisher", "grasp"])
@pytest.mark.parametrize("own", [True, False])
def test_a_batch_whose_only_labels_are_first_ones_is_skipped(salience, own, caplog):
    """A causal model's loss shifts labels by one: it is a mean over none then, and NaN."""
    model, batches = tiny_model("llama"), [token_batch(seed) for seed in range(3)]
    batches[1]["labels"] = torch.where(torch.arange(batches[1]["labels"].shape[1]) == 0, batches[1]["labels"], -100)
    loss = None if own else lambda model, batch: model(**batch).loss
    choose = dict(salience=salience, density=0.1, loss=loss, progress=False)
    masks = select_masks(model, batches, **choose)
    assert masks.overlap(select_masks(model, batches[::2], **choose)) > 0.99
    assert "1 of 3 calibration batches are left out" in caplog.text or salience == "fisher" and not own
    with pytest.raises(ValueError, match="has a label that is in its loss|All labels of all 1 calibration batches"):
        select_masks(model, batches[1:2], **choose)


def test_numbers_of_numpy_are_numbers():
    model = tiny_model("llama")
    choose = dict(salience="random", progress=False)
    masks = select_masks(model, density=0.25, **choose)
    for density in (np.float32(0.25), np.float64(0.25)):
        assert select_masks(model, density=density, seed=np.int64(0), **choose) == masks
    for budget in (np.int32(masks.count), {name: np.int16(len(mask)) for name, mask in masks.items()}):
        assert select_masks(model, budget=budget, memory_budget=np.int64(2**20), **choose) == masks


def test_a_weight_that_no_batch_uses_is_told_of(caplog):
    model = tiny_model("llama")
    model.model.layers.append(nn.Linear(4, 4))
    model.config.num_hidden_layers = 2
    select_masks(model, [token_batch()], density=0.1, progress=False)
    assert "All scores of 1 weights are equal, e.g. of model.layers.2.weight" in caplog.text
    caplog.clear()
    select_masks(model, [token_batch()], density=0.1, scope="global", progress=False)
    select_masks(model, density=0.1, salience="magnitude", progress=False)
    select_masks(model, density=1.0, salience="magnitude", targets=["norm"], progress=False)
    assert not caplog.text


def test_the_second_name_of_a_shared_weight_is_answered_with_the_first():
    with pytest.raises(
        ValueError, match="'lm_head', whose weight is shared and goes by its first name, model.embed_tok"
    ):
        select_masks(tiny_model("qwen2"), salience="random", density=0.1, targets=["lm_head"])


def test_models_without_blocks_or_loss_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no nn.ModuleList of blocks.*targets=\[\.\.\.\]"):
        select_masks(model, salience="magnitude", density=0.1)

    class Silent(Exact):
        def forward(self, ids, labels):
            return {"loss": None}

    with pytest.raises(ValueError, match="Silent returns no loss for its batch; pass loss="):
        select_masks(Silent(), exact_batches(), density=0.1, progress=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("salience", ["magnitude", "snip"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_scores_that_are_not_finite_are_refused_by_name(scope, salience, bad):
    model = Exact()
    with torch.no_grad():
        model.layers[1].weight.view(-1)[:3] = bad

    def loss(model, batch):
        """Finite, so that it is the scores that are found out."""
        return model.layers[1](torch.ones(7)).nan_to_num(0, 0).sum()

    with pytest.raises(ValueError, match=r"3 scores of layers.1.weight are not finite"):
        select_masks(model, exact_batches(), salience=salience, density=0.1, scope=scope, loss=loss, progress=False)


def test_a_batch_whose_labels_are_all_ignored_is_left_out_and_warned_of(caplog):
    good = [token_batch(seed) for seed in range(7)]
    model = tiny_model("llama")
    choose = dict(density=0.1, salience="force", scope="global", progress=False)
    expected = select_masks(model, good, **choose)
    with caplog.at_level(logging.WARNING):
        # Several passes, one warning. Counted in the average it would only shrink all scores by one factor, so the
        # scores themselves are looked at too.
        actual = select_masks(model, [good[0], IGNORED, *good[1:]], memory_budget=20_000, **choose)
    assert actual == expected
    assert [record.message for record in caplog.records] == [
        "1 of 8 calibration batches are left out: no label of theirs is in the loss."
    ]
    seen = []
    for batches in (good, [good[0], IGNORED, *good[1:]]):
        with recorded_scores(seen):
            select_masks(model, batches, **choose)
    assert torch.equal(seen[0], seen[1])


@contextlib.contextmanager
def recorded_scores(seen):
    """The scores that selection sees, in one tensor per call."""
    chunks = []
    update = BestEntries.update

    def note(self, scores, first):
        chunks.append(scores.clone())
        update(self, scores, first)

    BestEntries.update = note
    try:
        yield
    finally:
        BestEntries.update = update
        seen.append(torch.cat(chunks))


def test_a_generator_serves_one_pass_and_a_loader_any_number():
    model, batches = Exact(), exact_batches((4, 4))
    choose = dict(density=0.1, progress=False)
    expected = select_masks(model, batches, **choose)
    assert select_masks(model, iter(batches), **choose) == expected
    rows = [{key: value[row] for key, value in batch.items()} for batch in batches for row in range(4)]
    assert select_masks(model, DataLoader(rows, batch_size=4), memory_budget=100, **choose) == expected


def test_the_loss_that_a_user_passes_is_the_one_scored():
    model, batches = tiny_model("llama"), [token_batch()]
    choose = dict(density=0.1, progress=False)
    plain = select_masks(model, batches, **choose)
    assert select_masks(model, batches, loss=lambda m, b: 3 * m(**b).loss, **choose) == plain
    assert select_masks(model, batches, loss=lambda m, b: m(**b).logits.sum(), **choose) != plain


def snapshot(model):
    """All that selection must leave alone, comparable."""
    parameters = {
        name: (id(p), p._version, p.requires_grad, None if p.grad is None else p.grad.tolist(), p.detach().tolist())
        for name, p in model.named_parameters()
    }
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        path: (module.training, sorted(module.__dict__), [list(getattr(module, kind)) for kind in kinds])
        for path, module in model.named_modules()
    }
    hooks = [list(p._post_accumulate_grad_hooks or []) for p in model.parameters()]
    return parameters, modules, hooks, model.config.to_dict(), torch.get_rng_state().tolist(), torch.is_grad_enabled()


def test_compact_values_are_not_among_the_weights_to_select():
    model = tiny_model("llama")
    plain = {name: target.sites for name, target in all_targets(model).items()}
    sparsify(model, select_masks(model, salience="magnitude", density=0.1, progress=False))
    assert any(name.endswith("sparse_weight.values") for name, _ in model.named_parameters())
    assert {name: target.sites for name, target in all_targets(model).items()} == plain
    seen = []
    find_targets(model, lambda name, parameter: bool(seen.append(name)) or "norm" in name)
    assert seen == list(plain)
    with pytest.raises(ValueError, match="targets names 'values', which no parameter ends with"):
        find_targets(model, ["values"])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("salience", ["gradient", "fisher", "grasp", "synflow", "activation", "random"])
def test_the_model_is_exactly_as_before_also_after_an_error(salience, failing):
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    model.gradient_checkpointing_enable()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(24)
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    batches = [token_batch(seed) for seed in range(2)]
    calls = []

    def fail(module, args):
        calls.append(torch.rand(1))
        if failing and len(calls) > (0 if salience == "synflow" else 1):
            raise RuntimeError("stop")

    blocker = model.model.layers[1].register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop") if failing and salience != "random" else contextlib.nullcontext():
        select_masks(model, batches, salience=salience, density=0.1, progress=False)
    assert snapshot(model) == before
    blocker.remove(), handle.remove()


@pytest.mark.parametrize("order", [["gradient", "no_grad"], ["no_grad", "gradient"]])
def test_selection_works_inside_no_grad(order):
    model, batches = Exact(), exact_batches()
    found = []
    for name in order:
        with torch.no_grad() if name == "no_grad" else contextlib.nullcontext():
            found.append(select_masks(model, batches, density=0.1, progress=False))
    assert found[0] == found[1]


def test_a_sparsified_model_can_be_selected_on_again():
    """Dynamic masks: the estimate is that of the plain model, and the compact values are left alone."""
    model, batches = tiny_model("llama"), [token_batch(seed) for seed in range(2)]
    choose = dict(density=0.05, scope="global", progress=False)
    masks = select_masks(model, batches, **choose)
    values = sparsify(model, masks)
    kept = [value.detach().clone() for value in values]
    before = snapshot(model)
    assert select_masks(model, batches, **choose) == masks
    assert snapshot(model) == before
    assert all(torch.equal(value, old) for value, old in zip(values, kept, strict=True))
    assert all(value.requires_grad and value.grad is None for value in values) and len(sparse_weights(model)) > 0
    with pytest.raises(ValueError, match="outside"):
        select_masks(model, batches, budget=10**9)


def test_a_loss_that_is_no_scalar_tensor_is_refused():
    model, batch = tiny_model(), [token_batch()]
    with pytest.raises(ValueError, match="has shape"):
        select_masks(model, batch, density=0.1, loss=lambda model, batch: model(**batch).logits.sum(-1), progress=False)
    with pytest.raises(TypeError, match="is a float"):
        select_masks(model, batch, density=0.1, loss=lambda model, batch: 1.0, progress=False)


@pytest.mark.parametrize(
    ("fraction", "half"),
    [(1.0, (30 + 20 - 12) // 2), (0.25, (20 - 12) // 2)],
)
def test_the_default_budget_is_half_of_what_this_process_may_use(monkeypatch, fraction, half):
    """Of 80 GiB 30 are free, 20 are the allocator's, 12 of them in use."""
    gib = 2**30
    gpu = dict(memory_allocated=12 * gib, memory_reserved=20 * gib, mem_get_info=(30 * gib, 80 * gib))
    for name, value in dict(gpu, get_per_process_memory_fraction=fraction).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert default_memory_budget(torch.device("cuda")) == half * gib


# --- Batches of any kind, with a loss of one's own ---


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A batch as a frozen dataclass."""

    x: torch.Tensor
    y: torch.Tensor


KINDS_OF_BATCHES = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "list": (lambda x, y: [x, y], lambda batch: batch),
    "nested": (lambda x, y: {"text": {"x": x}, "of": [(y, "names")]}, lambda b: (b["text"]["x"], b["of"][0][0])),
    "dict": (lambda x, y: dict(x=x, y=y, weight=torch.ones(())), lambda batch: (batch["x"], batch["y"])),
    "dataclass": (Pairs, lambda batch: (batch.x, batch.y)),
    "namespace": (lambda x, y: types.SimpleNamespace(x=x, y=y), lambda batch: (batch.x, batch.y)),
    "named tuple": (collections.namedtuple("Named", "x y"), lambda batch: (batch.x, batch.y)),
    "encoding": (lambda x, y: transformers.BatchEncoding(dict(x=x, y=y)), lambda batch: (batch.x, batch.y)),
    "tensor": (lambda x, y: x, lambda batch: (batch, batch)),
}


def cross_entropy(model, x, y):
    return nn.functional.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@pytest.mark.parametrize("salience", ["gradient", "fisher", "activation", "grasp"])
@pytest.mark.parametrize("kind", KINDS_OF_BATCHES)
def test_a_loss_takes_any_kind_of_batch_and_no_labels_are_asked_for(kind, salience, llama):
    make, take = KINDS_OF_BATCHES[kind]
    ids = [token_batch(seed)["input_ids"] for seed in range(3)]
    options = dict(salience=salience, density=0.1, progress=False)
    seen = []

    def loss(model, batch):
        seen.append(type(batch))
        return cross_entropy(model, *take(batch))

    masks = select_masks(llama, [make(x, x) for x in ids], loss=loss, **options)
    assert masks == select_masks(llama, [dict(input_ids=x, labels=x) for x in ids], **options)
    assert set(seen) == {type(make(ids[0], ids[0]))}


def test_the_users_batch_is_left_as_it_was(llama):
    batch = transformers.BatchEncoding(dict(x=token_batch()["input_ids"]))
    before = dict(batch)
    select_masks(llama, [batch], salience="fisher", density=0.1, loss=lambda m, b: cross_entropy(m, b.x, b.x))
    assert all(batch[key] is part for key, part in before.items())


def preference_batch(seed):
    """As collators for preference losses make them: no labels, no input_ids, and the text beside."""
    chosen, rejected = token_batch(seed, ragged=True), token_batch(seed + 50, length=7)
    parts = {
        f"{side}_{key}": batch[key] for side, batch in (("chosen", chosen), ("rejected", rejected)) for key in batch
    }
    parts = {key: part for key, part in parts.items() if not key.endswith("labels")}
    return {**parts, "prompt": ["a", "b", "c"]}


def preference_loss(model, batch):
    def score(side):
        ids, mask = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
        each = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
        return (each.gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]).sum(1)

    assert "labels" not in batch
    return -nn.functional.logsigmoid(0.1 * (score("chosen") - score("rejected"))).mean()


def test_a_preference_loss_selects_by_its_own_gradient(llama):
    pairs = [preference_batch(seed) for seed in range(2)]
    name = "model.layers.1.mlp.up_proj.weight"
    masks = select_masks(llama, pairs, loss=preference_loss, density=0.1, progress=False)
    twin = copy.deepcopy(llama)
    sum(preference_loss(twin, pair) for pair in pairs).backward()
    best = dict(twin.named_parameters())[name].grad.abs().flatten().topk(len(masks[name])).indices
    assert torch.equal(masks[name].indices.long(), best.sort().values)


def test_fisher_takes_single_examples_of_a_preference_batch(llama):
    pairs = [preference_batch(seed) for seed in range(2)]
    name = "model.layers.1.mlp.up_proj.weight"
    masks = select_masks(llama, pairs, loss=preference_loss, salience="fisher", density=0.1, progress=False)
    squares = 0
    for pair in pairs:
        for row in range(3):
            twin = copy.deepcopy(llama)
            preference_loss(twin, {key: part[row : row + 1] for key, part in pair.items()}).backward()
            squares = squares + dict(twin.named_parameters())[name].grad.double().square().flatten()
    best = squares.topk(len(masks[name])).indices
    assert masks[name].overlap(Mask(best, masks[name].shape)) > 0.99


def test_activation_leaves_out_what_each_forward_calls_padding(llama):
    pairs = [preference_batch(seed) for seed in range(2)]
    apart = [
        {key: pair[f"{side}_{key}"] for key in ("input_ids", "attention_mask")}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    options = dict(salience="activation", density=0.1, progress=False)
    assert select_masks(llama, pairs, loss=preference_loss, **options) == select_masks(llama, apart, **options)


def test_a_loss_without_labels_that_is_nan_is_refused(llama):
    with pytest.raises(ValueError, match="loss of calibration batch 1 is nan"):
        select_masks(
            llama,
            [(token_batch()["input_ids"],)],
            density=0.1,
            loss=lambda model, batch: model(input_ids=batch[0]).logits.sum() * torch.nan,
        )


def test_what_the_model_itself_cannot_take_is_refused_with_the_remedy(llama):
    ids = token_batch()["input_ids"]
    with pytest.raises(TypeError, match=r"batch 1 is a tuple; .*loss=function"):
        select_masks(llama, [(ids, ids)], density=0.1)
    with pytest.raises(ValueError, match=r"batch 1 has no labels \(only input_ids\).*loss=function"):
        select_masks(llama, [dict(input_ids=ids)], density=0.1)
    with pytest.raises(ValueError, match="without a tensor.*examples"):
        select_masks(
            llama,
            [["words"]],
            salience="fisher",
            density=0.1,
            loss=lambda model, batch: model(input_ids=ids).logits.square().mean(),
        )


# --- A part of a loader ---


class Counted(torch.utils.data.Dataset):
    """Counts what is read of it."""

    def __init__(self, samples):
        self.samples, self.read = samples, 0

    def __len__(self):
        return len(self.samples["input_ids"])

    def __getitem__(self, item):
        self.read += 1
        return {key: part[item] for key, part in self.samples.items()}


def test_max_batches_reads_so_many_batches_in_each_pass_and_the_same_ones(llama):
    data = Counted(token_batch(batch=40))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    torch.manual_seed(3)
    first = list(itertools.islice(iter(loader), 3))
    data.read = 0
    # A budget for one row at a time takes many passes.
    passes = []
    for budget in (None, 20_000):
        torch.manual_seed(3)
        masks = select_masks(llama, loader, density=0.1, max_batches=3, memory_budget=budget, progress=False)
        assert masks == select_masks(llama, first, density=0.1, progress=False)
        passes.append(data.read / 6)
        data.read = 0
    assert passes[0] == 1 and passes[1] > 3 and passes[1] == int(passes[1])


def test_max_batches_ends_an_endless_stream_and_none_reads_all(llama, batches):
    endless = (batches[i % 4] for i in itertools.count())
    masks = select_masks(llama, endless, density=0.1, max_batches=4, progress=False)
    everything = select_masks(llama, batches, density=0.1, progress=False)
    assert masks == everything == select_masks(llama, batches, density=0.1, max_batches=9, progress=False)
    # Not one batch more than asked for was taken from the stream.
    assert next(endless) is batches[0]


@pytest.mark.parametrize("most, error", [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)])
def test_max_batches_that_is_no_positive_number_is_refused(most, error, llama, batches):
    with pytest.raises(error, match=f"max_batches={most}.*64|whole number"):
        select_masks(llama, batches, density=0.1, max_batches=most)
    optimizer = SparseAdamW(sparsify(llama, select_masks(llama, salience="magnitude", density=0.1)))
    with pytest.raises(error, match=f"max_batches={most}"):
        MaskSchedule(llama, optimizer, batches, max_batches=most)


def test_a_schedule_reads_no_more_than_it_may(llama):
    data = Counted(token_batch(batch=8))
    loader = DataLoader(data, batch_size=1)
    optimizer = SparseAdamW(sparsify(llama, select_masks(llama, salience="magnitude", density=0.1)))
    MaskSchedule(llama, optimizer, loader, max_batches=2, progress=False).reselect()
    assert data.read == 2
