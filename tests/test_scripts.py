"""The lines users have around an optimizer, with the real libraries, against REF or torch's AdamW."""

import copy
import io
import math
import os
import pickle
import signal
import warnings
from pathlib import Path

import pytest
import torch
from conftest import (
    OPTIONS,
    VOCABULARY,
    Reference,
    assert_close,
    attach,
    attach_with_reference,
    equal_states,
    every,
    random_masks,
    run_apart,
    skip_before,
    skip_unless_nodes_compile,
    tiny_model,
    token_batch,
    train,
)
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn
from torch.nn.utils import clip_grad_norm_

from speft_optim import Mask, Masks, SparseAdamW, desparsify, select_masks, sparsify
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.compact_values import linked

STEPS = 3


def micro_batches(batch, count):
    """A batch cut into `count` equal ones."""
    return [{key: part[i::count] for key, part in batch.items()} for i in range(count)]


def reference_step(reference, batch, clip=None, loss_scale=1.0):
    (reference.model(**batch).loss * loss_scale).backward()
    return reference.step(clip)


class Samples(torch.utils.data.Dataset):
    """Samples of equal length; those of one step make the same accumulated batch in every order."""

    def __init__(self, count=4):
        self.batch = token_batch(0, batch=count)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, item):
        return {key: part[item] for key, part in self.batch.items()}


def through(how, folder, model, optimizer, batch_size, accumulation, clip, samples):
    """One update by the named kind of script; the norm that it reports."""
    if how == "plain":
        for part in micro_batches(samples.batch, accumulation):
            (model(**part).loss / accumulation).backward()
        norm = clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()
    if how == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        loader = torch.utils.data.DataLoader(samples, batch_size=batch_size)
        prepared, prepared_optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(prepared.parameters(), clip)
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
        return norm.item()
    from transformers import Trainer

    sizes = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    arguments = trainer_arguments(folder, max_steps=1, max_grad_norm=clip, **sizes)
    trainer = Trainer(model, arguments, train_dataset=samples, optimizers=(optimizer, halving(optimizer)))
    trainer.train()
    return trainer.state.log_history[0]["grad_norm"]


SCRIPTS = ["plain", "accelerate", "Trainer"]


# Plain loop


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mixtral"])
def test_plain_loop_with_accumulation_clipping_and_scheduler(kind):
    targets = every if kind in ("qwen2", "mixtral") else None
    model, _, values, optimizer, reference = attach_with_reference(kind, targets=targets)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, reference.optimizer)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            batch = token_batch(step, batch=4)
            for part in micro_batches(batch, 4):
                (model(**part).loss / 4).backward()
            norm = clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
            assert_close(norm, reference_step(reference, batch, clip=0.05), rtol=1e-4)
            for scheduler in schedulers:
                scheduler.step()
    reference.assert_agrees(model, optimizer, values)
    assert all(int(optimizer.state[parameter]["step"]) == STEPS for parameter in values)


@pytest.mark.parametrize("how", SCRIPTS)
def test_gradient_accumulation_steps_once(how, tmp_path):
    """Four micro-batches are one update on their sum, and the moments are those of one batch of all."""
    model, _, values, optimizer, reference = attach_with_reference()
    samples = Samples(8)
    through(how, tmp_path, model, optimizer, batch_size=2, accumulation=4, clip=1e9, samples=samples)
    reference_step(reference, samples.batch)
    reference.assert_agrees(model, optimizer, values)
    assert all(int(optimizer.state[parameter]["step"]) == 1 for parameter in values)


