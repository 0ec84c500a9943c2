"""Runs of the recipe in two processes take the steps of a run in one, and leave the files of one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_apart
from safetensors.torch import load_file
from tiny_job import command, save_tiny

from recipes import gsm8k, loop, processes, word_problems

ROOT = Path(__file__).parent.parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2]
# With --cpu it would start one process, whatever number it is given.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
# An epoch ends in a shorter window, of which one process has no batch.
STEPS = ["--train-limit", 18, "--held-out", 16, "--steps", 5, "--accumulation", 2, "--lr", 3e-3, "--warmup", 0.2]
MOVING = [*STEPS, "--density", 0.05, "--interval", 2, "--window", 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    save_tiny(folder / "model")
    word_problems.write(folder / "problems", train=64, test=16, seed=0)
    return folder


def words(folders, out, *more):
    return command(folders / "model", folders / "problems", folders / out, *more)


def launch(launcher, *arguments):
    """Run a module or script in two processes, and return the launcher's result."""
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *launcher, *arguments]
    return subprocess.run([str(word) for word in line], cwd=ROOT, env=environment, capture_output=True, text=True)


def content(folder):
    """The weights, the record and the names of the files that a run left."""
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    return weights, json.loads((folder / "run.json").read_text()), sorted(p.name for p in folder.iterdir())


def assert_equal(one, other):
    for part in ("loss", "grad_norm", "tokens", "lr"):
        torch.testing.assert_close(one[1]["history"][part], other[1]["history"][part], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one[1]["held_out_loss"], other[1]["held_out_loss"], atol=1e-5, rtol=0)
    assert one[1]["mask"] == other[1]["mask"] and one[2] == other[2]
    torch.testing.assert_close(one[0], other[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "launcher, more", [(TORCHRUN, MOVING), (ACCELERATE, [*STEPS, "--method", "lora", "--budget-rank", 2])]
)
def test_two_processes_take_the_steps_of_one(launcher, more, folders):
    method = more[-2].strip("-")
    gsm8k.main(words(folders, f"one-{method}", *more))
    done = launch(launcher, "-m", "recipes.gsm8k", *words(folders, f"two-{method}", *more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss  ") == 1, "the first process prints, the other does not"
    one, two = content(folders / f"one-{method}"), content(folders / f"two-{method}")
    assert_equal(one, two)
    assert len(one[1]["history"]["loss"]) == 5
    assert (one[1]["processes"], two[1]["processes"]) == (1, 2)


def run_one_of_two(rank, port, words, dies):
    """A process as a launcher would start it; one that dies does so when it has kept its first state."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    if dies:
        keep = loop._keep_state
        loop._keep_state = lambda *state: (keep(*state), os._exit(1))
    gsm8k.main(words)


def run_two(words, dies=False):
    """Run the recipe in two processes; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_apart(run_one_of_two, port, words, dies, count=2)


def test_a_run_of_which_a_process_died_is_resumed(folders):
    # Within a turn the state that one process saves has the sums of both.
    more = [*MOVING, "--checkpoint-every", 3]
    died = folders / "died"
    assert any(run_two(words(folders, "died", *more), dies=True))
    assert [path.name for path in (died / "resume").iterdir()] == ["step-00000003.safetensors"]
    shutil.copytree(died, folders / "kept")
    assert run_two(words(folders, "died", *more, "--resume")) == [0, 0]
    gsm8k.main(words(folders, "whole", *more))
    assert_equal(content(folders / "whole"), content(died))
    # The sums of two processes are continued by those of one.
    shutil.rmtree(died)
    (folders / "kept").rename(died)
    gsm8k.main(words(folders, "died", *more, "--resume"))
    assert_equal(content(folders / "whole"), content(died))


def test_passes_that_processes_cannot_share_evenly_are_refused(monkeypatch, capsys, folders):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        gsm8k.main(words(folders, "odd", "--accumulation", 3))
    assert "--accumulation 3 forward passes in a step cannot be shared evenly by 2" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes were started for 1 GPUs"):
        processes.check(2)
