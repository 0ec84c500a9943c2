"""The benchmark on several GPUs: its modes train what they should, and run under torchrun."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import device
from processes import assert_passed, failures_of, on_two_gpus
from torch import distributed

from recipes import benchmark, peers, random_models, several, timed_steps

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def losses_of(attach, precision, storage=torch.uint8, cpu_offload=False):
    """Losses of three steps of a mode on the tiny shape, in the model's own call."""
    torch.manual_seed(0)
    model = random_models.build("tiny", precision, CPU, in_host_memory=True, storage=storage)
    model.forward = functools.partial(timed_steps.loss_of, model)
    options = dict(density=0.02, state_bits=8, rank=4, masks="uniform", cpu_offload=cpu_offload)
    arguments = type("Arguments", (), options)
    torch.manual_seed(1)
    optimizer, _ = attach(model, arguments, CPU)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []

    def loss(model, ids):
        losses.append(model(ids))
        return losses[-1]

    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(2))
    row, timed = timed_steps.train(model, optimizer, ids, CPU, 3, loss)
    assert len(timed) == 1 and row["step_ms"] > 0
    return [one.item() for one in losses]


@pytest.fixture
def group(monkeypatch):
    """A process group of this process alone, as torchrun would start it."""
    variables = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    several.start_group("mode", CPU)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(
    ("sharded", "whole", "precision", "storage"),
    [
        ("sharded", "ours", "bf16", torch.uint8),
        ("sharded", "ours", "nf4", torch.float32),
        ("fsdp-lora", "lora", "bf16", torch.uint8),
        ("fsdp-qlora", "qlora", "nf4", torch.float32),
    ],
)
def test_divided_modes_train_as_whole_ones(sharded, whole, precision, storage, cpu_offload, group):
    pytest.importorskip("peft")
    found = losses_of(several.ATTACH[sharded], precision, storage, cpu_offload)
    assert found == losses_of(peers.ATTACH[whole], precision) and found[2] < found[0]


