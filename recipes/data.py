"""Word problems in, token sequences and batches out.

Three things live here, in the order in which data flows through them.

1. **Where problems come from** (`load_examples`): a folder with GSM8K's own ``train.jsonl`` and ``test.jsonl``, a data
   set of the hub, or the generator below, which needs neither a network nor a licence.
2. **Tokens** (`tokenize`): prompt and answer become one sequence whose labels are set *by length*. Masking every
   position that holds the pad token is the usual shortcut, and it also hides the final EOS of every tokenizer whose pad
   token is its EOS: the model then never learns to stop.
3. **Batches** (`collate`, `sample_windows`): padding, and a data order that depends on the seed and the epoch only, so
   that a resumed run needs to know nothing but its step number.
"""

import json
import os
import random
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.checkpoints import prompt_ids

IGNORED = -100  # the label that PyTorch's and transformers' losses leave out
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
# The generator


@dataclass(frozen=True)
class Template:
    """A family of problems.

    Args:
        question: text with `{name}`, `{other}`, `{thing}` and the numbers in braces.
        ranges: for each number, the smallest and the largest value.
        steps: the worked answer, one (sentence, definition) a line. A definition reads `x=a*b` and `{x}` in the
            sentence becomes `<<6*7=42>>42`. The result of the last one is the answer.
    """

    question: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str], ...]


NAMES = (
    "Ada Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Peter Rosa Sam Tina Victor "
    "Alice Carl Diana Eric Fiona George Hannah Ivan Julia Karl Laura Mark Nina Oscar Paula Simon Tom Vera Will Zoe"
).split()
THINGS = (
    "apples books cards coins cookies flowers marbles pencils shells stamps stickers tickets buttons candles cups eggs "
    "lemons muffins oranges peaches pears plums postcards ribbons stones toys balls beads photos keys"
).split()

