"""The README's Python blocks run as they stand."""

import re
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_batch

import speft_optim

README = (Path(__file__).parent.parent / "README.md").read_text()
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
    """The names that a reader of the README has already: a model, batches, and the libraries of the block."""
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model, batches = tiny_model(), [token_batch(seed) for seed in range(3)]
    masks = speft_optim.select_masks(model, batches, density=0.05, progress=False)
    names = dict(model=model, batches=batches, masks=masks, base=tiny_model(), torch=torch, dataset=Rows())
    names["self"] = types.SimpleNamespace(model=tiny_model())
    names |= {name: getattr(speft_optim, name) for name in speft_optim.__all__}
    arguments = dict(per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    names |= dict(Trainer=Trainer, training_arguments=TrainingArguments(output_dir=folder / "trainer", **arguments))
    names |= dict(accelerator=Accelerator(cpu=True), loader=torch.utils.data.DataLoader(Rows(), batch_size=2))
    return names


def test_the_first_blocks_are_the_four_lines_and_the_saving():
    assert "select_masks" in BLOCKS[0] and "SparseAdamW" in BLOCKS[0] and "save_pretrained" in BLOCKS[1]
    assert len(BLOCKS) >= 9


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = surroundings(tmp_path)
    block = BLOCKS[number]
    if not re.search(r"\bsparsify\(model", block):
        names["optimizer"] = speft_optim.SparseAdamW(speft_optim.sparsify(names["model"], names["masks"]), lr=1e-3)
    if "load_adapter" in block:
        (tmp_path / "out").mkdir()
        speft_optim.save_adapter(names["model"], tmp_path / "out" / "adapter.safetensors")
    exec(compile(block, f"README.md block {number}", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].train().global_step == 2
        assert all(int(state["step"]) == 2 for state in names["optimizer"].state.values())
        return
    if "configure_optimizers" in names:
        for _ in range(2):
            optimizer = names["configure_optimizers"](names["self"])
            assert optimizer.param_groups[0]["params"] == names["self"].trained
    if "desparsify(model)" not in block:
        model, before = (
            names["model"],
            [p.detach().clone() for g in names["optimizer"].param_groups for p in g["params"]],
        )
        model(**token_batch(5)).loss.backward()
        names["optimizer"].step()
        now = [p for group in names["optimizer"].param_groups for p in group["params"]]
        assert any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
