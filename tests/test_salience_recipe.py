"""The comparison of measures, and the benchmark of their cost, on tiny models."""

import json
import subprocess
import sys

import pytest
from byte_tokenizer import VOCABULARY, byte_tokenizer
from conftest import tiny_model

from recipes import benchmark, salience
from speft_optim.salience.measures import MEASURES


def test_measures_are_compared_and_drawn(tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny_model(vocab_size=VOCABULARY, max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    command = (
        f"--model {folder} --data generator --samples 6 --batch-size 3 --density 0.05 --max-length 500 --out {out}"
    )
    record = salience.main(command.split())
    assert [row["measure"] for row in record["costs"]] == sorted(MEASURES)
    assert all(row["seconds"] > 0 for row in record["costs"])
    shared = record["overlaps"]
    assert all(shared[name][name] == 1.0 for name in MEASURES)
    assert shared["snip"]["taylor_fo"] > 0.99 and shared["random"]["gradient"] < 0.3
    assert json.loads((out / "salience.json").read_text())["overlaps"] == shared
    assert "snip" in capsys.readouterr().out
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"overlap.png", *(f"mask_{name}.png" for name in MEASURES)}


def test_cost_benchmark_counts_passes(tmp_path):
    command = f"salience --shape tiny --batches 2 --batch 1 --seq 8 --measures plain gradient grasp --out {tmp_path}"
    rows = benchmark.main(command.split())
    assert [row["passes"] for row in rows] == [1, 1, 2]
    lines = (tmp_path / "salience_cost.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    offload = [*command.replace(" --measures plain gradient grasp", "").split(), "--offload", "--memory-limit", "24"]
    (offloaded,) = benchmark.main([*offload, "--memory-budget", "0.0004"])
    assert offloaded["measure"] == "gradient" and offloaded["passes"] == 4
    with pytest.raises(ValueError, match="leave plain or --offload out"):
        benchmark.main([*offload, "--measures", "plain"])
    words = [sys.executable, "-m", "recipes.benchmark", *offload, "--measures", "plain"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: plain passes need the model on the GPU; leave plain or --offload out."
    )
    assert "Traceback" not in ended.stderr
