"""Adapters: bit-equal on their base, refused by others and where damaged, several on a base, trained on and merged."""

import copy
import itertools
import json
import re
import time

import pytest
import torch
import transformers
from conftest import (
    PROCESSES,
    VOCABULARY,
    assert_close,
    equal_states,
    every,
    fine_tune,
    masks_of,
    random_masks,
    skip_unless_nodes_compile,
    tiny_model,
    token_batch,
    train,
    weights_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_models import SIZES, load_quantized, save_original
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speft_optim import (
    Mask,
    Masks,
    SparseAdamW,
    desparsify,
    load_adapter,
    merge_adapters,
    save_adapter,
    sparsify,
    unload_adapter,
    use_adapters,
)
from speft_optim.checkpoint.adapter_file import read_adapter
from speft_optim.checkpoint.fingerprint import fingerprint
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.floating import FloatingWeight


def trained(path, kind="llama", dtype=torch.float32, targets=None, density=0.1, **config):
    """Train a tiny model on random masks and save its adapter."""
    model = tiny_model(kind, dtype, **config)
    masks = random_masks(model, targets, density)
    train(model, SparseAdamW(sparsify(model, masks), lr=1e-2), 3)
    save_adapter(model, path)
    return model, masks


def train_adapter(path, seed, dtype=torch.float32, density=0.05, **options):
    """Train on random masks of `seed`, save, and return the trained weights and the masks."""
    model = fine_tune(tiny_model(dtype=dtype), 3, density, lr=3e-2, seed=seed, first=100 * seed)
    save_adapter(model, path, **options)
    return weights_of(model), masks_of(model)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, targets, density",
    [
        ("llama", None, 0.1),
        ("qwen2", every, 0.1),
        ("gpt2", every, 0.02),
        ("mixtral", None, 0.3),
        ("llama", ["q_proj"], 1.0),
    ],
)
def test_a_fresh_base_becomes_the_trained_model_bit_for_bit(kind, targets, density, dtype, path):
    model, masks = trained(path, kind, dtype, targets, density)
    base = tiny_model(kind, dtype)
    assert not equal_states(base.state_dict(), model.state_dict())
    # Saving, loading and attaching: nothing of it may need gradients or change what requires them.
    required = {name: p.requires_grad for name, p in base.named_parameters()}
    assert load_adapter(base, str(path)) == Masks({name: mask for name, mask in masks.items() if len(mask)})
    assert equal_states(base.state_dict(), model.state_dict())
    assert {name: p.requires_grad for name, p in base.named_parameters()} == required
    batch = token_batch(9)
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 6), (torch.float16, 6), (torch.float32, 8)])
def test_file_takes_few_bytes_an_entry_all_told(dtype, most, share, path):
    model = nn.ModuleDict({"a": nn.Linear(512, 512, bias=False), "b": nn.Linear(512, 1024, bias=False)}).to(dtype)
    masks = random_masks(model, ["a", "b"], share)
    sparsify(model, masks)
    save_adapter(model, path)
    assert path.stat().st_size <= most * masks.count
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys() if key.endswith(":values")} == {dtype}


def edited(name):
    """The base with one entry changed, far from any mask of `name`'s siblings."""

    def change(model, masks):
        weight = model.get_parameter(name)
        outside = torch.ones(weight.numel(), dtype=torch.bool)
        if name in masks:
            outside[masks[name].indices.long()] = False
        with torch.no_grad():
            weight.view(-1)[outside.nonzero()[0]] += 1

    return change


def replaced(path, *shape):
    def change(model, masks):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Linear(*shape, bias=False))

    return change


def removed(path):
    def change(model, masks):
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)

    return change


