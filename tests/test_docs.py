"""README and docs: their Python runs, their links lead somewhere, and pictures and tables tell the same numbers."""

import importlib.util
import json
import os
import re
import types
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import tiny_model, token_batch

import speft_optim
from recipes import command_line, memory, presets
from speft_optim import SparseAdamW, save_adapter, select_masks, sparsify
from speft_optim.salience.measures import MEASURES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Rows(torch.utils.data.Dataset):
    """Samples of one batch."""

    def __init__(self):
        self.batch = token_batch(batch=4)

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return {key: value[row] for key, value in self.batch.items()}


def surroundings(folder):
    """The names that a reader of the README has already: a model, batches, masks, and the libraries."""
    import transformers
    from accelerate import Accelerator

    torch.manual_seed(0)
    model, batches = tiny_model(), [token_batch(seed) for seed in range(3)]
    masks = select_masks(model, batches, density=0.05, progress=False)
    names = {name: getattr(speft_optim, name) for name in speft_optim.__all__}
    names |= dict(model=model, batches=batches, masks=masks, base=tiny_model(), torch=torch, Path=Path, dataset=Rows())
    options = dict(per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    names |= dict(arguments=transformers.TrainingArguments(output_dir=folder / "trainer", **options))
    names |= dict(accelerator=Accelerator(cpu=True), loader=torch.utils.data.DataLoader(Rows(), batch_size=2))
    for name in ("Trainer", "AutoModelForCausalLM", "BitsAndBytesConfig"):
        names[name] = getattr(transformers, name)
    return names


def entries(optimizer):
    """A copy of all that an optimizer trains."""
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


def assert_trains(model, optimizer):
    """One step of an ordinary loop changes what the optimizer holds."""
    before = entries(optimizer)
    assert before
    loss = model(**token_batch(5)).loss
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, entries(optimizer), strict=True))


# --- The tables of measures ---


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_table_of_measures_has_every_measure_and_what_it_needs(page):
    table = (ROOT / page).read_text().partition("| measure | score | needs |\n")[2].partition("\n\n")[0]
    needs = {}
    for row in table.splitlines()[1:]:
        names, _, need = (cell.strip() for cell in row.strip("|").split("|"))
        needs |= dict.fromkeys(re.findall(r"`(\w+)`", names), need)
    assert needs.keys() == MEASURES.keys()
    for name, need in needs.items():
        measure = MEASURES[name]
        assert (need.split(",")[0] == "labels", need == "nothing", "twice" in need) == (
            measure.labels,
            not measure.takes_batches,
            measure.passes == 2,
        ), name


# --- The README's Python ---


def test_the_quickstart_runs_as_it_stands_in_a_new_namespace(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(BLOCKS[0], "README.md quickstart", "exec"), names)
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in names["model"].state_dict().items())
    assert all(int(state["step"]) == len(names["batches"]) for state in names["optimizer"].state.values())


def test_the_blocks_are_those_that_the_tests_know():
    known = ["select_masks", "Masks.load", "p.ndim >= 2", "MaskSchedule", "load_adapter", "BitsAndBytesConfig"]
    assert len(BLOCKS) == len(known)
    assert all(word in block for word, block in zip(known, BLOCKS, strict=True))


def run_block(number, names):
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), names)


@pytest.mark.parametrize("again", [False, True])
def test_the_lines_for_resuming_select_once(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path)
    if again:
        names["masks"].save("masks.safetensors")
        names["batches"] = None  # would be needed to select
    selected = names["masks"]
    run_block(1, names)
    assert speft_optim.Masks.load("masks.safetensors") == names["masks"]
    assert (names["masks"] == selected) == again
    assert_trains(names["model"], names["optimizer"])


def test_the_line_for_weight_decay_finds_all_values(tmp_path):
    names = surroundings(tmp_path)
    values = sparsify(names["model"], names["masks"])
    names["model"].model.norm.weight.requires_grad_()
    run_block(2, names)
    assert [id(found) for found in names["decayed"]] == [id(value) for value in values]


def test_the_line_for_moving_masks_and_those_for_adapters_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path)
    run_block(3, names)
    assert_trains(names["model"], names["optimizer"])
    assert names["optimizer"].schedule.steps == 1
    (tmp_path / "out").mkdir()
    save_adapter(names["model"], tmp_path / "out" / "adapter.safetensors")
    before = {name: weight.clone() for name, weight in names["base"].state_dict().items()}
    run_block(4, names)
    assert all(torch.equal(before[name], weight) for name, weight in names["base"].state_dict().items())


