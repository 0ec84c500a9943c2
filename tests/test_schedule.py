"""Masks chosen again during training: against a dense reference, across resume, accumulation and real trainers."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from conftest import (
    OPTIONS,
    Reference,
    assert_close,
    equal_states,
    masks_of,
    random_masks,
    run_apart,
    skip_unless_nodes_compile,
    tiny_model,
    token_batch,
    train,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
    unload_adapter,
)
from speft_optim.optim import carried_moments
from speft_optim.optim.carried_moments import MaskChange
from speft_optim.optim.moments import new_moments_, store_moments_, unpack_moments
from speft_optim.optim.state import has_moments
from speft_optim.salience.measures import MEASURES
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import DenseWeight

CALIBRATION = [token_batch(1000 + seed) for seed in range(2)]


def attach(dtype=torch.float32, share=0.05, scope="local", state_bits=32, kind="llama", **options):
    model = tiny_model(kind, dtype)
    masks = select_masks(model, CALIBRATION, density=share, scope=scope, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks, keep_empty=True), state_bits=state_bits, **OPTIONS)
    schedule = MaskSchedule(
        model, optimizer, CALIBRATION, **{"interval": 3, "scope": scope, "progress": False, **options}
    )
    return model, optimizer, schedule


@pytest.mark.parametrize("scope", ["local", "global"])
def test_reselection_equals_dense_training_with_reset_moments(scope):
    model, optimizer, schedule = attach(scope=scope)
    masks = masks_of(model)
    dense = tiny_model()
    for phase in range(3):
        reference = Reference(dense, masks, **OPTIONS)
        assert masks == masks_of(model)
        for step in range(3 * phase, 3 * phase + 3):
            train(model, optimizer, 1, first=step)
            reference.model(**token_batch(step)).loss.backward()
            reference.step()
        dense = reference.model
        for name, weight in model.state_dict().items():
            assert_close(weight, dense.state_dict()[name])
        masks = select_masks(dense, CALIBRATION, density=0.05, scope=scope, progress=False)
    assert schedule.steps == 9 and [event["step"] for event in schedule.history] == [3, 6, 9]
    assert 0 < schedule.history[0]["overlap"] < 1
    assert not any(map(has_moments, optimizer.state.values()))


def test_entries_that_leave_keep_their_value_and_never_move():
    model, optimizer, schedule = attach(interval=100)
    start = weights_of(model)
    train(model, optimizer, 3)
    old, trained = masks_of(model), weights_of(model)
    new = schedule.reselect()
    assert 0 < old.overlap(new) < 1 and new.count == old.count
    assert all(torch.equal(part, trained[name]) for name, part in weights_of(model).items())
    train(model, optimizer, 5)
    now = weights_of(model)
    for name, mask in new.items():
        inside = torch.zeros(mask.shape.numel(), dtype=torch.bool)
        inside[mask.indices.long()] = True
        assert torch.equal(now[name].flatten()[~inside], trained[name].flatten()[~inside])
        assert not torch.equal(now[name].flatten()[inside], trained[name].flatten()[inside])
    untouched = [name for name in now if name not in new]
    assert all(torch.equal(now[name], start[name]) for name in untouched)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_moments_are_reset_or_carried(state_bits):
    for how in ("reset", "carry"):
        model, optimizer, schedule = attach(interval=100, moments=how, state_bits=state_bits)
        train(model, optimizer, 3)
        old = {
            weight.name: (weight.mask, *unpack_moments(optimizer.state[weight.values]))
            for weight in sparse_weights(model)
        }
        new = schedule.reselect()
        if how == "reset":
            assert not any(map(has_moments, optimizer.state.values()))
            continue
        for weight in sparse_weights(model):
            mask, first, second = old[weight.name]
            new_first, new_second = unpack_moments(optimizer.state[weight.values])
            stays = torch.isin(new[weight.name].indices, mask.indices)
            stayed = torch.isin(mask.indices, new[weight.name].indices)
            tolerance = dict(rtol=0.05, atol=0.02 * first.abs().max().item()) if state_bits == 8 else {}
            assert_close(new_first[stays], first[stayed], **tolerance)
            assert_close(
                new_second[stays],
                second[stayed],
                **{**tolerance, **({"atol": 0.02 * second.max().item()} if tolerance else {})},
            )
            # The 8-bit second moment has no zero, but a smallest number.
            smallest = 1e-6 * second.max() if state_bits == 8 else 0
            assert not new_first[~stays].any() and (new_second[~stays] <= smallest).all()
            assert int(optimizer.state[weight.values]["step"]) == 3
        before = weights_of(model)
        train(model, optimizer, 1, first=3)
        moved = max((part - before[name]).abs().max().item() for name, part in weights_of(model).items())
        assert moved < 4 * OPTIONS["lr"]


def test_carried_moments_without_survivors_start_anew():
    state = {"step": torch.tensor(3.0)}
    values = nn.Parameter(torch.zeros(4))
    new_moments_(state, values, 32)
    store_moments_(state, *(moment.fill_(1.0) for moment in unpack_moments(state)))
    nothing = torch.zeros(0, dtype=torch.long)
    (carried,) = carried_moments.carried_moments([MaskChange(values, 5, nothing, nothing, None, None)], [state])
    assert all(moment.shape == (5,) and not moment.any() for moment in unpack_moments(carried))


def fails_at(function, call):
    """The function, which runs out of memory at that call."""
    calls = itertools.count(1)

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise torch.OutOfMemoryError("no room")
        return function(*args, **kwargs)

    return failing


# A selection that breaks off between weights, within one, and while moments are computed; each at several places.
FAILURES = {
    "change": (SparseWeight, "change_mask", 5),
    "first": (SparseWeight, "compare", 1),
    "prepare": (SparseWeight, "compare", 6),
    "within": (SparseWeight, "_exchange", 5),
    "entries": (DenseWeight, "gather", 22),
    "previous": (SparseWeight, "_trained_before", 3),
    "carry": (torch.Tensor, "index_copy_", 2),
    "quantise": (carried_moments, "quantize_blockwise", 4),
}


@pytest.mark.parametrize("together", [1, 2**22])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("moments", ["reset", "carry"])
@pytest.mark.parametrize("failure", FAILURES)
def test_each_weight_has_its_own_moments_after_a_selection_that_failed(
    failure, moments, state_bits, together, monkeypatch
):
    """Some had moments of other entries, which the next step took for their own."""
    model, optimizer, schedule = attach(interval=100, scope="global", moments=moments, state_bits=state_bits)
    train(model, optimizer, 3)
    before = {w.name: (w.mask, *unpack_moments(optimizer.state[w.values])) for w in sparse_weights(model)}
    holder, name, call = FAILURES[failure]
    monkeypatch.setattr(carried_moments, "_JOINED", together)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, fails_at(getattr(holder, name), call))
        try:
            schedule.reselect()
        except torch.OutOfMemoryError:
            assert not schedule.history
        else:
            carries = failure in ("carry", "quantise")
            assert carries and (moments == "reset" or state_bits == 32 or together > 1)
    changed = 0
    for weight in sparse_weights(model):
        state, (mask, first, second) = optimizer.state[weight.values], before[weight.name]
        assert len(weight.mask) == len(weight.values)
        changed += weight.mask != mask
        if weight.mask == mask or moments == "carry":
            stays = torch.isin(weight.mask.indices, mask.indices)
            stayed = torch.isin(mask.indices, weight.mask.indices)
            for now, old in zip(unpack_moments(state), (first, second), strict=True):
                assert now.shape == weight.values.shape
                largest = old.abs().max().item() if len(old) else 0.0
                tolerance = dict(rtol=0.05, atol=0.02 * largest) if state_bits == 8 else {}
                assert_close(now[stays], old[stayed], **tolerance)
                assert now[~stays].abs().max().item() <= 1e-6 * largest if not stays.all() else True
        else:
            assert not has_moments(state)
    assert changed or failure not in ("change", "within")
    train(model, optimizer, 1, first=3)
    assert_close(
        torch.cat([w.base.gather(w.mask.indices) for w in sparse_weights(model)]),
        torch.cat([w.values.detach() for w in sparse_weights(model)]),
    )


def test_masks_change_a_few_at_a_time(monkeypatch):
    """The places of all entries that stay were in memory at once."""
    model, optimizer, schedule = attach(interval=100, moments="carry", state_bits=8)
    train(model, optimizer, 1)
    places, alive = weakref.WeakSet(), []
    compare = SparseWeight.compare

    def watched(weight, mask):
        alive.append(len(places))
        found = compare(weight, mask)
        places.update([found.before, found.after])
        return found

    monkeypatch.setattr(SparseWeight, "compare", watched)
    monkeypatch.setattr(carried_moments, "_JOINED", 1)
    schedule.reselect()
    assert len(alive) == len(sparse_weights(model)) and max(alive) == 2, "those of the next weight in turn"


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("moments", ["reset", "carry"])
def test_progressive_density_is_exact(scope, moments):
    def density(step):
        return 0.05 + 0.02 * step if step < 6 else 0.01

    model, optimizer, schedule = attach(scope=scope, density=density, moments=moments)
    sizes = [weight.mask.shape.numel() for weight in sparse_weights(model)]

    def wanted(share):
        return sum(round(share * size) for size in sizes) if scope == "local" else round(share * sum(sizes))

    for step in range(9):
        train(model, optimizer, 1, first=step)
        done = (step + 1) // 3 * 3
        expected = wanted(density(done) if done else 0.05)
        assert masks_of(model).count == expected
        assert sum(weight.values.numel() for weight in sparse_weights(model)) == expected
    assert [event["entries"] for event in schedule.history] == [wanted(density(step)) for step in (3, 6, 9)]


def test_weights_without_entries_get_some_and_may_lose_them_all():
    model, optimizer, schedule = attach(scope="global", interval=100)
    before = {weight.name: len(weight.mask) for weight in sparse_weights(model)}
    assert 0 in before.values() and len(before) == 14
    schedule.salience = "random"
    schedule.reselect()
    train(model, optimizer, 2)
    assert all(len(weight.mask) == weight.values.numel() > 0 for weight in sparse_weights(model))
    schedule.salience = "gradient"
    schedule.reselect()
    train(model, optimizer, 2)
    assert 0 in [weight.values.numel() for weight in sparse_weights(model)] and optimizer.skipped_steps == 0


def test_empty_masks_attach_nothing_unless_kept():
    for keep in (False, True):
        model = tiny_model()
        masks = select_masks(model, CALIBRATION, density=0.01, scope="global", progress=False)
        values = sparsify(model, masks, keep_empty=keep)
        assert len(values) == (len(masks) if keep else sum(1 for mask in masks.values() if len(mask)))


@pytest.mark.parametrize("threshold, times", [(1e-9, 0), (1.0, 3)])
def test_adaptive_selects_only_when_the_overlap_falls(threshold, times):
    model, optimizer, schedule = attach(threshold=threshold, probe=2, interval=2)
    changes = 0
    for step in range(6):
        before = masks_of(model)
        train(model, optimizer, 1, first=step)
        changes += before != masks_of(model)
    assert changes == times and len(schedule.history) == 3 + times


def test_a_probe_that_reads_all_batches_agrees_with_the_selection():
    model, optimizer, schedule = attach(threshold=1.0, probe=2, interval=2)
    train(model, optimizer, 2)
    probe, selection = schedule.history
    assert probe == selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments, state_bits", [("reset", 32), ("carry", 32), ("carry", 8)])
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_is_bit_equal_across_selections(tmp_path, dtype, moments, state_bits, model_first):
    model, optimizer, schedule = attach(dtype, moments=moments, state_bits=state_bits)
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 4, first=4)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, other_optimizer, other_schedule = attach(dtype, moments=moments, state_bits=state_bits)
    loads = [(other, saved["model"]), (other_optimizer, saved["optimizer"])]
    for part, state in loads if model_first else reversed(loads):
        part.load_state_dict(state)
    assert other_schedule.steps == 4 and len(other_schedule.history) == 1
    train(other, other_optimizer, 4, first=4)
    assert masks_of(other) == masks_of(model) and other_schedule.history == schedule.history
    left, right = weights_of(model), weights_of(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
    for a, b in zip(sparse_weights(model), sparse_weights(other), strict=True):
        assert torch.equal(a.values, b.values) and a.previously_trained == b.previously_trained
        for key, part in optimizer.state[a.values].items():
            assert torch.equal(part, other_optimizer.state[b.values][key])


def test_a_run_that_loads_the_optimizer_alone_is_told_what_it_lacks(caplog):
    model, optimizer, _ = attach()
    train(model, optimizer, 4)
    saved, trained = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    for loaded in ("nothing", "before", "after"):
        other, other_optimizer, _ = attach()
        if loaded == "before":
            other.load_state_dict(trained)
        other_optimizer.load_state_dict(saved)
        if loaded == "after":
            other.load_state_dict(trained)
        caplog.clear()
        train(other, other_optimizer, 2)
        told = caplog.text.count("lack the trained values of entries that left their masks")
        assert told == (loaded == "nothing")


# --- A graph of before the entries changed ---


def growing(step):
    return 0.05 + 0.01 * step


@pytest.mark.parametrize(
    "how, scope",
    [
        *((how, scope) for how in ("plain", "retained", "checkpointed") for scope in ("local", "global")),
        ("compiled", "global"),
    ],
)
def test_a_loop_may_hold_its_losses(how, scope):
    results = []
    for hold in (False, True):
        model, optimizer, _ = attach(scope=scope, interval=2, density=growing)
        if how == "checkpointed":
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        if how == "compiled":
            skip_unless_nodes_compile()
            # Beyond its limit of compilations, to which other tests add, a part of the model runs eagerly.
            torch._dynamo.reset()
        run = torch.compile(model, backend="eager") if how == "compiled" else model
        held = []
        for step in range(3):
            loss = run(**token_batch(step)).loss
            loss.backward(retain_graph=how == "retained")
            optimizer.step()
            optimizer.zero_grad()
            held += [loss] if hold else []
            del loss
        results.append(weights_of(model))
    assert all(torch.equal(part, results[1][name]) for name, part in results[0].items())


@pytest.mark.parametrize("density", [None, growing])
def test_a_loss_of_before_gives_no_gradient_to_other_entries(density):
    model, optimizer, _ = attach(interval=1, density=density)
    early = model(**token_batch(1)).loss
    train(model, optimizer, 1)
    # The first is ours; of another length torch itself refuses.
    with pytest.raises(RuntimeError, match="changed the trained entries|invalid gradient|modified by an inplace"):
        early.backward()
    assert all(weight.values.grad is None for weight in sparse_weights(model))
    train(model, optimizer, 1, first=1)


def test_hooks_on_values_stay_after_a_change():
    model, optimizer, _ = attach(interval=1, density=growing)
    values, seen = sparse_weights(model)[0].values, []
    values.register_hook(lambda gradient: seen.append(len(gradient)))
    values.register_post_accumulate_grad_hook(lambda parameter: seen.append(len(parameter.grad)))
    lengths = []
    for step in range(2):
        loss = model(**token_batch(step)).loss
        lengths += 2 * [len(values)]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == lengths and len(set(lengths)) == 2


def test_a_run_may_look_at_its_loss_before_it_resumes():
    model, optimizer, _ = attach(interval=2, density=growing)
    train(model, optimizer, 3)
    other, other_optimizer, _ = attach(interval=2, density=growing)
    loss = other(**token_batch(0)).loss
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, 2, first=3)
    assert loss.requires_grad
    assert all(torch.equal(part, weights_of(other)[name]) for name, part in weights_of(model).items())


# --- State that other tools carry ---


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("state_bits, moments", [(32, "reset"), (8, "carry")])
@pytest.mark.parametrize("option", ["flatten_optimizer_state_dict", "full_state_dict", "cpu_offload"])
def test_resume_through_distributed_checkpoints_is_bit_equal(tmp_path, option, state_bits, moments):
    """Saved right after a selection, which leaves no moments if it resets them, and moved masks beside."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options, results = StateDictOptions(**{option: True}), []
    for resume in (False, True):
        model, optimizer, schedule = attach(torch.bfloat16, interval=2, state_bits=state_bits, moments=moments)
        optimizer.skipped_steps = 0 if resume else 3
        if not resume:
            train(model, optimizer, 2)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        if resume:
            assert schedule.steps == 0
            checkpoint.load(parts, checkpoint_id=tmp_path / "sharded")
            loaded = dict(model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
            set_state_dict(model, optimizer, **loaded, options=options)
        else:
            checkpoint.save(parts, checkpoint_id=tmp_path / "sharded")
        train(model, optimizer, 3, first=2)
        previous = [weight.previously_trained for weight in sparse_weights(model)]
        results.append((weights_of(model), optimizer.state_dict(), schedule.history, optimizer.skipped_steps, previous))
    assert equal_states(*(result[:4] for result in results))
    assert results[0][4] == results[1][4] and results[1][3] == 3 and len(results[1][2]) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_masks_of_another_length_resume_from_a_state_saved_whole():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options, saved, results = StateDictOptions(full_state_dict=True), None, []
    for resume in (False, True):
        model, optimizer, schedule = attach(interval=2, density=growing)
        if resume:
            set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        else:
            train(model, optimizer, 3)
            saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        train(model, optimizer, 3, first=3)
        results.append((weights_of(model), optimizer.state_dict()))
    assert equal_states(*results)


@pytest.mark.parametrize("key", ["schedule_steps", "schedule_history", "previously_trained", "previous_values"])
def test_a_key_of_the_schedule_that_a_tool_dropped_is_named(key):
    model, optimizer, _ = attach()
    train(model, optimizer, 4)
    other, other_optimizer, schedule = attach()
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry[key]
    with pytest.raises(ValueError, match=f"has no {key}"):
        other_optimizer.load_state_dict(saved)
    assert schedule.steps == 0 and masks_of(other) != masks_of(model)


def test_a_schedule_on_one_side_only_is_refused():
    model, optimizer, schedule = attach()
    plain = tiny_model()
    others = SparseAdamW(sparsify(plain, masks_of(model)), **OPTIONS)
    with pytest.raises(ValueError, match="build that MaskSchedule before loading"):
        others.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="no schedule_steps: .* load the state first"):
        optimizer.load_state_dict(others.state_dict())


