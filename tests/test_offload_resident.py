"""With some blocks on the device all the time, the others stream past them, and training gives the same bits."""

import pytest
import torch
from conftest import (
    OPTIONS,
    Setup,
    attach,
    equal_states,
    every,
    moved_blocks,
    random_masks,
    tiny_model,
    token_batch,
    train,
    weights_of,
)
from test_offload import on_meta
from test_offload_training import LossInChunks, Stop, loaded, state, t5

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    sparsify,
)
from speft_optim.offload.head import HeadCopy
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.prefetch import staying_blocks
from speft_optim.weights.attached import record_of, sparse_weights

BLOCKS = 5
NUMBERS = [1, 2, 4, "all"]


def tiny(kind="llama", dtype=torch.float32, **options):
    return tiny_model(kind, dtype, num_hidden_layers=BLOCKS, **options)


def partly(model=None, number=2, targets=None, masks=None, base=None, head=True):
    """What `attach` gives, of a model in host memory with so many blocks on the device."""
    model = tiny() if model is None else model
    masks = random_masks(model, targets) if masks is None else masks
    values = sparsify(model, masks, offload="cpu", base=base, resident_blocks=number, resident_head=head)
    return Setup(model, masks, values, SparseAdamW(values, **OPTIONS))


def prefetcher_of(model):
    (prefetcher,) = (hook.prefetcher for hook in record_of(model).hooks if hasattr(hook, "prefetcher"))
    return prefetcher


