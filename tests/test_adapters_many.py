"""Several adapters on one base, unloading, hostile files, the folder with its card, and being killed while saving."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import assert_close, tiny_model, token_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from speft_optim import (
    Mask,
    Masks,
    SparseAdamW,
    desparsify,
    load_adapter,
    merge_adapters,
    save_adapter,
    select_masks,
    sparsify,
    unload_adapter,
    use_adapters,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train_adapter(path, seed, dtype=torch.float32, steps=3, density=0.05, **options):
    """Train on random masks of `seed`, save, and return the trained weights."""
    model = tiny_model(dtype=dtype)
    masks = select_masks(model, salience="random", density=density, seed=seed, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks), lr=3e-2)
    for step in range(steps):
        model(**token_batch(100 * seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, path, **options)
    return weights_of(model), masks


def weights_of(model):
    return {name: part.detach().clone() for name, part in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / f"{letter}.safetensors" for letter in "ab"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_switch_and_unload_are_bit_exact(paths, dtype):
    (first, first_masks), (second, _) = (train_adapter(path, seed, dtype) for seed, path in enumerate(paths))
    model = tiny_model(dtype=dtype)
    base = weights_of(model)
    assert load_adapter(model, paths[0], name="a") == first_masks
    assert same(weights_of(model), first) and not same(first, base)
    load_adapter(model, paths[1], name="b")
    assert same(weights_of(model), second)
    for _ in range(2):
        use_adapters(model, {"a": 1.0})
        assert same(weights_of(model), first)
        use_adapters(model, {"b": 1})
        assert same(weights_of(model), second)
        use_adapters(model, {})
        assert same(weights_of(model), base)
    use_adapters(model, {"a": 0.3, "b": 0.6})
    unload_adapter(model, "b")
    unload_adapter(model, "a")
    assert same(weights_of(model), base)
    with pytest.raises(ValueError, match="No adapter is loaded"):
        unload_adapter(model)


def test_mixture_is_the_weighted_sum_of_differences(paths):
    (first, _), (second, _) = (train_adapter(path, seed, density=0.3) for seed, path in enumerate(paths))
    model = tiny_model()
    base = weights_of(model)
    load_adapter(model, paths[0], name="a")
    load_adapter(model, paths[1], name="b")
    for shares in ({"a": 0.3, "b": 0.6}, {"a": -1.0, "b": 1.0}, {"a": 2.0}):
        use_adapters(model, shares)
        a, b = shares.get("a", 0.0), shares.get("b", 0.0)
        for name, weight in weights_of(model).items():
            delta = a * (first[name] - base[name]) + b * (second[name] - base[name])
            assert_close(weight, base[name] + delta, atol=1e-6)
            assert torch.equal(weight[delta == 0], base[name][delta == 0])


def test_unloading_one_keeps_the_share_of_the_other(paths):
    first, _ = train_adapter(paths[0], 0)
    train_adapter(paths[1], 1)
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    load_adapter(model, paths[1], name="b")
    use_adapters(model, {"a": 1.0, "b": 0.5})
    unload_adapter(model, "b")
    assert same(weights_of(model), first)
    with pytest.raises(ValueError, match="'b'.*'a'"):
        use_adapters(model, {"b": 1.0})


def test_same_name_replaces(paths):
    second, _ = [train_adapter(path, seed) for seed, path in enumerate(paths)][1]
    model = tiny_model()
    base = weights_of(model)
    for path in (paths[0], paths[1]):
        load_adapter(model, path)
    assert same(weights_of(model), second)
    unload_adapter(model)
    assert same(weights_of(model), base)


def test_merge_keeps_weights_and_forgets(paths):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    merge_adapters(model)
    assert same(weights_of(model), first)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {}), lambda: merge_adapters(model)):
        with pytest.raises(ValueError, match="No adapter is loaded"):
            call()


def test_training_goes_on_from_an_adapter_and_is_never_written_over_unsaved(paths):
    first, masks = train_adapter(paths[0], 0)
    model = tiny_model()
    base = weights_of(model)
    optimizer = SparseAdamW(sparsify(model, load_adapter(model, paths[0])), lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="being trained"):
        unload_adapter(model)
    desparsify(model)
    trained = weights_of(model)
    assert not same(trained, first)
    for change in (
        lambda: unload_adapter(model),
        lambda: use_adapters(model, {}),
        lambda: load_adapter(model, paths[0]),
    ):
        with pytest.raises(ValueError, match="trained on and not saved.*save_adapter.*merge_adapters"):
            change()
        assert same(weights_of(model), trained)
    sparsify(model, masks)
    save_adapter(model, paths[1])
    desparsify(model)
    unload_adapter(model)
    assert same(weights_of(model), base)
    load_adapter(model, paths[1])
    assert same(weights_of(model), trained)


def test_saving_one_adapter_says_nothing_of_what_another_was_trained_to(paths):
    (_, first), (_, second) = (train_adapter(path, seed) for seed, path in enumerate(paths))
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    load_adapter(model, paths[1], name="b")
    use_adapters(model, {"a": 1.0, "b": 1.0})
    for masks in (first, second):
        optimizer = SparseAdamW(sparsify(model, masks), lr=1e-2)
        model(**token_batch()).loss.backward()
        optimizer.step()
        if masks is second:
            save_adapter(model, paths[1])
        desparsify(model)
    trained = weights_of(model)
    # Nor does a file loaded while the other trains.
    sparsify(model, second)
    load_adapter(model, paths[1])
    desparsify(model)
    with pytest.raises(ValueError, match="trained on and not saved"):
        unload_adapter(model)
    assert same(weights_of(model), trained)
    sparsify(model, first)
    save_adapter(model, paths[0])
    desparsify(model)
    unload_adapter(model)
    assert same(weights_of(model), weights_of(tiny_model()))


def test_a_base_that_changed_meanwhile_is_not_restored(paths):
    train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    changed = {name: part + 1 for name, part in weights_of(model).items()}
    model.load_state_dict(changed)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {})):
        with pytest.raises(ValueError, match="have changed.*merge_adapters"):
            call()
    assert same(weights_of(model), changed)


def test_an_adapter_of_another_base_leaves_the_loaded_one(paths):
    first, _ = train_adapter(paths[0], 0)
    other = tiny_model(seed=5)
    sparsify(other, select_masks(other, salience="random", density=0.05, progress=False))
    save_adapter(other, paths[1])
    model = tiny_model()
    load_adapter(model, paths[0])
    with pytest.raises(ValueError, match="fingerprint"):
        load_adapter(model, paths[1])
    assert same(weights_of(model), first)


def test_a_refused_file_leaves_what_was_trained_on_from_an_adapter(paths):
    train_adapter(paths[0], 0)
    foreign = tiny_model(seed=9)
    sparsify(foreign, select_masks(foreign, salience="random", density=0.05, progress=False))
    save_adapter(foreign, paths[1])
    model = tiny_model()
    masks = load_adapter(model, paths[0])
    optimizer = SparseAdamW(sparsify(model, masks), lr=3e-2)
    model(**token_batch(7)).loss.backward()
    optimizer.step()
    save_adapter(model, paths[0])
    desparsify(model)
    trained = weights_of(model)
    with pytest.raises(ValueError, match="base"):
        load_adapter(model, paths[1], name="foreign")
    assert same(weights_of(model), trained)


def test_copies_switch_on_their_own(paths):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    base = weights_of(model)
    load_adapter(model, paths[0])
    other = copy.deepcopy(model)
    unload_adapter(other)
    assert same(weights_of(other), base) and same(weights_of(model), first)


@pytest.mark.parametrize("shares", [{"a": float("nan")}, {"a": "1"}, {"a": True}, {"a": float("inf")}])
def test_wrong_shares_change_nothing(paths, shares):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    with pytest.raises(ValueError, match="share of 'a'"):
        use_adapters(model, shares)
    assert same(weights_of(model), first)


# The folder and its card


def test_folder_with_card_and_metadata(tmp_path):
    folder = tmp_path / "new" / "adapter"
    trained, masks = train_adapter(folder, 0, details={"measure": "gradient", "learning rate": 1e-3})
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "adapter.safetensors"]
    model = tiny_model()
    load_adapter(model, folder)
    assert same(weights_of(model), trained)
    with safe_open(str(folder / "adapter.safetensors"), "pt") as file:
        about, base = (json.loads(file.metadata()[key]) for key in ("about", "base"))
    assert about["entries"] == masks.count and about["density"] == masks.density
    assert about["masks"] == masks.fingerprint() and about["measure"] == "gradient"
    assert about["torch"] == torch.__version__ and about["speft_optim"]
    card = (folder / "README.md").read_text()
    assert base["fingerprint"] in card and "gradient" in card and f"{masks.count:,}" in card
    front, body = re.match(r"---\n(.*?)---\n(.*)", card, re.DOTALL).groups()
    assert "library_name: speft_optim" in front and "load_adapter" in body


def test_card_names_a_base_on_a_hub_and_no_folder_of_ours(tmp_path):
    for name, shown in (("org/model", True), ("/home/someone/model", False), ("./model", False)):
        model = tiny_model()
        model.config._name_or_path, model.config._commit_hash = name, "abc123"
        sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
        save_adapter(model, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("base_model" in card) == shown and "abc123" in card


@pytest.mark.parametrize("details", [{"a": [1]}, {1: "a"}, {"a": None}])
def test_details_are_strings_and_numbers(tmp_path, details):
    model = tiny_model()
    sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
    with pytest.raises(TypeError, match="strings and numbers"):
        save_adapter(model, tmp_path / "out", details=details)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("details", [[("a", 1)], [], "a"])
def test_details_are_a_mapping(tmp_path, details):
    model = tiny_model()
    sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
    with pytest.raises(TypeError, match=rf"details is a {type(details).__name__}; pass a dict"):
        save_adapter(model, tmp_path / "out", details=details)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key", ["entries", "density", "masks", "speft_optim", "torch", "base name", "base fingerprint"]
)
def test_details_take_no_reserved_name(tmp_path, key):
    model = tiny_model()
    sparsify(model, select_masks(model, salience="random", density=0.05, progress=False))
    with pytest.raises(ValueError, match=rf"details names \['{key}'\].*'entries'.*'base name'.*other names"):
        save_adapter(model, tmp_path / "out", details={"data": "x", key: "x"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [[], None, 1])
def test_a_name_that_is_no_string_changes_nothing(paths, name):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    with pytest.raises(TypeError, match="pass a string"):
        load_adapter(model, paths[0], name=name)
    assert same(weights_of(model), first)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 6.0), (torch.float32, 8.0)])
def test_bytes_per_entry(tmp_path, dtype, limit):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024)).to(dtype)
    masks = select_masks(
        model, salience="random", density=0.01, targets=lambda name, parameter: parameter.dim() == 2, progress=False
    )
    sparsify(model, masks)
    save_adapter(model, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size <= limit * masks.count


# Hostile files


def edit(path, target, change):
    with safe_open(str(path), "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    change(metadata, tensors)
    save_file(tensors, str(target), metadata)


NAME = "model.layers.0.self_attn.q_proj.weight"


def tensor(key, function):
    def change(metadata, tensors):
        tensors[f"{NAME}:{key}"] = function(tensors[f"{NAME}:{key}"])

    return change


def shape(value):
    def change(metadata, tensors):
        metadata["shapes"] = json.dumps({**json.loads(metadata["shapes"]), NAME: value})

    return change


def metadata_is(key, value):
    return lambda metadata, tensors: metadata.update({key: value})


def flat(function):
    """Replace the positions by flat ones."""

    def change(metadata, tensors):
        keys = [f"{NAME}:{part}" for part in ("row_pointers", "columns")]
        if keys[0] in tensors:
            parts = {key.removeprefix(f"{NAME}:"): tensors.pop(key) for key in keys}
            tensors[f"{NAME}:indices"] = Mask.unpack(parts, (24, 24)).indices
        tensors[f"{NAME}:indices"] = function(tensors[f"{NAME}:indices"])

    return change


HOSTILE = {
    "position too large": flat(lambda i: torch.cat([i[:-1], torch.tensor([576], dtype=i.dtype)])),
    "negative position": flat(lambda i: torch.cat([torch.tensor([-1], dtype=i.dtype), i[1:]])),
    "position twice": flat(lambda i: torch.cat([i[:1], i[:-1]])),
    "floating positions": flat(lambda i: i.float()),
    "positions in two dimensions": flat(lambda i: i[None]),
    "too few values": tensor("values", lambda v: v[:-1]),
    "integer values": tensor("values", lambda v: v.int()),
    "double values": tensor("values", lambda v: v.double()),
    "values in two dimensions": tensor("values", lambda v: v[None]),
    "values not finite": tensor("values", lambda v: v * float("nan")),
    "shape of another rank": shape([24]),
    "no shape": shape([]),
    "negative shape": shape([-24, -24]),
    "empty shape": shape([0, 24]),
    "huge shape": shape([2**62, 2**62]),
    "large shape": shape([2**20, 2**20]),
    "shape of strings": shape(["24", "24"]),
    "shape of booleans": shape([True, 24]),
    "shape is no list": shape("24"),
    "swapped shape": shape([12, 48]),
    "shapes are a list": metadata_is("shapes", "[]"),
    "shapes are no JSON": metadata_is("shapes", "{"),
    "base is a string": metadata_is("base", '"x"'),
    "another format": metadata_is("format", "other/1"),
    "unknown weight": lambda metadata, tensors: metadata.update(
        shapes=metadata["shapes"].replace(NAME, "lm_tail.weight")
    ),
    "another fingerprint": lambda metadata, tensors: metadata.update(
        base=json.dumps({**json.loads(metadata["base"]), "fingerprint": "0" * 16})
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    train_adapter(path, 0)
    return path


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_file_is_refused_and_the_model_unchanged(good, tmp_path, damage):
    edit(good, tmp_path / "bad.safetensors", HOSTILE[damage])
    model = tiny_model()
    base = weights_of(model)
    with pytest.raises(ValueError, match="bad.safetensors"):
        load_adapter(model, tmp_path / "bad.safetensors")
    assert same(weights_of(model), base)


@pytest.mark.parametrize("sparsified", [False, True])
@pytest.mark.parametrize(
    "dtype, value, stored",
    [
        (torch.float16, 1e6, torch.float32),
        (torch.float16, 3e38, torch.bfloat16),
        (torch.float16, -1e6, torch.float32),
        (torch.bfloat16, 3.4e38, torch.float32),
    ],
)
def test_values_that_the_dtype_of_the_weights_cannot_hold_are_refused(paths, dtype, value, stored, sparsified):
    train_adapter(paths[0], 0, dtype)
    edit(paths[0], paths[1], tensor("values", lambda v: torch.full_like(v, value, dtype=stored)))
    model = tiny_model(dtype=dtype)
    masks = load_adapter(model, paths[0])
    if sparsified:
        sparsify(model, masks)
    before = weights_of(model)
    with pytest.raises(ValueError, match=rf"{NAME} up to .* in {dtype} here.* base in {stored}"):
        load_adapter(model, paths[1], name="b")
    assert same(weights_of(model), before)
    # What it can hold it takes, in whatever dtype it is stored.
    edit(paths[0], paths[1], tensor("values", lambda v: torch.full_like(v, 6e4, dtype=stored)))
    load_adapter(model, paths[1], name="b")


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_changed_anywhere_never_break_more_than_the_load(good, tmp_path, data):
    content = bytearray(good.read_bytes())
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        for _ in range(data.draw(st.integers(1, 8), "changes")):
            # The header is where most of the meaning is.
            limit = data.draw(st.sampled_from([16, 2000, len(content)]), "limit")
            content[data.draw(st.integers(0, min(limit, len(content)) - 1), "place")] = data.draw(st.integers(0, 255))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bytes(content))
    model = tiny_model()
    base = weights_of(model)
    try:
        load_adapter(model, path)
    except ValueError as error:
        assert "bad.safetensors" in str(error)
        assert same(weights_of(model), base)
    else:
        unload_adapter(model)
        assert same(weights_of(model), base)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="There is no adapter .*safetensors; pass"):
            load_adapter(tiny_model(), path)


# Killed while saving

SAVER = """
import sys, torch
sys.path[:0] = {paths!r}
from conftest import tiny_model
from speft_optim import Masks, save_adapter, select_masks, sparsify
model = tiny_model(hidden_size=256, intermediate_size=1024)
masks = select_masks(model, salience="random", density=0.5, progress=False)
values = sparsify(model, masks)
print("ready", flush=True)
while True:
    with torch.no_grad():
        for value in values:
            value.add_(1)
    masks.save("masks.safetensors")
    save_adapter(model, "adapter.safetensors")