def test_a_long_history_is_saved_in_its_latest_part():
    _, _, schedule = attach()
    schedule.history = [{"step": step, "entries": 5, "overlap": 0.1} for step in range(300)]
    saved = schedule.state_dict()
    schedule.load_state_dict(saved)
    assert [event["step"] for event in schedule.history] == list(range(44, 300))
    assert schedule.history[0] == {"step": 44, "entries": 5, "overlap": 0.1}


def test_without_a_schedule_changed_masks_are_refused():
    model, optimizer, _ = attach()
    train(model, optimizer, 4)
    plain = tiny_model()
    masks = select_masks(plain, CALIBRATION, density=0.05, progress=False)
    other = SparseAdamW(sparsify(plain, masks), **OPTIONS)
    with pytest.raises(ValueError, match="MaskSchedule"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "key", ["values", "indices", "previously_trained", "all previously trained", "previous_values", "exp_avg"]
)
def test_damaged_state_is_refused_whole(key):
    model, optimizer, _ = attach()
    train(model, optimizer, 4)
    other, other_optimizer, _ = attach()
    before, masks = weights_of(other), masks_of(other)
    state = copy.deepcopy(optimizer.state_dict())
    last = state["state"][max(state["state"])]
    damages = {
        "previous_values": torch.zeros(1),
        "all previously trained": torch.full_like(last["previously_trained"], 255),
    }
    last[key.removeprefix("all ").replace(" ", "_")] = damages[key] if key in damages else last[key][:-1]
    with pytest.raises(ValueError):
        other_optimizer.load_state_dict(state)
    assert masks_of(other) == masks and all(torch.equal(before[n], part) for n, part in weights_of(other).items())