@pytest.mark.parametrize("how", SCRIPTS)
def test_clipping_is_no_silent_no_op(how, tmp_path):
    """With a gradient norm of about 100 and a limit of 1, the first moment has norm 0.1 x 1."""
    model, _, values, optimizer, reference = attach_with_reference()

    def scale(module, args, output):
        output.loss = 1e3 * output.loss

    model.register_forward_hook(scale)
    norm = through(how, tmp_path, model, optimizer, batch_size=4, accumulation=1, clip=1.0, samples=Samples())
    expected = reference_step(reference, Samples().batch, clip=1.0, loss_scale=1e3)
    assert norm == pytest.approx(expected.item(), rel=1e-4) and norm > 50
    reference.assert_agrees(model, optimizer, values)
    moments = torch.cat([optimizer.state[parameter]["exp_avg"] for parameter in values])
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("how", ["plain", "Trainer"])
def test_batches_whose_labels_are_all_ignored_poison_nothing_and_are_told_of_once(how, tmp_path, caplog):
    samples = [{key: part[0] for key, part in token_batch(seed, batch=1).items()} for seed in range(6)]
    for bad in (2, 4):
        samples[bad] = {**samples[bad], "labels": torch.full_like(samples[bad]["labels"], -100)}
    model, _, values, optimizer, reference = attach_with_reference()
    with caplog.at_level("WARNING", logger="speft_optim"):
        if how == "plain":
            for sample in samples:
                batch = {key: part[None] for key, part in sample.items()}
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                reference_step(reference, batch)
            reference.assert_agrees(model, optimizer, values)
        else:
            from transformers import Trainer

            arguments = trainer_arguments(tmp_path, max_steps=6, gradient_accumulation_steps=1)
            Trainer(model, arguments, train_dataset=samples, optimizers=(optimizer, None)).train()
    state = [part for parameter in values for part in optimizer.state[parameter].values()]
    assert all(part.isfinite().all() for part in [*state, *values, *model.parameters()])
    assert len([record for record in caplog.records if record.name.startswith("speft_optim")]) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("on_model", [True, False])
def test_zero_grad_of_model_and_optimizer(set_to_none, on_model):
    model, _, values, optimizer, reference = attach_with_reference()
    for step in range(STEPS):
        (model if on_model else optimizer).zero_grad(set_to_none=set_to_none)
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        reference_step(reference, token_batch(step))
    reference.assert_agrees(model, optimizer, values)


def resume(rank, folder, dtype, order):
    """Load masks and states in this order, and train steps 3 to 5."""
    model = tiny_model("llama", dtype)
    optimizer = SparseAdamW(sparsify(model, Masks.load(folder / "masks.safetensors")), **OPTIONS)
    saved = torch.load(folder / "state.pt", weights_only=True)
    for part in order:
        {"model": model, "optimizer": optimizer}[part].load_state_dict(saved[part])
    train(model, optimizer, 3, first=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "resumed.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")], ids=" first, ".join)
def test_resume_in_a_new_process_is_bit_equal(tmp_path, dtype, order):
    model, masks, values, optimizer = attach(dtype=dtype)
    masks.save(tmp_path / "masks.safetensors")
    for step in range(6):
        if step == 3:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run_apart(resume, tmp_path, dtype, order) == [0]
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert equal_states(resumed["optimizer"], optimizer.state_dict())
    assert equal_states(resumed["model"], dict(model.state_dict()))


# Hugging Face Trainer


def trainer_arguments(folder, **options):
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        **{
            **dict(max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_steps=1),
            **dict(save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True),
            **options,
        },
    )


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "trainer.optimizer"])
def test_trainer_takes_the_optimizer_in_other_ways(tmp_path, way):
    """By its class after `sparsify`, or put in place of the trainer's own; both resume bit-equal."""
    from transformers import Trainer

    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = tiny_model()
        masks = random_masks(model, density=0.05)
        arguments = trainer_arguments(tmp_path, max_steps=4, weight_decay=0.3, save_strategy="steps", save_steps=2)
        if way == "optimizer_cls_and_kwargs":
            sparsify(model, masks)
            chosen = {way: (SparseAdamW, {"lr": 1e-2})}
            trainer = Trainer(model, arguments, train_dataset=Samples(), **chosen)
        else:
            trainer = Trainer(model, arguments, train_dataset=Samples())
            decay = trainer.args.weight_decay
            trainer.optimizer = SparseAdamW(sparsify(trainer.model, masks), lr=1e-2, weight_decay=decay)
        before = {name: part.clone() for name, part in model.state_dict().items()}
        trainer.train(resume_from_checkpoint=resume)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(optimizer, SparseAdamW)
        decayed = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decayed) == len(masks) and set(decayed.values()) == {0.3}
        assert any(not torch.equal(before[name], part) for name, part in model.state_dict().items())
        results.append((dict(model.state_dict()), optimizer.state_dict()))
    assert equal_states(*results)


