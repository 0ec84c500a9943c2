"""From word problems to token sequences and batches, in three steps.

1. **Where problems come from** (`load_examples`): a folder with GSM8K's own ``train.jsonl`` and ``test.jsonl``, a data
   set of the hub. `recipes.word_problems` generates such a folder.
2. **Tokens** (`tokenize`): prompt and answer become one sequence whose labels are set *by length*. Masking every
   position that holds the pad token is the usual shortcut, and it also hides the final EOS of every tokenizer whose pad
   token is its EOS: the model then never learns to stop.
3. **Batches** (`collate`, `sample_windows`): padding, and a data order that depends on the seed and the epoch only, so
   that a resumed run needs to know nothing but its step number.
"""

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.checkpoints import prompt_ids
from eval.records import read_json_lines
from recipes.loss import IGNORED

PROMPT = "Question: {question}\nAnswer:"
# Pairs of columns that data sets of this kind use for the problem and its worked solution.
COLUMNS = (("question", "answer"), ("query", "response"))


@dataclass(frozen=True)
class Example:
    """One problem and its worked answer, both plain text."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One tokenised problem: token ids and, of the same length, the labels (`IGNORED` over the prompt)."""

    input_ids: list[int]
    labels: list[int]


# ---------------------------------------------------------------------------------------------------------------------
# Where problems come from


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a file with one JSON object a line, each with a question and a worked answer under one pair of `COLUMNS`."""
    examples = []
    for where, row in read_json_lines(Path(path)):
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}; write one JSON object a line")
        question, answer = columns_of(row, where)
        if not isinstance(row[question], str) or not isinstance(row[answer], str):
            raise ValueError(f"{where}: {question} and {answer} must both be text")
        examples.append(Example(row[question], row[answer]))
    if not examples:
        raise ValueError(f"{path} holds no problems; it needs at least one line")
    return examples


def columns_of(row: Sequence[str] | dict, where: str) -> tuple[str, str]:
    """Return the names of the question and answer columns among those of `row`."""
    for pair in COLUMNS:
        if all(column in row for column in pair):
            return pair
    wanted = " or ".join("/".join(pair) for pair in COLUMNS)
    raise ValueError(f"{where} has the columns {sorted(row)}; rename them to {wanted}")


def load_examples(
    source: str, *, train_limit: int | None = None, held_out: int = 256
) -> tuple[list[Example], list[Example]]:
    """Load training problems and held-out problems from a folder or from a data set of the hub.

    Args:
        source: a folder with `train.jsonl` and `test.jsonl`, or the name of a data set such as `meta-math/MetaMathQA`
            or `openai/gsm8k`.
        train_limit: keep only the first so many training problems. None keeps all.
        held_out: how many problems to hold out where the source has no test split: those after `train_limit`, or the
            last ones.
    """
    if train_limit is not None and train_limit < 1:
        raise ValueError(f"the limit on training problems is {train_limit}; it must be at least 1, or left out for all")
    folder = Path(source)
    if folder.is_dir():
        missing = [name for name in ("train.jsonl", "test.jsonl") if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{source} lacks {' and '.join(missing)}; put GSM8K's two files there")
        return read_jsonl(folder / "train.jsonl")[:train_limit], read_jsonl(folder / "test.jsonl")
    return _load_from_hub(source, train_limit, held_out)


def _load_from_hub(source: str, train_limit: int | None, held_out: int) -> tuple[list[Example], list[Example]]:
    import datasets

    config = "main" if source in ("openai/gsm8k", "gsm8k") else None
    try:
        loaded = datasets.load_dataset(source, config)
    except Exception as error:  # the library raises a dozen kinds here; all mean that the name leads nowhere
        raise ValueError(
            f"data {source!r} is neither a folder nor a data set that could be loaded ({error}); "
            "give a folder with train.jsonl and test.jsonl, or a name such as openai/gsm8k"
        ) from error
    if "train" not in loaded:
        raise ValueError(f"data set {source} has the splits {sorted(loaded)}; it needs one called train")
    question, answer = columns_of(loaded["train"].column_names, f"data set {source}")

    def examples(rows) -> list[Example]:
        return [Example(q, a) for q, a in zip(rows[question], rows[answer], strict=True)]

    train = loaded["train"]
    if "test" in loaded:
        rows = train.select(range(min(train_limit or len(train), len(train))))
        return examples(rows[:]), examples(loaded["test"][:])
    end = min(train_limit or len(train), len(train) - held_out)
    if end < 1:
        raise ValueError(f"data set {source} has {len(train)} rows and no test split; hold out fewer than {held_out}")
    return examples(train[:end]), examples(train[end : end + held_out])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def tokenize(tokenizer, examples: Sequence[Example], *, max_length: int) -> list[Sample]:
    """Tokenise problems as [BOS] prompt answer EOS, with labels on the answer and on EOS.

    A sequence that is too long is dropped, not cut: cut in the answer it would teach to stop before the result, cut in
    the prompt it would have no label at all. How many were dropped is warned of once.

    Args:
        tokenizer: a transformers tokenizer with an EOS. The special tokens are placed by hand, so that a tokenizer
            which also adds an EOS, or none, gives the same layout.
        examples: the problems.
        max_length: the longest sequence that is kept, in tokens.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token, so no answer could ever end; set tokenizer.eos_token")
    if not examples:
        return []

    texts = [PROMPT.format(question=example.question) for example in examples]
    answers = [" " + example.answer for example in examples]
    wholes = prompt_ids(tokenizer, [text + answer for text, answer in zip(texts, answers, strict=True)])
    samples = []
    for prompt, answer, whole in zip(prompt_ids(tokenizer, texts), answers, wholes, strict=True):
        if whole[: len(prompt)] == prompt:
            labels = whole[len(prompt) :]
        else:  # a token straddles the boundary; generation will start from the prompt alone, so training does too
            labels = tokenizer([answer], add_special_tokens=False)["input_ids"][0]
        labels = [*labels, tokenizer.eos_token_id]
        samples.append(Sample(prompt + labels, [IGNORED] * len(prompt) + labels))
    kept = [sample for sample in samples if len(sample.input_ids) <= max_length]
    if not kept:
        shortest = min(len(sample.input_ids) for sample in samples)
        raise ValueError(
            f"max_length is {max_length}, but the shortest of the problems has {shortest} tokens; raise it"
        )
    if len(kept) < len(samples):
        dropped = f"{len(samples) - len(kept)} of {len(samples)}"
        warnings.warn(f"dropped {dropped} problems that are longer than {max_length} tokens", stacklevel=2)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(
    samples: Sequence[Sample], *, pad_id: int, side: str = "right", multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Pad samples to the longest of them and stack them: input_ids, attention_mask, labels, each (batch, length).

    Args:
        samples: at least one.
        pad_id: token to pad with; may equal EOS, labels do not depend on it.
        side: `right` or `left`.
        multiple: pad on to a length that this divides, so that shapes repeat.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}; pad on the `right` or on the `left`")
    length = -(-max(len(sample.input_ids) for sample in samples) // multiple) * multiple

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        fill = [[value] * (length - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([row + more if side == "right" else more + row for row, more in pairs])

    return {
        "input_ids": padded([sample.input_ids for sample in samples], pad_id),
        "attention_mask": padded([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": padded([sample.labels for sample in samples], IGNORED),
    }


def make_batches(samples: Sequence[Sample], batch_size: int, *, pad_id: int) -> list[dict[str, torch.Tensor]]:
    """Make batches of samples of similar length, for passes in which their order does not matter."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    return [collate(ordered[i : i + batch_size], pad_id=pad_id) for i in range(0, len(ordered), batch_size)]


def calibration_batches(
    samples: Sequence[Sample], count: int, batch_size: int, *, pad_id: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Make calibration batches of at most `count` samples, drawn by the seed."""
    drawn = random.Random(seed).sample(samples, min(count, len(samples)))
    return make_batches(drawn, batch_size, pad_id=pad_id)


def sample_windows(
    samples: Sequence[Sample], window: int, *, seed: int, start: int = 0, pool: int = 1
) -> Iterator[list[Sample]]:
    """Yield shuffled windows of samples without end; a window holds the samples of one optimizer step.

    The order is a function of `seed` and the epoch alone, so `start=n` goes on exactly where a run of n steps stopped.
    One window of an epoch is shorter if the samples do not divide evenly.

    Args:
        samples: the training samples.
        window: samples in a window, that is, batch size x accumulation.
        seed: shuffles each epoch differently.
        start: number of windows to pass over.
        pool: shuffled samples of so many windows are sorted by length before they are cut into windows, which then come
            in random order: less padding, as windows hold samples of similar length. 1 leaves them as shuffled.
    """
    per_epoch = steps_per_epoch(len(samples), window)
    epoch, first = divmod(start, per_epoch)
    while True:
        for ordered in _shuffled(samples, window, random.Random(f"{seed}-{epoch}"), pool)[first:]:
            yield [samples[j] for j in ordered]
        epoch, first = epoch + 1, 0


def _shuffled(samples: Sequence[Sample], window: int, generator: random.Random, pool: int) -> list[list[int]]:
    """Return the numbers of the samples of each window of an epoch."""
    order = list(range(len(samples)))
    generator.shuffle(order)
    if pool > 1:
        pools = [order[i : i + window * pool] for i in range(0, len(order), window * pool)]
        order = [j for part in pools for j in sorted(part, key=lambda j: len(samples[j].input_ids))]
    windows = [order[i : i + window] for i in range(0, len(order), window)]
    if pool > 1:
        generator.shuffle(windows)
    return windows


def steps_per_epoch(samples: int, window: int) -> int:
    """Return the number of windows in one pass over `samples`, with the shorter last one."""
    return -(-samples // window)
