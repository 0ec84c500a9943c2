"""Streaming blocks through a device gives the masks of a resident model, from memory and from a checkpoint on disk."""

import pytest
import torch
from conftest import tiny_model, token_batch

from speft_optim import select_masks
from speft_optim.offload import streaming
from speft_optim.salience import MEASURES

STREAMED = sorted(set(MEASURES) - {"grasp"})


def batches():
    return [token_batch(seed, ragged=True) for seed in range(3)]


def on_meta(model, folder, max_shard_size="100MB"):
    """The model's checkpoint in `folder`, and its twin on the meta device with buffers in memory."""
    from accelerate import init_empty_weights

    model.save_pretrained(folder, max_shard_size=max_shard_size)
    with init_empty_weights(include_buffers=False):
        twin = type(model)(model.config)
    twin.tie_weights()
    assert all(parameter.is_meta for parameter in twin.parameters())
    return twin.eval()


def state(model):
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    return hooks, [sorted(m.__dict__) for m in model.modules()], [id(p) for p in model.parameters()]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("salience", STREAMED)
def test_masks_equal_those_of_a_resident_model(kind, salience):
    model = tiny_model(kind)
    before = state(model)
    choose = dict(salience=salience, density=0.1, scope="global", progress=False)
    resident = select_masks(model, batches(), **choose)
    assert select_masks(model, batches(), offload="cpu", **choose) == resident
    assert select_masks(model, batches(), offload="cpu", memory_budget=20_000, **choose) == resident
    assert state(model) == before


@pytest.mark.parametrize("salience", ["magnitude", "gradient", "fisher", "synflow", "activation"])
def test_weights_can_be_read_from_a_sharded_checkpoint(tmp_path, salience):
    model = tiny_model("qwen2", torch.bfloat16)
    twin = on_meta(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    choose = dict(salience=salience, density=0.1, progress=False)
    resident = select_masks(model, batches(), **choose)
    assert select_masks(twin.bfloat16(), batches(), offload="cpu", checkpoint=tmp_path, **choose) == resident


def test_embeddings_and_norms_can_be_targets_of_a_streamed_model():
    model = tiny_model("qwen2")
    choose = dict(density=0.2, targets=lambda name, p: "norm" in name or "embed" in name, progress=False)
    assert select_masks(model, batches(), offload="cpu", **choose) == select_masks(model, batches(), **choose)


def test_one_block_at_a_time_has_copies_of_its_weights():
    model = tiny_model("llama", num_hidden_layers=5)
    alive = []

    def note(module, args, output):
        alive.append(sum("weight" in part.__dict__ for part in model.modules()))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(note)
    with streaming(model, "cpu"):
        model(**token_batch())
    assert len(alive) == 5 and set(alive) == {1}


def test_blocks_are_recomputed_so_that_copies_do_not_wait_for_backward():
    model = tiny_model("llama", num_hidden_layers=3)
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o, number=number: calls.append(number))
    select_masks(model, batches()[:1], density=0.1, offload="cpu", progress=False)
    assert calls == [0, 1, 2, 2, 1, 0]


def test_a_streamed_model_is_as_before_after_an_error():
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="no labels"):
        select_masks(
            model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], density=0.1, offload="cpu", progress=False
        )
    assert state(model) == before


def test_what_cannot_be_streamed_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="grasp"):
        select_masks(model, batches(), salience="grasp", density=0.1, offload="cpu")
    with pytest.raises(ValueError, match="only with offload"):
        select_masks(model, batches(), density=0.1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors"):
        select_masks(model, batches(), density=0.1, offload="cpu", checkpoint=tmp_path)
    twin = on_meta(model, tmp_path)
    with pytest.raises(ValueError, match="on the meta device; pass checkpoint"):
        select_masks(twin, batches(), density=0.1, offload="cpu")
    other = on_meta(tiny_model(hidden_size=32), tmp_path / "other")
    with pytest.raises(ValueError, match="has shape"):
        select_masks(other, batches(), density=0.1, offload="cpu", checkpoint=tmp_path)