@pytest.mark.parametrize(
    "base, change, message",
    [
        (dict(seed=1), None, "fingerprint .* weights outside the masks differ"),
        (dict(dtype=torch.bfloat16), None, "in the same dtype"),
        (dict(kind="qwen2"), None, "fingerprint"),
        (
            dict(kind="gpt2"),
            None,
            r"a parameter model\.layers\.0\.self_attn\.q_proj\.weight, which GPT2LMHeadModel lacks",
        ),
        (dict(intermediate_size=48), None, r"up_proj\.weight has shape \(40, 24\) there and \(48, 24\) here"),
        ({}, edited("model.layers.0.self_attn.q_proj.weight"), "weights outside the masks differ"),
        # Weights without a mask belong to the base as well.
        ({}, edited("model.layers.1.mlp.down_proj.weight"), "weights outside the masks differ"),
        ({}, edited("model.norm.weight"), "weights outside the masks differ"),
        (
            {},
            replaced("model.layers.0.self_attn.q_proj", 24, 25),
            r"q_proj\.weight has shape \(24, 24\) there and \(25, 24\) here",
        ),
        (
            {},
            removed("model.layers.0.self_attn.q_proj"),
            "model.layers.0.self_attn.q_proj.weight, which LlamaForCausalLM lacks",
        ),
    ],
)
def test_another_base_is_refused_by_name_shape_or_weights_and_left_alone(base, change, message, path):
    _, masks = trained(path, targets=["q_proj", "up_proj"])
    other = tiny_model(**base)
    if change is not None:
        change(other, masks)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=message):
        load_adapter(other, path)
    assert equal_states(other.state_dict(), before.state_dict()) and set(other.__dict__) == set(before.__dict__)