def test_the_lines_for_a_quantised_base_run(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path)
    names["folder"] = tmp_path / "base"
    tiny_model(hidden_size=64, intermediate_size=64, dtype=torch.bfloat16).save_pretrained(names["folder"])
    run_block(5, names)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    assert_trains(names["model"], names["optimizer"])


# --- The table of objects and lines ---

HEADER = "| script | where | line |"
TABLE = [row.split(" | ")[-1].strip(" |`") for row in README.partition(HEADER)[2].split("\n\n")[0].splitlines()[2:]]


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed_names():
    """What the lines for several processes import."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    found = [get_optimizer_state_dict, ZeroRedundancyOptimizer, DistributedDataParallel]
    return {part.__name__: part for part in found} | {"dcp": dcp}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("line", TABLE, ids=lambda line: re.sub(r"\W+", "-", line)[:40])
def test_a_line_of_the_table_trains(line, tmp_path, monkeypatch, process_group):
    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path) | distributed_names()
    model, masks = names["model"], names["masks"]
    if "self.trained" in line:
        names["self"] = types.SimpleNamespace(model=model, trained=None)
    if line.startswith("return"):
        names["self"].trained = sparsify(model, masks)
        line = line.replace("return", "optimizer =")
    elif "optimizer_cls_and_kwargs" in line:
        sparsify(model, masks)
    elif line.startswith("trainer.optimizer"):
        names["trainer"] = names["Trainer"](model, names["arguments"], train_dataset=names["dataset"])
    elif "sparsify(" not in line:
        names["optimizer"] = SparseAdamW(sparsify(model, masks), lr=1e-3)
    if "fabric" in line:
        names["fabric"] = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    exec(compile(line, "README.md table", "exec"), names)
    if "trainer" in names:
        before = [weight.clone() for weight in model.state_dict().values()]
        assert names["trainer"].train().global_step == 2
        assert any(not torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))
        return
    if line.startswith("self.trained"):
        names["optimizer"] = SparseAdamW(names["self"].trained, lr=1e-3)
    if line.startswith("dcp.save"):
        assert os.listdir("out/state")
    assert_trains(names["model"], names["optimizer"])


# --- Words, links and numbers ---


def test_the_readme_is_read_in_one_sitting():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    words = " ".join(line for line in prose.splitlines() if not line.startswith("|")).split()
    assert len(words) < 925


def anchors(page):
    """The addresses of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            found = page.parent / path if path else page
            assert found.is_file(), f"{page.name} links to {target}, which is no file"
            assert not heading or heading in anchors(found), f"{page.name} links to {target}, which is no heading"


def test_the_readme_links_to_every_page():
    assert all(f"(docs/{page.name})" in README for page in PAGES[1:])


def test_numbers_of_the_pictures_stand_in_the_tables():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for row in json.loads((ROOT / "docs" / "data" / "cost.json").read_text())["rows"]:
        assert f"{row['step_ms']} " in text and f"{row['peak_gib']:.2f}" in text, row
    for point in json.loads((ROOT / "docs" / "data" / "quality.json").read_text())["methods"]:
        assert f"{mean(point['losses']):.4f}" in text, point


def test_the_picture_of_gpu_memory_shows_the_estimate():
    for row in json.loads((ROOT / "docs" / "data" / "reach.json").read_text())["ours"]:
        for mode in (key for key in row if key not in ("model", "billions")):
            words = ["--preset", row["model"], "--no-moving", "--batch-size=2", "--max-length=2048"]
            words += ["--base-bits", "16" if "bf16" in mode else "4", "--offload" if "host" in mode else "--no-offload"]
            needed = memory.peak_bytes(presets.expected_memory(command_line.parse(words))) + memory.OVERHEAD_BYTES
            assert row[mode] == round(needed / 1e9, 1), (row, mode)


def test_every_picture_is_drawn_and_shown(tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.main(tmp_path)
    drawn = {picture.name for picture in tmp_path.iterdir()}
    kept = {picture.name for picture in (ROOT / "docs").glob("*.png")}
    assert drawn <= kept and len(drawn) == 6
    text = "".join(page.read_text() for page in PAGES)
    assert all(name in text for name in kept)
