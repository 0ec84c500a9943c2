"""Adapters in the recipe's loop, at equal trained numbers, and the ways in which the loop is made faster."""

import contextlib
import random

import peft
import pytest
import tiny_job
import torch
from byte_tokenizer import byte_tokenizer
from conftest import random_masks, skip_unless_nodes_compile
from safetensors.torch import load_file
from tiny_job import PAD, save_tiny, tiny
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from recipes import baselines, batch_loss, command_line, compiled, data, gsm8k, loop, windows, word_problems
from speft_optim import Masks, SparseAdamW, sparsify

pytestmark = pytest.mark.usefixtures("quick_pictures")

ADAPTERS = list(baselines.ADAPTERS)


@pytest.fixture(scope="module")
def samples():
    return data.tokenize(byte_tokenizer(), word_problems.generate(24, split="train"), max_length=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    save_tiny(root / "model")
    word_problems.write(root / "problems", train=24, test=8)
    return root


def command(folder, out, *more):
    fixed = ["--held-out", 8, "--accumulation", 2]
    return tiny_job.command(folder / "model", folder / "problems", out, *fixed, *more)


def attach(model, method, lr=3e-3):
    if method == "sparse":
        masks = random_masks(model)
        return SparseAdamW(sparsify(model, masks), lr=lr, on_nonfinite="ignore")
    if method != "full":
        budget = baselines.trained_values(baselines.linear_layers(model), 2)
        baselines.attach_adapter(model, method, budget=budget)
    return baselines.optimizer_over(model, lr=lr)


# --- adapters


def test_the_rank_is_the_one_whose_number_of_values_is_nearest():
    layers = baselines.linear_layers(tiny())
    assert {name.split(".")[-1] for name in layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    generator = random.Random(0)
    for method in ADAPTERS:
        counts = {rank: baselines.trained_values(layers, rank, method) for rank in range(1, 40)}
        for budget in (1, *(generator.randrange(1, counts[30]) for _ in range(50))):
            rank = baselines.nearest_rank(layers, budget, method)
            assert abs(counts[rank] - budget) == min(abs(count - budget) for count in counts.values())


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_trains_its_number_in_fp32_and_merges_into_plain_weights(method, dtype, capsys):
    model = tiny().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 35)[None]
    before = model(input_ids=ids).logits.detach()
    budget = baselines.trained_values(baselines.linear_layers(model), 3)
    wrapper, counted = baselines.attach_adapter(model, method, budget=budget, seed=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert counted["trained"] == sum(map(torch.numel, trained)) == pytest.approx(budget, rel=0.2)
    assert f"{counted['trained']:,} trained values" in capsys.readouterr().out
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    loose = 0.05 if dtype is torch.bfloat16 else 1e-5
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, before, rtol=loose, atol=loose)
    with baselines.plain_layers(model):
        plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert plain.keys() == base.keys()
    assert method == "pissa" or all(torch.equal(plain[name], base[name]) for name in base)

    output.loss.backward()
    baselines.optimizer_over(model, lr=1e-2).step()
    after = model(input_ids=ids).logits.detach()
    assert not torch.allclose(after, before, rtol=loose, atol=1e-3)
    merged = wrapper.merge_and_unload()
    assert merged is model and model.state_dict().keys() == base.keys()
    torch.testing.assert_close(model(input_ids=ids).logits, after, rtol=loose, atol=loose)


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="a budget of 3 values is out of reach of lora: rank 1 trains"):
        baselines.attach_adapter(tiny(), "lora", budget=3)


