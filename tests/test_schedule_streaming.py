"""Masks selected from the training's own backward passes: equal to a plain computation, whatever runs around them."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from conftest import (
    OPTIONS,
    BytesSince,
    assert_close,
    equal_states,
    masks_of,
    random_masks,
    run_apart,
    skip_before,
    skip_unless_nodes_compile,
    tiny_model,
    token_batch,
    train,
    weights_of,
)
from quantized_models import dequantized_twin, load_quantized, save_original, stored
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speft_optim import (
    Mask,
    Masks,
    MaskSchedule,
    SparseAdamW,
    desparsify,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.distributed import check_equal
from speft_optim.optim.state import has_moments
from speft_optim.salience import streaming
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.sparse_weight import SparseWeight

# The accumulators of the tiny model take 36,864 bytes in one group; a matrix 1,152 to 3,840.
# Roundings of gradients that nearly vanish grow in the steps of Adam, which are of the size of the rate.
DRIFT = dict(atol=1e-4, rtol=1e-4)
BUDGETS = {"one group": 2**20, "a few weights a group": 6_000, "panels": 1_600}
SCORES = {
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (g * w).abs(),
    "force": lambda w, g: -(g * w),
    "taylor_fo": lambda w, g: (g * w).double().square(),
    "fisher": lambda w, g: g,
}


def flatter(w, g):
    """A measure of a user."""
    return g.abs() * w.abs().sqrt()


def attach(model=None, scope="global", budget=2**20, density=0.05, state_bits=32, optimizer_options=None, **options):
    model = tiny_model() if model is None else model
    masks = random_masks(model, density=density, scope=scope)
    values = sparsify(model, masks, keep_empty=True)
    optimizer = SparseAdamW(values, state_bits=state_bits, **{**OPTIONS, **(optimizer_options or {})})
    steps = {} if "batches" in options else {"window": 2, "interval": 1}
    schedule = MaskSchedule(model, optimizer, **{"scope": scope, **steps, "memory_budget": budget, **options})
    return model, optimizer, schedule


class Plain:
    """Dense gradients by autograd, summed over the window; entries by a stable sort; AdamW on dense tensors."""

    def __init__(self, model, schedule, groups, score):
        self.model = copy.deepcopy(model)
        desparsify(self.model)
        self.model.requires_grad_(False)
        self.names = [weight.name for weight in sparse_weights(model)]
        self.weights = {name: self.model.get_parameter(name) for name in self.names}
        self.score, self.scope, self.window, self.groups = score, schedule.scope, schedule.window, groups
        self.squares = schedule.salience == "fisher"
        self.inside = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in self.weights.items()}
        for weight in sparse_weights(model):
            self.inside[weight.name].view(-1)[weight.mask.indices.long()] = True
        self.first, self.second, self.sums = ({n: torch.zeros_like(w) for n, w in self.weights.items()} for _ in "abc")
        self.kept_by = {n: torch.zeros(w.shape, dtype=torch.float64) for n, w in self.weights.items()}
        self.steps = self.turns = self.in_window = 0

    def gradients(self, batch, share=1.0):
        """The dense gradient of each weight, and of one micro-batch added to the group's sums."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        loss = self.model(**batch).loss * share
        found = torch.autograd.grad(loss, list(self.weights.values()))
        for weight in self.weights.values():
            weight.requires_grad_(False)
        for name, gradient in zip(self.names, found, strict=True):
            self.sums[name] += gradient.square() if self.squares else gradient
        return dict(zip(self.names, found, strict=True))

    def step(self, batches, clip=None):
        parts = [self.gradients(batch, 1 / len(batches)) for batch in batches]
        total = {name: sum(part[name] for part in parts) * self.inside[name] for name in self.names}
        if clip is not None:
            norm = torch.stack([gradient.norm() for gradient in total.values()]).norm()
            total = {name: gradient * min(1.0, clip / (norm + 1e-6)) for name, gradient in total.items()}
        self.steps += 1
        for name, gradient in total.items():
            m, v, w = self.first[name], self.second[name], self.weights[name].data
            m.mul_(0.9).add_(gradient, alpha=0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = (v / (1 - 0.999**self.steps)).sqrt() + 1e-8
            new = w * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
            new -= OPTIONS["lr"] * m / (1 - 0.9**self.steps) / root
            w.copy_(torch.where(self.inside[name], new, w))
        self.in_window += 1
        if self.in_window == self.window:
            self.choose()

    def forget(self):
        for total in self.sums.values():
            total.zero_()
        self.in_window = 0

    def choose(self):
        group = self.groups[self.turns % len(self.groups)]
        rows = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in self.weights.items()}
        for name, first, last in group:
            rows[name].view(len(rows[name]), -1)[first:last] = True
        for names in [self.names] if self.scope == "global" else [[name] for name, *_ in group]:
            # Until each other group with a part in it had its turn, a group keeps its number.
            turns = [i for i, g in enumerate(self.groups) for name, *_ in g if name in names]
            is_first_round = any(i >= self.turns and i != self.turns % len(self.groups) for i in turns)
            self._choose_among(names, rows, is_first_round)
        self.turns += 1
        self.forget()

    def _choose_among(self, names, rows, is_first_round):
        flat = {
            "inside": torch.cat([self.inside[name].flatten() for name in names]),
            "new": torch.cat([rows[name].flatten() for name in names]),
            "scores": torch.cat([self.score(self.weights[n], self.sums[n]).double().flatten() for n in names]),
            "kept_by": torch.cat([self.kept_by[name].flatten() for name in names]),
        }
        candidates = flat["new"] if is_first_round else flat["new"] | flat["inside"]
        count = int((flat["inside"] & candidates).sum())
        scores = torch.where(flat["new"], flat["scores"], flat["kept_by"])
        order = torch.where(candidates, scores, -torch.inf).sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(candidates)
        chosen[order[:count]] = True
        chosen |= flat["inside"] & ~candidates
        sizes = [self.weights[name].numel() for name in names]
        for name, inside, score in zip(names, chosen.split(sizes), scores.split(sizes), strict=True):
            inside, score = inside.view_as(self.inside[name]), score.view_as(self.inside[name])
            stays = inside & self.inside[name]
            self.first[name] *= stays
            self.second[name] *= stays
            self.inside[name], self.kept_by[name] = inside, score

    def assert_agrees(self, model, optimizer, schedule):
        assert (schedule.training.turns, schedule.training.steps) == (self.turns, self.in_window)
        for name, mine, dense, places in self._pairs(model, optimizer, schedule):
            expected = dense.view(-1)[places]
            assert_close(mine, expected, atol=1e-5 * float(dense.abs().max()) + 1e-12, rtol=1e-3, msg=name)
        for weight in sparse_weights(model):
            inside = self.inside[weight.name].flatten().nonzero().squeeze(1)
            assert torch.equal(weight.mask.indices.long(), inside), weight.name
            state = optimizer.state[weight.values]
            assert not has_moments(state) or int(state["step"]) == self.steps
        for name, part in model.state_dict().items():
            assert_close(part, self.model.state_dict()[name], atol=2e-5, rtol=1e-4)

    @torch.no_grad()
    def follow(self, model, optimizer, schedule):
        """Go on from the very numbers of the run, since Adam lets roundings grow where gradients nearly vanish."""
        for _, mine, dense, places in self._pairs(model, optimizer, schedule):
            dense.view(-1)[places] = mine.to(dense.dtype)

    def _pairs(self, model, optimizer, schedule):
        """What a run holds, and where the same stands here."""
        for weight in sparse_weights(model):
            name, indices, state = weight.name, weight.mask.indices.long(), optimizer.state[weight.values]
            yield name, weight.values.detach(), self.weights[name].detach(), indices
            if name in schedule.training.scores:
                scores = schedule.training.scores[name]
                # The highest number stands for entries that were not scored yet.
                scores = torch.where(scores < torch.finfo(scores.dtype).max, scores, 0)
                yield f"scores of {name}", scores, self.kept_by[name], indices
            if has_moments(state) and "exp_avg_scale" not in state:
                yield f"first moment of {name}", state["exp_avg"], self.first[name], indices
                yield f"second moment of {name}", state["exp_avg_sq"], self.second[name], indices
        for row_slice in schedule.training.group:
            if row_slice.accumulator is not None:
                name, places = (
                    row_slice.target.name,
                    torch.arange(row_slice.first * row_slice.columns, row_slice.last * row_slice.columns),
                )
                yield f"sums of {name}", row_slice.accumulator.flatten(), self.sums[name], places