def test_trainer_logs_no_grad_norm_of_zero(tmp_path):
    from transformers import Trainer

    model, _, values, optimizer, reference = attach_with_reference()
    scheduler = halving(reference.optimizer)
    arguments = trainer_arguments(tmp_path, max_steps=10, max_grad_norm=0.05)
    trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, halving(optimizer)))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(losses) == 10
    for step in range(10):
        # The loss of an accumulated batch is that of the batch: it does not grow with the number of parts.
        assert losses[step] == pytest.approx(reference.model(**Samples().batch).loss.item(), rel=1e-3)
        norm = reference_step(reference, Samples().batch, clip=0.05)
        assert 0 < logged[step] == pytest.approx(norm.item(), rel=1e-3)
        scheduler.step()
    reference.assert_agrees(model, optimizer, values)


def run_trainer(folder, dtype=torch.float32, resume=None):
    """Four steps of two batches, saved after the second and the fourth; all that comes of them."""
    from transformers import Trainer

    model, _, values, optimizer = attach(dtype=dtype)
    arguments = trainer_arguments(
        folder, max_steps=4, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2
    )
    trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, halving(optimizer)))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_resumes_bit_equal(tmp_path, dtype):
    assert equal_states(run_trainer(tmp_path, dtype), run_trainer(tmp_path, dtype, tmp_path / "checkpoint-2"))


def killed_while_saving(rank, folder, name):
    """Train until the file of this name is to be written, write half of it and die."""
    save = torch.save

    def save_or_die(state, file, *args, **kwargs):
        if name in str(file):
            Path(file).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(state, file, *args, **kwargs)

    torch.save = save_or_die
    run_trainer(folder)