@pytest.mark.parametrize("change", ["load", "use", "unload"])
def test_adapters_whose_change_was_interrupted_can_be_changed_again(change, path, tmp_path, monkeypatch):
    """All calls ended in a KeyError, or took the mixture for entries that were trained further."""
    model = tiny_model()
    plain = weights_of(model)
    train_adapter(path, 1)
    train_adapter(other := tmp_path / "other.safetensors", 2)
    if change != "load":
        load_adapter(model, path, name="one")
        load_adapter(model, other, name="two")
    act = {
        "load": lambda: load_adapter(model, path),
        "use": lambda: use_adapters(model, {"one": 1.0}),
        "unload": lambda: unload_adapter(model),
    }[change]
    put, calls = FloatingWeight.put, itertools.count()

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        put(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FloatingWeight, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            act()
    with pytest.raises(ValueError, match="adapters was interrupted.*call use_adapters"):
        sparsify(model, random_masks(model))
    load_adapter(model, path)
    expected = tiny_model()
    load_adapter(expected, path)
    assert equal_states(weights_of(model), weights_of(expected))
    unload_adapter(model)
    assert equal_states(weights_of(model), plain)


def test_a_mask_of_whole_columns_does_not_hide_the_weights_beside_it():
    """Probes in one column of a matrix with 2^n columns would all be under such a mask, and gradient masks are so."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 4096, bias=False)
    for column in (0, 1, 63):
        masks = Masks(weight=Mask(torch.arange(4096) * 64 + column, (4096, 64)))
        before = fingerprint(layer, masks)
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight.add_(1e-3)
        assert fingerprint(other, masks) != before
        with torch.no_grad():
            other.weight.copy_(layer.weight)
            other.weight[:, column] = 0
        assert fingerprint(other, masks) == before


def test_training_goes_on_from_a_loaded_adapter_as_from_the_model(path):
    model, masks = trained(path)
    base = tiny_model()
    loaded = load_adapter(base, path)
    desparsify(model)
    for one, its_masks in ((model, masks), (base, loaded)):
        train(one, SparseAdamW(sparsify(one, its_masks), lr=1e-2), 3, first=3)
    assert equal_states(model.state_dict(), base.state_dict())
    save_adapter(base, path)
    again = tiny_model()
    load_adapter(again, path)
    assert equal_states(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("pending", [False, True])
def test_loading_onto_a_sparsified_model_reaches_its_values(pending, path):
    """Also over values that were changed but not yet written."""
    model, masks = trained(path)
    base = tiny_model()
    values = sparsify(base, masks)
    if pending:
        with torch.no_grad():
            for value in values:
                value.mul_(3)
    load_adapter(base, path)
    base(**token_batch())
    assert equal_states(base.state_dict(), model.state_dict())
    for ours, theirs in zip(values, sparse_weights(model), strict=True):
        assert torch.equal(ours, theirs.values)


def test_a_change_of_values_not_yet_written_is_in_the_file(path):
    model = tiny_model()
    values = sparsify(model, random_masks(model))
    with torch.no_grad():
        values[0].fill_(5.0)
    save_adapter(model, path)
    base = tiny_model()
    load_adapter(base, path)
    assert equal_states(base.state_dict(), model.state_dict())
    assert int((next(iter(sparse_weights(model))).base.tensor == 5).sum()) == len(values[0])


def test_one_mask_object_for_several_weights_is_saved(path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    mask = Mask(torch.tensor([1, 5]), (4, 4))
    sparsify(model, {"a.weight": mask, "b.weight": mask})
    save_adapter(model, path)
    assert load_adapter(copy.deepcopy(model), path) == {"a.weight": mask, "b.weight": mask}


class Wrapper(nn.Module):
    """As a LightningModule is one, with weights of its own beside the model's."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(3, 3)

    def forward(self, **batch):
        return self.model(**batch)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "module": Wrapper,
    "ddp": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in a module": lambda model: Wrapper(torch.compile(model, backend="eager")),
    "submodule": lambda model: model.model,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_file_of_a_wrapped_model_is_that_of_the_model(kind, path, process_group):
    if kind.startswith("compiled"):
        skip_unless_nodes_compile()
    model = tiny_model()
    model.config._name_or_path = "org/model"
    values = sparsify(model, random_masks(model))
    wrapped = WRAPPERS[kind](model)
    train(model if kind == "submodule" else wrapped, SparseAdamW(values, lr=1e-2), 2)
    save_adapter(wrapped, path)
    base = tiny_model()
    load_adapter(base, path)
    assert equal_states(base.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(base(**token_batch(9)).logits, model(**token_batch(9)).logits)
    assert read_adapter(path).base["name"] == "org/model"
    # Onto a wrapped model as well, with the names of what is inside.
    other = tiny_model()
    sparsify(other, random_masks(other))
    load_adapter(WRAPPERS[kind](other), path)
    assert equal_states(other.state_dict(), model.state_dict())


def test_an_adapter_is_on_a_compiled_model_and_on_the_model_inside_alike(path):
    trained(path)
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    load_adapter(compiled, path)
    assert not equal_states(model.state_dict(), tiny_model().state_dict())
    unload_adapter(model)
    assert equal_states(model.state_dict(), tiny_model().state_dict())


def test_a_wrapper_of_two_sparsified_models_is_refused(path):
    trained(path)
    both = nn.ModuleDict({name: tiny_model() for name in ("left", "right")})
    for model in both.values():
        sparsify(model, random_masks(model))
    for call in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match=r"ModuleDict holds 2 sparsified models, \['left', 'right'\].*one of them"):
            call(both, path)


def test_equal_adapters_are_equal_files(tmp_path):
    """Metadata is written in random order by the library of the format."""
    model = tiny_model()
    masks = random_masks(model)
    sparsify(model, masks)
    contents = set()
    for number in range(8):
        save_adapter(model, tmp_path / f"{number}.safetensors")
        masks.save(tmp_path / f"masks-{number}.safetensors")
        files = (tmp_path / f"{number}.safetensors", tmp_path / f"masks-{number}.safetensors")
        contents.add(tuple(file.read_bytes() for file in files))
    assert len(contents) == 1


def test_saving_needs_a_sparsified_model_and_a_folder(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"call sparsify\(model, masks\) before save_adapter"):
        save_adapter(model, tmp_path / "a.safetensors")
    sparsify(model, random_masks(model))
    with pytest.raises(ValueError, match="does not exist"):
        save_adapter(model, tmp_path / "nowhere" / "a.safetensors")
    assert not list(tmp_path.iterdir())


# --- Parameters that were trained densely beside the masked entries ---


def classifier(head_seed=0, tie=False, **config):
    """A base with a new head, which is another one each time that the base is loaded."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    options = transformers.LlamaConfig(num_attention_heads=4, num_labels=3, pad_token_id=0, **sizes, **config)
    model = transformers.LlamaForSequenceClassification(options)
    torch.manual_seed(100 + head_seed)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def train_classifier(model, masks, beside=("score.weight",), steps=4):
    values = sparsify(model, masks)
    dense = [parameter for name, parameter in model.named_parameters() if name in beside]
    for parameter in dense:
        parameter.requires_grad_(True)
    optimizer = SparseAdamW([*values, *dense], lr=1e-2)
    for step in range(steps):
        batch = {**token_batch(step), "labels": torch.tensor([0, 1, 2])}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_trained_beside_is_in_the_file_and_the_base_with_any_head_is_the_base(tmp_path):
    model = classifier()
    masks = random_masks(model)
    train_classifier(model, masks)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    base, before = classifier(head_seed=1), classifier(head_seed=1)
    assert not torch.equal(base.score.weight, model.score.weight)
    assert load_adapter(base, folder) == masks
    assert equal_states(base.state_dict(), model.state_dict())
    assert read_adapter(folder).whole == ("score.weight",)
    assert "score.weight (72) was trained whole beside them" in (folder / "README.md").read_text()
    use_adapters(base, {"default": 0.5})
    torch.testing.assert_close(base.score.weight, (model.score.weight + before.score.weight) / 2)
    unload_adapter(base)
    assert equal_states(base.state_dict(), before.state_dict())
    # Any other weight still tells another base.
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="weights outside the masks differ"):
        load_adapter(base, folder)
    assert torch.equal(base.score.weight, before.score.weight)


@pytest.mark.parametrize("dtype, value", [(torch.float32, float("nan")), (torch.float16, 1e6)])
def test_values_that_no_adapter_may_hold_are_not_saved(dtype, value, tmp_path):
    model = tiny_model(dtype=dtype)
    values, *_ = sparsify(model, random_masks(model))
    with torch.no_grad():
        values[0] = value
    with pytest.raises(ValueError, match="q_proj.weight are inf or NaN in torch.float"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_move_with_training_are_told_of(training, tmp_path, caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    sparsify(model, random_masks(model, every, density=0.5))
    model.train(training)(torch.randn(8, 4)).sum().backward()
    save_adapter(model, tmp_path / "adapter.safetensors")
    told = [
        record.message for record in caplog.records if "running statistics of 1 batch norms, e.g. 1," in record.message
    ]
    assert len(told) == training


def test_a_head_of_another_shape_is_refused_by_name(tmp_path):
    model = classifier()
    train_classifier(model, random_masks(model))
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = classifier()
    base.score = nn.Linear(24, 5, bias=False)
    with pytest.raises(ValueError, match=r"another base: score.weight has shape \(3, 24\) there and \(5, 24\) here"):
        load_adapter(base, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("train_head_again", [True, False])
def test_training_goes_on_with_a_loaded_head(train_head_again, tmp_path):
    model = classifier()
    train_classifier(model, random_masks(model))
    save_adapter(model, tmp_path / "first.safetensors")
    model = classifier(head_seed=1)
    masks = load_adapter(model, tmp_path / "first.safetensors")
    train_classifier(model, masks, ("score.weight",) if train_head_again else ())
    save_adapter(model, tmp_path / "second.safetensors")
    base = classifier(head_seed=2)
    load_adapter(base, tmp_path / "second.safetensors")
    assert equal_states(base.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_head_beside_entries_of_a_quantised_base(kind, tmp_path):
    folder = tmp_path / "base"
    model = tiny_model("llama", torch.bfloat16, **SIZES)
    model.save_pretrained(folder)
    model = load_quantized(folder, kind)
    values = sparsify(model, random_masks(model))
    dense = [model.lm_head.weight, model.model.norm.weight]
    for parameter in dense:
        parameter.requires_grad_(True)
    train(model, SparseAdamW([*values, *dense], lr=1e-2), 3)
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = load_quantized(folder, kind)
    start = copy.deepcopy(base.lm_head.weight)
    load_adapter(base, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(base(**token_batch(9)).logits, model(**token_batch(9)).logits)
    unload_adapter(base)
    assert torch.equal(base.lm_head.weight, start)


def test_a_tied_weight_trained_whole_goes_by_its_first_name(path):
    model = tiny_model("qwen2")
    values = sparsify(model, random_masks(model))
    model.lm_head.weight.requires_grad_(True)
    train(model, SparseAdamW([*values, model.lm_head.weight], lr=1e-2), 2)
    save_adapter(model, path)
    base = tiny_model("qwen2")
    load_adapter(base, path)
    assert equal_states(base.state_dict(), model.state_dict()) and base.lm_head.weight is base.model.embed_tokens.weight
    assert read_adapter(path).whole == ("model.embed_tokens.weight",)


def test_a_dense_parameter_that_the_file_cannot_hold_is_warned_of(path, caplog):
    model = tiny_model()
    sparsify(model, random_masks(model))
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.double())
    save_adapter(model, path)
    assert "model.norm.weight requires gradients and is left out" in caplog.text
    assert read_adapter(path).whole == ()


# --- Several adapters on one base, unloading, merging ---


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / f"{letter}.safetensors" for letter in "ab"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_switch_and_unload_are_bit_exact(paths, dtype):
    (first, first_masks), (second, _) = (train_adapter(path, seed, dtype) for seed, path in enumerate(paths))
    model = tiny_model(dtype=dtype)
    base = weights_of(model)
    assert load_adapter(model, paths[0], name="a") == first_masks
    assert equal_states(weights_of(model), first) and not equal_states(first, base)
    load_adapter(model, paths[1], name="b")
    assert equal_states(weights_of(model), second)
    for _ in range(2):
        use_adapters(model, {"a": 1.0})
        assert equal_states(weights_of(model), first)
        use_adapters(model, {"b": 1})
        assert equal_states(weights_of(model), second)
        use_adapters(model, {})
        assert equal_states(weights_of(model), base)
    use_adapters(model, {"a": 0.3, "b": 0.6})
    unload_adapter(model, "b")
    unload_adapter(model, "a")
    assert equal_states(weights_of(model), base)
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
    assert equal_states(weights_of(model), first)
    with pytest.raises(ValueError, match="'b'.*'a'"):
        use_adapters(model, {"b": 1.0})


def test_an_adapter_replaces_the_one_of_its_name(paths):
    second, _ = [train_adapter(path, seed) for seed, path in enumerate(paths)][1]
    model = tiny_model()
    base = weights_of(model)
    for path in (paths[0], paths[1]):
        load_adapter(model, path)
    assert equal_states(weights_of(model), second)
    unload_adapter(model)
    assert equal_states(weights_of(model), base)


def test_merging_keeps_the_weights_and_forgets_the_adapters(paths):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    merge_adapters(model)
    assert equal_states(weights_of(model), first)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {}), lambda: merge_adapters(model)):
        with pytest.raises(ValueError, match="No adapter is loaded"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loaded_into_other_masks_is_saved_with_what_they_train(paths, dtype):
    train_adapter(paths[0], 0, dtype)

    def resumed(state=None):
        model = tiny_model(dtype=dtype)
        optimizer = SparseAdamW(sparsify(model, random_masks(model, density=0.05, seed=5)), lr=1e-2)
        load_adapter(model, paths[0])
        if state is None:
            train(model, optimizer, 2)
        else:
            optimizer.load_state_dict(state)
        save_adapter(model, paths[1])
        fresh = tiny_model(dtype=dtype)
        load_adapter(fresh, paths[1])
        assert equal_states(weights_of(fresh), weights_of(model))
        return model, optimizer

    model, optimizer = resumed()
    again, _ = resumed(optimizer.state_dict())
    assert equal_states(weights_of(again), weights_of(model))


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
    assert not equal_states(trained, first)
    for change in (
        lambda: unload_adapter(model),
        lambda: use_adapters(model, {}),
        lambda: load_adapter(model, paths[0]),
    ):
        with pytest.raises(ValueError, match="trained further and not saved.*save_adapter.*merge_adapters"):
            change()
        assert equal_states(weights_of(model), trained)
    sparsify(model, masks)
    save_adapter(model, paths[1])
    desparsify(model)
    unload_adapter(model)
    assert equal_states(weights_of(model), base)
    load_adapter(model, paths[1])
    assert equal_states(weights_of(model), trained)


def test_saving_one_adapter_says_nothing_of_what_another_was_trained_to(paths):
    (_, first), (_, second) = (train_adapter(path, seed) for seed, path in enumerate(paths))
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    load_adapter(model, paths[1], name="b")
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
    with pytest.raises(ValueError, match="trained further and not saved"):
        unload_adapter(model)
    assert equal_states(weights_of(model), trained)
    sparsify(model, first)
    save_adapter(model, paths[0])
    desparsify(model)
    unload_adapter(model)
    assert equal_states(weights_of(model), weights_of(tiny_model()))


def test_an_adapter_that_was_trained_beside_another_holds_that_too(paths, caplog):
    (_, first), (_, second) = (train_adapter(path, seed) for seed, path in enumerate(paths))
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    load_adapter(model, paths[1], name="b")
    use_adapters(model, {"a": 0.5, "b": 1.0})
    train(model, SparseAdamW(sparsify(model, second), lr=1e-2), 2)
    save_adapter(model, paths[1])
    shared = sum(len(first[name]) * first[name].overlap(second[name]) for name in first)
    assert f"also holds {round(first.count - shared):,} entries of other adapters" in caplog.text
    trained, alone = weights_of(model), tiny_model()
    load_adapter(alone, paths[1])
    assert equal_states(weights_of(alone), trained)
    desparsify(model)
    unload_adapter(model)
    assert equal_states(weights_of(model), weights_of(tiny_model()))


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_an_adapter_trained_on_top_of_another_fits_the_base_by_itself(kind, targets, paths, tmp_path, caplog):
    """Its file held its own entries alone, so that no dense base took it, and a quantised one without other layers'."""
    base = tiny_model() if kind == "dense" else load_quantized(save_original(tmp_path / "base"), kind)
    first, model = copy.deepcopy(base), copy.deepcopy(base)
    fine_tune(first, 1, 0.05, lr=3e-2, seed=0)
    save_adapter(first, paths[0])
    load_adapter(model, paths[0])
    masks = random_masks(model, targets, 0.03, seed=1)
    train(model, SparseAdamW(sparsify(model, masks), lr=3e-2), 2)
    assert not caplog.text
    save_adapter(model, paths[1])
    assert caplog.text.count("entries of other adapters") == 1 and "before the masks moved" not in caplog.text
    load_adapter(base, paths[1])
    assert torch.equal(logits(base), logits(model)) and not torch.equal(logits(base), logits(first))


def test_a_base_that_changed_meanwhile_is_not_restored(paths):
    train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    changed = {name: part + 1 for name, part in weights_of(model).items()}
    model.load_state_dict(changed)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {})):
        with pytest.raises(ValueError, match="have changed.*merge_adapters"):
            call()
    assert equal_states(weights_of(model), changed)