def groups_of(schedule):
    """Names and rows of the groups; checked to be all entries, in order, and to fit the budget."""
    training, groups = schedule.training, []
    for group in training.groups:
        groups.append([(row_slice.target.name, row_slice.first, row_slice.last) for row_slice in group])
    entries = [(name, row) for group in groups for name, first, last in group for row in range(first, last)]
    assert entries == [(w.name, row) for w in training.weights for row in range(w.mask.shape[0])]
    return groups


# How weights are cut into panels does not depend on the measure, but for the squares' two accumulators.
CUT = [(salience, budget) for salience in (*SCORES, flatter) for budget in BUDGETS]
CUT = [(salience, budget) for salience, budget in CUT if budget != "panels" or salience in ("snip", "fisher", flatter)]


@pytest.mark.parametrize(("salience", "budget"), CUT)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_equals_plain_sums_of_dense_gradients(salience, scope, budget):
    # The squares need two accumulators.
    bytes_here = BUDGETS[budget] * (2 if salience == "fisher" else 1)
    # A panel has its turn after all others: of two layers it would be twice as many turns of twice the work.
    model = tiny_model(num_hidden_layers=1) if budget == "panels" else tiny_model()
    model, optimizer, schedule = attach(model, salience=salience, scope=scope, budget=bytes_here)
    groups, count = groups_of(schedule), masks_of(model).count
    assert (len(groups) == 1) == (budget == "one group")
    plain = Plain(model, schedule, groups, SCORES.get(salience, flatter))
    turns = 3 if len(groups) == 1 else len(groups) + 4
    lengths = [len(weight.mask) for weight in sparse_weights(model)]
    for step in range(2 * turns + 1):
        train(model, optimizer, 1, first=step, parts=2)
        plain.step([token_batch(2 * step + part) for part in range(2)])
        assert masks_of(model).count == count
        plain.assert_agrees(model, optimizer, schedule)
        plain.follow(model, optimizer, schedule)
    assert schedule.training.turns == turns and len(schedule.history) == turns
    assert [event["step"] for event in schedule.history] == [2 * turn + 2 for turn in range(turns)]
    assert all(event["entries"] == count for event in schedule.history)
    assert min(event["overlap"] for event in schedule.history) < 1
    assert ([len(weight.mask) for weight in sparse_weights(model)] == lengths) == (scope == "local")