@pytest.mark.parametrize("file", ["checkpoint-4/optimizer.pt", "checkpoint-4/scheduler.pt"])
def test_a_trainer_killed_while_it_saves_resumes_from_the_last_complete_checkpoint(tmp_path, file):
    whole = run_trainer(tmp_path / "whole")
    assert run_apart(killed_while_saving, tmp_path / "killed", file) == [-signal.SIGKILL]
    assert (tmp_path / "killed" / file).read_bytes() == b"half of it"
    assert equal_states(whole, run_trainer(tmp_path / "killed", resume=tmp_path / "killed" / "checkpoint-2"))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_loses_no_gradient_to_checkpointing_with_frozen_embeddings(tmp_path, use_reentrant):
    from transformers import Trainer

    model, _, values, optimizer, reference = attach_with_reference("qwen2")
    arguments = trainer_arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, None)).train()
    # Trainer's own schedule falls linearly to zero.
    scheduler = torch.optim.lr_scheduler.LambdaLR(reference.optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        reference_step(reference, Samples().batch, clip=1.0)
        scheduler.step()
    reference.assert_agrees(model, optimizer, values)


def test_eval_loss_is_present_and_the_best_model_is_loaded_at_the_end(tmp_path):
    from transformers import Trainer

    model, _, values, _ = attach()
    # Uphill, so that the best model is not the last.
    optimizer = SparseAdamW(values, lr=1e-2, maximize=True)
    each_step = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    arguments = trainer_arguments(tmp_path, max_steps=6, load_best_model_at_end=True, **each_step)
    datasets = dict(train_dataset=Samples(), eval_dataset=Samples())
    trainer = Trainer(model, arguments, **datasets, optimizers=(optimizer, halving(optimizer)))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6 and min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == min(losses)
    for weight in sparse_weights(model):
        assert torch.equal(weight.base.tensor.flatten()[weight.mask.indices], weight.values)


# TRL


def test_sft_trainer_logs_no_grad_norm_of_zero(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, _, values, optimizer, reference = attach_with_reference()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")
    arguments = SFTConfig(
        **{**trainer_arguments(tmp_path, max_steps=10).to_dict(), "gradient_checkpointing": False},
        max_length=16,
    )
    ids = Samples().batch["input_ids"]
    # No token predicts the first one; older versions of transformers count its label when they average, unless told so.
    labels = ids.clone()
    labels[:, 0] = -100
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
        processing_class=tokenizer,
        optimizers=(optimizer, halving(optimizer)),
    )
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    scheduler = halving(reference.optimizer)
    assert len(logged) == 10
    for step in range(10):
        norm = reference_step(reference, {"input_ids": ids, "labels": ids}, clip=1.0)
        assert 0 < logged[step] == pytest.approx(norm.item(), rel=1e-3)
        scheduler.step()
    reference.assert_agrees(model, optimizer, values)


# accelerate


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero_grad_first", [True, False])
def test_zero_grad_may_stand_anywhere_in_an_accelerate_loop(zero_grad_first, set_to_none):
    """As with torch's AdamW in the same script, also in the last window of an epoch, which is shorter."""
    from accelerate import Accelerator

    model, _, values, optimizer, reference = attach_with_reference()
    reference.stand_alone()
    norms = []
    for trained, its_optimizer in ((model, optimizer), (reference.model, reference.optimizer)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loader = torch.utils.data.DataLoader(Samples(6), batch_size=2)
        prepared, prepared_optimizer, loader, scheduler = accelerator.prepare(
            trained, its_optimizer, loader, halving(its_optimizer)
        )
        for _ in range(STEPS):
            for batch in loader:
                with accelerator.accumulate(prepared):
                    if zero_grad_first:
                        prepared_optimizer.zero_grad(set_to_none=set_to_none)
                    accelerator.backward(prepared(**batch).loss)
                    if accelerator.sync_gradients:
                        norms.append(accelerator.clip_grad_norm_(prepared.parameters(), 0.05))
                    prepared_optimizer.step()
                    scheduler.step()
                    if not zero_grad_first:
                        prepared_optimizer.zero_grad(set_to_none=set_to_none)
    assert len(norms) == 4 * STEPS
    assert_close(torch.stack(norms[: 2 * STEPS]), torch.stack(norms[2 * STEPS :]), rtol=1e-4)
    reference.assert_agrees(model, optimizer, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_save_state_and_load_state_are_bit_equal(tmp_path, dtype):
    from accelerate import Accelerator

    results = []
    for resume in (False, True):
        model, _, values, optimizer = attach(dtype=dtype)
        accelerator = Accelerator(cpu=True)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for step in range(2 * resume, 4):
            accelerator.backward(prepared(**token_batch(step)).loss)
            prepared_optimizer.step()
            prepared_optimizer.zero_grad()
            if step == 1 and not resume:
                accelerator.save_state(str(tmp_path / "state"))
        results.append({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    assert equal_states(*results)


# Saving


def save(how, model, folder):
    if how == "save_pretrained":
        model.save_pretrained(folder)
    elif how == "Trainer":
        from transformers import Trainer

        Trainer(model, trainer_arguments(folder)).save_model(folder)
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.save_state(str(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}


@pytest.mark.parametrize("how", ["save_pretrained", "Trainer", "accelerate"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_saving_drops_no_tensor_that_shares_memory(kind, how, tmp_path):
    """Names and shapes are those of before, tied weights stay tied, and the logits come back bit for bit."""
    before = save(how, tiny_model(kind), tmp_path / "before")
    model, _, values, optimizer = attach(kind, targets=every)
    for step in range(2):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert save(how, model, tmp_path / "after") == before
    loaded = tiny_model(kind, seed=1)
    missing, unexpected = load_model(loaded, tmp_path / "after" / "model.safetensors")
    assert not missing and not unexpected
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind == "qwen2")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "qwen2")
    assert torch.equal(loaded(**token_batch()).logits, model.eval()(**token_batch()).logits)


# Lightning


def lightning_module(model, optimizer, automatic=True):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.automatic_optimization = model, automatic
            self.steps = 0

        def training_step(self, batch, index):
            self.steps += 1
            loss = self.model(**batch).loss
            if not automatic:
                chosen = self.optimizers()
                chosen.zero_grad()
                self.manual_backward(loss)
                chosen.step()
            return loss

        def configure_optimizers(self):
            return optimizer

    return Module()


def fit(folder, module, batches, **options):
    import lightning

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=str(folder), **quiet, **options
    )
    module.train()
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_closure_and_manual_optimisation(tmp_path, automatic):
    model, _, values, optimizer, reference = attach_with_reference()
    module = lightning_module(model, optimizer, automatic)
    batches = [token_batch(seed) for seed in range(5)]
    fit(tmp_path, module, batches)
    for batch in batches:
        reference_step(reference, batch)
    assert module.steps == 5
    reference.assert_agrees(model, optimizer, values)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_accumulates_and_clips(tmp_path):
    model, _, values, optimizer, reference = attach_with_reference()
    whole = [token_batch(seed, batch=4) for seed in range(3)]
    parts = [part for batch in whole for part in micro_batches(batch, 2)]
    fit(tmp_path, lightning_module(model, optimizer), parts, accumulate_grad_batches=2, gradient_clip_val=0.05)
    for batch in whole:
        reference_step(reference, batch, clip=0.05)
    reference.assert_agrees(model, optimizer, values)


# Other optimizers over the compact values


@pytest.mark.parametrize(
    "other, options",
    [
        (torch.optim.AdamW, dict(lr=1e-2, foreach=True)),
        (torch.optim.AdamW, dict(lr=1e-2, fused=True)),
        (torch.optim.SGD, dict(lr=1.0, momentum=0.9, weight_decay=0.01)),
    ],
)
def test_optimizers_of_torch_train_the_values(other, options):
    model = tiny_model()
    masks = random_masks(model, density=0.05)
    reference = Reference(model, masks, other, **options)
    values = sparsify(model, masks)
    optimizer = other(values, **options)
    for step in range(STEPS):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference_step(reference, token_batch(step))
    reference.assert_agrees(model, None, values)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_optimizers_of_bitsandbytes_train_the_values(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, masks, values, _ = attach()
    plain = [nn.Parameter(parameter.detach().clone()) for parameter in values]
    start = copy.deepcopy(dict(model.state_dict()))
    ours, theirs = (getattr(bitsandbytes.optim, name)(over, lr=1e-2) for over in (values, plain))
    for step in range(STEPS):
        model(**token_batch(step)).loss.backward()
        for parameter, copied in zip(values, plain, strict=True):
            copied.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    for parameter, copied in zip(values, plain, strict=True):
        weight = linked(parameter)
        assert torch.equal(parameter, copied) and not torch.equal(weight.base.tensor, start[weight.name])
        dense = start[weight.name].flatten().index_copy(0, weight.mask.indices.long(), copied.detach())
        assert torch.equal(weight.base.tensor.flatten(), dense)


# Averages, loss scaling, copies, compilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponential_moving_average_of_the_model(dtype):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, _, values, optimizer = attach(dtype=dtype)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(STEPS):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        now = [parameter.detach().clone() for parameter in values]
        expected = now if expected is None else [0.5 * (a + b) for a, b in zip(expected, now, strict=True)]
    averaged(**token_batch())
    for weight, value in zip(sparse_weights(averaged.module), expected, strict=True):
        assert_close(weight.values.detach(), value)
        assert torch.equal(weight.base.tensor.flatten()[weight.mask.indices], weight.values.to(dtype))
    assert all(
        linked(parameter).base.tensor.data_ptr() != weight.base.tensor.data_ptr()
        for parameter, weight in zip(values, sparse_weights(averaged.module), strict=True)
    )


def move_masks(model):
    """Move each mask by one entry, as a schedule does between two steps."""
    for weight in sparse_weights(model):
        size = weight.mask.shape.numel()
        moved = Mask(((weight.mask.indices.long() + 1) % size).sort().values, weight.mask.shape)
        weight.change_mask(weight.compare(moved))


def test_an_averaged_model_is_right_after_masks_have_moved(caplog):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, _, values, optimizer = attach()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(6):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        now = {name: part.clone() for name, part in model.state_dict().items()}
        expected = now if step == 0 else {name: 0.5 * (expected[name] + part) for name, part in now.items()}
        if step in (2, 4):
            move_masks(model)
            optimizer = SparseAdamW(values, **OPTIONS)
        if step > 2:
            averaged(**token_batch())
            for name, part in averaged.module.state_dict().items():
                assert_close(part, expected[name])
    assert not caplog.records


@pytest.mark.parametrize("moved", [False, True])
def test_averages_that_are_set_after_masks_have_moved_are_warned_of(moved, caplog):
    model, _, values, optimizer = attach()
    averages = [value.detach().clone() for value in values]
    model(**token_batch()).loss.backward()
    optimizer.step()
    if moved:
        move_masks(model)
    model(**token_batch())
    copy.deepcopy(model)
    assert not caplog.records
    for value, average in zip(values, averages, strict=True):
        value.data.copy_(average)
    model(**token_batch())
    assert ["belong to other entries" in record.message for record in caplog.records] == [True] * moved


def test_swapping_averaged_values_in_and_out_reaches_the_weights():
    model, _, values, optimizer = attach()
    before = model(**token_batch()).logits
    kept = [parameter.detach().clone() for parameter in values]
    with torch.no_grad():
        for parameter in values:
            parameter.copy_(2 * parameter)
    assert not torch.equal(model(**token_batch()).logits, before)
    for parameter, value in zip(values, kept, strict=True):
        parameter.data = value
    assert torch.equal(model(**token_batch()).logits, before)


def test_a_loss_scaler_lets_no_infinite_gradient_through():
    model, _, values, optimizer, reference = attach_with_reference()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        batch, bad = token_batch(step), step == 3
        loss = model(**batch).loss * (1e38 if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), 0.05)
        before = copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert scaler.get_scale() == 2.0**9 and equal_states(before, optimizer.state_dict())
        else:
            assert_close(norm, reference_step(reference, batch, clip=0.05), rtol=1e-4)
    reference.assert_agrees(model, optimizer, values)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_train_on_their_own(how):
    model, _, values, optimizer, reference = attach_with_reference()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    start = copy.deepcopy(dict(model.state_dict()))
    other_values = [weight.values for weight in sparse_weights(other)]
    other_optimizer = SparseAdamW(other_values, **OPTIONS)
    for step in range(STEPS):
        other(**token_batch(step)).loss.backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
        reference_step(reference, token_batch(step))
    reference.assert_agrees(other, other_optimizer, other_values)
    assert equal_states(start, dict(model.state_dict())) and all(parameter.grad is None for parameter in values)
    desparsify(other)
    assert len(sparse_weights(model)) == len(values)


@pytest.mark.parametrize(
    "kind, order",
    [
        ("llama", "sparsified first"),
        ("llama", "compiled first"),
        ("llama", "compiled and run first"),
        ("qwen2", "compiled and run first"),
    ],
)
def test_a_compiled_model_equals_eager_with_every_hook_in_whichever_order(kind, order):
    """Qwen2 has masks on all its weights, the tied embeddings among them."""
    skip_unless_nodes_compile()
    torch._dynamo.reset()
    model = tiny_model(kind)
    compiled = torch.compile(model, backend="aot_eager")
    if order == "compiled and run first":
        compiled(**token_batch()).loss.backward()
        model.zero_grad()
    part = model if order == "sparsified first" else compiled
    masks = random_masks(part, every if kind == "qwen2" else None, density=0.05)
    reference = Reference(model, masks, **OPTIONS)
    values = sparsify(part, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(5):
        compiled(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference_step(reference, token_batch(step))
    reference.assert_agrees(model, optimizer, values)
    with torch.no_grad():
        for parameter in values:
            parameter.mul_(3)
    assert_close(compiled(**token_batch()).logits, model(**token_batch()).logits)
    desparsify(part)
    assert not sparse_weights(model)


@skip_before("torch", "2.11", "breaks the graph at every hook")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_compiled_model_is_one_graph(kind):
    torch._dynamo.reset()
    model = tiny_model(kind)
    sparsify(model, random_masks(model, every if kind == "qwen2" else None, density=0.05))
    explained = torch._dynamo.explain(model)(**token_batch())
    assert explained.graph_break_count == 0, [str(reason.reason) for reason in explained.break_reasons]


@pytest.mark.slow
def test_compiled_model_with_the_default_backend():
    skip_unless_nodes_compile()
    block = dict(num_hidden_layers=1)
    model, masks, values, optimizer = attach(tiny_model(**block), density=0.05)
    reference = Reference(tiny_model(**block), masks, **OPTIONS)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for step in range(2):
        compiled(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference_step(reference, token_batch(step))
    reference.assert_agrees(model, optimizer, values)


# What cannot work says so


def test_offloaded_weights_are_refused(tmp_path):
    from accelerate import cpu_offload, disk_offload

    masks = random_masks(tiny_model(), density=0.05)
    for offloaded in (cpu_offload(tiny_model()), disk_offload(tiny_model(), str(tmp_path))):
        with pytest.raises(ValueError, match="meta device .*without offloading"):
            sparsify(offloaded, masks)
        with pytest.raises(ValueError, match="meta device .*without offloading"):
            select_masks(offloaded, [token_batch()], density=0.05, progress=False)
    model, *_ = attach()
    with pytest.raises(ValueError, match="moved to the meta device"):
        cpu_offload(model)(**token_batch())


def test_layers_dispatched_by_accelerate_train_as_the_reference():
    """As `device_map` does over several devices, each module's forward within accelerate's own: here all on one."""
    from accelerate import dispatch_model

    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    model = dispatch_model(tiny_model(), dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert all("_old_forward" in model.get_submodule(part).__dict__ for part in parts)
    options = dict(density=0.05, scope="global", progress=False)
    masks = select_masks(model, [token_batch(9)], **options)
    assert masks == select_masks(tiny_model(), [token_batch(9)], **options)
    reference = Reference(tiny_model(), masks, **OPTIONS)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(STEPS):
        model(**token_batch(step)).loss.backward()
        clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        reference_step(reference, token_batch(step), clip=0.05)
    reference.assert_agrees(model, optimizer, values)


def test_weights_of_deepspeed_are_refused():
    """ZeRO-3 leaves empty parameters, marked with an id, and trains another copy of them."""
    model = tiny_model()
    masks = random_masks(model, density=0.05)
    model.model.norm.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        sparsify(model, masks)


@pytest.mark.parametrize("change", ["resize", "replace", "reshape"])
def test_a_parameter_replaced_after_attaching_is_named_at_the_first_step(change):
    model, _, values, optimizer = attach("qwen2", targets=["embed_tokens", "mlp.up_proj"])
    if change == "resize":
        model.resize_token_embeddings(VOCABULARY + 8)
    elif change == "replace":
        model.model.layers[0].mlp.up_proj = nn.Linear(24, 40, bias=False)
    else:
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 23))
    match = "embed_tokens.weight.*sparsify again" if change == "resize" else "layers.0.mlp.up_proj.weight.*again"
    with pytest.raises(ValueError, match=match):
        model(**token_batch()).loss.backward()
        optimizer.step()


def test_model_cast_after_attaching_trains_in_its_new_dtype():
    model, _, values, optimizer = attach()
    exact = [parameter.detach().clone() for parameter in values]
    model.to(torch.bfloat16)
    assert all(map(torch.equal, exact, values))
    model(**token_batch()).loss.backward()
    optimizer.step()
    for parameter, start in zip(values, exact, strict=True):
        weight = linked(parameter)
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, start)
        assert torch.equal(weight.base.tensor.flatten()[weight.mask.indices], parameter.to(torch.bfloat16))


# --- Public scripts: a plain loop over (x, y) batches, and a trainer that is given a path ---


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.c_out(nn.functional.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """A GPT without transformers: tied head, logits and loss as a tuple, no labels by name."""

    def __init__(self, width=24, layers=2, heads=4, length=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch(number, size=4, length=12):
    """Random places in a text that has something to learn."""
    data = torch.arange(400).remainder(7).add(torch.arange(400) // 100)
    starts = torch.randint(len(data) - length - 1, (size,), generator=torch.Generator().manual_seed(number))
    rows = torch.stack([data[start : start + length + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def cosine(step, warm=2, most=12, rate=2e-2, least=2e-3):
    if step < warm:
        return rate * (step + 1) / (warm + 1)
    share = (step - warm) / (most - warm)
    return least + 0.5 * (1 + math.cos(math.pi * share)) * (rate - least)


def plain_loop(folder, steps, resume=False, dense=False, accumulation=2):
    """A training script: groups by dimension, accumulation, autocast, clipping, cosine rate, checkpoints."""
    torch.manual_seed(0)
    model = PlainGPT()
    start, state = 0, None
    if resume:
        state = torch.load(folder / "ckpt.pt", weights_only=True)
        model.load_state_dict(state["model"])
        start = state["step"]
    if (folder / "masks.safetensors").exists():
        masks = Masks.load(folder / "masks.safetensors")
    else:
        masks = select_masks(
            model, [get_batch(100 + i) for i in range(4)], density=0.1, loss=lambda m, b: m(*b)[1], progress=False
        )
        masks.save(folder / "masks.safetensors")
    if dense:
        reference = Reference(model, masks, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        reference.stand_alone()
        model, optimizer = reference.model, reference.optimizer
    else:
        values = sparsify(model, masks)
        # Compact values are 1-D: the usual "two dimensions decay, others do not" would decay none of them.
        decay = [p for p in model.parameters() if p.requires_grad and (p.dim() >= 2 or linked(p) is not None)]
        rest = [p for p in model.parameters() if p.requires_grad and not (p.dim() >= 2 or linked(p) is not None)]
        assert len(decay) == len(values) and not rest
        groups = [dict(params=decay, weight_decay=0.1)]
        optimizer = SparseAdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    if resume:
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step)
        for micro in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = model(*get_batch(step * accumulation + micro))
                loss = loss / accumulation
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * accumulation)
        if step == 5 and not dense:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=6), folder / "ckpt.pt")
    return model, masks, losses, optimizer


def test_a_plain_loop_over_tuples_trains_as_a_dense_one_and_resumes_bit_equal(tmp_path, caplog):
    model, masks, losses, optimizer = plain_loop(tmp_path, 12)
    _, _, expected, _ = plain_loop(tmp_path, 12, dense=True)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=2e-2)
    torch.manual_seed(0)
    start, trained = dict(PlainGPT().named_parameters()), model.state_dict()
    for name, parameter in start.items():
        changed = (trained[name] != parameter).flatten().nonzero().squeeze(1)
        inside = masks[name].indices.long() if name in masks else changed[:0]
        assert bool(torch.isin(changed, inside).all())
    resumed, _, rest, again = plain_loop(tmp_path, 12, resume=True)
    assert rest == losses[6:]
    assert equal_states(dict(resumed.state_dict()), dict(trained))
    assert equal_states(again.state_dict(), optimizer.state_dict())
    assert "selected on other weights" not in caplog.text
    # A checkpoint is the plain model's, for a script that knows nothing of masks.
    PlainGPT().load_state_dict(torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])


def run_sft_of_a_path(path, folder, resume=None):
    """A script that gives SFTTrainer the name of a model, so that the model is first there after construction."""
    from byte_tokenizer import byte_tokenizer
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = trainer_arguments(folder, max_steps=4, gradient_accumulation_steps=2).to_dict()
    options |= dict(save_strategy="steps", save_steps=2, learning_rate=1e-2, gradient_checkpointing=False, bf16=False)
    trainer = SFTTrainer(
        str(path),
        args=SFTConfig(**options, max_length=24, model_init_kwargs=dict(dtype="float32")),
        train_dataset=Dataset.from_dict({"text": [f"the answer to {i} is {i + 1}" for i in range(16)]}),
        processing_class=byte_tokenizer(),
    )
    loader = trainer.get_train_dataloader()
    masks = select_masks(trainer.model, loader, density=0.05, max_batches=4, progress=False)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.optimizer = SparseAdamW(sparsify(trainer.model, masks), lr=1e-2)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, masks, before


def test_a_trainer_that_is_given_a_path_takes_the_optimizer_after_construction(tmp_path):
    from byte_tokenizer import VOCABULARY as BYTES

    tiny_model(vocab_size=BYTES).save_pretrained(tmp_path / "base")
    trainer, masks, before = run_sft_of_a_path(tmp_path / "base", tmp_path / "run")
    assert [entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry] == [True] * 4
    after = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for name, weight in before.items():
        changed = (after[name] != weight).flatten().nonzero().squeeze(1)
        assert bool(torch.isin(changed, masks[name].indices.long()).all()) if name in masks else not len(changed)
    assert any(not torch.equal(after[name], before[name]) for name in masks)
    state = trainer.optimizer.state_dict()
    trainer.save_model(tmp_path / "out")
    saved = type(tiny_model()).from_pretrained(tmp_path / "out").state_dict()
    assert equal_states(dict(saved), after)
    resumed, again, _ = run_sft_of_a_path(tmp_path / "base", tmp_path / "run", tmp_path / "run" / "checkpoint-2")
    assert again == masks
    assert equal_states(dict(resumed.model.state_dict()), after)
    assert equal_states(resumed.optimizer.state_dict(), state)