TEMPLATES = (
    Template(
        "{name} has {a} boxes with {b} {thing} in each box. {name} gives {c} {thing} to {other}. "
        "How many {thing} does {name} have left?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9)},
        (("{name} has {x} {thing} in the boxes.", "x=a*b"), ("{name} has {y} {thing} left.", "y=x-c")),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} times as many. How many {thing} do they have together?",
        {"a": (2, 12), "b": (2, 5)},
        (("{other} has {x} {thing}.", "x=a*b"), ("Together they have {y} {thing}.", "y=a+x")),
    ),
    Template(
        "{name} has {a} {thing}. {other} has half as many. How many {thing} do they have together?",
        {"a": (4, 40)},
        (("{other} has {x} {thing}.", "x=a/2"), ("Together they have {y} {thing}.", "y=a+x")),
    ),
    Template(
        "{name} has {a} {thing} and finds {b} more. {name} shares all of them equally among {c} friends. "
        "How many {thing} does each friend get?",
        {"a": (4, 20), "b": (2, 10), "c": (2, 6)},
        (("{name} has {x} {thing} in all.", "x=a+b"), ("Each friend gets {y} {thing}.", "y=x/c")),
    ),
    Template(
        "A shop sells {thing} for ${a} each. {name} buys {b} of them and pays with ${c}. "
        "How much change does {name} get?",
        {"a": (2, 9), "b": (2, 5), "c": (20, 50)},
        (("The {thing} cost ${x}.", "x=a*b"), ("{name} gets ${y} back.", "y=c-x")),
    ),
    Template(
        "{name} earns ${a} an hour and works {b} hours a day. How much does {name} earn in {c} days?",
        {"a": (5, 12), "b": (2, 5), "c": (2, 4)},
        (("{name} earns ${x} a day.", "x=a*b"), ("In {c} days {name} earns ${y}.", "y=x*c")),
    ),
    Template(
        "{name} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left to read?",
        {"a": (3, 12), "b": (2, 6), "c": (40, 90)},
        (("{name} reads {x} pages.", "x=a*b"), ("There are {y} pages left.", "y=c-x")),
    ),
    Template(
        "There are {a} {thing} on one table and {b} on another. {name} takes {c} of them and {other} takes {d}. "
        "How many {thing} are left?",
        {"a": (10, 30), "b": (5, 15), "c": (2, 6), "d": (2, 6)},
        (
            ("There are {x} {thing} at first.", "x=a+b"),
            ("They take {y} {thing}.", "y=c+d"),
            ("There are {z} {thing} left.", "z=x-y"),
        ),
    ),
    Template(
        "{name} buys {a} {thing} at ${b} each and {c} bags at ${d} each. How much does {name} pay?",
        {"a": (2, 6), "b": (2, 6), "c": (2, 6), "d": (2, 6)},
        (
            ("The {thing} cost ${x}.", "x=a*b"),
            ("The bags cost ${y}.", "y=c*d"),
            ("{name} pays ${z}.", "z=x+y"),
        ),
    ),
    Template(
        "{name} collects {a} {thing} on Monday, {b} more than that on Tuesday, and {c} on Wednesday. "
        "How many {thing} does {name} collect in all?",
        {"a": (3, 15), "b": (2, 6), "c": (3, 12)},
        (
            ("On Tuesday {name} collects {x} {thing}.", "x=a+b"),
            ("On both days {name} collects {y} {thing}.", "y=a+x"),
            ("In all {name} collects {z} {thing}.", "z=y+c"),
        ),
    ),
    Template(
        "A bus has {a} rows with {b} seats in each row. {c} seats are taken. How many seats are free?",
        {"a": (5, 10), "b": (2, 6), "c": (2, 9)},
        (("The bus has {x} seats.", "x=a*b"), ("{y} seats are free.", "y=x-c")),
    ),
    Template(
        "{name} is {a} years old. {other} is {b} times as old as {name}. How old will {other} be in {c} years?",
        {"a": (3, 12), "b": (2, 5), "c": (2, 10)},
        (("{other} is {x} years old.", "x=a*b"), ("In {c} years {other} will be {y}.", "y=x+c")),
    ),
    Template(
        "{name} saves ${a} a week for {b} weeks and then spends ${c}. How much money does {name} have left?",
        {"a": (3, 10), "b": (3, 8), "c": (2, 9)},
        (("{name} saves ${x}.", "x=a*b"), ("{name} has ${y} left.", "y=x-c")),
    ),
    Template(
        "{name} has {a} {thing}. {other} has {b} fewer than {name}. They put them together and fill bags of {c}. "
        "How many bags do they fill?",
        {"a": (6, 20), "b": (2, 5), "c": (2, 5)},
        (
            ("{other} has {x} {thing}.", "x=a-b"),
            ("Together they have {y} {thing}.", "y=a+x"),
            ("They fill {z} bags.", "z=y/c"),
        ),
    ),
    Template(
        "{name} bakes {a} trays of {b} muffins and sells each muffin for ${c}. How much money does {name} make?",
        {"a": (2, 5), "b": (4, 10), "c": (2, 3)},
        (("{name} bakes {x} muffins.", "x=a*b"), ("{name} makes ${y}.", "y=x*c")),
    ),
    Template(
        "A train travels {a} miles an hour for {b} hours and then {c} more miles. How many miles does it travel?",
        {"a": (10, 40), "b": (2, 4), "c": (2, 9)},
        (("It first travels {x} miles.", "x=a*b"), ("In all it travels {y} miles.", "y=x+c")),
    ),
    Template(
        "{name} cuts a rope of {a} feet into pieces of {b} feet and uses {c} of the pieces. How many pieces are left?",
        {"a": (12, 60), "b": (2, 6), "c": (2, 6)},
        (("There are {x} pieces.", "x=a/b"), ("{y} pieces are left.", "y=x-c")),
    ),
    Template(
        "A class has {a} girls and {b} boys. They form groups of {c}. Each group gets {d} {thing}. "
        "How many {thing} are needed?",
        {"a": (4, 12), "b": (4, 12), "c": (2, 5), "d": (2, 5)},
        (
            ("The class has {x} children.", "x=a+b"),
            ("They form {y} groups.", "y=x/c"),
            ("They need {z} {thing}.", "z=y*d"),
        ),
    ),
    Template(
        "{name} had {a} {thing}, lost {b} of them and then bought twice as many as were left. "
        "How many {thing} does {name} have now?",
        {"a": (6, 20), "b": (2, 5)},
        (
            ("{name} had {x} {thing} left.", "x=a-b"),
            ("{name} bought {y} {thing}.", "y=x*2"),
            ("Now {name} has {z} {thing}.", "z=x+y"),
        ),
    ),
    Template(
        "{name} and {other} share the price of a ${a} game and a ${b} pizza equally. How much does each of them pay?",
        {"a": (10, 40), "b": (4, 12)},
        (("Game and pizza cost ${x}.", "x=a+b"), ("Each pays ${y}.", "y=x/2")),
    ),
)

SPLITS = {"train": range(1, 4), "test": range(0, 1)}  # which quarters of the number combinations each split may use


def _quarter(template: int, numbers: dict[str, int]) -> int:
    """Which quarter of all number combinations this one belongs to: a stable hash, the same on every machine."""
    return zlib.crc32(f"{template}:{sorted(numbers.items())}".encode()) % 4


def _calculate(expression: str, values: dict[str, int]) -> tuple[str, int] | None:
    """Evaluate `a*b` over `values`: the expression in digits and its result; None if that is not a positive integer."""
    operator = next(character for character in expression if character in "+-*/")
    left, right = (values[part] if part in values else int(part) for part in expression.split(operator))
    if operator == "/":
        result = left // right if left % right == 0 else 0
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return (f"{left}{operator}{right}", result) if result > 0 else None


