"""lm-eval's part of scoring: find tasks, run them on a model, and turn the result into a plain dict."""

import difflib
import hashlib
import json
import math
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import set_seed

from eval.model import quiet

TASK_FOLDER = Path(__file__).parent / "tasks"
LOCAL_TASKS = ("demo", "gsm8k_local")
# The number to quote if a task reports several; other tasks quote the first that they report.
HEADLINES = {task: ("exact_match", "strict-match") for task in ("gsm8k", *LOCAL_TASKS)}


def check_names(names: list[str]) -> None:
    """Refuse names that are not a list of at least one."""
    if isinstance(names, str) or not names:
        raise ValueError(f"tasks is {names!r}; give a list of at least one name, e.g. ['demo']")


@lru_cache(maxsize=2)
def task_manager(folder: str, include_defaults: bool, data: str | None) -> TaskManager:
    """Return lm-eval's index of tasks, which takes seconds to build with its own ones.

    Args:
        folder: folder of further task files.
        include_defaults: whether to include lm-eval's own tasks.
        data: folder that the local tasks read.
    """
    return TaskManager(
        include_path=folder,
        include_defaults=include_defaults,
        metadata={} if data is None else {"data": data},
    )


def load_tasks(
    names: list[str],
    *,
    data: str | None = None,
    fewshot: int | None = None,
    max_gen_tokens: int | None = None,
    seed: int = 1234,
) -> dict:
    """Find the tasks and read their data.

    Args:
        names: names of lm-eval tasks or of the files in `eval/tasks/`.
        data: folder that the local tasks read.
        fewshot: overrides the tasks' number of solved examples.
        max_gen_tokens: overrides the tasks' limit of a generated answer.
        seed: seeds the choice of solved examples.

    Returns:
        lm-eval's dict of tasks and groups.
    """
    check_names(names)
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot is {fewshot}; it must be at least 0, or None for the task's own number")
    if data is None and (local := [name for name in names if name in LOCAL_TASKS]):
        raise ValueError(
            f"task {local[0]} reads a local folder; name one with train.jsonl and test.jsonl (--data FOLDER)"
        )
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"no such data folder: {data}; it must hold train.jsonl and test.jsonl")
    with quiet():
        own = not set(names) <= set(LOCAL_TASKS)
        manager = task_manager(str(TASK_FOLDER), own, None if data is None else str(data))
        for name in names:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks) or LOCAL_TASKS
                raise ValueError(
                    f"unknown task {name!r}; did you mean {' or '.join(near)}? `lm_eval ls tasks` lists all"
                )
        loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        set_options(task, fewshot=fewshot, max_gen_tokens=max_gen_tokens, seed=seed)
    return loaded


def set_options(task, *, fewshot: int | None, max_gen_tokens: int | None, seed: int) -> None:
    """Override a task's options with the caller's.

    `simple_evaluate` would do this too, but silently keeps 0 examples where a task's file says 0.
    """
    shots = (task.get_config("num_fewshot") or 0) if fewshot is None else fewshot
    if shots and (available := len(task.fewshot_docs())) < shots:
        raise ValueError(
            f"{task.task_name} asks for {shots} solved examples before each problem, but its data has {available}; "
            "give it more training problems or set fewshot lower"
        )
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed)
    if max_gen_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": max_gen_tokens}, update=True)


def run(
    language_model: LM,
    loaded: dict,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    seed: int = 1234,
) -> dict[str, dict]:
    """Run the tasks and return their scores by name.

    Args:
        language_model: any lm-eval model.
        loaded: from `load_tasks`.
        limit: problems of each task; None is all of them.
        chat_template: wrap each prompt in the model's chat template, solved examples as earlier turns.
        seed: seeds Python's, NumPy's and PyTorch's generators.
    """
    set_seed(seed)
    # lm-eval gives no way to switch this one bar off; `disable=None` shows it on a terminal only.
    with mock.patch("lm_eval.api.task.tqdm", partial(tqdm, disable=None)):
        results = evaluate(
            language_model,
            loaded,
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    return {name: summarise(name, results) for name in results["results"]}


def summarise(name: str, results: dict) -> dict:
    """Turn lm-eval's result of one task or group into ours.

    Args:
        name: the task or group.
        results: what `lm_eval.evaluate` returned.

    Returns:
        `scores[metric][filter]` with value, stderr (or None), n and, for a task, the value of each problem; the
        headline; the number of solved examples; and a hash of the problems, by which runs on the same problems are
        known.
    """
    row, samples = results["results"][name], results["samples"].get(name, [])
    scores: dict[str, dict[str, dict]] = {}
    for key, value in row.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        each = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        scores.setdefault(metric, {})[chosen] = {
            "value": float(value),
            "stderr": finite_or_none(row.get(f"{metric}_stderr,{chosen}")),
            "n": len(each) or row.get("sample_len"),
            "each": [float(one) for one in each] if all(isinstance(one, (bool, int, float)) for one in each) else None,
        }
    problems = sorted({(sample["doc_id"], sample["doc_hash"]) for sample in samples})
    return {
        "headline": headline(name, scores),
        "scores": scores,
        "fewshot": results["n-shot"].get(name),
        "problems_sha256": hashlib.sha256(json.dumps(problems).encode()).hexdigest() if problems else None,
    }


def finite_or_none(value: object) -> float | None:
    """Return a finite number or None, since lm-eval writes "N/A" for a single problem and JSON has no NaN."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def headline(name: str, scores: dict[str, dict[str, dict]]) -> dict[str, str] | None:
    """Name the metric and filter to quote for a task; None for a group that reports no score of its own."""
    metric, chosen = HEADLINES.get(name, (None, None))
    if chosen in scores.get(metric, {}):
        return {"metric": metric, "filter": chosen}
    return next(({"metric": metric, "filter": chosen} for metric in scores for chosen in scores[metric]), None)