def test_accumulation_counts_optimizer_steps_and_loses_no_gradient():
    results = []
    for parts in (1, 4):
        model, optimizer, schedule = attach(interval=2)
        for step in range(5):
            batch = token_batch(step, batch=4)
            for i in range(parts):
                (model(**{key: part[i::parts] for key, part in batch.items()}).loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((weights_of(model), masks_of(model), schedule.steps))
    (left, left_masks, steps), (right, right_masks, _) = results
    assert steps == 5 and left_masks.overlap(right_masks) > 0.99
    close = [torch.isclose(left[name], right[name], rtol=1e-3, atol=1e-5).float().mean() for name in left]
    assert min(close) > 0.99


def test_adapter_holds_entries_that_left(tmp_path):
    model, optimizer, _ = attach()
    train(model, optimizer, 7)
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = tiny_model()
    base = weights_of(fresh)
    masks = load_adapter(fresh, tmp_path / "a.safetensors")
    assert masks.count > masks_of(model).count
    assert all(torch.equal(part, weights_of(fresh)[name]) for name, part in weights_of(model).items())
    unload_adapter(fresh)
    assert all(torch.equal(part, base[name]) for name, part in weights_of(fresh).items())


def test_a_copy_after_a_change_of_masks_is_desparsified_on_its_own():
    model, optimizer, _ = attach()
    train(model, optimizer, 4)
    other = copy.deepcopy(model)
    assert masks_of(other) == masks_of(model)
    trained = weights_of(model)
    desparsify(other)
    assert all(torch.equal(part, trained[name]) for name, part in weights_of(other).items())


@pytest.mark.parametrize("salience", sorted(MEASURES))
@pytest.mark.parametrize("memory_budget", [2**30, 30_000])
def test_a_model_in_training_is_scored_as_a_plain_one(salience, memory_budget):
    """Its own hooks must stay out of calibration, of second derivatives too."""
    model = tiny_model()
    linear = None if salience == "activation" else lambda name, parameter: True
    choose = dict(salience=salience, density=0.1, targets=linear, memory_budget=memory_budget, progress=False)
    masks = select_masks(model, CALIBRATION, **choose)
    sparsify(model, random_masks(model, linear, density=0.1, seed=7))
    before = {weight.name: weight.values.requires_grad for weight in sparse_weights(model)}
    assert select_masks(model, CALIBRATION, **choose) == masks
    assert {weight.name: weight.values.requires_grad for weight in sparse_weights(model)} == before
    model(**token_batch()).loss.backward()
    assert all(weight.values.grad is not None for weight in sparse_weights(model))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_function_reselects_as_the_measure_it_computes(scope):
    ends = []
    for salience in ("force", lambda w, g: -w * g):
        model, optimizer, schedule = attach(scope=scope, salience=salience)
        train(model, optimizer, 4)
        assert len(schedule.history) == 1
        ends.append(masks_of(model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_copied_optimizer_keeps_its_schedule(copied, order):
    model, optimizer, _ = attach()
    train(model, optimizer, 2)
    other, others = copied((model, optimizer)[order])[order]
    assert others.schedule is not optimizer.schedule and others.schedule.model is other
    for _ in range(2):
        train(model, optimizer, 2, first=2)
        train(other, others, 2, first=2)
    assert others.schedule.history == optimizer.schedule.history and len(others.schedule.history) == 2
    assert masks_of(other) == masks_of(model)
    trained = weights_of(model)
    assert all(torch.equal(part, trained[name]) for name, part in weights_of(other).items())


def test_rates_and_options_of_groups_outlive_a_change_of_masks():
    model = tiny_model()
    values = sparsify(model, select_masks(model, CALIBRATION, density=0.05, progress=False))
    groups = [{"params": values[:3], "lr": 1e-3, "weight_decay": 0.0}, {"params": values[3:]}]
    optimizer = SparseAdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    MaskSchedule(model, optimizer, CALIBRATION, interval=1, progress=False)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3 / 8, 1e-2 / 8]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(value) for value in values]


def test_trainer_and_accelerate_resume_with_nothing_added(tmp_path):
    from accelerate import Accelerator
    from test_scripts import Samples, halving, trainer_arguments
    from transformers import Trainer

    results = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model, optimizer, schedule = attach()
        arguments = trainer_arguments(
            tmp_path, max_steps=7, gradient_accumulation_steps=2, save_strategy="steps", save_steps=4
        )
        trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, halving(optimizer)))
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.steps == 7
        results.append((weights_of(model), masks_of(model)))
    (left, left_masks), (right, right_masks) = results
    assert left_masks == right_masks and all(torch.equal(left[name], right[name]) for name in left)

    results = []
    for resume in (False, True):
        model, optimizer, schedule = attach()
        accelerator = Accelerator(cpu=True)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for step in range(4 * resume, 7):
            accelerator.backward(prepared(**token_batch(step)).loss)
            prepared_optimizer.step()
            prepared_optimizer.zero_grad()
            if step == 3 and not resume:
                accelerator.save_state(str(tmp_path / "state"))
        results.append((weights_of(model), masks_of(model)))
    (left, left_masks), (right, right_masks) = results
    assert left_masks == right_masks and all(torch.equal(left[name], right[name]) for name in left)


