"""A generator of word problems in GSM8K's format, which needs neither a network nor a licence."""

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from recipes.data import Example
from speft_optim.files import whole_folder


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
    """Return the quarter, 0 to 3, of all number combinations that this one is in, by a hash that is stable."""
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
    """Draw a problem; None if the numbers belong to another split or do not divide evenly."""
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

    The folder appears complete or not at all.

    Args:
        folder: the folder to write; an earlier one of that name is replaced.
        train: number of training problems.
        test: number of test problems.
        seed: see `generate`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as temporary:
        for split, count in (("train", train), ("test", test)):
            lines = [json.dumps(vars(example)) + "\n" for example in generate(count, split=split, seed=seed)]
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