# --- What runs around the training ---


def test_clipping_changes_no_score():
    model, optimizer, schedule = attach()
    plain = Plain(model, schedule, groups_of(schedule), SCORES["snip"])
    for step in range(4):
        model(**token_batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        plain.step([token_batch(step)], clip=0.01)
    plain.assert_agrees(model, optimizer, schedule)


def lose(model, optimizer, step, takes_step):
    """A step whose gradients are inf; a loss scaler does not call the optimizer for it."""
    (model(**token_batch(step)).loss * float("inf")).backward()
    if takes_step:
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_a_skipped_step_lets_the_window_begin_anew(salience):
    model, optimizer, schedule = attach(salience=salience, budget=6_000)
    plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])
    for step in range(10):
        if step == 5:
            lose(model, optimizer, step, takes_step=True)
            plain.forget()
        else:
            train(model, optimizer, 1, first=step)
            plain.step([token_batch(step)])
    assert optimizer.skipped_steps == 1 and schedule.steps == 10 and schedule.training.turns == 4
    plain.assert_agrees(model, optimizer, schedule)


@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_a_step_that_a_loss_scaler_skipped_lets_the_window_begin_anew(salience, tmp_path):
    """The optimizer is not called, so that the end of the window finds it out; a checkpoint in between is whole."""
    results = []
    for resume in (False, True):
        model, optimizer, schedule = attach(salience=salience, budget=6_000)
        if not resume:
            train(model, optimizer, 5)
            lose(model, optimizer, 5, takes_step=False)
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
            before = masks_of(model)
        else:
            for part, state in zip((model, optimizer), torch.load(tmp_path / "state.pt"), strict=True):
                part.load_state_dict(state)
        train(model, optimizer, 1, first=6)
        assert (schedule.training.turns, schedule.training.steps) == (2, 0) and masks_of(model) == before
        train(model, optimizer, 2, first=7)
        assert schedule.training.turns == 3 and masks_of(model) != before
        assert all(scores.isfinite().all() for scores in schedule.training.scores.values())
        results.append(weights_of(model))
    assert equal_states(*results)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_gradients_that_lead_to_no_step_choose_no_entries(salience, set_to_none):
    """A window that has only these in it begins at once, any other at its end."""
    model, optimizer, schedule = attach(salience=salience, budget=6_000)
    plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])

    for step in range(8):
        for part in range(2 if step in (2, 5) else 0):
            (model(**token_batch(90 + part)).loss * 1e3).backward()
        optimizer.zero_grad(set_to_none)
        train(model, optimizer, 1, first=step)
        plain.window = 3 if step == 5 else 2
        plain.step([token_batch(step)])
        if step == 5:
            plain.forget()
        assert schedule.training.turns == plain.turns
    assert plain.turns == 3
    plain.assert_agrees(model, optimizer, schedule)


@pytest.mark.parametrize("package", ["accelerate", "lightning.fabric"])
def test_gradients_that_a_wrapped_optimizer_drops_are_seen(package):
    module = pytest.importorskip(package)
    model, optimizer, schedule = attach(scope="local", window=3)
    if package == "accelerate":
        _, wrapper = module.Accelerator(cpu=True).prepare(model, optimizer)
    else:
        _, wrapper = module.Fabric(accelerator="cpu").setup(model, optimizer)
    model(**token_batch(0)).loss.backward()
    assert schedule.bytes_held
    wrapper.zero_grad()
    assert not schedule.bytes_held


@pytest.mark.parametrize("salience", ["snip", "fisher"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_does_not_count_twice(reentrant, salience):
    results = []
    for checkpointed in (False, True):
        model, optimizer, schedule = attach(salience=salience, budget=6_000)
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        train(model, optimizer, 9, parts=2)
        sums = [row_slice.accumulator for row_slice in schedule.training.group]
        results.append((weights_of(model), sums, schedule.training.scores))
    assert schedule.training.turns == 4 and schedule.training.steps == 1
    for left, right in zip(*(result[1] for result in results), strict=True):
        assert_close(left, right, atol=1e-7)
    for left, right in zip(*(result[0].values() for result in results), strict=True):
        assert_close(left, right, **DRIFT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("salience, how", [("snip", "wrapped"), ("fisher", "layers")])
def test_a_compiled_model_is_scored_like_any(salience, how):
    """Also where a graph was made before the weight's turn, in which nothing was added up."""
    skip_unless_nodes_compile()
    torch._dynamo.reset()
    model, optimizer, schedule = attach(tiny_model(num_hidden_layers=1), salience=salience, budget=9_000, window=1)
    assert len(schedule.training.groups) > 1
    plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])
    called = torch.compile(model, backend="aot_eager") if how == "wrapped" else model
    for layer in model.model.layers if how == "layers" else ():
        layer.compile(backend="aot_eager")
    for step in range(3):
        train(called, optimizer, 1, first=step, parts=2)
        plain.step([token_batch(2 * step + part) for part in range(2)])
        plain.assert_agrees(model, optimizer, schedule)
    torch._dynamo.reset()


@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_all_uses_of_a_weight_in_a_micro_batch_make_one_gradient(salience):
    """A tied embedding is a lookup, a product, and here a penalty outside of any module besides."""
    model = tiny_model("qwen2", num_hidden_layers=1)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    masks = random_masks(model, targets=lambda n, p: n in names, density=0.05)
    optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    schedule = MaskSchedule(model, optimizer, salience=salience, window=2, interval=1)
    plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])

    class Penalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **batch):
            out = self.inner(**batch)
            out.loss = out.loss + 1e-2 * (self.inner.model.embed_tokens.weight**3).sum()
            return out

    dense, plain.model = plain.model, Penalised(plain.model)
    for step in range(5):
        train(Penalised(model), optimizer, 1, first=step, parts=2)
        plain.step([token_batch(2 * step + part) for part in range(2)])
    plain.model = dense
    plain.assert_agrees(model, optimizer, schedule)


