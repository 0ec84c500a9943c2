"""The files of a run when training is over, and a rehearsal of all of them before it begins.

A package that is missing, a full disk, a folder that refuses files or a model whose saver fails would otherwise show
after hours of training. So `rehearse` writes everything once from the untrained state, by the same functions as in the
end, and removes it again.
"""

import importlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eval.records import hash_files
from recipes import report
from recipes.baselines import plain_layers
from recipes.training_state import History, load_checkpoint, save_checkpoint, training_state_bytes
from speft_optim import Masks, save_adapter
from speft_optim.files import whole_folder

# All temporary files and folders of the library, the recipes and eval match this pattern.
TEMPORARY = ".*.tmp"


def save_model(model, tokenizer, out: Path) -> None:
    """Write an ordinary checkpoint with its tokenizer to `out/checkpoint`; it appears complete or not at all."""
    with whole_folder(out / "checkpoint") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_masked_entries(model, out: Path, salience: str) -> str:
    """Write the adapter to `out/adapter.safetensors`, and return its checksum."""
    save_adapter(model, out / "adapter.safetensors", details={"measure": salience})
    return hash_files([out / "adapter.safetensors"])


def check_packages(*, scoring: bool) -> None:
    """Refuse a run whose later stages need a package that cannot be imported."""
    needed = {"matplotlib": "the picture of the run"} | ({"lm_eval": "--score"} if scoring else {})
    for package, purpose in needed.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = package.replace("_", "-")
            raise ValueError(f"{purpose} needs {name}, which is missing ({error}); pip install {name}") from error


def prepare_folder(out: Path) -> None:
    """Make the folder, and refuse one that cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error}); choose another --out") from error


def remove_temporary(out: Path) -> None:
    """Remove what a killed run left half-written in its folder."""
    for path in [*out.glob(TEMPORARY), *(out / "resume").glob(TEMPORARY)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_space(out: Path, needed: dict[str, int]) -> None:
    """Refuse a run whose files would not fit on the disk.

    Args:
        out: the run's folder.
        needed: from the name of a file to its expected bytes.
    """
    free, total = shutil.disk_usage(out).free, sum(needed.values())
    if free < total:
        parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
        raise ValueError(
            f"{out} has {free / 1e9:.2f} GB free, but this run writes up to {total / 1e9:.2f} GB ({parts}); "
            "free some room, or choose an --out on another disk"
        )


def expected_bytes(model: torch.nn.Module, masks: Masks | None, state_bits: int, moves: int = 0) -> dict[str, int]:
    """Return the expected bytes of the files of a run, by name; an old training state stays until the new one is whole.

    Args:
        model: the model, with its mask or adapter attached.
        masks: the masks; None for all weights or an adapter.
        state_bits: bits of each of the optimizer's two moments.
        moves: bytes that moving masks add to the training state (`moving.saved_bytes`).
    """
    # Quantised weights are saved in 16 bits.
    sizes = (
        target.shape.numel() * (target.parameter.element_size() if target.parameter.is_floating_point() else 2)
        for target in report.base_weights(model)
    )
    needed = {
        "checkpoint": sum(sizes),
        "training state": 2 * (training_state_bytes(model, state_bits, masked=masks is not None) + moves),
    }
    return needed | ({} if masks is None else {"adapter and masks": 12 * masks.count})


def rehearse(
    model, tokenizer, optimizer, *, masks: Masks | None, base: Path, out: Path, salience: str, exact: bool = True
) -> None:
    """Write everything that the run will leave from its untrained state, check it, and remove it again.

    Args:
        model: the untrained model with its mask or adapter attached; it is saved without the adapter.
        tokenizer: its tokenizer.
        optimizer: the optimizer over the trained tensors.
        masks: the masks; None for adapters and for all weights.
        base: folder of the base checkpoint.
        out: the run's folder, in which all is written.
        salience: the measure that chose the masks.
        exact: whether the weights of the untrained model must equal those of the base.

    Raises:
        ValueError: a file cannot be written, or the checkpoint differs from the base.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".rehearsal-", suffix=".tmp") as folder:
        trial = Path(folder)
        with _trying("the training state"):
            state = save_checkpoint(trial, model, optimizer, History(), 0)
            load_checkpoint(state, model, optimizer)
            state.unlink()
        if masks is not None:
            with _trying("the adapter"):
                save_masked_entries(model, trial, salience)
        with _trying("the checkpoint"), plain_layers(model):
            save_model(model, tokenizer, trial)
            moved = report.moved_share(base, trial / "checkpoint", masks, model)
            if moved["moved"] and exact:
                raise ValueError(f"before any training, {moved['moved']:,} of its entries differ from those of {base}")
        with _trying("the picture"):
            report.draw([1.0], (1.0, 1.0), masks, moved["change"], trial / "report.png", str(base))


@contextmanager
def _trying(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any error here would otherwise come after training
        raise ValueError(
            f"{what} of this run cannot be saved, so it was not started ({type(error).__name__}: {error}); "
            "fix this, or choose another model or --out"
        ) from error