def test_blocks_that_travel_are_spread_evenly():
    found = {staying: sorted(set(range(9)) - staying_blocks(9, staying)) for staying in (0, 3, 6, 8, 9)}
    assert found == {0: [*range(9)], 3: [0, 2, 3, 5, 6, 8], 6: [1, 4, 7], 8: [4], 9: []}
    for count in range(1, 40):
        assert [len(staying_blocks(count, number)) for number in range(count + 1)] == [*range(count + 1)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind, dtype", [("llama", torch.bfloat16), ("gemma2", torch.float32)])
def test_training_equals_that_of_a_resident_model(kind, dtype, number):
    """With accumulation, of an untied and of a tied head, and in evaluation between."""
    results = []
    for setup in (attach(tiny(kind, dtype)), partly(tiny(kind, dtype), number)):
        losses = train(setup.model, setup.optimizer, 2, parts=2)
        with torch.inference_mode():
            losses.append(float(setup.model(**token_batch(5)).loss))
        losses += train(setup.model, setup.optimizer, 2, first=4)
        results.append((losses, weights_of(setup.model), setup.optimizer.state_dict()))
    assert equal_states(*results)


@pytest.mark.parametrize("number", [1, "all"])
@pytest.mark.parametrize("make", [t5, *(lambda kind=kind: tiny_model(kind) for kind in ("qwen2", "bert", "mixtral"))])
def test_all_weights_of_models_of_other_shapes_may_be_masked(make, number):
    """Encoders and decoders, encoders alone, experts; with dropout."""
    results = []
    for options in ({}, dict(offload="cpu", resident_blocks=number)):
        model = make().train()
        optimizer = SparseAdamW(sparsify(model, random_masks(model, every), **options), **OPTIONS)
        torch.manual_seed(0)
        results.append((train(model, optimizer, 3), weights_of(model), optimizer.state_dict()))
    assert equal_states(*results)


@pytest.mark.parametrize("source", ["batches", "training"])
@pytest.mark.parametrize("number", [2, "all"])
def test_masks_move_as_on_a_resident_model(number, source):
    """An entry that leaves a mask keeps its trained value in the copy that stays."""
    data = [token_batch(seed) for seed in range(2)] if source == "batches" else None
    options = dict(progress=False, interval=2) if source == "batches" else dict(window=1, interval=2)
    results = []
    for setup in (attach(tiny()), partly(number=number)):
        MaskSchedule(setup.model, setup.optimizer, data, **options)
        losses = train(setup.model, setup.optimizer, 7)
        moved = {weight.name: weight.mask for weight in sparse_weights(setup.model)}
        assert all(moved[name] != mask for name, mask in setup.masks.items())
        results.append((losses, weights_of(setup.model), setup.optimizer.state_dict()))
    assert equal_states(*results)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    from quantized_models import save_original

    return save_original(tmp_path_factory.mktemp("original"), num_hidden_layers=BLOCKS)


@pytest.mark.parametrize("number", [2, "all"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_a_quantised_base_trains_moves_its_masks_and_is_saved_as_a_resident_one(original, kind, number, tmp_path):
    from quantized_models import effective, stored

    results = []
    for name, options in dict(resident={}, host=dict(offload="cpu", resident_blocks=number)).items():
        model = loaded(original, kind)
        before = stored(model)
        optimizer = SparseAdamW(sparsify(model, random_masks(model), **options), **OPTIONS)
        MaskSchedule(model, optimizer, [token_batch(0)], interval=2, progress=False)
        losses = train(model, optimizer, 3, parts=2)
        model.save_pretrained(tmp_path / name)
        losses += train(model, optimizer, 2, first=3)
        states = weights_of(model), optimizer.state_dict()
        desparsify(model)
        assert all(map(torch.equal, stored(model), before))
        results.append((losses, states, effective(model), (tmp_path / name / "model.safetensors").read_bytes()))
    assert equal_states(*results)


@pytest.mark.parametrize("change", ["load", "assign", "copy", "entry", "adapter"])
def test_changes_from_outside_reach_the_blocks_that_stay(change, tmp_path):
    """And the head, which has no mask."""
    trained = attach(tiny())
    train(trained.model, trained.optimizer, first=7)
    save_adapter(trained.model, tmp_path)
    results = []
    for setup in (attach(tiny()), partly(number="all")):
        model = setup.model
        train(model, setup.optimizer)
        if change in ("load", "assign"):
            model.load_state_dict(tiny(seed=1).state_dict(), assign=change == "assign")
        elif change == "adapter":
            load_adapter(model, tmp_path)
        with torch.no_grad():
            for weight in (model.model.layers[1].mlp.up_proj.weight, model.lm_head.weight):
                if change == "copy":
                    weight.copy_(weight.flip(0))
                elif change == "entry":
                    weight[3:5] = 0.25
        losses = train(model, setup.optimizer, 2, first=2)
        results.append((losses, weights_of(model)))
        desparsify(model)
        results[-1] += (weights_of(model),)
    assert equal_states(*results)


def test_saved_models_equal_those_of_a_resident_one_and_desparsify_leaves_it_as_it_was(tmp_path):
    plain = tiny("qwen2")
    before = state(plain)
    for name, setup in (("resident", attach(tiny("qwen2"))), ("host", partly(plain, 2))):
        train(setup.model, setup.optimizer)
        save_adapter(setup.model, tmp_path / name / "adapter")
        export_merged(setup.model, tmp_path / name / "merged")
        setup.model.save_pretrained(tmp_path / name / "model")
        train(setup.model, setup.optimizer, first=2)
        desparsify(setup.model)
        setup.model.save_pretrained(tmp_path / name / "plain")
    for part in ("adapter/adapter", "merged/model", "model/model", "plain/model"):
        parts = [tmp_path / name / f"{part}.safetensors" for name in ("host", "resident")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    assert state(plain) == before


@pytest.mark.parametrize("number", [1, 2, "all"])
def test_training_from_files_equals_that_of_a_resident_model(number, tmp_path):
    """A thread copies them, and may have two blocks to copy."""
    model = tiny()
    twin = on_meta(model, tmp_path, "20KB").to(model.dtype)
    host = partly(twin, number, masks=random_masks(model), base=tmp_path)
    resident = attach(model)
    assert train(host.model, host.optimizer, 3) == train(model, resident.optimizer, 3)
    assert equal_states(host.model.state_dict(), model.state_dict())
    assert train(host.model, host.optimizer, 2, first=3) == train(model, resident.optimizer, 2, first=3)


@pytest.mark.parametrize("passes", range(1, 2 * BLOCKS + 1))
def test_an_exception_anywhere_leaves_the_model_usable(passes):
    """In the forward of any block, and in its recomputation."""
    model, left = tiny(), [passes]
    before = state(model)

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    hooks = [layer.self_attn.q_proj.register_forward_hook(fail) for layer in model.model.layers]
    setup = partly(model)
    with pytest.raises(Stop):
        train(model, setup.optimizer, 1)
    for hook in hooks:
        hook.remove()
    setup.optimizer.zero_grad()
    resident = attach(tiny())
    assert train(model, setup.optimizer, 2) == train(resident.model, resident.optimizer, 2)
    desparsify(model)
    assert state(model) == before


def test_only_the_other_blocks_travel_after_the_first_pass(monkeypatch):
    """Blocks 0, 2 and 4 stream past 1 and 3, and the two buffers hold two of them at each turn."""
    moved, model = moved_blocks(monkeypatch), tiny()
    setup = partly(model)
    block = sum(256 * -(-parameter.nbytes // 256) for parameter in model.model.layers[0].parameters())
    block -= sum(256 * -(-weight.values.nbytes // 256) for weight in sparse_weights(model.model.layers[0]))
    assert prefetcher_of(model).nbytes == (2 + 2) * block
    train(model, setup.optimizer, 1)
    assert sorted(moved[:5]) == [0, 1, 2, 3, 4] and moved[5:] == [0]
    moved.clear()
    train(model, setup.optimizer, 2)
    assert moved == [4, 0] * 2
    moved.clear()
    model.load_state_dict(tiny(seed=1).state_dict())
    train(model, setup.optimizer, 1)
    # All blocks have changed; the copy of block 4 was begun before that was seen, and is repeated.
    assert sorted(moved[:5]) == [0, 1, 2, 3, 4] and moved[5:] == [4, 0]


@pytest.mark.parametrize("number, buffers", [(3, 5), (4, 5), (5, 5)])
def test_nothing_travels_where_two_or_fewer_are_left(number, buffers, monkeypatch):
    moved, setup = moved_blocks(monkeypatch), partly(number=number)
    assert prefetcher_of(setup.model).nbytes * BLOCKS == buffers * prefetcher_of(partly(number="all").model).nbytes
    train(setup.model, setup.optimizer, 3)
    with torch.no_grad():
        setup.model(**token_batch())
    assert sorted(moved) == [0, 1, 2, 3, 4], "once each"


def test_both_buffers_are_filled_ahead_while_a_block_that_stays_is_computed(monkeypatch):
    """Of nine blocks 1, 4 and 7 stream; 7 begins to travel when 1 has been computed, and not when 4 is begun."""
    model = tiny_model("llama", num_hidden_layers=9)
    done = moved_blocks(monkeypatch)
    setup = partly(model, 6)
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: done.append(f"computed {number}"))
    train(model, setup.optimizer, 1)
    done.clear()
    train(model, setup.optimizer, 1)
    before = {block: done[done.index(block) + 1] for block in (7, 1)}
    assert before == {7: "computed 2", 1: "computed 6"}
    assert [block for block in done if isinstance(block, int)] == [7, 1]


def test_a_head_that_stays_is_copied_once_and_again_when_it_changes(monkeypatch):
    """Also if its first use was in inference mode, as copies on a device show."""
    brought, bring, take = [], HostWeight._bring, HeadCopy.take

    def note(weight, source):
        brought.append(weight.name)
        return bring(weight, source).clone()

    def note_ahead(copied):
        copy = take(copied)
        brought.extend([] if copy is None else ["lm_head.weight"])
        return copy

    monkeypatch.setattr(HostWeight, "_bring", note)
    monkeypatch.setattr(HeadCopy, "take", note_ahead)
    resident, results = attach(tiny()), []
    for head in (True, False):
        setup = partly(tiny(), "all", head=head)
        brought.clear()
        with torch.inference_mode():
            setup.model(**token_batch())
        results.append(train(setup.model, setup.optimizer, 3))
        assert brought.count("lm_head.weight") == (1 if head else 4)
        # A loss of its own calls decoder and head apart.
        setup.model.lm_head(setup.model.get_decoder()(token_batch()["input_ids"]).last_hidden_state)
        assert brought.count("lm_head.weight") == (1 if head else 5)
        setup.model.lm_head.weight.mul_(2.0)
        results[-1] += train(setup.model, setup.optimizer, 2, first=3)
        assert brought.count("lm_head.weight") == (2 if head else 7)
        desparsify(setup.model)
    expected = train(resident.model, resident.optimizer, 3)
    with torch.no_grad():
        resident.model.lm_head.weight.mul_(2.0)
    assert results == [expected + train(resident.model, resident.optimizer, 2, first=3)] * 2


@pytest.mark.parametrize("targets", [None, every])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_that_stays_may_be_read_by_the_loss_and_have_a_mask(kind, targets):
    """Two forwards before one backward, over copies of which the first must not have changed."""
    results = []
    for setup in (attach(tiny(kind), targets=targets), partly(tiny(kind), "all", targets)):
        losses = []
        for step in range(3):
            loss = sum(setup.model(**token_batch(2 * step + part)).loss for part in range(2))
            loss.backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            losses.append(loss.item())
        setup.model.forward = LossInChunks(setup.model)
        losses += train(setup.model, setup.optimizer, 2)
        results.append((losses, weights_of(setup.model)))
    assert equal_states(*results)


REFUSED = {
    r"resident_blocks=6 is above 5, .*; pass 'all'": dict(resident_blocks=6),
    r"resident_blocks=-1 must be a whole number of at least 0": dict(resident_blocks=-1),
    r"resident_blocks='some' is a str; pass a whole number, such as 8, or 'all'": dict(resident_blocks="some"),
    r"resident_blocks=True is a bool": dict(resident_blocks=True),
    r"resident_head=1 is a int": dict(resident_head=1),
    r"resident_blocks='all' is read only with offload": dict(resident_blocks="all", offload=None),
    r"resident_head=True is read only with offload": dict(resident_head=True, offload=None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_stay_is_refused_before_anything_changes(reason):
    model = tiny()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=reason):
        sparsify(model, random_masks(model), **{"offload": "cpu", **REFUSED[reason]})
    assert state(model) == before


def test_a_model_without_a_head_has_none_that_stays():
    model = tiny().model
    before = state(model)
    with pytest.raises(ValueError, match=r"resident_head=True needs a head that get_output_embeddings\(\) of LlamaM"):
        sparsify(model, random_masks(model), offload="cpu", resident_head=True)
    assert state(model) == before
