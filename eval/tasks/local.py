"""Data of the local tasks: GSM8K's two files in a folder that the user names.

The folder reaches lm-eval as task metadata (`--metadata '{"data": "FOLDER"}'` on its own command line), so the task
files hold no paths. The rows are read into memory and not into the cache of `datasets`, so that a run on an edited file
cannot read earlier rows.
"""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

SPLITS = ("train", "test")


def read_folder(data: str | None = None, **_metadata) -> DatasetDict:
    """Read train.jsonl and test.jsonl, whose lines hold `question` and `answer`.

    Args:
        data: the folder.

    Returns:
        The two splits with exactly these two columns.

    Raises:
        ValueError: there is no folder, a file is missing, or a line lacks one of the two fields.
    """
    if data is None:
        raise ValueError(
            "no data folder given: this task reads its problems from a folder with train.jsonl and test.jsonl"
        )
    return DatasetDict({split: Dataset.from_list(read_rows(Path(data) / f"{split}.jsonl")) for split in SPLITS})


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read one file of problems, one JSON object a line."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}; the data folder must hold train.jsonl and test.jsonl")
    with path.open(encoding="utf-8") as file:
        rows = [read_row(path, number, line) for number, line in enumerate(file, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no problems; each line must be a JSON object with question and answer")
    return rows


def read_row(path: Path, number: int, line: str) -> dict[str, str]:
    """Read one problem; its `question` and `answer` must be strings."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ValueError(f"{path}, line {number}: needs the strings question and answer, got {line[:80]!r}")
    return {"question": row["question"], "answer": row["answer"]}
