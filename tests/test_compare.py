"""Methods compared cell by cell, on tiny random models."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from importlib.metadata import version

import pytest
import tiny_job
import torch
from tiny_job import PAD, save_tiny

from recipes import baselines, batch_loss, cells, compare, forgetting, gsm8k, loop, moving, word_problems, workers
from recipes.bench import Bench
from recipes.cells import Cell
from recipes.claims import claimed
from speft_optim import SparseAdamW

pytestmark = pytest.mark.usefixtures("quick_pictures")

EVERY = ["full", *baselines.ADAPTERS, *cells.STATIC]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    save_tiny(root / "model")
    word_problems.write(root / "problems", train=16, test=6)
    return root


def command(folder, out, *more):
    fixed = ["--steps", 3, "--length-pool", 2]
    return tiny_job.command(folder / "model", folder / "problems", out, *fixed, *more)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a comparison of every method, with two seeds for some."""
    out = tmp_path_factory.mktemp("out")
    more = ["--methods", ",".join(EVERY), "--budget-ranks", "2", "--rates", "1e-2"]
    assert compare.main(command(folder, out, *more)) == {"done": len(EVERY), "failed": 0, "left": 0}
    more = ["--methods", "lora,static-snip", "--budget-ranks", "2", "--rates", "1e-2", "--seeds", "0,1"]
    assert compare.main(command(folder, out, *more))["done"] == 4
    return out


def records(out):
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))}


def test_each_cell_leaves_what_a_comparison_needs(finished):
    found = records(finished)
    assert len(found) == len(EVERY) + 2
    one = {name: record for name, record in found.items() if name.endswith("lr0.01_s0")}
    for name, record in one.items():
        assert record["test_loss"] < record["base"]["test_loss"] and record["test_problems"] == 6, name
        assert record["steps"] == len(record["train_loss"]) == 3 and record["skipped_steps"] == 0
        for kind in ("own", "documentation"):
            change = record[f"{kind}_loss"] - record["base"][f"{kind}_loss"]
            assert record["forgetting"][kind] == pytest.approx(change) and change != 0
        assert record["tokens_per_second"] > 0 and set(record["seconds"]) == {"attach", "train", "judge"}
        assert record["machine"]["versions"]["torch"] == version("torch") and record["workers"] == 1
        assert record["peak_bytes"] is None  # of a GPU alone
        if record["method"] in baselines.ADAPTERS:
            assert record["unmerged_test_loss"] == pytest.approx(record["test_loss"], rel=1e-4)
    assert len({record["base"]["test_loss"] for record in found.values()}) == 1
    trained = {name: record["trained"] for name, record in found.items() if "_r2_" in name}
    exact = {count for name, count in trained.items() if not name.startswith("dora")}
    assert len(exact) == 1 and set(trained.values()) - exact != set()