def test_an_adapter_of_another_base_leaves_the_loaded_one_and_what_it_was_trained_to(paths):
    train_adapter(paths[0], 0)
    foreign = tiny_model(seed=9)
    sparsify(foreign, random_masks(foreign))
    save_adapter(foreign, paths[1])
    model = tiny_model()
    masks = load_adapter(model, paths[0])
    optimizer = SparseAdamW(sparsify(model, masks), lr=3e-2)
    model(**token_batch(7)).loss.backward()
    optimizer.step()
    save_adapter(model, paths[0])
    desparsify(model)
    trained = weights_of(model)
    for name in ("foreign", "default"):
        with pytest.raises(ValueError, match="fingerprint"):
            load_adapter(model, paths[1], name=name)
        assert equal_states(weights_of(model), trained)


def test_copies_switch_on_their_own(paths):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    base = weights_of(model)
    load_adapter(model, paths[0])
    other = copy.deepcopy(model)
    unload_adapter(other)
    assert equal_states(weights_of(other), base) and equal_states(weights_of(model), first)


@pytest.mark.parametrize("shares", [{"a": float("nan")}, {"a": "1"}, {"a": True}, {"a": float("inf")}])
def test_a_share_that_is_no_finite_number_is_refused_and_changes_nothing(paths, shares):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0], name="a")
    with pytest.raises(ValueError, match="share of 'a'"):
        use_adapters(model, shares)
    assert equal_states(weights_of(model), first)


