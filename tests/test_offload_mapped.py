"""Training a model whose weights stay in a checkpoint's files gives what a resident model gives, bit for bit."""

import copy
import os
import re

import pytest
import torch
from conftest import OPTIONS, Setup, equal_states, every, random_masks, tiny_model, token_batch, train, weights_of
from safetensors.torch import load_file, save_file
from test_offload import on_meta
from test_offload_training import offloaded, state

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.offload.staging import Staging
from speft_optim.weights.attached import sparse_weights

KINDS = ["llama", "qwen2", "gemma2"]


def mapped(model, folder, masks=None, max_shard_size="20KB", resident=0, **options):
    """A twin of a model in memory, trained from the checkpoint that this writes into `folder`."""
    twin = on_meta(model, folder, max_shard_size).to(model.dtype)
    masks = random_masks(model) if masks is None else masks
    values = sparsify(twin, masks, offload="cpu", base=folder, resident_blocks=resident)
    return Setup(twin, masks, values, SparseAdamW(values, **{**OPTIONS, **options}))


def written_bytes(folder):
    """Bytes of a folder's files that the process has in memory of its own, since it wrote to their mapping."""
    written, inside = 0, False
    for line in open("/proc/self/smaps"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f"{folder}{os.sep}" in line
        elif inside and line.startswith("Anonymous:"):
            written += 1024 * int(line.split()[1])
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_from_files_equals_that_of_a_resident_model(kind, dtype, tmp_path):
    """With accumulation and 8-bit moments, from several files, of a tied and an untied head."""
    model = tiny_model(kind, dtype)
    masks = random_masks(model)
    host = mapped(model, tmp_path, masks, state_bits=8)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS, state_bits=8)
    assert train(host.model, host.optimizer, 3, parts=2) == train(model, optimizer, 3, parts=2)
    assert written_bytes(tmp_path) == 0
    assert equal_states(host.optimizer.state_dict(), optimizer.state_dict())
    assert equal_states(host.model.state_dict(), model.state_dict())
    assert written_bytes(tmp_path) > 0, "the state dict holds the trained entries"


def test_masks_are_selected_and_trained_without_the_model_in_memory(tmp_path):
    resident = tiny_model("gemma2")
    twin = on_meta(resident, tmp_path)
    batches = [token_batch(seed) for seed in range(2)]
    choose = dict(density=0.1, progress=False)
    masks = select_masks(twin, batches, offload="cpu", base=tmp_path, **choose)
    assert masks == select_masks(resident, batches, **choose)
    results = []
    for model, options in ((resident, {}), (twin, dict(offload="cpu", base=tmp_path))):
        optimizer = SparseAdamW(sparsify(model, masks, **options), **OPTIONS)
        results.append((train(model, optimizer, 3), optimizer.state_dict(), select_masks(model, batches, **choose)))
    assert equal_states(results[0][:2], results[1][:2]) and results[0][2] == results[1][2]
    assert written_bytes(tmp_path) == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_of_every_kind_may_be_masked(kind, tmp_path):
    """Embeddings, tied or not, norms and biases."""
    model = tiny_model(kind)
    masks = random_masks(model, every)
    host = mapped(model, tmp_path, masks)
    optimizer = SparseAdamW(sparsify(model, masks), **OPTIONS)
    assert train(host.model, host.optimizer, 3) == train(model, optimizer, 3)
    assert equal_states(host.model.state_dict(), model.state_dict())


def test_saved_adapters_and_models_equal_those_of_a_resident_model_and_write_no_page(tmp_path):
    model = tiny_model("qwen2", torch.bfloat16)
    base = tmp_path / "base"
    host = mapped(model, base)
    values = sparsify(model, host.masks)
    results = {"host": (host.model, host.optimizer), "resident": (model, SparseAdamW(values, **OPTIONS))}
    for name, (trained, optimizer) in results.items():
        train(trained, optimizer)
        save_adapter(trained, tmp_path / name / "adapter")
        train(trained, optimizer, first=2)
        export_merged(trained, tmp_path / name / "merged", max_shard_size="20KB")
        export_merged(trained, tmp_path / name / "onto", base=base)
        trained.save_pretrained(tmp_path / name / "model")
        assert written_bytes(base) == 0
        load_adapter(trained, tmp_path / name / "adapter")
        train(trained, optimizer, first=4)
        save_adapter(trained, tmp_path / name / "again")
        trained.eval()
        ids = token_batch()["input_ids"]
        torch.save(trained.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), tmp_path / name / "ids")
    assert written_bytes(base) == 0
    for file in (tmp_path / "resident").rglob("*.safetensors"):
        same = tmp_path / "host" / file.relative_to(tmp_path / "resident")
        assert equal_states(load_file(file), load_file(same)), file
    assert torch.equal(torch.load(tmp_path / "host" / "ids"), torch.load(tmp_path / "resident" / "ids"))


