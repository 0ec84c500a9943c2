"""The comparison of methods: equal budgets, cells that are done once, and what they came to."""

import json
import os

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, token_batch

from recipes import baselines, compare, comparison, data

TARGETS = [f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint with its tokenizer, and problems."""
    root = tmp_path_factory.mktemp("comparison")
    model = tiny_model("qwen2", vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    data.write(root / "problems", train=8, test=4)
    return root


def arguments(folders, out, *more):
    fixed = ["run", "--model", folders / "model", "--data", folders / "problems", "--out", out, "--batch-size", 4]
    return [str(part) for part in [*fixed, "--epochs", 1, "--calibration-samples", 4, *more]]


@pytest.mark.parametrize("method", baselines.METHODS)
def test_baselines_train_the_numbers_of_their_rank_and_merge_into_the_model(method):
    pytest.importorskip("peft")
    model = tiny_model()
    shapes = [(m.out_features, m.in_features) for m in map(model.get_submodule, TARGETS)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped = baselines.attach(model, method, 2, TARGETS, seed=1)
    count = baselines.numbers_of_rank(shapes, 2)
    assert baselines.trained_numbers(wrapped) == count + (sum(rows for rows, _ in shapes) if method == "dora" else 0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        wrapped(**token_batch(step)).loss.backward()
        optimizer.step()
    wrapped.eval()
    expected = wrapped(**token_batch()).logits
    merged = baselines.merge(wrapped)
    torch.testing.assert_close(merged(**token_batch()).logits, expected, rtol=1e-4, atol=1e-4)
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    assert {n for n in before if not torch.equal(after[n], before[n])} == {f"{name}.weight" for name in TARGETS}


@pytest.mark.parametrize("rank", [1, 3, 32])
def test_rank_and_numbers_are_inverse(rank):
    shapes = [(8, 20), (30, 5)]
    assert baselines.numbers_of_rank(shapes, rank) == rank * 63
    assert baselines.rank_of_numbers(shapes, rank * 63 + 20) == rank
    assert baselines.rank_of_numbers(shapes, 1) == 1


def test_unknown_baselines_and_cells_are_refused():
    with pytest.raises(ValueError, match="'loro' is no baseline; choose from lora, rslora"):
        baselines.attach(tiny_model(), "loro", 2, TARGETS)
    with pytest.raises(ValueError, match="'static-luck' is no method"):
        compare.parse_cell("static-luck rank=4 rate=1e-3")
    with pytest.raises(ValueError, match="has 'ranks'; a cell takes"):
        compare.parse_cell("lora ranks=4")
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        compare.parse_cell("lora rank=0 rate=1e-3")


def test_every_method_runs_and_a_second_command_trains_nothing_again(folders, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    out = tmp_path / "cells"
    lines = [f"{method} rank={0 if method == 'full' else 2} rate=1e-3" for method in compare.METHODS]
    lines += ["moving-snip rank=2 rate=1e-2 power=0.5 window=1 groups=2  # moves within these few steps", ""]
    (tmp_path / "cells.txt").write_text("\n".join(lines))
    compare.main(arguments(folders, out, "--cells", tmp_path / "cells.txt"))
    printed = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in out.glob("*_s0.json")]
    assert len(results) == len(compare.METHODS) + 1
    shapes = [p.shape for n, p in tiny_model("qwen2").named_parameters() if n.endswith("_proj.weight")]
    budget = 2 * sum(map(sum, shapes))
    for result in results:
        cell = compare.Cell(**result["cell"])
        if cell.method not in ("full", "dora"):
            assert result["trained"] == budget, cell
        assert result["loss"] < result["before"]["loss"] and result["changed"] > 0
        if cell.is_masked and not cell.method.startswith("moving-"):
            assert result["changed"] <= budget / sum(
                p.numel() for p in tiny_model("qwen2", vocab_size=300).parameters()
            )
        assert cell.method in printed
    assert (out / "comparison.png").stat().st_size > 10_000 and (out / "table.md").read_text().strip() in printed
    assert not list(out.glob(".*.claim"))
    monkeypatch.setattr(compare.Bench, "run", lambda self, cell: pytest.fail("trained again"))
    compare.main(arguments(folders, out, "--cells", tmp_path / "cells.txt"))


def test_workers_share_the_cells_and_begin_none_after_their_time(folders, tmp_path):
    out = tmp_path / "cells"
    more = ["--methods", "static-random", "--ranks", "1", "--rates", "1e-3,1e-2", "--seeds", "0,1", "--workers", "2"]
    with pytest.raises(ValueError, match="No cell in"):
        compare.main(arguments(folders, out, *more, "--minutes", "0"))
    compare.main(arguments(folders, out, *more))
    assert len(list(out.glob("*_s?.json"))) == 4


def test_a_cell_is_one_process_at_a_time_and_free_again_when_that_is_gone(tmp_path):
    cell, claims = compare.parse_cell("lora rank=4 rate=1e-3 seed=2"), compare.Claims(tmp_path)
    assert claims.take(cell) and not claims.take(cell)
    claims.give_back(cell)
    (tmp_path / f".{cell.name}.claim").write_text(str(2**22 + os.getpid()))  # above the largest process number
    assert claims.take(cell)
    claims.give_back(cell)
    compare.result_path(tmp_path, cell).write_text("{}")
    assert not claims.take(cell)


def results_of(losses, method="lora", rank=4):
    peak = {"card": None, "host": 10**9}
    before = {"loss": 2.0, "own_texts": 2.0, "docs_texts": 3.0}
    for rate, per_seed in losses.items():
        for seed, loss in enumerate(per_seed):
            cell = vars(compare.Cell(method, rank, rate, seed))
            yield dict(
                cell=cell, loss=loss, trained=1000, changed=0.5, before=before, own_texts=2.25, docs_texts=2.5,
                peak_bytes=peak, tokens_per_second=100.0,
            )  # fmt: skip


def test_the_table_has_the_best_rate_of_each_method_and_says_whether_it_is_bracketed(tmp_path):
    both = [*results_of({1e-3: [0.7, 0.8], 3e-3: [0.6, 0.64], 1e-2: [0.9]})]
    both += results_of({1e-3: [0.5], 3e-3: [0.55]}, "static-snip")
    for result in both:
        compare.result_path(tmp_path, compare.Cell(**result["cell"])).write_text(json.dumps(result))
    rows = comparison.table(comparison.read(tmp_path)).splitlines()[2:]
    assert rows == [
        "| static-snip | 1,000 | (0.001) | 1 | 0.5000 | nan | +0.250 | -0.500 | 50.00% | 1.00 | 100 |",
        "| lora | 1,000 | 0.003 | 2 | 0.6200 | 0.0283 | +0.250 | -0.500 | 50.00% | 1.00 | 100 |",
    ]
    (tmp_path / "lora_r4_0.001_s0.json").write_text("{")
    with pytest.raises(ValueError, match="lora_r4_0.001_s0.json is damaged"):
        comparison.read(tmp_path)