def test_a_peft_without_shira_is_named(monkeypatch, capsys):
    monkeypatch.delattr(peft, "ShiraConfig")
    with pytest.raises(ValueError, match=f"peft {peft.__version__} has no ShiraConfig; install peft 0.21 or later"):
        baselines.check_available("shira")
    with pytest.raises(SystemExit):
        command_line.parse(["--model", "m", "--data", "d", "--method", "shira", "--lr", "1"])
    assert "has no ShiraConfig" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora"], "--method lora has no default rate; give --lr"),
        (["--method", "lora", "--lr", "1e-3", "--state-bits", "8"], "--state-bits belongs to a mask"),
        (["--method", "dora", "--lr", "1e-3", "--base-bits", "8"], "--base-bits 8 is for --method sparse"),
        (["--method", "full", "--budget-rank", "4"], "--budget-rank belongs to a mask"),
        (["--budget-rank", "4", "--density", "0.1"], "not both"),
        (["--budget-rank", "0"], "budget-rank is 0; it must be at least 1"),
        (["--compile", "fast"], "invalid choice: 'fast'"),
        (["--cuda-graphs"], "--cuda-graphs needs a CUDA device"),
    ],
)
def test_bad_commands_are_refused_at_once(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command_line.parse(["--model", "m", "--data", "d", *arguments])
    assert message in capsys.readouterr().err


def test_an_adapter_takes_neither_rate_nor_budget_of_a_preset():
    args = command_line.parse(["--preset", "demo", "--method", "lora", "--lr", "0.5", "--budget-rank", "2"])
    assert (args.lr, args.density, args.budget, args.budget_rank) == (0.5, None, None, 2)


@pytest.mark.parametrize("method", ADAPTERS)
def test_job_with_an_adapter_leaves_an_ordinary_checkpoint(method, folder, tmp_path):
    more = ["--steps", 6, "--lr", 1e-2, "--method", method, "--budget-rank", 2, "--warmup", 0.2]
    record = gsm8k.main(command(folder, tmp_path, *more))
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    assert record["mask"] is None and record["adapter"]["budget"] == pytest.approx(
        record["adapter"]["trained"], rel=0.3
    )
    base, tuned = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "checkpoint"))
    assert {name: tensor.shape for name, tensor in base.items()} == {
        name: tensor.shape for name, tensor in tuned.items()
    }
    differing = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert differing == {f"{name}.weight" for name in baselines.linear_layers(tiny())}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    held_out = data.tokenize(
        byte_tokenizer(template="<s> $A"), data.read_jsonl(folder / "problems" / "test.jsonl"), max_length=512
    )
    loss = batch_loss.evaluate(model, held_out, batch_size=4, pad_id=PAD)
    assert loss == pytest.approx(record["held_out_loss"]["after"], rel=1e-5)


