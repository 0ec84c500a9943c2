"""Whatever arguments come: it works, or a ValueError or TypeError says what to change and nothing has changed."""

import copy
import math

import pytest
import torch
from conftest import random_masks, token_batch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

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
    use_adapters,
)
from speft_optim.weights.attached import sparse_weights

# The same examples in every run: what a longer search finds (take out `derandomize`) is fixed by whoever searched.
FUZZ = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

# What a caller may pass where something else belongs.
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.integers(min_value=10**6, max_value=10**30),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
    st.sampled_from([object(), torch.zeros(()), torch.zeros(3), torch.zeros(2, 2), nn.Linear(2, 2), len, Ellipsis]),
)


class Blocks(nn.Module):
    """The least that has blocks: what default targets look for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, labels):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": (x - labels).square().mean()}


BATCHES = [{"x": torch.randn(3, 4), "labels": torch.randn(3, 4)}]


def snapshot(model):
    state = {name: part.clone() for name, part in model.state_dict().items()}
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return state, flags, hooks, sorted(model.__dict__), model.training


def assert_unchanged(model, before):
    state, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert all(torch.equal(part, before[0][name]) for name, part in state.items())


def assert_says_what_to_do(error):
    """A sentence of ours, with what was got or is the limit before what to do instead: not Python's or torch's own."""
    words = str(error)
    ours = len(words) > 15 and any(sign in words for sign in REMEDIES)
    assert ours or words.startswith(OF_ANY_OPTIMIZER), repr(error)


# As they stand in the messages: an order after a semicolon, what an argument takes, or an example.
REMEDIES = ("; ", "must be", "takes", "needs", "such as", "choose", "exactly one", "pass ")
# What torch says of parameters that none of its optimizers takes.
OF_ANY_OPTIMIZER = ("optimizer got an empty", "optimizer can only optimize Tensors", "params argument given")


def works_or_says_why(call, model):
    """Run `call`; after an error of the documented kinds the model must be as it was. Returns whether it worked."""
    before = snapshot(model)
    try:
        call()
    except (ValueError, TypeError) as error:
        assert_says_what_to_do(error)
        assert_unchanged(model, before)
        return False
    return True


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "salience": st.one_of(st.sampled_from(["gradient", "magnitude", "random", "snip"]), anything),
            "density": st.one_of(st.floats(0.01, 1.0), anything),
            "budget": st.one_of(st.integers(0, 40), anything),
            "scope": st.one_of(st.sampled_from(["local", "global"]), anything),
            "targets": st.one_of(st.just(["0", "1"]), st.lists(st.text(max_size=3), max_size=2), anything),
            "memory_budget": st.one_of(st.integers(1, 1000), anything),
            "offload": st.one_of(st.sampled_from(["cpu", "meta", "cuda:99", "hpu", torch.device("cpu")]), anything),
            "seed": anything,
        },
    ),
    st.one_of(st.just(BATCHES), anything),
)
def test_select_masks_works_or_says_what_to_do_whatever_it_is_given(options, batches):
    model = Blocks()
    before = snapshot(model)
    works_or_says_why(lambda: select_masks(model, batches, progress=False, **options), model)
    assert_unchanged(model, before)


@FUZZ
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(["layers.0.weight", "layers.1.weight", "layers.0.bias", "nowhere"]),
            anything.filter(lambda x: x.__hash__),
        ),
        st.one_of(
            st.sampled_from(
                [
                    Mask(torch.tensor([0, 3]), (4, 4)),
                    Mask(torch.tensor([1]), (4,)),
                    Mask(torch.tensor([]).int(), (4, 4)),
                ]
            ),
            anything,
        ),
        max_size=3,
    )
)
def test_sparsify_works_or_says_what_to_do_whatever_it_is_given(masks):
    model = Blocks()
    if works_or_says_why(lambda: sparsify(model, masks), model):
        desparsify(model)


@FUZZ
@given(st.one_of(anything, st.just(Blocks())))
def test_sparsify_takes_a_mapping_only(masks):
    model = Blocks()
    assert not works_or_says_why(lambda: sparsify(model, masks), model)


def test_masks_as_bool_tensors_are_told_how_to_become_masks():
    model = nn.Linear(4, 4)
    chosen = torch.eye(4).bool()
    with pytest.raises(TypeError, match="got a dict with a Tensor; write Mask"):
        sparsify(model, {"weight": chosen})
    sparsify(model, {"weight": Mask(chosen.flatten().nonzero().squeeze(1), chosen.shape)})


@FUZZ
@given(
    st.one_of(
        st.lists(st.integers(-2, 20), max_size=5).map(lambda values: torch.tensor(values, dtype=torch.int64)), anything
    ),
    st.one_of(st.lists(st.integers(0, 5), max_size=3).map(tuple), anything),
)
def test_a_mask_is_its_positions_or_says_what_to_do(indices, shape):
    try:
        mask = Mask(indices, shape)
    except (ValueError, TypeError) as error:
        assert_says_what_to_do(error)
        return
    assert sorted(set(indices.tolist())) == mask.indices.tolist()
    assert all(0 <= index < math.prod(shape) for index in mask.indices.tolist())


@FUZZ
@example(options={"eps": 2**64}, in_group=False)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.one_of(st.floats(0, 1), anything),
            "betas": st.one_of(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), anything),
            "eps": st.one_of(st.floats(1e-10, 1e-3), anything),
            "weight_decay": st.one_of(st.floats(0, 1), anything),
            "state_bits": st.one_of(st.sampled_from([8, 32]), anything),
            "on_nonfinite": st.one_of(st.sampled_from(["skip", "raise", "ignore"]), anything),
        },
    ),
    st.booleans(),
)
def test_sparse_adamw_works_or_says_what_to_do_whatever_its_options(options, in_group):
    model = Blocks()
    values = sparsify(model, random_masks(model, density=0.5))
    made = []

    def make():
        if in_group and "on_nonfinite" not in options:
            made.append(SparseAdamW([{"params": values, **options}]))
        else:
            made.append(SparseAdamW(values, **options))

    if works_or_says_why(make, model):
        model(**BATCHES[0])["loss"].backward()
        if max(float(options.get(name, 0.0)) for name in ("lr", "weight_decay")) <= 1.0:
            made[0].step()
            assert all(value.isfinite().all() for value in values)


@FUZZ
@given(anything)
def test_sparse_adamw_works_or_says_what_to_do_whatever_its_parameters(parameters):
    model = Blocks()
    works_or_says_why(lambda: SparseAdamW(parameters), model)
    works_or_says_why(lambda: SparseAdamW([parameters]), model)


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "interval": st.one_of(st.integers(1, 3), anything),
            "scope": st.one_of(st.sampled_from(["local", "global"]), anything),
            "moments": st.one_of(st.sampled_from(["reset", "carry"]), anything),
            "threshold": st.one_of(st.floats(0.1, 1), anything),
            "probe": st.one_of(st.integers(1, 2), anything),
            "density": st.one_of(st.just(lambda step: 0.5), anything),
            "salience": st.one_of(st.just("gradient"), anything),
            "nonsense": st.just(1),
        },
    ),
    st.one_of(st.just(BATCHES), anything),
)
def test_mask_schedule_works_or_says_what_to_do_whatever_it_is_given(options, batches):
    model = Blocks()
    masks = random_masks(model, density=0.25)
    optimizer = SparseAdamW(sparsify(model, masks))
    if works_or_says_why(lambda: MaskSchedule(model, optimizer, batches, **options), model):
        works_or_says_why(lambda: optimizer.schedule.reselect(), model)
    else:
        assert optimizer.schedule is None


@FUZZ
@given(st.data())
def test_an_optimizer_state_loads_or_says_what_to_do(data):
    model = Blocks()
    optimizer = SparseAdamW(sparsify(model, random_masks(model, density=0.25)))
    if data.draw(st.booleans(), "with a schedule"):
        MaskSchedule(model, optimizer, BATCHES, interval=1, moments="carry", progress=False)
    model(**BATCHES[0])["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    place = data.draw(st.sampled_from(["top", "state", "entry", "group"]))
    part = {
        "top": state,
        "state": state["state"],
        "entry": state["state"][0],
        "group": state["param_groups"][0],
    }[place]
    key = data.draw(st.sampled_from(sorted(part, key=str)))
    if data.draw(st.booleans(), "remove"):
        del part[key]
    else:
        part[key] = data.draw(anything)
    before = copy.deepcopy(optimizer.state_dict())
    if not works_or_says_why(lambda: optimizer.load_state_dict(state), model):
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for entry, kept in zip(now["state"].values(), before["state"].values(), strict=True):
            assert all(
                torch.equal(entry[k], v) if isinstance(v, torch.Tensor) else entry[k] == v for k, v in kept.items()
            )


@FUZZ
@given(
    anything,
    st.dictionaries(st.one_of(st.just("default"), anything.filter(lambda x: x.__hash__)), anything, max_size=2),
)
def test_adapters_load_and_mix_or_say_what_to_do(tmp_path_factory, path, shares):
    folder = tmp_path_factory.getbasetemp()
    trained = Blocks()
    sparsify(trained, random_masks(trained, density=0.25))
    save_adapter(trained, folder / "fuzz.safetensors")
    model = Blocks()
    load_adapter(model, folder / "fuzz.safetensors")
    works_or_says_why(lambda: use_adapters(model, shares), model)
    works_or_says_why(lambda: use_adapters(model, path), model)
    if not isinstance(path, str | bytes):
        works_or_says_why(lambda: load_adapter(model, path), model)
        works_or_says_why(lambda: save_adapter(trained, path), trained)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b'{"a": 1}', (2**40).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    model = Blocks()
    for load in (lambda: load_adapter(model, path), lambda: Masks.load(path)):
        assert not works_or_says_why(load, model)


def test_a_batch_that_breaks_off_leaves_the_model_sparsified_and_whole():
    model = Blocks()
    sparsify(model, random_masks(model, density=0.25))
    optimizer = SparseAdamW([weight.values for weight in sparse_weights(model)])
    schedule = MaskSchedule(model, optimizer, [*BATCHES, {"x": torch.randn(3, 4)}], progress=False)
    assert not works_or_says_why(schedule.reselect, model)
    assert token_batch() is not None and schedule.history == []
