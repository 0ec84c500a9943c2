"""Loading of models from a folder, from the hub, or from a Python package (`recipes.packaged_models`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from eval.checkpoints import check_readable, fetch, load_tokenizer
from recipes.packaged_models import PACKAGED, packaged_configuration, quiet_bars, unpack
from speft_optim import patch_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(name: str, *, cache: str | Path = "models") -> Path:
    """Return the local folder of a model, after fetching or unpacking it if need be.

    Args:
        name: a checkpoint folder, a key of `PACKAGED`, or a name on the hub.
        cache: where packaged models are unpacked to.
    """
    if name in PACKAGED:
        return unpack(name, cache)
    check_folder(name)
    return Path(name) if Path(name).is_dir() else fetch(name, packaged=PACKAGED)


def check_folder(name: str) -> None:
    """Refuse a model that is a folder, if it is no checkpoint or a damaged one; reads no weights.

    Raises:
        ValueError: names what is missing or damaged.
    """
    folder = Path(name)
    if name in PACKAGED or not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {name} has no config.json; give the folder that save_pretrained wrote")
    check_readable(folder)


def configuration(name: str, *, cache: str | Path = "models") -> PretrainedConfig:
    """Return the configuration of a model by a name that `resolve` takes, without fetching or loading its weights.

    Raises:
        ValueError: there is no such folder, package or name on the hub.
    """
    if name in PACKAGED:
        return packaged_configuration(name, cache)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder with a config.json, nor one of {sorted(PACKAGED)}, "
            f"nor could its configuration be fetched from the hub ({error})"
        ) from error


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bits: int = 16,
    offload: bool = False,
):
    """Load a checkpoint folder for training.

    Args:
        folder: a local checkpoint.
        dtype: dtype of the weights; of a quantised base, of the weights that are not quantised and of all products.
        device: the device that computes, and that holds the model unless it is offloaded.
        bits: 16 leaves the weights in `dtype`. With 8, or 4 (nf4, double quantisation), bitsandbytes quantises the
            linear weights of the blocks as they are read, so that the dense model never exists.
        offload: whether the model is left in CPU memory, for `sparsify(..., offload=device)`.

    Returns:
        The model, in training mode, and its tokenizer, which always has a pad token.
    """
    quiet_bars()
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer in {folder} has neither a pad nor an EOS token; set tokenizer.eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(folder)
    options = dict(dtype=dtype, attn_implementation=attention_backend(config, device))
    home = "cpu" if offload else device
    if bits == 16:
        return AutoModelForCausalLM.from_pretrained(folder, **options).to(home).train(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_quantisation(bits, dtype), device_map={"": home}, **options
    )
    # Patched before training, the model gives a loss that can be compared with the one after.
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
    """Choose the attention implementation for training; None leaves the choice to transformers.

    Gemma 2 caps its attention logits with a tanh, which fused kernels silently leave out, so that losses and gradients
    would be wrong: it gets the plain implementation. So does every model on a CPU, where backward through the fused
    bf16 kernel takes longer (SmolLM2-135M, 8 x 73 tokens, one core: 1.84 against 1.19 seconds).
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped or torch.device(device).type == "cpu" else None


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """Return the faster of bf16 and fp32 for matrix products on this device, by a quarter-second trial on a CPU.

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
    """Let fp32 matrix products on a CPU round their operands to bf16 while the context lasts, if `dtype` is bf16.

    The gradient of a mask is an fp32 product of bf16 activations and gradients, for which the rounding loses nothing.
    Sums stay fp32, and with matrix units the product is several times faster.
    """
    before = torch.get_float32_matmul_precision()
    if dtype is torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