def test_calibration_leaves_training_as_it_was():
    model, optimizer, schedule = attach(interval=1)
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, optimizer, 1)
    assert torch.equal(torch.rand(3), expected) and model.training
    assert all(weight.values.requires_grad for weight in sparse_weights(model))


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(interval=0), ValueError, "interval"),
        (dict(interval=2.5), TypeError, "interval"),
        (dict(probe=0), ValueError, "probe"),
        (dict(moments="drop"), ValueError, "moments"),
        (dict(scope="all"), ValueError, "scope"),
        (dict(threshold=0.0), ValueError, "threshold"),
        (dict(threshold=1.5), ValueError, "threshold"),
        (dict(density=0.1), TypeError, "density"),
        (dict(budget=5), ValueError, "budget"),
        (dict(salience="gradint"), ValueError, "salience='gradint' is not known; choose from"),
        (dict(salience=3), TypeError, "salience=3 is a int; pass one of"),
    ],
)
def test_wrong_arguments_of_a_schedule_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        attach(**options)


def test_wrong_optimizer_model_and_batches():
    model, optimizer, _ = attach()
    with pytest.raises(ValueError, match="already"):
        MaskSchedule(model, optimizer, CALIBRATION)
    values = [weight.values for weight in sparse_weights(model)]
    with pytest.raises(TypeError, match="SparseAdamW"):
        MaskSchedule(model, torch.optim.AdamW(values), CALIBRATION)
    with pytest.raises(ValueError, match="all of the model's values"):
        MaskSchedule(model, SparseAdamW(values[:2]), CALIBRATION)
    with pytest.raises(ValueError, match="once"):
        MaskSchedule(model, SparseAdamW(values), iter(CALIBRATION))
    # At construction, not after the first thousand steps.
    with pytest.raises(ValueError, match="needs calibration batches"):
        MaskSchedule(model, SparseAdamW(values), None, salience="activation")
    with pytest.raises(TypeError, match="batches is a int"):
        MaskSchedule(model, SparseAdamW(values), 5)
    MaskSchedule(model, SparseAdamW(values), None, salience="magnitude")
    for density, error in ((0.0, ValueError), ("x", TypeError)):
        bad = MaskSchedule(model, SparseAdamW(values), CALIBRATION, density=lambda step, density=density: density)
        with pytest.raises(error, match=rf"density\(0\)={density!r} is .*\(0, 1\]"):
            bad.reselect()


