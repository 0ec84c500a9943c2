"""Names are the plain model's, whatever wraps the model or its blocks, in any order."""

import contextlib
import functools
import itertools
import sys

import pytest
import torch
from conftest import Reference, random_masks, skip_unless_nodes_compile, tiny_model, token_batch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import LlamaForCausalLM

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
    unload_adapter,
)
from speft_optim.weights.wrappers import plain_modules, unwrapped

with contextlib.suppress(ImportError):
    # Fabric knows only what is compiled after its import.
    import lightning.fabric  # noqa: F401


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_fabric(model):
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu", devices=1).setup(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def with_blocks(wrap):
    def change(model):
        layers = unwrapped(model).model.layers
        for number in range(len(layers)):
            layers[number] = wrap(layers[number])
        return model

    return change


def small_model(**sizes):
    """A model without a cache, which blocks that are computed again would fill twice."""
    return tiny_model(use_cache=False, **sizes)


def checkpointed(block):
    return checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)


OUTER = {"ddp": DistributedDataParallel, "compiled": compiled, "fabric": by_fabric}
BLOCKS = {"compiled": with_blocks(compiled), "checkpointed": with_blocks(checkpointed)}
WRAPPERS = {
    **OUTER,
    "data parallel": DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    **{f"{a} in {b}": lambda m, a=a, b=b: OUTER[b](OUTER[a](m)) for a, b in itertools.permutations(OUTER, 2)},
    **{f"blocks {kind}": wrap for kind, wrap in BLOCKS.items()},
    "blocks compiled and checkpointed": lambda m: with_blocks(lambda block: checkpointed(compiled(block)))(m),
    "blocks checkpointed in ddp": lambda m: DistributedDataParallel(BLOCKS["checkpointed"](m)),
}


def plain_state(model):
    """The weights by plain names."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in plain_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and "sparse_weight" not in path
    }


def assert_equal_weights(model, other):
    left, right = plain_state(model), plain_state(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_selected_on_trained_saved_and_loaded_as_the_plain_one(kind, tmp_path):
    if "compiled" in kind:
        skip_unless_nodes_compile()
    # A compiler takes seconds a layer.
    make = functools.partial(small_model, num_hidden_layers=1 if "compiled" in kind else 2)
    plain, batch = make(), [token_batch()]
    expected = select_masks(plain, batch, density=0.1, progress=False)
    reference = Reference(plain, expected, lr=1e-2, weight_decay=0.1)
    model = WRAPPERS[kind](make())
    masks = select_masks(model, batch, density=0.1, progress=False)
    assert masks == expected and list(masks) == list(expected)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        model(**token_batch(step)).loss.backward()
        reference.model(**token_batch(step)).loss.backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for name, weight in plain_state(model).items():
        torch.testing.assert_close(weight, dict(reference.model.named_parameters())[name].detach())
    schedule = MaskSchedule(model, optimizer, batch, interval=50, progress=False)
    assert list(schedule.reselect()) == list(expected)
    save_adapter(model, tmp_path / "adapter.safetensors")
    desparsify(model)
    assert set(load_adapter(plain, tmp_path / "adapter.safetensors")) <= set(expected)
    assert_equal_weights(plain, model)
    # And the other way round: what the plain model saved, into a wrapped one.
    other = WRAPPERS[kind](make())
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert_equal_weights(other, plain)
    unload_adapter(other)
    assert_equal_weights(other, make())


@pytest.mark.parametrize("kind", ["ddp", "fabric", "compiled in fabric", "blocks compiled", "blocks checkpointed"])
def test_a_merged_checkpoint_has_the_plain_names(kind, tmp_path):
    if "compiled" in kind:
        skip_unless_nodes_compile()
    model = WRAPPERS[kind](small_model(num_hidden_layers=1))
    values = sparsify(model, select_masks(model, [token_batch()], density=0.1, progress=False))
    optimizer = SparseAdamW(values, lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    export_merged(model, tmp_path / "merged", dtype=torch.float32)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_equal_weights(loaded, model)


@pytest.mark.parametrize("wrap", BLOCKS)
def test_blocks_may_be_wrapped_after_values_were_attached(wrap, tmp_path):
    if wrap == "compiled":
        skip_unless_nodes_compile()
    model = small_model(num_hidden_layers=1)
    values = sparsify(model, select_masks(model, [token_batch()], density=0.1, progress=False))
    BLOCKS[wrap](model)
    optimizer = SparseAdamW(values, lr=1e-2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path / "adapter.safetensors")
    base = small_model(num_hidden_layers=1)
    load_adapter(base, tmp_path / "adapter.safetensors")
    assert_equal_weights(base, model)
    desparsify(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_selection_and_loss_see_the_model_without_wrappers_so_that_nothing_is_exchanged():
    inner = tiny_model()
    model = DistributedDataParallel(inner)
    model.register_forward_pre_hook(lambda *_: pytest.fail("called through the wrapper"))
    seen = []

    def loss(model, batch):
        seen.append(model)
        return model(**batch).loss

    for salience in ("gradient", "activation"):
        select_masks(model, [token_batch()], salience=salience, density=0.1, progress=False)
        select_masks(model, [token_batch()], salience=salience, density=0.1, loss=loss, progress=False)
    assert set(seen) == {inner}


def test_values_that_no_wrapper_would_average_are_refused(monkeypatch):
    model = DistributedDataParallel(tiny_model())
    masks = random_masks(model, density=0.1)
    # Of this one process that says it is one of two.
    monkeypatch.setattr(sys.modules["speft_optim.sparsify"], "together", contextlib.nullcontext)
    monkeypatch.setattr(type(model.process_group), "size", lambda self: 2)
    with pytest.raises(ValueError, match="DistributedDataParallel of 2 processes.*sparsify first"):
        sparsify(model, masks)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_that_only_calls_a_child_module_is_no_wrapper():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

        def forward(self, x):
            return self.module(x)

    assert list(select_masks(Model(), salience="magnitude", density=0.5, targets=["module"])) == ["module.weight"]


def test_a_schedule_finds_the_model_inside_a_module_of_the_users():
    class Module(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    model = tiny_model()
    masks = select_masks(model, [token_batch()], density=0.1, progress=False)
    optimizer = SparseAdamW(sparsify(model, masks))
    schedule = MaskSchedule(Module(model), optimizer, [token_batch()], progress=False)
    assert schedule.reselect() == masks
