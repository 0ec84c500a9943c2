"""Cells of a comparison: a method at a budget, a learning rate and a seed."""

from dataclasses import dataclass
from pathlib import Path

from eval.records import read_json_lines
from recipes import baselines, ranges

SALIENCES = ("snip", "gradient", "magnitude", "random")
STATIC = tuple(f"static-{salience}" for salience in SALIENCES)
MOVING = ("moving-snip", "moving-gradient")


@dataclass(frozen=True)
class Cell:
    """One training of a comparison.

    Attributes:
        method: `full`, an adapter, or a sparse method such as `static-snip`.
        budget_rank: the rank of LoRA with as many trained values; None for `full`.
        rate: peak learning rate.
        seed: seed of data order, mask and adapter.
    """

    method: str
    budget_rank: int | None
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        rank = "" if self.budget_rank is None else f"_r{self.budget_rank}"
        return f"{self.method}{rank}_lr{self.rate:g}_s{self.seed}"


def check_cell(cell: Cell) -> None:
    """Refuse a cell that cannot be trained.

    Raises:
        ValueError: its method is unknown or not installed, or a number is out of range.
    """
    known = ("full", *baselines.ADAPTERS, *STATIC, *MOVING)
    if cell.method not in known:
        raise ValueError(f"method {cell.method!r} is unknown; take one of {', '.join(known)}")
    baselines.check_available(cell.method)
    for name, value in {"rate": cell.rate, "seed": cell.seed}.items():
        if reason := ranges.refusal("lr" if name == "rate" else name, value):
            raise ValueError(f"the {name} of {cell.method} is {reason}")
    if (cell.budget_rank is None) != (cell.method == "full") or (cell.budget_rank is not None and cell.budget_rank < 1):
        raise ValueError(f"the budget rank of {cell.method} is {cell.budget_rank}; full has none, others at least 1")


def read_cells(path: Path) -> list[Cell]:
    """Read a file with one cell a line.

    Raises:
        ValueError: there is no such file, it is empty, or a line is not a cell.
    """
    cells = []
    for where, row in read_json_lines(path):
        try:
            cells.append(_as_cell(row))
        except TypeError as error:
            raise ValueError(
                f'{where} is no cell ({error}); write it as {{"method": "lora", "budget_rank": 4, "rate": 0.003, '
                '"seed": 0}'
            ) from error
    if not cells:
        raise ValueError(f"{path} holds no cells; write one a line")
    return cells


def _as_cell(row: object) -> Cell:
    cell = Cell(**row)
    numbers = {"rate": (int, float), "seed": (int,), "budget_rank": (int, type(None))}
    for name, kinds in numbers.items():
        if type(getattr(cell, name)) not in kinds:
            raise TypeError(f"its {name} is {getattr(cell, name)!r}")
    return cell
