"""One adapter on its base and on others: bit-equal on the first, refused by the rest, and trained on."""

import copy

import pytest
import torch
import transformers
from conftest import VOCABULARY, tiny_model, token_batch
from quantized_models import SIZES, load_quantized
from safetensors import safe_open
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speft_optim import (
    Mask,
    Masks,
    SparseAdamW,
    desparsify,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
    unload_adapter,
    use_adapters,
)
from speft_optim.checkpoint.adapter_file import fingerprint, read_adapter
from speft_optim.weights.sparse_weight import sparse_weights

EVERY = lambda name, parameter: True  # noqa: E731


def random_masks(model, targets=None, density=0.1):
    return select_masks(model, salience="random", density=density, targets=targets, progress=False)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(path, kind="llama", dtype=torch.float32, targets=None, density=0.1, **config):
    model = tiny_model(kind, dtype, **config)
    masks = random_masks(model, targets, density)
    train(model, SparseAdamW(sparsify(model, masks), lr=1e-2), 3)
    save_adapter(model, path)
    return model, masks


def equal_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, targets, density",
    [
        ("llama", None, 0.1),
        ("qwen2", EVERY, 0.1),
        ("gpt2", EVERY, 0.02),
        ("mixtral", None, 0.3),
        ("llama", ["q_proj"], 1.0),
    ],
)
def test_a_fresh_base_becomes_the_trained_model_bit_for_bit(kind, targets, density, dtype, path):
    model, masks = trained(path, kind, dtype, targets, density)
    base = tiny_model(kind, dtype)
    assert not equal_weights(base, model)
    # Saving, loading and attaching: nothing of it may need gradients or change what requires them.
    required = {name: p.requires_grad for name, p in base.named_parameters()}
    assert load_adapter(base, str(path)) == Masks({name: mask for name, mask in masks.items() if len(mask)})
    assert equal_weights(base, model)
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
    assert equal_weights(other, before) and set(other.__dict__) == set(before.__dict__)


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
        train(one, SparseAdamW(sparsify(one, its_masks), lr=1e-2), 3, start=3)
    assert equal_weights(model, base)
    save_adapter(base, path)
    again = tiny_model()
    load_adapter(again, path)
    assert equal_weights(again, model)


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
    assert equal_weights(base, model)
    for ours, theirs in zip(values, sparse_weights(model), strict=True):
        assert torch.equal(ours, theirs.values)


def test_what_was_changed_last_is_in_the_file(path):
    model = tiny_model()
    values = sparsify(model, random_masks(model))
    with torch.no_grad():
        values[0].fill_(5.0)
    save_adapter(model, path)
    base = tiny_model()
    load_adapter(base, path)
    assert equal_weights(base, model)
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
    model = tiny_model()
    model.config._name_or_path = "org/model"
    values = sparsify(model, random_masks(model))
    wrapped = WRAPPERS[kind](model)
    train(model if kind == "submodule" else wrapped, SparseAdamW(values, lr=1e-2), 2)
    save_adapter(wrapped, path)
    base = tiny_model()
    load_adapter(base, path)
    assert equal_weights(base, model)
    with torch.no_grad():
        assert torch.equal(base(**token_batch(9)).logits, model(**token_batch(9)).logits)
    assert read_adapter(path).base["name"] == "org/model"
    # Onto a wrapped model as well, with the names of what is inside.
    other = tiny_model()
    sparsify(other, random_masks(other))
    load_adapter(WRAPPERS[kind](other), path)
    assert equal_weights(other, model)


def test_an_adapter_is_on_a_compiled_model_and_on_the_model_inside_alike(path):
    trained(path)
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    load_adapter(compiled, path)
    assert not equal_weights(model, tiny_model())
    unload_adapter(model)
    assert equal_weights(model, tiny_model())


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
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nowhere.safetensors")
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
    assert equal_weights(base, model)
    assert read_adapter(folder).whole == ("score.weight",)
    assert "score.weight (72) was trained whole beside them" in (folder / "README.md").read_text()
    use_adapters(base, {"default": 0.5})
    torch.testing.assert_close(base.score.weight, (model.score.weight + before.score.weight) / 2)
    unload_adapter(base)
    assert equal_weights(base, before)
    # Any other weight still tells another base.
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="weights outside the masks differ"):
        load_adapter(base, folder)
    assert torch.equal(base.score.weight, before.score.weight)


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
    assert equal_weights(base, model)


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
    assert equal_weights(base, model) and base.lm_head.weight is base.model.embed_tokens.weight
    assert read_adapter(path).whole == ("model.embed_tokens.weight",)


def test_what_no_file_holds_is_told_of(path, caplog):
    model = tiny_model()
    sparsify(model, random_masks(model))
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.double())
    save_adapter(model, path)
    assert "model.norm.weight is trained beside the masked entries and left out" in caplog.text
    assert read_adapter(path).whole == ()