@given(st.integers(0, 2**16), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_change_mask_against_a_dictionary(seed, before, after):
    from speft_optim import Mask

    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(8, 5, bias=False)
    picks = [torch.randperm(40, generator=generator)[:count] for count in (max(1, before), after)]
    sparsify(model, {"weight": Mask(picks[0], (5, 8))})
    (weight,) = sparse_weights(model)
    with torch.no_grad():
        weight.values.add_(1e-9)
    exact = dict(zip(weight.mask.indices.tolist(), weight.values.tolist(), strict=True))
    dense = model.weight.detach().clone()
    following = weight.compare(Mask(picks[1], (5, 8)))
    weight.change_mask(following)
    for i, index in enumerate(weight.mask.indices.tolist()):
        assert weight.values[i].item() == exact.get(index, dense.flatten()[index].item())
    old, new = (
        [indices[place] for place in part.tolist()]
        for indices, part in zip(
            (sorted(exact), weight.mask.indices.tolist()), (following.before, following.after), strict=True
        )
    )
    assert old == new == sorted(exact.keys() & set(picks[1].tolist()))
    assert set(weight.ever_trained().indices.tolist()) == {*picks[0].tolist(), *picks[1].tolist()}
    assert set(weight.previously_trained.indices.tolist()) == {*picks[0].tolist()} - {*picks[1].tolist()}


def trains_as_one_of_two(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = tiny_model()
    masks = select_masks(model, CALIBRATION, density=0.05, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    parallel = DistributedDataParallel(model)
    own = [token_batch(50 + rank), token_batch(60 + rank)]
    schedule = MaskSchedule(parallel, optimizer, own, interval=2, progress=False)
    for step in range(5):
        parallel(**token_batch(2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [None, None]
    sums = {name: part.sum().item() for name, part in weights_of(model).items()}
    dist.all_gather_object(found, (masks_of(model).fingerprint(), sums))
    assert found[0] == found[1] and masks_of(model) != masks and schedule.steps == 5

    def follow(scope):
        MaskSchedule(parallel, SparseAdamW([w.values for w in sparse_weights(model)]), own, scope=scope)

    follow("global")
    # A forward without DistributedDataParallel, as of an evaluation before training, does not tell that it is not used.
    model(**token_batch(rank))
    for refused in (parallel, DistributedDataParallel(copy.deepcopy(model))):
        with pytest.raises(ValueError, match="fixed size"):
            refused(**token_batch(rank))
    follow("local")
    parallel(**token_batch(rank))
    follow("global")
    desparsify(model)
    model.requires_grad_(True)
    DistributedDataParallel(model)(**token_batch(rank))


def test_two_processes_stay_equal(tmp_path):
    assert run_apart(trains_as_one_of_two, tmp_path / "store", count=2) == [0, 0]
