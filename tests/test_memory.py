"""The loss without logits, the estimate against counts, and the benchmark's own plumbing."""

import json

import pytest
import torch
from conftest import assert_close
from torch import nn

from recipes import benchmark
from recipes.loss import linear_cross_entropy
from recipes.memory import GIB, Shape, estimate


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 61 * 5, 2**20])
def test_linear_cross_entropy_is_cross_entropy(softcap, chunk_bytes):
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 24, requires_grad=True), torch.randn(61, 24)
    targets = torch.randint(0, 61, (13,))
    targets[[2, 7]] = -100
    twin = hidden.detach().clone().requires_grad_()
    loss = linear_cross_entropy(hidden, head, targets, softcap=softcap, chunk_bytes=chunk_bytes)
    logits = twin @ head.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss / 3).backward()
    (expected / 3).backward()
    assert_close(loss.detach(), expected.detach())
    assert_close(hidden.grad, twin.grad, atol=1e-6)


def test_linear_cross_entropy_in_bf16_and_without_gradients():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 24, dtype=torch.bfloat16), torch.randn(61, 24, dtype=torch.bfloat16)
    targets = torch.randint(0, 61, (9,))
    loss = linear_cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert_close(loss, nn.functional.cross_entropy((hidden @ head.t()).float(), targets, reduction="sum"))
    assert linear_cross_entropy(hidden, head, torch.full((9,), -100)).item() == 0


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_estimate_counts_weights_and_entries_exactly(precision):
    from speft_optim import select_masks
    from speft_optim.frozen import quantized_linears

    model = benchmark.build("tiny", precision, torch.device("cpu"))
    masks = select_masks(model, salience="random", density=0.05, targets=benchmark.PROJECTIONS)
    parts = estimate(Shape.of(model.config), bits=benchmark.BITS[precision], entries=masks.count, batch=1, length=8)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for _, module in quantized_linears(model):
        if precision == "int8":
            weights += module.weight.SCB.nbytes
        else:
            state = module.weight.quant_state
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    assert parts["weights"] == pytest.approx(weights, rel=0.01)
    held = 4 * masks.count + sum(mask.nbytes for mask in masks.values())
    assert parts["values and positions"] == pytest.approx(held, rel=0.05)
    assert parts["moments"] == 8 * masks.count


@pytest.mark.parametrize(
    ("name", "bits", "low", "high"),
    [("llama3-8b", 16, 16.4, 17.4), ("llama3-8b", 8, 9.9, 10.9), ("llama3-8b", 4, 6.8, 7.8)],
)
def test_estimate_of_frozen_models_is_near_what_was_measured(name, bits, low, high):
    family, sizes = benchmark.SHAPES[name]
    import transformers

    config = transformers.AutoConfig.for_model(family, **sizes)
    parts = estimate(Shape.of(config), bits=bits, entries=0, batch=2, length=2048)
    assert low < parts["peak"] / GIB < high


def test_estimate_grows_with_everything():
    shape = Shape(2, 128, 192, 128, 64, 512, False, False, 4)
    base = dict(bits=16, entries=1000, batch=2, length=64)
    small = estimate(shape, **base)["peak"]
    for change in (dict(entries=2000), dict(batch=4), dict(length=128), dict(checkpointing=False)):
        assert estimate(shape, **{**base, **change})["peak"] > small
    assert estimate(shape, **base, state_bits=8)["peak"] < small


def test_benchmark_reports_every_mode_also_one_that_fails(tmp_path, capsys):
    command = ["memory", "--shape", "tiny", "--batch", "1", "--seq", "16", "--steps", "1", "--density", "0.02"]
    (row,) = benchmark.main([*command, "--modes", "ours-nf4", "--out", str(tmp_path)])
    assert row["mode"] == "ours-nf4" and row["trained"] > 0 and row["step_ms"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == row
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [row]
    failed = benchmark.run_apart("frozen-bf16", ["memory", "--shape", "unknown"])
    assert "invalid choice" in failed["error"] and failed["error"] in benchmark.table([failed, row])
    with pytest.raises(SystemExit):
        benchmark.main(["memory", "--modes", "none"])


@pytest.mark.parametrize("method", ["frozen", "lora", "ours"])
def test_modes_train_what_they_should(method):
    pytest.importorskip("peft")
    arguments = type("Arguments", (), dict(density=0.02, state_bits=32, rank=4))
    model = benchmark.build("tiny", "nf4", torch.device("cpu"))
    optimizer, held = benchmark.ATTACH[method](model, arguments)
    model.enable_input_require_grads()
    ids = torch.randint(0, 512, (2, 16))
    first = benchmark.loss_of(model, ids).item()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(5):
        benchmark.take_step(model, optimizer, ids, torch.device("cpu"))
    last = benchmark.loss_of(model, ids).item()
    assert (last < first - 0.1 and held > 0) if method != "frozen" else (last == first and held == 0)