# --- The folder and its card ---


def test_a_folder_holds_the_adapter_its_metadata_and_a_card(tmp_path):
    folder = tmp_path / "new" / "adapter"
    trained, masks = train_adapter(folder, 0, details={"measure": "gradient", "learning rate": 1e-3})
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "adapter.safetensors"]
    model = tiny_model()
    load_adapter(model, folder)
    assert equal_states(weights_of(model), trained)
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
        sparsify(model, random_masks(model))
        save_adapter(model, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("base_model" in card) == shown and "abc123" in card


RESERVED = ["entries", "density", "masks", "speft_optim", "torch", "base name", "base fingerprint"]


@pytest.mark.parametrize(
    "details, error, message",
    [
        *((details, TypeError, "strings and numbers") for details in ({"a": [1]}, {1: "a"}, {"a": None})),
        *((d, TypeError, rf"details is a {type(d).__name__}; pass a dict") for d in ([("a", 1)], [], "a")),
        *(
            ({"data": "x", key: "x"}, ValueError, rf"details names \['{key}'\].*'entries'.*'base name'.*other names")
            for key in RESERVED
        ),
    ],
)
def test_details_are_a_mapping_of_free_names_to_strings_and_numbers(details, error, message, tmp_path):
    model = tiny_model()
    sparsify(model, random_masks(model))
    with pytest.raises(error, match=message):
        save_adapter(model, tmp_path / "out", details=details)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [[], None, 1])
