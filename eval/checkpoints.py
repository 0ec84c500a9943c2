"""Fetching of checkpoints, and one BOS rule for training and scoring.

A missing or second BOS lowers a model's scores by many points without any error, and tokenizers cause it in several
ways: a setting lost in a conversion, a template that adds a BOS to one that is there, a chat template that writes one
more. So neither training nor scoring leaves special tokens to the tokenizer: both encode their prompts with
`prompt_ids`.
"""

import itertools
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

logger = logging.getLogger(__name__)


def fetch(name: str, *, packaged: Collection[str] = ()) -> Path:
    """Fetch a model from the hub, weights and tokenizer only.

    Args:
        name: its name on the hub.
        packaged: names that the caller knows besides folders and the hub, for the message.

    Raises:
        ValueError: it could not be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"])
        )
    except Exception as error:  # no network, no such name, no licence accepted: the remedy is the same
        also = f", nor one of {sorted(packaged)}" if packaged else ""
        raise ValueError(
            f"{name!r} is neither a folder{also}, nor could it be fetched from the hub ({error}); "
            "give a folder that save_pretrained wrote"
        ) from error


def check_readable(folder: Path) -> None:
    """Refuse a checkpoint folder with a file that is cut short or otherwise damaged; reads no weights.

    Raises:
        ValueError: names the file.
    """
    remedy = "copy or save the checkpoint again"
    for path in sorted(
        path for pattern in ("*config.json", "*.index.json", "tokenizer.json") for path in folder.glob(pattern)
    ):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not an object of names and values; {remedy}")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def load_tokenizer(folder: str | Path):
    """Load a tokenizer that puts exactly one BOS before a text if the model uses BOS.

    Args:
        folder: the checkpoint.

    Returns:
        The tokenizer; if it is saved again, it still does so.

    Raises:
        ValueError: the tokenizer cannot be brought to do so.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ensure_one_bos(tokenizer, AutoConfig.from_pretrained(folder).model_type)
    return tokenizer


def ensure_one_bos(tokenizer, model_type: str) -> bool:
    """Make the tokenizer put exactly one BOS before a text if the model uses BOS, and warn if it had to be changed.

    A tokenizer that puts none is left so: many models (Qwen2, SmolLM2) name a BOS and were trained without it. Only
    the Gemma family is known to need it always.

    Args:
        tokenizer: a transformers tokenizer; changed in place.
        model_type: as in config.json, e.g. `gemma2`.

    Returns:
        Whether a text begins with BOS.

    Raises:
        ValueError: the tokenizer still puts another number of BOS before a text.
    """
    count = _leading_bos(tokenizer, _prefix_and_suffix(tokenizer)[0])
    wanted = 1 if model_type.startswith("gemma") else min(count, 1)
    if count == wanted:
        return bool(wanted)
    if tokenizer.bos_token_id is not None:
        # Both setters rebuild the template that places special tokens, from these two flags alone.
        tokenizer.add_eos_token = _prefix_and_suffix(tokenizer)[1] == [tokenizer.eos_token_id]
        tokenizer.add_bos_token = True
    if _leading_bos(tokenizer, _prefix_and_suffix(tokenizer)[0]) != wanted:
        raise ValueError(
            f"a {model_type} model needs BOS before its prompt, exactly one, but its tokenizer "
            f"({type(tokenizer).__name__}, bos_token {tokenizer.bos_token!r}) puts {count} there and cannot be set to "
            "one; save a tokenizer that does beside the model, such as the base model's own"
        )
    logger.warning("The tokenizer put %d BOS before a text; it was set to put one.", count)
    return True


def begins_with_bos(tokenizer) -> bool:
    """Tell whether `prompt_ids` puts a BOS before a text (for Gemma and Llama 3 it does, for Qwen2 and SmolLM2 not)."""
    return _leading_bos(tokenizer, text_prefix(tokenizer)) == 1


def text_prefix(tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before a text, with one BOS if it puts several."""
    return _keep_one_bos(tokenizer, _prefix_and_suffix(tokenizer)[0])


def prompt_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that a model is to continue: one BOS at most before each, and no EOS after it.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the prompts; a BOS that a chat template wrote at their beginning counts as the one.
    """
    prefix = text_prefix(tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [_keep_one_bos(tokenizer, prefix + row) for row in ids]


def _prefix_and_suffix(tokenizer) -> tuple[list[int], list[int]]:
    """Find the ids that the tokenizer puts before and after a text, by encoding one: flags are often wrong."""
    whole, text = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    start = _leading_bos(tokenizer, whole)  # the ids before the text changed how it was encoded
    return whole[:start], []


def _leading_bos(tokenizer, ids: list[int]) -> int:
    bos = tokenizer.bos_token_id
    return 0 if bos is None else len(list(itertools.takewhile(lambda token: token == bos, ids)))


def _keep_one_bos(tokenizer, ids: list[int]) -> list[int]:
    return ids[max(0, _leading_bos(tokenizer, ids) - 1) :]