def trained_lora(attach, precision, cpu_offload, batches):
    """Gradient and values of each adapter after two steps, and the kinds of device of what is trained and frozen.

    One step would leave half of the adapters without a gradient, since the other half begins at zero.
    """
    divided = attach is several.attach_sharded_lora
    torch.manual_seed(0)
    # Each in the storage that the benchmark gives it.
    storage = torch.float32 if divided else torch.uint8
    # In host memory blocks are copies of the first one, so that both models have to be built there.
    model = random_models.build("tiny", precision, device(), in_host_memory=True, storage=storage)
    if not divided:
        model.to(device())
    model.forward = functools.partial(timed_steps.loss_of, model)
    torch.manual_seed(1)
    optimizer, _ = attach(model, type("Arguments", (), dict(rank=4, cpu_offload=cpu_offload)), device())
    states = [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
    assert all(state.absmax.device.type == state.state2.absmax.device.type == device().type for state in states)
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(2):
        optimizer.zero_grad()
        for ids in batches:
            (model(ids.to(device())) / len(batches)).backward()
        optimizer.step()
    adapters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    tensors = {name: [gathered(one.grad), gathered(one.detach())] for name, one in adapters.items()}
    kinds = [{one.device.type for one in model.parameters() if one.requires_grad == kind} for kind in (True, False)]
    return tensors, *kinds


def gathered(tensor):
    """All rows of a tensor that may be divided among processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).float()


def divided_lora_takes_the_mean_of_all_gradients(rank):
    """Two processes with a batch each train adapters as one process does with both batches."""
    batches = torch.randint(0, 512, (2, 2, 16), generator=torch.Generator().manual_seed(2))
    for cpu_offload, precision in [(False, "bf16"), (True, "bf16"), (True, "nf4")]:
        options = precision, cpu_offload
        expected, _, _ = trained_lora(peers.attach_lora, *options, batches)
        found, trained, frozen = trained_lora(several.attach_sharded_lora, *options, batches[rank : rank + 1])
        assert trained == {device().type} and frozen == {"cpu" if cpu_offload else device().type}
        assert found.keys() == expected.keys() and len(found) > 0
        for name, pair in expected.items():
            for mine, whole in zip(found[name], pair, strict=True):
                # With the batch of one process alone, gradients would be off by more than half.
                assert (mine - whole).norm() < 0.05 * whole.norm(), (name, options)


SCENARIOS = [divided_lora_takes_the_mean_of_all_gradients]


def test_two_processes_train_lora(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    failures = failures_of(SCENARIOS, tmp_path, "forkserver")
    assert_passed(failures, SCENARIOS[0].__name__)


@on_two_gpus
def test_two_gpus_train_lora(failures_on_gpus):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    assert_passed(failures_on_gpus, SCENARIOS[0].__name__)


def test_adapters_stay_when_the_base_leaves_the_gpu_and_come_with_their_block(group, monkeypatch):
    pytest.importorskip("peft")
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    model = random_models.build("tiny", "bf16", CPU, in_host_memory=True)
    divide, left, ahead = several.divide, [], []

    def divided(modules, device, *, cpu_offload=False):
        if cpu_offload:
            left.extend(one for one in modules.parameters() if not isinstance(one, DTensor))
        divide(modules, device, cpu_offload=cpu_offload)

    monkeypatch.setattr(several, "divide", divided)
    monkeypatch.setattr(FSDPModule, "set_modules_to_forward_prefetch", lambda _, modules: ahead.extend(modules))
    several.attach_sharded_lora(model, type("Arguments", (), dict(rank=4, cpu_offload=True)), CPU)
    assert len(left) > 0 and not any(one.requires_grad for one in left)
    adapters = [module for name, module in model.named_modules() if "lora_" in name and hasattr(module, "weight")]
    assert len(adapters) > 0 and all(any(module is one for one in ahead) for module in adapters)


def test_rates_compare_with_one_gpu_and_errors_stay_in_the_table():
    args = type("Arguments", (), dict(batch=2, seq=1000))
    alone = several.add_rates(dict(mode="one-bf16", step_ms=500.0, peak_gib=17.5, trained=9), args, None)
    divided = dict(mode="sharded-bf16", step_ms=625.0, peak_gib=9.25, trained=9, processes=2)
    divided = several.add_rates(divided, args, alone)
    assert (alone["tokens_per_second_a_gpu"], divided["scaling"]) == (4000.0, 0.8)
    failed = several.add_rates(dict(mode="sharded-nf4", error="out of memory"), args, alone)
    text = several.table([alone, divided, failed])
    assert "| sharded-bf16 | 2 | 9 | 625 | 3200 | 0.80 | 9.25 |" in text and "out of memory" in text


def test_each_process_limits_its_own_gpu(monkeypatch):
    limits = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), dict(total_memory=100))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    timed_steps.limit_memory(25)
    assert limits == [(0.25, torch.device("cuda", 1))]


@pytest.mark.parametrize(
    ("words", "reason"),
    [("--modes one-bf16,one-bf16", "names a mode twice"), ("--cpu-offload", "one-bf16 shards none; leave it out")],
)
def test_modes_that_cannot_be_compared_are_refused(words, reason, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["several", *words.split()])
    assert reason in capsys.readouterr().err


FAILING = """
import sys, time, torch
from recipes import apart, processes
with apart.ending_together("mode") as end:
    if processes.number() == 1:
        if sys.argv[1] == "message":
            end("the base takes 9 GiB\\nof host memory")
        raise torch.OutOfMemoryError("CUDA") if sys.argv[1] == "memory" else KeyError("a shape")
    if sys.argv[1] == "late":
        raise RuntimeError("the other is gone")
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("memory", "out of memory"),
        ("message", "the base takes 9 GiB"),
        ("error", "KeyError: 'a shape'"),
        ("late", None),
    ],
)
def test_all_processes_of_a_mode_end_when_one_fails(how, message):
    """Also one that waits for the others; each says what the first said that failed."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), PYTHONPATH=str(ROOT))
    environment = {**os.environ, **variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", FAILING, how]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1].strip().splitlines()[-1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert said[0] == said[1] and message in (None, said[0])


# Python runs this module, `sitecustomize`, as it starts.
KILLED = """
import os, signal, sys
if sys.orig_argv[-1] == "--in-process" and sys.orig_argv[-2] == "fsdp-qlora-nf4":
    sys.path.insert(0, ROOT)
    import time
    from recipes import processes, timed_steps
    def train(*arguments, **options):
        # gloo would notice that the other process is gone; a collective that runs on the GPU would not.
        os.kill(os.getpid(), signal.SIGKILL) if processes.number() == 1 else time.sleep(600)
    timed_steps.train = train
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_report_once(tmp_path):
    """A mode of which one process is killed, as by a system without memory, ends in both, and the next one begins."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    (tmp_path / "sitecustomize.py").write_text(KILLED.replace("ROOT", repr(str(ROOT))))
    modes = "one-bf16,sharded-bf16,fsdp-lora-bf16,fsdp-qlora-nf4,sharded-nf4"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["recipes.benchmark", "several", "--shape", "tiny", "--batch", "2", "--seq", "16", "--steps", "1"]
    command += ["--density", "0.02", "--modes", modes, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    # Processes that wait for each other until their process group gives up take longer.
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["mode"] for row in rows] == modes.split(",")
    assert json.loads((tmp_path / "several.json").read_text())["rows"] == rows
    one, sharded, lora, killed, quantised = rows
    assert sharded["processes"] == lora["processes"] == 2 and sharded["trained"] == one["trained"] > 0
    assert sharded["scaling"] == round(sharded["tokens_per_second_a_gpu"] / one["tokens_per_second_a_gpu"], 3)
    assert killed == dict(mode="fsdp-qlora-nf4", error="ended by SIGKILL")
    assert quantised["trained"] == one["trained"] and quantised["processes"] == 2
