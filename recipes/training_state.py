"""The state of an unfinished training in one file, from which it continues bit for bit.

It holds the trained tensors, the optimizer, the random generators and the history. A mask's values are in the state of
its optimizer; entries that left a moving mask keep their trained values in the weights, and are saved too. It is a
safetensors file, so reading it runs no code and takes no more memory than its size; all that is not a tensor is JSON in
its metadata. A checksum over everything detects a damaged file, which is refused before model or optimizer are changed.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from recipes.nested_tensors import digest, from_plan, to_plan
from recipes.random_state import random_state, restore_random_state
from speft_optim import Mask, SparseAdamW
from speft_optim.files import write_safetensors

FORMAT = "speft_optim.training_state/2"
# Reading a damaged or foreign file can raise these.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


@dataclass
class History:
    """Numbers of each training step, and the counts of skipped batches and steps."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    skipped_batches: int = 0
    skipped_steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, with prompts and without padding."""
        return self.tokens_per_second_after(0)

    def tokens_per_second_after(self, first: int) -> float:
        """Return tokens per second without the first steps, which include one-time costs, if there are others."""
        first = first if first < len(self.tokens) else 0
        return sum(self.tokens[first:]) / max(sum(self.step_seconds[first:]), 1e-9)


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: History, step: int
) -> Path:
    """Write the state after `step` steps, then remove older ones.

    The file is written under another name and renamed, so that a run that is killed at any moment leaves a complete
    one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    state = {
        "step": step,
        "trained": {name: parameter.detach() for name, parameter in _beside(optimizer, model).items()},
        "moved": _moved_entries(optimizer, model),
        "optimizer": optimizer.state_dict(),
        "history": dataclasses.asdict(history),
        "random": random_state(),
    }
    plan = json.dumps(to_plan(state, tensors))
    path = folder / f"step-{step:08d}.safetensors"
    write_safetensors(tensors, path, {"format": FORMAT, "plan": plan, "sha256": digest(plan, tensors)})
    for other in folder.glob("step-*.safetensors"):
        if other != path:
            other.unlink()
    return path


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the latest complete state in `folder`, or None."""
    return max(Path(folder).glob("step-*.safetensors"), default=None)


def step_of(path: Path) -> int:
    """Return the step after which a state was written, from its name."""
    return int(path.stem.removeprefix("step-"))


def remove_checkpoints(folder: str | Path) -> None:
    """Delete a folder of states, once a run has saved its results."""
    shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[History, int]:
    """Restore model, optimizer and random generators from a state; return its history and step number.

    Raises:
        ValueError: the file is damaged, not written by `save_checkpoint`, or of another run. Nothing is changed then.
    """
    state = _read(path)
    parameters = _beside(optimizer, model)
    _check_same_run(path, state["trained"], parameters)
    moved = _checked_entries(path, state["moved"], model)
    before, held = random_state(), []
    try:
        restore_random_state(state["random"])
        _check_moments(state["optimizer"], optimizer)
        held = _exchange_entries(moved)
        optimizer.load_state_dict(state["optimizer"])
    except (*UNREADABLE, RuntimeError) as error:
        restore_random_state(before)
        _exchange_entries(held)
        raise ValueError(
            f"{path} cannot resume this run ({type(error).__name__}: {error}); resume with the command of the first run"
        ) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["trained"][name])
    return History(**state["history"]), state["step"]


def training_state_bytes(model: nn.Module, state_bits: int, *, masked: bool) -> int:
    """Return the expected size of the file in bytes.

    Args:
        model: the model, with its mask or adapter attached.
        state_bits: bits of each of the two moments.
        masked: whether a mask is trained, so that the optimizer saves positions too.
    """
    beside = 2 * state_bits // 8 + (4 if masked else 0)
    return sum(parameter.nbytes + beside * parameter.numel() for parameter in _trained(model).values())


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _beside(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained tensors that are not in the optimizer's state, where the values of masks are."""
    return {} if isinstance(optimizer, SparseAdamW) else _trained(model)