def test_a_cell_is_the_recipes_own_training(folder, finished):
    """Written out once more with the parts of `recipes.loop`."""
    bench = Bench(compare.parse(command(folder, finished, "--methods", "lora", "--rates", "1")), finished)
    torch.manual_seed(0)
    model = bench.pristine
    layers = baselines.linear_layers(model)
    wrapper, _ = baselines.attach_adapter(model, "lora", budget=baselines.trained_values(layers, 2), seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    history = loop.train(
        model, optimizer, bench.samples, steps=3, batch_size=4, pad_id=PAD, seed=1, pool=2, pad_multiple=16
    )
    record = records(finished)["lora_r2_lr0.01_s1"]
    assert history.loss == pytest.approx(record["train_loss"], rel=1e-6)
    merged = wrapper.merge_and_unload()
    assert batch_loss.evaluate(merged, bench.test, batch_size=64, pad_id=PAD) == pytest.approx(
        record["test_loss"], rel=1e-6
    )


def test_cells_of_one_worker_do_not_reach_each_other(folder, finished, tmp_path):
    alone = ["--methods", "static-snip", "--budget-ranks", "2", "--rates", "1e-2"]
    compare.main(command(folder, tmp_path, *alone))
    again, before = records(tmp_path)["static-snip_r2_lr0.01_s0"], records(finished)["static-snip_r2_lr0.01_s0"]
    for key in ("train_loss", "test_loss", "own_loss", "documentation_loss"):
        assert again[key] == before[key]


def test_a_command_that_could_not_begin_does_not_decide_over_the_next_ones_settings(folder, tmp_path):
    words = ["--methods", "static-random", "--budget-ranks", "2", "--rates", "1e-2", "--minutes", "0"]
    with pytest.raises(ValueError, match="is neither a folder nor a data set"):
        compare.main(command(folder, tmp_path, *words[:-2], "--data", tmp_path / "none"))
    assert compare.main(command(folder, tmp_path, *words)) == {"done": 0, "failed": 0, "left": 1}


def test_a_damaged_model_is_refused_before_a_folder_is_made(folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "model", damaged)
    (damaged / "model.safetensors").write_bytes(b"short")
    cells = ["--methods", "lora", "--rates", "1e-2"]
    for main, more in ((compare.main, cells), (gsm8k.main, ["--steps", 1])):
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            main(tiny_job.command(damaged, folder / "problems", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_finished_cells_are_not_trained_again_and_other_settings_are_refused(folder, finished, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(workers, "Bench", refuse)
    more = ["--methods", "lora", "--rates", "1e-2", "--budget-ranks", "2", "--seeds", "0,1"]
    assert compare.main(command(folder, finished, *more)) == {"done": 2, "failed": 0, "left": 0}
    with pytest.raises(ValueError, match="--steps is 4, but the cells in .* were trained with 3"):
        compare.main(command(folder, finished, *more, "--steps", 4))


@pytest.mark.parametrize(("options", "power"), [([], 0.5), (["--magnitude-power", 1.0], 1.0)])
def test_moving_masks_train_the_budget_at_a_time(folder, finished, tmp_path, options, power, monkeypatch):
    """They are those of `recipes.moving`, chosen anew after each of the three steps."""
    attached, attach = [], moving.attach
    monkeypatch.setattr(moving, "attach", lambda *a, **b: attached.append(attach(*a, **b)) or attached[-1])
    more = ["--methods", "moving-snip", "--budget-ranks", 2, "--rates", "1e-2", "--window", 1, "--interval", 1]
    compare.main(command(folder, tmp_path, *more, *options))
    record = records(tmp_path)["moving-snip_r2_lr0.01_s0"]
    ((optimizer, schedule),) = attached
    assert optimizer.param_groups[0]["magnitude_power"] == power and record["density"] > 0.03
    assert schedule.scope == "global" and [event["step"] for event in schedule.history] == [1, 2, 3]
    assert schedule.ever_trained().count > record["trained"] == record["budget"]
    assert record["trained"] == records(finished)["static-snip_r2_lr0.01_s0"]["trained"]


def test_a_cell_that_fails_leaves_its_error_and_is_tried_again_later(folder, tmp_path, monkeypatch):
    step, more = SparseAdamW.step, ["--methods", "static-random,lora", "--rates", "1e-2", "--budget-ranks", "2"]

    def fail(self, closure=None):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SparseAdamW, "step", fail)
    assert compare.main(command(folder, tmp_path, *more)) == {"done": 1, "failed": 1, "left": 0}
    assert "out of memory" in (tmp_path / "cells" / "static-random_r2_lr0.01_s0.error").read_text()
    monkeypatch.setattr(SparseAdamW, "step", step)
    assert compare.main(command(folder, tmp_path, *more)) == {"done": 2, "failed": 0, "left": 0}


def test_no_cell_begins_when_time_is_up(folder, tmp_path):
    more = ["--methods", "lora", "--rates", "1e-2", "--minutes", "0"]
    assert compare.main(command(folder, tmp_path, *more)) == {"done": 0, "failed": 0, "left": 1}


def test_several_workers_share_the_cells(folder, finished, tmp_path):
    more = ["--methods", "lora,static-snip", "--budget-ranks", "2", "--rates", "1e-2", "--seeds", "0,1", "--workers", 2]
    assert compare.main(command(folder, tmp_path, *more)) == {"done": 4, "failed": 0, "left": 0}
    logs = [(tmp_path / f"worker-{number}.log").read_text() for number in range(2)]
    assert "".join(logs).count("== ") == 4
    for name, record in records(tmp_path).items():
        assert record["test_loss"] == pytest.approx(records(finished)[name]["test_loss"], rel=1e-5)
        assert record["workers"] == 2


def test_workers_that_cannot_begin_are_told_of(folder, tmp_path):
    more = ["--methods", "lora", "--rates", "1e-2", "--seeds", "0,1", "--workers", "2"]
    with pytest.raises(ValueError, match="2 of 2 workers ended early, .* exit code 1: ValueError: .*no/such"):
        compare.main([*command(folder, tmp_path, *more), "--data", "no/such"])


def hold(path, held):
    with claimed(path) as mine:
        held.value = int(mine)
        time.sleep(60)


def test_a_claim_is_held_once_and_a_dead_process_gives_its_claim_up(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Value("i", -1)
    process = context.Process(target=hold, args=(tmp_path / "claim", held))
    process.start()
    while held.value < 0:
        time.sleep(0.01)
    with claimed(tmp_path / "claim") as mine:
        assert held.value == 1 and not mine
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with claimed(tmp_path / "claim") as mine:
        assert mine


def test_cells_come_from_a_file_or_from_lists_seeds_last(tmp_path):
    fixed = ["--model", "m", "--data", "d"]
    more = ["--methods", "full,lora", "--budget-ranks", "1,4", "--rates", "1e-3,1e-2", "--seeds", "0,7"]
    listed = compare.cells_of(compare.parse([*fixed, *more]))
    assert len(listed) == 2 * (2 + 4) == len(set(listed)) and [cell.seed for cell in listed] == [0] * 6 + [7] * 6
    assert listed[0] == Cell("full", None, 1e-3, 0) and Cell("lora", 4, 1e-2, 7).name == "lora_r4_lr0.01_s7"
    file = tmp_path / "cells.jsonl"
    file.write_text("\n".join(json.dumps(vars(cell)) for cell in listed))
    assert compare.cells_of(compare.parse([*fixed, "--cells", str(file)])) == listed


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("moving-fisher", 4, 1e-3, 0), "method 'moving-fisher' is unknown"),
        (Cell("static-best", 4, 1e-3, 0), "method 'static-best' is unknown"),
        (Cell("lora", 4, 0.0, 0), "the rate of lora is 0.0"),
        (Cell("lora", 4, 1e-3, -1), "the seed of lora is -1; it must be from 0"),
        (Cell("lora", None, 1e-3, 0), "the budget rank of lora is None"),
        (Cell("full", 4, 1e-3, 0), "the budget rank of full is 4"),
        (Cell("lora", 0, 1e-3, 0), "the budget rank of lora is 0"),
    ],
)
def test_cells_that_cannot_be_trained_are_refused(cell, message, tmp_path):
    file = tmp_path / "cells.jsonl"
    file.write_text(json.dumps(vars(cell)))
    with pytest.raises(ValueError, match=message):
        compare.main(["--model", "m", "--data", "d", "--out", str(tmp_path), "--cells", str(file)])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no cells"),
        ("{}", "line 1 is no cell"),
        ('\n{"method": "lora"}', "line 2 is no cell"),
        ("x", "line 1 is not JSON"),
        ('{"method": "lora", "budget_rank": 4, "rate": "1", "seed": 0}', "its rate is '1'"),
    ],
)
def test_files_of_no_cells_are_refused(text, message, tmp_path):
    file = tmp_path / "cells.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        cells.read_cells(file)


def test_texts_are_made_once_and_are_the_models_own(folder, tmp_path):
    bench = Bench(compare.parse(command(folder, tmp_path, "--methods", "lora", "--rates", "1")), tmp_path)
    model, tokenizer = bench.pristine, bench.tokenizer
    first = forgetting.own_texts(model, tokenizer, seed=0, count=4, length=20)
    state = torch.get_rng_state()
    assert forgetting.own_texts(model, tokenizer, seed=0, count=4, length=20) == first
    assert forgetting.own_texts(model, tokenizer, seed=1, count=4, length=20) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(2 <= len(row) <= 21 and 2 not in row[1:-1] for row in first)
    documentation = forgetting.documentation(tokenizer, seed=0)
    assert len(documentation) == 64 and {len(piece) for piece in documentation} == {256}
    assert "assignment" in tokenizer.decode(sum(documentation, []))
    kept = (tmp_path / "texts.json").read_bytes()
    again = forgetting.load_texts(tmp_path / "texts.json", None, None)
    assert (tmp_path / "texts.json").read_bytes() == kept and again["own"] == bench.texts["own"]