def test_a_run_is_resumed_from_the_files_and_an_adapter(tmp_path):
    model = tiny_model()
    whole = mapped(model, tmp_path / "base")
    train(whole.model, whole.optimizer)
    save_adapter(whole.model, tmp_path / "adapter")
    saved = copy.deepcopy(whole.optimizer.state_dict())
    losses = train(whole.model, whole.optimizer, first=2)
    resumed = mapped(model, tmp_path / "same", whole.masks)
    train(resumed.model, resumed.optimizer, 1, first=7)
    load_adapter(resumed.model, tmp_path / "adapter")
    resumed.optimizer.load_state_dict(saved)
    assert train(resumed.model, resumed.optimizer, first=2) == losses
    assert written_bytes(tmp_path) == 0


def test_trainer_trains_saves_and_resumes_as_with_a_resident_model(tmp_path):
    from test_scripts import Samples, halving, trainer_arguments
    from transformers import Trainer

    results, model = [], tiny_model()
    masks = random_masks(model)
    for folder, checkpoint in (("resident", None), ("files", None), ("files", "checkpoint-2")):
        trained, options = tiny_model(), {}
        if folder == "files":
            base = tmp_path / f"base {checkpoint}"
            trained, options = on_meta(model, base), dict(offload="cpu", base=base)
        optimizer = SparseAdamW(sparsify(trained, masks, **options), **OPTIONS)
        arguments = trainer_arguments(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        optimizers = (optimizer, halving(optimizer))
        trainer = Trainer(trained, arguments, train_dataset=Samples(), optimizers=optimizers)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / folder / checkpoint))
        if folder == "files" and checkpoint is None:
            assert written_bytes(base) == 0
        results.append((weights_of(trained), optimizer.state_dict()))
    assert equal_states(results[0], results[1]) and equal_states(results[1], results[2])


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded_wins_and_the_files_stay_as_they_are(assign, tmp_path):
    model = tiny_model()
    host = mapped(model, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train(host.model, host.optimizer)
    host.model.load_state_dict(tiny_model(seed=1).state_dict(), assign=assign)
    resident = offloaded(tiny_model(seed=1), masks=host.masks)
    assert train(host.model, host.optimizer, 1, first=9)[0] == train(resident.model, resident.optimizer, 1, first=9)[0]
    desparsify(host.model)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("source", ["batches", "training"])
def test_masks_move_as_on_a_resident_model(source, tmp_path):
    data = [token_batch(seed) for seed in range(2)] if source == "batches" else None
    options = dict(progress=False, interval=2) if source == "batches" else dict(window=1, interval=2)
    model, results = tiny_model(), []
    masks = random_masks(model)
    host = mapped(model, tmp_path, masks)
    for trained, optimizer in (
        (host.model, host.optimizer),
        (model, SparseAdamW(sparsify(model, masks), **OPTIONS)),
    ):
        MaskSchedule(trained, optimizer, data, **options)
        results.append((train(trained, optimizer, 7), weights_of(trained), optimizer.state_dict()))
        assert any(weight.mask != masks[weight.name] for weight in sparse_weights(trained))
    assert equal_states(*results)


def test_desparsify_leaves_plain_weights_with_the_trained_values(tmp_path):
    model = tiny_model()
    host = mapped(model, tmp_path)
    optimizer = SparseAdamW(sparsify(model, host.masks), **OPTIONS)
    for trained, step in ((host.model, host.optimizer), (model, optimizer)):
        train(trained, step)
        desparsify(trained)
    assert {type(parameter) for parameter in host.model.parameters()} == {torch.nn.Parameter}
    assert all(parameter.requires_grad for parameter in host.model.parameters())
    assert equal_states(host.model.state_dict(), model.state_dict())


def test_a_tied_weight_may_be_stored_under_another_of_its_names(tmp_path):
    model = tiny_model("qwen2")
    twin = on_meta(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    values = sparsify(twin, random_masks(model), offload="cpu", base=tmp_path)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert torch.equal(twin(**token_batch()).logits, model(**token_batch()).logits) and len(values)


def test_weights_in_memory_and_in_files_may_be_mixed(tmp_path):
    model = tiny_model()
    twin = on_meta(model, tmp_path)
    twin.model.layers[1].mlp.load_state_dict(model.model.layers[1].mlp.state_dict(), assign=True)
    optimizer = SparseAdamW(sparsify(twin, random_masks(model), offload="cpu", base=tmp_path), **OPTIONS)
    resident = SparseAdamW(sparsify(model, random_masks(model)), **OPTIONS)
    assert train(twin, optimizer, 3) == train(model, resident, 3)


def without_folder(twin, folder):
    return None


def of_other_dtype(twin, folder):
    twin.bfloat16()
    return folder


def with_missing_tensor(twin, folder):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    return folder


def of_other_shape(twin, folder):
    twin.model.norm.weight = torch.nn.Parameter(torch.empty(7, device="meta"))
    return folder


def with_buffer_on_meta(twin, folder):
    twin.model.rotary_emb.to("meta")
    return folder


REFUSED = {
    "is on the meta device .* pass offload='cuda' and base=folder": without_folder,
    "is in torch.float32 in .* and in torch.bfloat16 in the model": of_other_dtype,
    "model.norm.weight is on the meta device and .* has no tensor of that name": with_missing_tensor,
    r"model.norm.weight has shape \(7,\) in the model and \(24,\) in": of_other_shape,
    "Buffer model.rotary_emb.* is on the meta device": with_buffer_on_meta,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_do_not_fit_their_files_are_refused_before_anything_changes(reason, tmp_path):
    model = tiny_model()
    masks, twin = random_masks(model), on_meta(model, tmp_path)
    folder = REFUSED[reason](twin, tmp_path)
    before = state(twin)
    with pytest.raises(ValueError, match=reason):
        sparsify(twin, masks, offload="cpu", base=folder)
    assert state(twin) == before


def test_a_refusal_after_the_files_were_mapped_leaves_the_model_on_the_meta_device(tmp_path):
    model = tiny_model()
    masks, twin = random_masks(model), on_meta(model, tmp_path)
    twin.model.layers[0].compile()
    before = state(twin)
    with pytest.raises(ValueError, match="is compiled"):
        sparsify(twin, masks, offload="cpu", base=tmp_path)
    assert state(twin) == before and all(parameter.is_meta for parameter in twin.parameters())


@pytest.mark.parametrize("resident", [0, 1, 4])
def test_an_error_of_the_copying_thread_is_raised_and_the_block_copied_again(resident, tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=4)
    host = mapped(model, tmp_path, resident=resident)
    optimizer = SparseAdamW(sparsify(model, host.masks), **OPTIONS)
    copy, left = Staging.copy_, [20]

    def fail(staging, out, source):
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the disk is gone")
        copy(staging, out, source)

    monkeypatch.setattr(Staging, "copy_", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        host.model(**token_batch())
    assert train(host.model, host.optimizer, 3) == train(model, optimizer, 3)


def test_copies_longer_than_a_buffer_are_cut(monkeypatch):
    monkeypatch.setattr("speft_optim.offload.staging._BYTES", 64)
    staging, source = Staging(torch.device("cpu"), torch.cpu.Stream()), torch.randn(7, 11)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = torch.zeros(7, 11, dtype=dtype)
        staging.submit(lambda out=out: staging.copy_(out, source)).result()
        assert torch.equal(out, source.to(dtype))
    staging.copy_(out := torch.zeros(11, 7), source.t())
    assert torch.equal(out, source.t())
    staging.copy_(torch.zeros(0), torch.zeros(0))
    staging.close()