@pytest.mark.parametrize("method", ["pissa", "shira"])
def test_job_with_an_adapter_resumes_bit_equal(method, folder, tmp_path, monkeypatch):
    more = ["--steps", 4, "--lr", 1e-2, "--method", method, "--budget-rank", 2, "--checkpoint-every", 2]
    train = loop.train

    def killed(*args, **options):
        train(*args, **options | {"steps": 2})
        raise KeyboardInterrupt

    # The run that is stopped after two steps takes them at the rates of the whole one.
    monkeypatch.setattr(loop, "rate_factor", lambda *_, **__: 1.0)
    whole = gsm8k.main(command(folder, tmp_path / "whole", *more))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train", killed)
        gsm8k.main(command(folder, tmp_path / "killed", *more))
    resumed = gsm8k.main(command(folder, tmp_path / "killed", *more, "--resume"))
    assert resumed["history"]["loss"] == whole["history"]["loss"]
    files = [load_file(tmp_path / run / "checkpoint" / "model.safetensors") for run in ("whole", "killed")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_mask_takes_the_budget_of_a_rank(folder, tmp_path):
    gsm8k.main(command(folder, tmp_path, "--steps", 1, "--budget-rank", 2))
    expected = baselines.trained_values(baselines.linear_layers(tiny()), 2)
    assert Masks.load(tmp_path / "masks.safetensors").count == expected


def test_autocast_casts_weights_anew_each_step_and_keeps_them_in_fp32(samples):
    losses = {}
    for autocast in (None, torch.bfloat16):
        model = tiny()
        options = dict(steps=8, batch_size=8, pad_id=PAD, warmup=0.0, autocast=autocast)
        losses[autocast] = loop.train(model, attach(model, "full", lr=1e-2), samples, **options).loss
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain, cast = losses.values()
    assert cast != plain and cast == pytest.approx(plain, rel=0.02) and cast[-1] < 0.9 * cast[0]


@pytest.mark.parametrize("method", ADAPTERS)
def test_activations_are_not_cast_to_fp32_for_adapters_and_back(method, samples, monkeypatch):
    def train():
        model, seen = tiny(), set()
        optimizer = attach(model.bfloat16(), method)
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
        options = dict(steps=4, batch_size=8, pad_id=PAD, autocast=torch.bfloat16)
        return loop.train(model, optimizer, samples, **options).loss, seen

    losses, seen = train()
    monkeypatch.setattr(loop, "casts_by_autocast", lambda *_: contextlib.nullcontext())
    expected, before = train()
    assert losses == expected
    if method in ("lora", "rslora", "pissa"):
        assert seen == {torch.bfloat16} and before == {torch.float32}


# --- speed


def test_pools_bring_similar_lengths_together_and_lose_no_sample(samples):
    def epoch(pool, start=0):
        windows = data.sample_windows(samples, 5, seed=1, start=start, pool=pool)
        return [next(windows) for _ in range(5 - start)]

    def padding(windows):
        lengths = [[len(sample.input_ids) for sample in window] for window in windows]
        return sum(max(row) * len(row) - sum(row) for row in lengths)

    key = lambda sample: sample.input_ids  # noqa: E731
    assert sorted(map(key, sum(epoch(5), []))) == sorted(map(key, samples))
    assert padding(epoch(5)) < 0.5 * padding(epoch(1))
    assert epoch(5, start=2) == epoch(5)[2:]
    lengths = [len(window[0].input_ids) for window in epoch(5)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("method", ["sparse", "full"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_padding_to_repeated_shapes_changes_no_loss(method, kind, samples):
    histories = []
    for multiple in (1, 32):
        model = tiny(kind)
        optimizer = attach(model, method)
        histories.append(
            loop.train(model, optimizer, samples, steps=4, batch_size=4, pad_id=PAD, pad_multiple=multiple)
        )
    assert histories[0].loss == pytest.approx(histories[1].loss, rel=1e-5)
    assert histories[0].grad_norm == pytest.approx(histories[1].grad_norm, rel=1e-3)
    assert histories[0].tokens == histories[1].tokens
    window = windows.prepare(samples[:5], 3, pad_id=PAD, device=torch.device("cpu"), multiple=32)
    assert all(batch["input_ids"].shape[1] % 32 == 0 == len(batch["targets"]) % 256 for batch in window.batches)


@pytest.mark.parametrize(
    "method, how", [("sparse", "parts"), ("sparse", "blocks"), ("full", "parts"), ("lora", "blocks")]
)
def test_compiled_models_train_as_plain_ones(method, how, samples):
    if method == "sparse" and how == "blocks":
        skip_unless_nodes_compile()
    torch._dynamo.reset()
    histories, losses = [], []
    for compiles in (False, True):
        model = tiny(num_hidden_layers=2 if how == "parts" else 1)
        optimizer = attach(model, method)
        if compiles:
            compiled.compile_model(model, how, backend="aot_eager")
        options = dict(batch_size=8, pad_id=PAD, pad_multiple=32, pool=3)
        torch._dynamo.utils.counters.clear()
        histories.append(loop.train(model, optimizer, samples, steps=4, **options))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses.append(batch_loss.evaluate(model, samples, batch_size=4, pad_id=PAD))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing is compiled for evaluation
        assert bool(graphs) == compiles and not torch._dynamo.utils.counters["graph_break"]
    compiled.uncompile(model)
    assert (
        batch_loss.evaluate(model, samples, batch_size=4, pad_id=PAD) == losses[1] == pytest.approx(losses[0], rel=1e-5)
    )
    assert histories[0].loss == pytest.approx(histories[1].loss, rel=1e-5)
    assert histories[0].grad_norm == pytest.approx(histories[1].grad_norm, rel=1e-4)
    torch._dynamo.reset()


def test_compiled_parts_are_compiled_once_for_all_blocks_methods_and_models(samples):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for method, layers in (("sparse", 2), ("sparse", 4), ("lora", 3)):
        model = tiny(num_hidden_layers=layers)
        rotary = modeling_llama.apply_rotary_pos_emb
        optimizer = attach(model, method)
        compiled.compile_model(model, backend="aot_eager")
        assert modeling_llama.apply_rotary_pos_emb is not rotary
        loop.train(model, optimizer, samples, steps=2, batch_size=8, pad_id=PAD, pad_multiple=32)
        compiled.uncompile(model)
        assert modeling_llama.apply_rotary_pos_emb is rotary
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 6 and graphs[2] <= graphs[0] + 1
    torch._dynamo.reset()


def test_a_compiled_model_computes_with_values_that_were_changed(samples):
    skip_unless_nodes_compile()
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1)
    optimizer = attach(model, "sparse")
    compiled.compile_model(model, "blocks", backend="aot_eager")
    # One batch, and always with gradients: for others the graphs would be compiled anew.
    batch = data.collate(samples[:4], pad_id=PAD)
    batch_loss.mean_loss(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
        for value in optimizer.param_groups[0]["params"]:
            value.mul_(3)
    loss = batch_loss.mean_loss(model, batch).item()
    compiled.uncompile(model)
    assert loss == pytest.approx(batch_loss.mean_loss(model, batch).item(), rel=1e-5)
    torch._dynamo.reset()


def test_rate_of_tokens_leaves_out_the_first_steps():
    history = loop.History(tokens=[10, 10, 10], step_seconds=[8.0, 1.0, 1.0])
    assert (history.tokens_per_second, history.tokens_per_second_after(1)) == (3.0, 10.0)
    assert history.tokens_per_second_after(3) == 3.0


def test_job_with_the_speed_options(folder, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "compile_model", lambda model, how: asked.append(how))
    record = gsm8k.main(command(folder, tmp_path, "--steps", 12, "--compile", "--length-pool", 3))
    assert asked == ["parts"] and record["arguments"]["pad_multiple"] == 32
    assert record["steady_tokens_per_second"] > 0 and "without the first 10 steps" in capsys.readouterr().out


def test_passes_are_replayed_on_a_gpu_alone(samples):
    model = tiny()
    optimizer = SparseAdamW(sparsify(model, random_masks(model, density=0.05)))
    with pytest.raises(ValueError, match="CUDA graphs need a model on a GPU"):
        loop.train(model, optimizer, samples, steps=1, batch_size=1, pad_id=0, graphs=True)
