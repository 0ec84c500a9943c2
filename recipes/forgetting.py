"""Forgetting: the loss of a fine-tuned model on texts unrelated to its training data.

There are two kinds of text, both available without a network. **Own** texts are sampled from the base model itself
before any training: the base model fits them as well as possible, so that any change is visible. **Documentation** is
the reference of the Python language in Python's standard library (`pydoc_data.topics`, what `help("assignment")`
prints): technical prose by people. It depends on Python's version, so both kinds are kept in a file, and every model of
a comparison reads the same.
"""

import json
import platform
import random
from pathlib import Path

import torch

from eval.checkpoints import text_prefix
from eval.records import write_json
from recipes.data import Sample

COUNT, OWN_LENGTH, DOCUMENTATION_LENGTH = 64, 128, 256


def load_texts(path: Path, model, tokenizer, *, seed: int = 0) -> dict[str, list[Sample]]:
    """Return the texts `own` and `documentation` of a file, which is written first if it is missing.

    Args:
        path: the file.
        model: the base model, on its device.
        tokenizer: its tokenizer.
        seed: seed of the sampled texts, and of the choice of documentation.
    """
    if not path.is_file():
        texts = {"own": own_texts(model, tokenizer, seed=seed), "documentation": documentation(tokenizer, seed=seed)}
        source = {"own": f"sampled from the base model, seed {seed}"}
        source["documentation"] = f"pydoc_data.topics of Python {platform.python_version()}"
        write_json({"source": source, "texts": texts}, path)
    texts = json.loads(path.read_text(encoding="utf-8"))["texts"]
    return {kind: [Sample(ids, ids) for ids in rows] for kind, rows in texts.items()}


def own_texts(model, tokenizer, *, seed: int, count: int = COUNT, length: int = OWN_LENGTH) -> list[list[int]]:
    """Sample texts from the model, and return their token ids, with the BOS or EOS from which each begins.

    They are sampled from the full distribution at temperature 1, and end with the first EOS.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((count, 1), start, device=model.device)
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        written = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    model.train(was_training)
    return [_until(row, tokenizer.eos_token_id) for row in written.tolist()]


def _until(row: list[int], eos: int) -> list[int]:
    """Return the row up to its first EOS after the first token, which may be an EOS itself."""
    return row[: row.index(eos, 1) + 1] if eos in row[1:] else row


def documentation(tokenizer, *, seed: int, count: int = COUNT, length: int = DOCUMENTATION_LENGTH) -> list[list[int]]:
    """Return token ids of pieces of the language reference, each of `length` tokens, drawn by the seed."""
    from pydoc_data.topics import topics

    prefix = text_prefix(tokenizer)
    whole = tokenizer([topics[name] for name in sorted(topics)], add_special_tokens=False)["input_ids"]
    size = length - len(prefix)
    pieces = [ids[i : i + size] for ids in whole for i in range(0, len(ids) - size + 1, size)]
    return [prefix + piece for piece in random.Random(seed).sample(pieces, min(count, len(pieces)))]