@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_a_layer_whose_output_is_changed_is_scored_by_its_true_gradient(salience):
    """In the first backward the product and autograd's own gradient differ, and only the latter counts."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: output * 3.0)
    model, optimizer, schedule = attach(model, salience=salience, window=3)
    plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])
    for step in range(4):
        train(model, optimizer, 1, first=step, parts=2)
        plain.step([token_batch(2 * step + part) for part in range(2)])
    plain.assert_agrees(model, optimizer, schedule)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_train_with_sums_in_fp32(dtype, state_bits):
    model, optimizer, schedule = attach(tiny_model(dtype=dtype), budget=6_000, state_bits=state_bits)
    start = weights_of(model)
    train(model, optimizer, 7)
    assert all(row_slice.accumulator.dtype == torch.float32 for row_slice in schedule.training.group)
    assert schedule.training.turns == 3 and schedule.history[-1]["overlap"] < 1
    for weight in sparse_weights(model):
        outside = torch.ones(weight.mask.shape.numel(), dtype=torch.bool)
        outside[weight.ever_trained().indices.long()] = False
        assert torch.equal(weights_of(model)[weight.name].flatten()[outside], start[weight.name].flatten()[outside])


@pytest.mark.parametrize("salience", ["snip", "fisher"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_a_quantised_base_is_scored_as_its_dequantised_weights(tmp_path, kind, salience):
    model = load_quantized(save_original(tmp_path / "base"), kind)
    twin, state = dequantized_twin(model), stored(model)
    model, optimizer, schedule = attach(model, salience=salience, budget=200_000, density=0.02)
    other, other_optimizer, other_schedule = attach(twin, salience=salience, budget=200_000, density=0.02)
    assert len(schedule.training.groups) > 2
    train(model, optimizer, 9)
    train(other, other_optimizer, 9)
    assert schedule.training.turns == 4 and schedule.history == other_schedule.history
    assert masks_of(model) == masks_of(other)
    for left, right in zip(sparse_weights(model), sparse_weights(other), strict=True):
        assert_close(left.values.detach(), right.values.detach(), **DRIFT)
    assert all(torch.equal(a, b) for a, b in zip(stored(model), state, strict=True))


# --- What it holds ---


def test_memory_grows_by_the_accumulators_of_one_group_within_the_budget():
    budget, seen = 6_000, []
    model, optimizer, schedule = attach(budget=budget)
    train(model, optimizer, 1)
    stored_bytes = sum(scores.nbytes for scores in schedule.training.scores.values())
    assert stored_bytes == 4 * masks_of(model).count
    for step in range(1, 30):
        train(model, optimizer, 1, first=step)
        row_slices = [row_slice for group in schedule.training.groups for row_slice in group]
        held = sum(row_slice.accumulator.nbytes for row_slice in row_slices if row_slice.accumulator is not None)
        assert held == schedule.bytes_held - stored_bytes == optimizer.memory_summary()["salience"] - stored_bytes
        seen.append(held)
        assert all(
            weight.accumulator is None or weight.name in schedule.training._sums for weight in sparse_weights(model)
        )
    assert 0.5 * budget < max(seen) <= budget and min(seen) == 0


def note(found, bytes_since, gradient):
    found.append(bytes_since())


@pytest.mark.parametrize("salience", ["snip", "fisher"])
def test_bytes_alive_in_backward_are_those_of_a_static_run_and_the_budget(salience):
    budget, peaks = 12_000, []
    for moving in (False, True):
        model = tiny_model()
        masks = random_masks(model, density=0.05)
        optimizer = SparseAdamW(sparsify(model, masks, verify=False), **OPTIONS)
        if moving:
            MaskSchedule(model, optimizer, salience=salience, window=100, memory_budget=budget)
        train(model, optimizer, 2)
        weight, found = model.model.embed_tokens.weight, []
        bytes_since = BytesSince()
        # Its gradient is the last one in backward.
        weight.requires_grad_(True).register_hook(functools.partial(note, found, bytes_since))
        train(model, optimizer, 1, first=2)
        held = optimizer.memory_summary()["salience"]
        peaks.append(found[0])
        assert held <= budget and (held > 0.5 * budget) == moving
    # The accumulators were there before the step began, and nothing came in it.
    assert peaks[0] == peaks[1]


def test_gradients_of_replicas_on_other_devices_are_refused():
    model, optimizer, schedule = attach()
    (weight, *_) = sparse_weights(model)
    with pytest.raises(ValueError, match="is on meta, but the weight is on cpu. The replicas of nn.DataParallel"):
        weight.accumulator.from_dense(weight.weight.to("meta"))


def test_weights_that_join_share_the_step_count_of_the_others():
    """In global scope a mask may grow from nothing, and newcomers start from zero moments."""
    model = tiny_model()
    masks = random_masks(model, density=0.05, scope="global")
    names = list(masks)
    masks.update({name: type(masks[name])(torch.empty(0, dtype=torch.int64), masks[name].shape) for name in names[3:]})
    optimizer = SparseAdamW(sparsify(model, masks, keep_empty=True), **OPTIONS)
    MaskSchedule(model, optimizer, scope="global", window=2, interval=1)
    count = masks.count
    empty = [weight for weight in sparse_weights(model) if not len(weight.mask)]
    assert len(empty) == 11
    # As those of an expert that no token came to.
    for weight in empty:
        weight.values.grad = None
    for step in range(2):
        model(**token_batch(step)).loss.backward()
        for weight in empty[:5]:
            weight.values.grad = None
        optimizer.step()
        optimizer.zero_grad()
    joined = [weight for weight in empty if len(weight.mask)]
    assert joined and masks_of(model).count == count
    for weight in joined:
        state = optimizer.state[weight.values]
        assert int(state["step"]) == 2 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        assert len(state["exp_avg"]) == len(weight.mask)
    train(model, optimizer, 1, first=2)
    assert all(int(optimizer.state[weight.values]["step"]) == 3 for weight in joined)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_density_that_changes_is_kept(scope, budget):
    model, optimizer, schedule = attach(scope=scope, budget=BUDGETS[budget], density=0.05, window=1)
    schedule.density = lambda step: 0.05 + 0.002 * min(step, 5)
    sizes = {weight.name: weight.mask.shape.numel() for weight in sparse_weights(model)}
    turns = 6 + 2 * len(schedule.training.groups)
    for step in range(turns):
        train(model, optimizer, 1, first=step)
        if scope == "global":
            assert masks_of(model).count == round((0.05 + 0.002 * min(step + 1, 5)) * sum(sizes.values()))
    if scope == "local":
        assert all(len(weight.mask) == round(0.06 * sizes[weight.name]) for weight in sparse_weights(model))
    schedule.density = lambda step: 0.01
    for step in range(turns, 2 * turns):
        train(model, optimizer, 1, first=step)
    assert abs(masks_of(model).count - 0.01 * sum(sizes.values())) < 8


@pytest.mark.parametrize("scope, budget", [("global", 6_000), ("global", 1_600), ("local", 1_600)])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_scores_belong_to_the_masks_after_a_turn_that_failed(scope, budget, failing, monkeypatch):
    """Entries were judged by scores of others, or the state that was saved could not be loaded."""
    model, optimizer, schedule = attach(scope=scope, budget=budget)
    groups, total = len(schedule.training.groups), masks_of(model).count
    train(model, optimizer, 2 * groups)
    change_mask, calls = SparseWeight.change_mask, itertools.count(1)

    def change(*args):
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no room")
        return change_mask(*args)

    with monkeypatch.context() as patch:
        patch.setattr(SparseWeight, "change_mask", change)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, optimizer, 2 * groups, first=2 * groups)
    stored = schedule.training.scores
    assert stored and all(len(stored[w.name]) == len(w.mask) for w in sparse_weights(model) if w.name in stored)
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4 * groups, first=4 * groups)
    assert masks_of(model).count == total


def test_moments_belong_to_the_masks_after_a_state_that_failed_to_load(monkeypatch):
    model, optimizer, _ = attach(budget=6_000)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6)
    change_mask, calls = SparseWeight.change_mask, itertools.count(1)

    def change(*args):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return change_mask(*args)

    with monkeypatch.context() as patch:
        patch.setattr(SparseWeight, "change_mask", change)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_of_no_size_has_a_turn_like_any(caplog):
    empty = nn.utils.skip_init(nn.Linear, 0, 4, bias=False)
    model = nn.ModuleDict({"some": nn.Linear(4, 4, bias=False), "none": empty})
    masks = {"some.weight": Mask(torch.tensor([1, 5]), (4, 4)), "none.weight": Mask(torch.tensor([]).long(), (4, 0))}
    optimizer = SparseAdamW(sparsify(model, Masks(masks), keep_empty=True), lr=0.1)
    MaskSchedule(model, optimizer, window=1, interval=1, scope="global")
    for _ in range(4):
        (model["some"](torch.randn(3, 4)).square().sum() + model["none"](torch.randn(3, 0)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name: len(mask) for name, mask in masks_of(model).items()} == {"some.weight": 2, "none.weight": 0}
    assert "got no gradient" not in caplog.text


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_weight_without_a_gradient_keeps_its_mask(scope, budget, caplog):
    model, optimizer, schedule = attach(scope=scope, budget=budget)
    rested = sparse_weights(model)[3]
    rested.values.requires_grad_(False)
    before = masks_of(model)
    train(model, optimizer, 4 * len(schedule.training.groups))
    after = masks_of(model)
    assert [name for name in before if before[name] == after[name]] == [rested.name]
    assert before.count == after.count
    assert caplog.text.count("got no gradient in 2 steps") == 1


def test_entries_that_leave_keep_their_value_and_an_adapter_holds_all_that_moved(tmp_path, caplog):
    model, optimizer, schedule = attach(budget=6_000)
    base = weights_of(model)
    train(model, optimizer, 20)
    now, count = weights_of(model), masks_of(model).count
    ever = Masks({weight.name: weight.ever_trained() for weight in sparse_weights(model)})
    assert ever.count > 1.5 * count
    for name, mask in ever.items():
        outside = torch.ones(mask.shape.numel(), dtype=torch.bool)
        outside[mask.indices.long()] = False
        assert torch.equal(now[name].flatten()[outside], base[name].flatten()[outside])
    with caplog.at_level("INFO"):
        save_adapter(model, tmp_path / "adapter")
    assert f"{ever.count:,} entries" in caplog.text and f"{count:,}" in caplog.text
    fresh = tiny_model()
    load_adapter(fresh, tmp_path / "adapter")
    assert equal_states(now, weights_of(fresh))


# --- Rounds of at least an interval ---


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_turn_waits_until_the_rounds_are_long_enough_and_sums_in_its_last_steps(scope):
    """As a schedule without waiting that begins when the window does; nothing is held before."""
    model, optimizer, schedule = attach(scope=scope, window=2, interval=7)
    assert len(schedule.training.groups) == 1 and schedule.training.period == 7
    start, held = masks_of(model), []
    for step in range(7):
        held.append(sum(row_slice.accumulator is not None for row_slice in schedule.training.group))
        assert masks_of(model) == start and not schedule.history
        if step == 5:
            twin, twins = copy.deepcopy((model, optimizer))
        train(model, optimizer, 1, first=step)
    assert held == [0] * 6 + [14] and [event["step"] for event in schedule.history] == [7]
    train(twin, twins, 2, first=5)
    assert masks_of(twin) == masks_of(model) != start
    train(model, optimizer, 7, first=7)
    assert [event["step"] for event in schedule.history] == [7, 14]


def test_the_groups_of_weights_share_the_steps_between_two_selections():
    *_, schedule = attach(budget=6_000, window=2, interval=50)
    groups = len(schedule.training.groups)
    assert groups > 2 and schedule.training.period == -(-50 // groups)
    *_, schedule = attach(budget=6_000, window=40, interval=50)
    assert schedule.training.period == 40


@pytest.mark.parametrize("steps", [3, 5, 6])
def test_resume_before_and_in_the_window_of_a_long_turn_is_bit_equal(steps):
    results, saved = [], None
    for resume in (False, True):
        model, optimizer, schedule = attach(window=2, interval=7)
        if resume:
            for part, state in zip((model, optimizer), saved, strict=True):
                part.load_state_dict(state)
        else:
            train(model, optimizer, steps)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, 9, first=steps)
        results.append((weights_of(model), optimizer.state_dict(), schedule.history))
    assert equal_states(*results) and len(results[0][2]) >= 1


def test_a_skipped_step_while_a_turn_waits_changes_nothing():
    model, optimizer, schedule = attach(window=2, interval=7)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["params"][0].grad = torch.full_like(optimizer.param_groups[0]["params"][0], torch.nan)
    optimizer.step()
    optimizer.zero_grad()
    assert schedule.training.steps == 2
    train(model, optimizer, 5, first=2)
    assert [event["step"] for event in schedule.history] == [8]


# --- Resume ---


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("salience, state_bits", [("snip", 32), ("fisher", 8), ("taylor_fo", 32)])
def test_resume_in_the_middle_of_a_window_is_bit_equal(tmp_path, salience, state_bits, scope, budget):
    options = dict(salience=salience, scope=scope, budget=BUDGETS[budget], window=3, state_bits=state_bits)
    results = []
    for resume in (False, True):
        model, optimizer, schedule = attach(**options)
        if resume:
            for part, state in zip(
                (model, optimizer), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
            ):
                part.load_state_dict(state)
            assert (schedule.training.turns, schedule.training.steps) == (3, 2)
        else:
            train(model, optimizer, 11)
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
        train(model, optimizer, 20, first=11)
        previous = [weight.previously_trained for weight in sparse_weights(model)]
        results.append((weights_of(model), optimizer.state_dict(), schedule.history, previous))
    assert equal_states(results[0][:3], results[1][:3]) and results[0][3] == results[1][3]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("option", ["flatten_optimizer_state_dict", "full_state_dict", "cpu_offload"])
def test_resume_through_distributed_checkpoints_is_bit_equal(tmp_path, option):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options, results = StateDictOptions(**{option: True}), []
    for resume in (False, True):
        model, optimizer, schedule = attach(scope="local", budget=1_600)
        if not resume:
            train(model, optimizer, 5)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        if resume:
            checkpoint.load(parts, checkpoint_id=tmp_path / "sharded")
            loaded = dict(model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
            set_state_dict(model, optimizer, **loaded, options=options)
        else:
            checkpoint.save(parts, checkpoint_id=tmp_path / "sharded")
        train(model, optimizer, 4, first=5)
        results.append((weights_of(model), optimizer.state_dict(), schedule.history))
    assert equal_states(*results) and len(results[1][2]) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_copied_run_goes_on_and_a_copied_model_alone_sums_nothing(copied, order):
    model, optimizer, schedule = attach(budget=6_000, window=3)
    train(model, optimizer, 4)
    alone = copy.deepcopy(model)
    assert all(weight.accumulator is None for weight in sparse_weights(alone))
    other, others = copied((model, optimizer)[order])[order]
    for pair in ((model, optimizer), (other, others)):
        train(*pair, 6, first=4)
    assert others.schedule.history == schedule.history and others.schedule.training.turns == 3
    assert masks_of(other) == masks_of(model)
    assert equal_states(weights_of(model), weights_of(other))


@skip_before("transformers", "5", "resumes within an epoch with other batches, dense models too")
def test_trainer_resumes_with_nothing_added(tmp_path):
    from test_scripts import Samples, halving, trainer_arguments
    from transformers import Trainer

    results = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        model, optimizer, schedule = attach(budget=6_000)
        arguments = trainer_arguments(
            tmp_path, max_steps=9, gradient_accumulation_steps=2, save_strategy="steps", save_steps=5
        )
        trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, halving(optimizer)))
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.steps == 9 and schedule.training.turns == 4
        results.append(weights_of(model))
    assert equal_states(*results)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(window=3), "a window of 3 in 3 steps; build MaskSchedule with the saved run's window"),
        (dict(interval=60), r"a window of 2 in \d+ steps; build MaskSchedule with the saved run's window, interval"),
        (dict(budget=1_600), "build MaskSchedule with the saved run's window, interval, salience and memory_budget"),
        (dict(scope="local"), "schedule_scores of .* build MaskSchedule with the saved run's options"),
        (dict(salience="taylor_fo"), "schedule_scores of .* not of torch.float64"),
        (dict(batches=[token_batch()], window=None, budget=None), "had no batches; build this one without them too"),
    ],
)
def test_a_state_of_another_schedule_is_refused(options, match):
    model, optimizer, _ = attach(budget=6_000)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    other, other_optimizer, _ = attach(**{"budget": 6_000, **options})
    before = weights_of(other)
    with pytest.raises(ValueError, match=match):
        other_optimizer.load_state_dict(saved)
    assert equal_states(before, weights_of(other))


def test_a_damaged_state_is_refused():
    model, optimizer, _ = attach(budget=6_000)
    train(model, optimizer, 3)
    for key, part in (
        ("schedule_turn", torch.tensor([0, -1, 6, 2])),
        ("schedule_turn", torch.tensor([1.0, 1.0, 6.0, 2.0])),
        ("schedule_scores", torch.zeros(1)),
        ("schedule_accumulator", torch.zeros(2)),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state[key] = part
        with pytest.raises(ValueError, match=key):
            optimizer.load_state_dict(saved)


# --- Several processes ---


def scores_as_one_of_two(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sent, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **options: (sent.append(tensor.numel()), reduce(tensor, *args, **options))[
        1
    ]
    for salience in ("snip", "fisher"):
        model, optimizer, schedule = attach(scope="local", salience=salience, budget=1_600)
        plain = Plain(model, schedule, groups_of(schedule), SCORES[salience])
        parallel = DistributedDataParallel(model)
        sent.clear()
        for step in range(8):
            parallel(**token_batch(2 * step + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if salience == "snip":
                plain.step([token_batch(2 * step + part) for part in range(2)])
        expected = [row_slice.entries for group in schedule.training.groups[:4] for row_slice in group]
        assert sent == expected, (sent, expected)
        found = [None, None]
        sums = {name: part.double().sum().item() for name, part in weights_of(model).items()}
        dist.all_gather_object(found, (masks_of(model).fingerprint(), sums, schedule.history))
        assert found[0] == found[1] and schedule.training.turns == 4 and schedule.history[-1]["overlap"] < 1
        if salience == "snip":
            plain.assert_agrees(model, optimizer, schedule)
    global_scope_with_gradients_summed_by_hand(rank)
    for salience in ("snip", "fisher"):
        resumes_within_a_window(rank, salience)
    an_error_of_one_process_while_it_chooses(rank)
    model = tiny_model()
    optimizer = SparseAdamW(sparsify(model, random_masks(model, density=0.1)))
    with pytest.raises(ValueError, match="arguments of MaskSchedule differ between processes"):
        MaskSchedule(model, optimizer, window=2 + rank)


def global_scope_with_gradients_summed_by_hand(rank):
    """Without DistributedDataParallel entries may move between weights, to those of one process with all batches."""
    both = attach(scope="global", salience="snip", budget=1_600)
    lone = attach(scope="global", salience="snip", budget=1_600)
    for step in range(6):
        for part, own in ((0, (rank,)), (1, (0, 1))):
            model, optimizer, _ = (both, lone)[part]
            for number in own:
                model(**token_batch(2 * step + number)).loss.backward()
            if part == 0:
                for group in optimizer.param_groups:
                    for values in group["params"]:
                        dist.all_reduce(values.grad)
            optimizer.step()
            optimizer.zero_grad()
    assert [len(w.mask) for w in sparse_weights(both[0])] == [len(w.mask) for w in sparse_weights(lone[0])]
    assert masks_of(both[0]) == masks_of(lone[0])
    for name, weight in weights_of(lone[0]).items():
        torch.testing.assert_close(weights_of(both[0])[name], weight, atol=1e-6, rtol=0)


def an_error_of_one_process_while_it_chooses(rank):
    """The others do not wait for its masks."""
    model, optimizer, _ = attach(scope="local", salience="snip", budget=6_000)
    parallel, keep_best = DistributedDataParallel(model), streaming.keep_best

    def failing(*args):
        if rank == 1:
            raise torch.OutOfMemoryError("no room")
        return keep_best(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "keep_best", failing)
        with pytest.raises(torch.OutOfMemoryError if rank == 1 else RuntimeError, match="no room"):
            for step in range(3):
                parallel(**token_batch(2 * step + rank)).loss.backward()
                optimizer.step()
    check_equal(masks_of(model).fingerprint(), "masks", "")


def resumes_within_a_window(rank, salience):
    """A state that one process saves has the sums of all if these were shared; else the window begins again."""

    def begin(state=None):
        run = attach(scope="local", salience=salience, budget=6_000, window=3)
        if state is not None:
            for part, saved in zip(run, state, strict=False):
                part.load_state_dict(saved)
        return run, DistributedDataParallel(run[0])

    def advance(run, parallel, first, last):
        for step in range(first, last):
            parallel(**token_batch(2 * step + rank)).loss.backward()
            run[1].step()
            run[1].zero_grad()

    def saved_by_the_first(run):
        states = [copy.deepcopy((run[0].state_dict(), run[1].state_dict())) if rank == 0 else None]
        dist.broadcast_object_list(states)
        return states[0]

    run, parallel = begin()
    advance(run, parallel, 0, 5)
    alone = saved_by_the_first(run)
    run[2].share_sums()
    shared = saved_by_the_first(run)
    advance(run, parallel, 5, 14)
    resumed, parallel = begin(shared)
    assert equal_states(resumed[1].state_dict(), shared[1])
    advance(resumed, parallel, 5, 14)
    assert resumed[2].history == run[2].history and masks_of(resumed[0]) == masks_of(run[0])
    assert equal_states(weights_of(resumed[0]), weights_of(run[0]))
    resumed, parallel = begin(alone)
    assert resumed[2].training.steps == 0 and not any(s.accumulator is not None for s in resumed[2].training.group)
    advance(resumed, parallel, 5, 8)
    assert [event["step"] for event in resumed[2].history] == [3, 8]
    check_equal(masks_of(resumed[0]).fingerprint(), "masks", "")


def test_two_processes_average_a_group_once_a_turn_and_stay_equal(tmp_path):
    assert run_apart(scores_as_one_of_two, tmp_path / "store", count=2) == [0, 0]


# --- Options ---


@pytest.mark.parametrize(
    "options, error, match",
    [
        (
            dict(threshold=0.5),
            ValueError,
            "threshold=0.5 does not apply without batches.*leave threshold out, or pass batches",
        ),
        (dict(probe=2), ValueError, "probe=2 does not apply without batches"),
        (dict(loss=len), ValueError, "loss=.* does not apply without batches"),
        (dict(max_batches=2), ValueError, "max_batches=2 does not apply without batches"),
        (dict(seed=1), ValueError, "seed=1 does not apply without batches"),
        (dict(progress=False), ValueError, "progress=False does not apply without batches"),
        (dict(salience="grasp"), ValueError, "salience='grasp' needs calibration batches.*or choose gradient, snip"),
        (dict(salience="activation"), ValueError, "salience='activation' needs calibration batches"),
        (dict(salience="snipe"), ValueError, "salience='snipe' is not known; choose from"),
        (dict(salience=lambda w, g: g.sum()), ValueError, r"returned scores of shape \(\) .* one score for each entry"),
        (dict(salience=lambda w, g: g > 0), TypeError, "returned a tensor of torch.bool for model"),
        (dict(salience=lambda w, g: 1), TypeError, "returned a int for model"),
        (dict(salience=5), TypeError, "salience=5 is a int; pass one of"),
        (dict(window=0), ValueError, "window=0 must be a whole number of at least 1, such as 8"),
        (dict(window=2.5), TypeError, "window=2.5 is a float; pass a whole number"),
        (dict(budget=0), ValueError, "memory_budget=0 must be a whole number of at least 1.*bytes"),
        (dict(budget=1e9), TypeError, "memory_budget=1000000000.0 is a float; pass a whole number"),
        (dict(moments="keep"), ValueError, "moments='keep' is not known; choose 'reset' or 'carry'"),
        (dict(scope="all"), ValueError, "scope='all' is not known"),
        (dict(batches=[token_batch()]), ValueError, "window=2 applies only if masks.*leave batches out"),
        (dict(salience="magnitude"), ValueError, "window=2 applies only if masks"),
        (dict(nonsense=1), ValueError, "does not accept nonsense"),
    ],
)
def test_options_without_meaning_for_streamed_scores_are_refused(options, error, match):
    model = tiny_model()
    masks = random_masks(model, density=0.05)
    optimizer = SparseAdamW(sparsify(model, masks))
    options = {"window": 2, **options}
    if "budget" in options:
        options["memory_budget"] = options.pop("budget")
    with pytest.raises(error, match=match):
        MaskSchedule(model, optimizer, **options)
    assert optimizer.schedule is None and all(weight.accumulator is None for weight in sparse_weights(model))


def test_measures_that_need_no_gradient_are_selected_by_at_intervals():
    model = tiny_model()
    optimizer = SparseAdamW(sparsify(model, random_masks(model, density=0.05)))
    schedule = MaskSchedule(model, optimizer, salience="magnitude", interval=2, progress=False)
    train(model, optimizer, 2)
    assert schedule.training is None and [event["step"] for event in schedule.history] == [2]
    expected = select_masks(model, salience="magnitude", density=0.05, progress=False)
    assert masks_of(model) == expected


def test_a_streaming_schedule_has_its_own_defaults_and_no_reselect():
    model, optimizer, schedule = attach(window=None, budget=None)
    assert (schedule.salience, schedule.window, schedule.moments) == ("snip", 8, "carry")
    with pytest.raises(ValueError, match="at the end of each window"):
        schedule.reselect()


def test_scores_that_are_not_finite_are_refused_by_name():
    model, optimizer, _ = attach(salience=lambda w, g: (g * w).log())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="returned NaN for .* entries of model.layers.0.self_attn.q_proj.weight"):
        train(model, optimizer, 1, first=1)