def _draw(generator: random.Random, split: str) -> Example | None:
    """One attempt at a problem; None where the numbers belong to another split or do not divide evenly."""
    index = generator.randrange(len(TEMPLATES))
    template = TEMPLATES[index]
    numbers = {key: generator.randint(*limits) for key, limits in template.ranges.items()}
    if _quarter(index, numbers) not in SPLITS[split]:
        return None
    name, other = generator.sample(NAMES, 2)
    texts = {"name": name, "other": other, "thing": generator.choice(THINGS), **numbers}
    lines, values = [], dict(numbers)
    for sentence, definition in template.steps:
        variable, expression = definition.split("=")
        calculated = _calculate(expression, values)
        if calculated is None:
            return None
        digits, values[variable] = calculated
        texts[variable] = f"<<{digits}={values[variable]}>>{values[variable]}"
        lines.append(sentence.format(**texts))
    return Example(template.question.format(**texts), "\n".join([*lines, f"#### {values[variable]}"]))


def generate(count: int, *, split: str, seed: int = 0) -> list[Example]:
    """Draw `count` different word problems in GSM8K's format.

    No (template, numbers) pair occurs in both splits, whatever the counts and seeds: the combinations themselves are
    divided between them by a hash. A model cannot get a test answer right by remembering the same sum with other names.

    Args:
        count: how many problems.
        split: `train` or `test`.
        seed: the same seed gives the same problems, and a smaller count their beginning.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {sorted(SPLITS)}")
    if not 1 <= count <= 100_000:
        raise ValueError(f"count is {count}; the generator draws 1 to 100,000 different problems, ask for fewer")
    generator = random.Random(f"{split}-{seed}")  # seeding with text does not depend on the hash seed of the process
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = _draw(generator, split)
        if example is not None:
            examples.setdefault(example.question, example)
    return list(examples.values())


def write(folder: str | Path, *, train: int, test: int, seed: int = 0) -> Path:
    """Write generated problems as `train.jsonl` and `test.jsonl`, the layout of GSM8K.

    The folder appears complete or not at all: it is filled under a temporary name and renamed.

    Args:
        folder: where; an earlier folder of that name is replaced.
        train: number of training problems.
        test: number of test problems.
        seed: see `generate`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, count in (("train", train), ("test", test)):
            lines = [json.dumps(vars(example)) + "\n" for example in generate(count, split=split, seed=seed)]
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Where problems come from


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a file with one JSON object a line, each with a question and a worked answer under one pair of `COLUMNS`."""
    path = Path(path)
    examples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); write one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is a {type(row).__name__}; write one JSON object a line")
            question, answer = columns_of(row, f"{path}, line {number}")
            if not isinstance(row[question], str) or not isinstance(row[answer], str):
                raise ValueError(f"{path}, line {number}: {question} and {answer} must both be text")
            examples.append(Example(row[question], row[answer]))
    if not examples:
        raise ValueError(f"{path} holds no problems; it needs at least one line")
    return examples


def columns_of(row: Sequence[str] | dict, where: str) -> tuple[str, str]:
    """Names of the question and answer columns among those of `row`."""
    for pair in COLUMNS:
        if all(column in row for column in pair):
            return pair
    wanted = " or ".join("/".join(pair) for pair in COLUMNS)
    raise ValueError(f"{where} has the columns {sorted(row)}; rename them to {wanted}")


def load_examples(
    source: str, *, train_limit: int | None = None, held_out: int = 256
) -> tuple[list[Example], list[Example]]:
    """Training problems and held-out problems from a folder or from a data set of the hub.

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
            "give a folder with train.jsonl and test.jsonl, a name such as openai/gsm8k, or `generator`"
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
    """Batches of similar length, for passes in which the order does not matter (calibration, evaluation)."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    return [collate(ordered[i : i + batch_size], pad_id=pad_id) for i in range(0, len(ordered), batch_size)]


def calibration_batches(
    samples: Sequence[Sample], count: int, batch_size: int, *, pad_id: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of at most `count` samples that the seed draws, to rank entries by."""
    drawn = random.Random(seed).sample(samples, min(count, len(samples)))
    return make_batches(drawn, batch_size, pad_id=pad_id)


def sample_windows(
    samples: Sequence[Sample], window: int, *, seed: int, start: int = 0, pool: int = 1
) -> Iterator[list[Sample]]:
    """Endless shuffled windows of samples: one window is what one optimizer step sees.

    The order is a function of `seed` and the epoch alone, so `start=n` goes on exactly where a run of n steps stopped.
    One window of an epoch is shorter where the samples do not divide evenly.

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
    """The numbers of the samples of each window of an epoch."""
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
    """Number of windows in one pass over `samples`, the shorter last one included."""
    return -(-samples // window)