"""


def test_killed_at_any_moment_the_last_complete_files_load(tmp_path):
    for attempt in range(4):
        script = SAVER.format(paths=sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not (tmp_path / "adapter.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        model = tiny_model(hidden_size=256, intermediate_size=1024)
        base = weights_of(model)
        masks = load_adapter(model, tmp_path / "adapter.safetensors")
        assert Masks.load(tmp_path / "masks.safetensors") == masks
        # Of one save and not of two: all entries have moved by the same whole number.
        moved = torch.cat([(weights_of(model)[n] - base[n]).flatten()[masks[n].indices] for n in masks]).round()
        assert moved.min() == moved.max() >= 1


# Quantised bases


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized_model(request, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    from quantized_models import load_quantized, save_original

    return load_quantized(save_original(tmp_path_factory.mktemp("quantised") / "base"), request.param)


def train_on_random_masks(model, seed):
    masks = select_masks(model, salience="random", density=0.05, seed=seed, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks), lr=3e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    return logits(model)


def logits(model):
    # With gradients, since without them bitsandbytes' own CPU kernel refuses rows that are no whole number of blocks.
    return model(**token_batch()).logits.detach()


def test_on_a_quantised_base(quantized_model, paths):
    model, trained = copy.deepcopy(quantized_model), []
    base = logits(model)
    for seed, path in enumerate(paths):
        other = copy.deepcopy(model)
        trained.append(train_on_random_masks(other, seed))
        save_adapter(other, path)
    for seed, path in enumerate(paths):
        load_adapter(model, path, name=str(seed))
        assert torch.equal(logits(model), trained[seed])
    use_adapters(model, {"0": 1.0})
    assert torch.equal(logits(model), trained[0])
    unload_adapter(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("merged", [False, True])
def test_entries_trained_on_codes_elsewhere_are_another_base(quantized_model, paths, merged):
    """As on a dense base: the weights are no longer those that the adapter was trained on."""
    model, other = copy.deepcopy(quantized_model), copy.deepcopy(quantized_model)
    wanted = train_on_random_masks(other, 0)
    save_adapter(other, paths[0])
    trained = train_on_random_masks(model, 1)
    if merged:
        desparsify(model)
    with pytest.raises(ValueError, match="weights outside the masks differ"):
        load_adapter(model, paths[0])
    assert torch.equal(logits(model), trained)
    # The adapter's own entries count for nothing, trained or not.
    desparsify(other)
    train_on_random_masks(other, 0)
    load_adapter(other, paths[0])
    assert torch.equal(logits(other), wanted)


def test_a_quantised_base_trained_elsewhere_meanwhile_is_not_restored(quantized_model, paths):
    model, other = copy.deepcopy(quantized_model), copy.deepcopy(quantized_model)
    train_on_random_masks(other, 0)
    save_adapter(other, paths[0])
    load_adapter(model, paths[0])
    trained = train_on_random_masks(model, 1)
    desparsify(model)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {})):
        with pytest.raises(ValueError, match="have changed.*merge_adapters"):
            call()
    assert torch.equal(logits(model), trained)
    merge_adapters(model)
    assert torch.equal(logits(model), trained)