def _moved_entries(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return all entries of dense weights that a schedule has ever trained, as `positions` and `entries`, (k,) each."""
    if (schedule := getattr(optimizer, "schedule", None)) is None:
        return {}
    moved = {}
    for name, mask in schedule.ever_trained().items():
        weight = model.get_parameter(name).detach()
        # The entries that left a quantised weight's mask are in the optimizer's state.
        if weight.is_floating_point():
            positions = mask.indices.to(weight.device)
            moved[name] = {"positions": positions, "entries": weight.flatten()[positions.long()]}
    return moved


Entries = list[tuple[Tensor, Tensor, Tensor]]


def _checked_entries(path: Path, moved: dict[str, dict[str, Tensor]], model: nn.Module) -> Entries:
    """Return saved entries as (weight, positions, entries), after a check that they fit the model."""
    checked = []
    for name, saved in moved.items():
        try:
            weight = model.get_parameter(name)
            positions = Mask(saved["positions"], weight.shape).indices.long()
            if saved["entries"].shape != positions.shape or saved["entries"].dtype != weight.dtype:
                raise ValueError(f"there are {len(positions)} positions and other entries")
        except (*UNREADABLE, RuntimeError) as error:
            raise ValueError(
                f"{path} cannot resume this run: its entries of {name} do not fit the model ({error}); resume with the "
                "command of the first run"
            ) from error
        checked.append((weight, positions.to(weight.device), saved["entries"].to(weight.device)))
    return checked


@torch.no_grad()
def _exchange_entries(chosen: Entries) -> Entries:
    """Write entries into weights; return what was there before."""
    before = [(weight, positions, weight.flatten()[positions]) for weight, positions, _ in chosen]
    for weight, positions, entries in chosen:
        weight.view(-1)[positions] = entries
    return before


def _read(path: Path) -> dict:
    """Return the checked content of a file."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if digest(metadata["plan"], tensors) != metadata["sha256"]:
            raise ValueError("its checksum does not fit its content")
        state = from_plan(json.loads(metadata["plan"]), tensors)
        _check_content(state)
        return state
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is no readable training state ({type(error).__name__}: {error}); delete it to start anew"
        ) from error


def _check_content(state: dict) -> None:
    fields = {one.name for one in dataclasses.fields(History)}
    if (
        state.keys() != {"step", "trained", "moved", "optimizer", "history", "random"}
        or state["history"].keys() != fields
    ):
        raise ValueError("it lacks a part of the state")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"its step is {state['step']!r}, which is no whole number from 0 on")
    if not all(isinstance(tensor, Tensor) for tensor in state["trained"].values()):
        raise ValueError("what it holds as trained is not all tensors")
    for name, saved in state["moved"].items():
        if saved.keys() != {"positions", "entries"} or not all(isinstance(part, Tensor) for part in saved.values()):
            raise ValueError(f"its entries of {name} are no positions and entries")
    if not {"state", "param_groups"} <= state["optimizer"].keys():
        raise ValueError("its optimizer has no state or no parameter groups")


def _check_same_run(path: Path, saved: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name in sorted(parameters.keys() | saved.keys()):
        there, here = (
            f"shape {tuple(tensors[name].shape)} and {tensors[name].dtype}" if name in tensors else "no such tensor"
            for tensors in (saved, parameters)
        )
        if there != here:
            raise ValueError(
                f"{path} cannot resume this run: {name} has {there} there and {here} here; "
                "resume with the model, method, mask and density of the first run"
            )


def _check_moments(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments of other sizes, which torch's own optimizers do not check."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for number, entries in saved["state"].items():
        count = parameters[number].numel()
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.numel() not in (1, count):
                raise ValueError(f"{key} of parameter {number} has {value.numel()} entries, not {count}")