def test_a_name_that_is_no_string_changes_nothing(paths, name):
    first, _ = train_adapter(paths[0], 0)
    model = tiny_model()
    load_adapter(model, paths[0])
    with pytest.raises(TypeError, match="pass a string"):
        load_adapter(model, paths[0], name=name)
    assert equal_states(weights_of(model), first)


# --- Hostile files ---


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
    assert equal_states(weights_of(model), base)


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
    assert equal_states(weights_of(model), before)
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
        assert equal_states(weights_of(model), base)
    else:
        unload_adapter(model)
        assert equal_states(weights_of(model), base)


def test_a_missing_file_or_folder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="There is no adapter .*safetensors; pass"):
            load_adapter(tiny_model(), path)


# --- Killed while saving ---


def save_for_ever(folder):
    model = tiny_model(hidden_size=256, intermediate_size=1024)
    masks = random_masks(model, density=0.5)
    values = sparsify(model, masks)
    while True:
        with torch.no_grad():
            for value in values:
                value.add_(1)
        masks.save(folder / "masks.safetensors")
        save_adapter(model, folder / "adapter.safetensors")


def test_killed_at_any_moment_the_last_complete_files_load(tmp_path):
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = PROCESSES.Process(target=save_for_ever, args=(folder,))
        process.start()
        deadline = time.monotonic() + 60
        while not (folder / "adapter.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.013 * attempt)
        process.kill()
        process.join()
        model = tiny_model(hidden_size=256, intermediate_size=1024)
        base = weights_of(model)
        masks = load_adapter(model, folder / "adapter.safetensors")
        assert Masks.load(folder / "masks.safetensors") == masks
        # Of one save and not of two: all entries have moved by the same whole number.
        moved = torch.cat([(weights_of(model)[n] - base[n]).flatten()[masks[n].indices] for n in masks]).round()
        assert moved.min() == moved.max() >= 1


# --- Quantised bases ---


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized_model(request, tmp_path_factory):
    return load_quantized(save_original(tmp_path_factory.mktemp("quantised") / "base"), request.param)


def logits(model):
    # With gradients, since without them bitsandbytes' own CPU kernel refuses rows that are no whole number of blocks.
    return model(**token_batch()).logits.detach()


def test_adapters_of_a_quantised_base_load_switch_and_unload_bit_exact(quantized_model, paths):
    model, trained = copy.deepcopy(quantized_model), []
    base = logits(model)
    for seed, path in enumerate(paths):
        other = copy.deepcopy(model)
        trained.append(logits(fine_tune(other, 1, 0.05, lr=3e-2, seed=seed)))
        save_adapter(other, path)
    for seed, path in enumerate(paths):
        load_adapter(model, path, name=str(seed))
        assert torch.equal(logits(model), trained[seed])
    use_adapters(model, {"0": 1.0})
    assert torch.equal(logits(model), trained[0])
    unload_adapter(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("merged", [False, True])
def test_a_quantised_base_with_entries_trained_elsewhere_is_another_base(quantized_model, paths, merged):
    """As on a dense base: the weights are no longer those that the adapter was trained on."""
    model, other = copy.deepcopy(quantized_model), copy.deepcopy(quantized_model)
    wanted = logits(fine_tune(other, 1, 0.05, lr=3e-2, seed=0))
    save_adapter(other, paths[0])
    trained = logits(fine_tune(model, 1, 0.05, lr=3e-2, seed=1))
    if merged:
        desparsify(model)
    with pytest.raises(ValueError, match="weights outside the masks differ"):
        load_adapter(model, paths[0])
    assert torch.equal(logits(model), trained)
    # The adapter's own entries count for nothing, trained or not.
    desparsify(other)
    fine_tune(other, 1, 0.05, lr=3e-2, seed=0)
    load_adapter(other, paths[0])
    assert torch.equal(logits(other), wanted)


def test_a_quantised_base_trained_elsewhere_meanwhile_is_not_restored(quantized_model, paths):
    model, other = copy.deepcopy(quantized_model), copy.deepcopy(quantized_model)
    fine_tune(other, 1, 0.05, lr=3e-2, seed=0)
    save_adapter(other, paths[0])
    load_adapter(model, paths[0])
    trained = logits(fine_tune(model, 1, 0.05, lr=3e-2, seed=1))
    desparsify(model)
    for call in (lambda: unload_adapter(model), lambda: use_adapters(model, {})):
        with pytest.raises(ValueError, match="have changed.*merge_adapters"):
            call()
    assert torch.equal(logits(model), trained)
    merge_adapters(model)
    assert torch.equal(logits(model), trained)
