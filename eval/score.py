"""Score a checkpoint, or a base and an adapter, with lm-eval, and write one JSON.

    python -m eval.score out/run1 --tasks demo --data out/data --out scores.json
    python -m eval.score BASE --adapter out/adapter.safetensors --tasks gsm8k_local --data FOLDER_WITH_GSM8K

A task is any that lm-eval knows (`gsm8k`, `arc_easy`, ...), or one of `eval/tasks/`, which read a local folder: the
demo's word problems (`demo`) and GSM8K without a hub (`gsm8k_local`). GSM8K's two filters often differ by tens of
points: `strict-match` requires the number after `####`, as the training answers write it, and `flexible-extract` takes
the last number of the text. Both are always reported, with standard errors, and the headline is marked.

The file is written whenever a task ends. After an interruption the same command continues with the tasks that are
listed under `unfinished`.
"""

import argparse
import json
import platform
import re
import tempfile
import time
from pathlib import Path

import torch

from eval.checkpoints import begins_with_bos, check_readable, fetch, load_tokenizer
from eval.harness import check_names, load_tasks, run
from eval.model import as_language_model, load_model
from eval.records import hash_files, package_version, write_json

PACKAGES = ("torch", "transformers", "lm_eval")


def score(
    checkpoint: str,
    tasks: list[str],
    *,
    adapter: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    fewshot: int | None = None,
    chat_template: bool = False,
    out: str | None = None,
    seed: int = 1234,
    max_gen_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> dict:
    """Score one model.

    Args:
        checkpoint: folder with config.json, *.safetensors and the tokenizer, or a name on the hub; with `adapter`, the
            base's.
        tasks: names of lm-eval tasks or of the files in `eval/tasks/`.
        adapter: file written by `speft_optim.save_adapter`; None scores the checkpoint as it is.
        data: folder with train.jsonl and test.jsonl, which the local tasks read.
        limit: problems of each task; None is all of them.
        batch_size: prompts scored together. Results can differ in a few problems between sizes: compare at one.
        fewshot: solved examples before each problem; None is the task's own number.
        chat_template: wrap each prompt in the tokenizer's chat template.
        out: JSON file, written whenever a task ends; None writes none. A run that was interrupted goes on from it when
            repeated.
        seed: seeds the choice of few-shot examples and all generators. 1234 draws those of lm-eval's own command line.
        max_gen_tokens: limit of a generated answer; None is the task's own.
        dtype: `float32`, `bfloat16`, ...; None is float32 on CPU and the checkpoint's own elsewhere.
        device: a torch device; None is CUDA where there is one, else the CPU.

    Returns:
        The record in the JSON: scores by task, metric and filter, and all that is needed to repeat the run.

    Raises:
        ValueError: an argument is wrong, or a file of the checkpoint is damaged. It is raised before any weight is
            read, but for more `max_gen_tokens` than the model has positions.
    """
    check_counts(limit=limit, batch_size=batch_size, max_gen_tokens=max_gen_tokens)
    check_seed(seed)
    check_dtype(dtype)
    check_device(device)
    check_names(tasks)
    folder = find_checkpoint(checkpoint)
    check_files(adapter=adapter, out=out)
    options = dict(data=data, fewshot=fewshot, max_gen_tokens=max_gen_tokens, seed=seed)
    # Tasks run one by one, so that the result of each can be kept while the others run.
    loaded = {name: load_tasks([name], **options) for name in tasks}
    tokenizer = load_tokenizer(folder)
    if chat_template and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {checkpoint} has no chat template; score it without chat_template")

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, None if adapter is None else Path(adapter), dtype, device)
    settings = {
        **identity(checkpoint, folder, adapter, data),
        "asked": list(loaded),
        "limit": limit,
        "batch_size": batch_size,
        "fewshot": fewshot,
        "chat_template": chat_template,
        "prepends_bos": begins_with_bos(tokenizer),
        "seed": seed,
        "max_gen_tokens": max_gen_tokens,
        **environment(model),
    }
    unbegun = {"tasks": {}, "unfinished": list(loaded), "seconds": 0.0}
    record = earlier_record(out, settings) or settings | unbegun
    language_model = as_language_model(model, tokenizer, batch_size)
    if max_gen_tokens is not None and max_gen_tokens >= language_model.max_length:
        raise ValueError(
            f"max_gen_tokens is {max_gen_tokens}; it must be below {language_model.max_length}, which the model reads, "
            "and leave room for prompts"
        )
    finish(record, language_model, loaded, None if out is None else Path(out))
    return record


def finish(record: dict, language_model, loaded: dict[str, dict], out: Path | None) -> None:
    """Run the unfinished tasks of a record, and write it whenever one ends.

    Args:
        record: the record, to which results are added.
        language_model: an lm-eval model.
        loaded: each task by name, from `load_tasks`.
        out: JSON file; None writes none.
    """
    options = {name: record[name] for name in ("limit", "chat_template", "seed")}
    for name in list(record["unfinished"]):
        start = time.perf_counter()
        record["tasks"] |= run(language_model, loaded[name], **options)
        record["unfinished"].remove(name)
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 1)
        if out is not None:
            write_json(record, out)


def earlier_record(out: str | None, settings: dict) -> dict | None:
    """Return the record of an interrupted run with the same settings in `out`, or None."""
    if out is None or not Path(out).is_file():
        return None
    try:
        record = json.loads(Path(out).read_text(encoding="utf-8"))
    except ValueError:
        return None  # another file, which is replaced when the first task ends
    same = isinstance(record, dict) and settings.items() <= record.items()
    return record if same and record.get("unfinished") else None


def identity(checkpoint: str, folder: Path, adapter: str | None, data: str | None) -> dict:
    """Return the files that a score depends on, as they were named and by hash."""
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hash_files(sorted(folder.glob("*.safetensors"))),
        "adapter": None if adapter is None else str(adapter),
        "adapter_sha256": None if adapter is None else hash_files([Path(adapter)]),
        "data": None if data is None else str(data),
        "data_sha256": None if data is None else hash_files(sorted(Path(data).glob("*.jsonl"))),
    }


def environment(model: torch.nn.Module) -> dict:
    """Return what a score depends on beside the arguments: dtype, device and versions."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
    }


def find_checkpoint(checkpoint: str) -> Path:
    """Return the folder of a checkpoint, after fetching it if it is a name on the hub; refuse an incomplete one."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
            raise ValueError(f"no such checkpoint folder: {checkpoint}; give a folder that save_pretrained wrote")
        folder = fetch(str(checkpoint))
    missing = [pattern for pattern in ("config.json", "*.safetensors", "tokenizer*") if not any(folder.glob(pattern))]
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {', '.join(missing)}; save the model with save_pretrained and its tokenizer beside it"
        )
    check_readable(folder)
    return folder


def check_files(*, adapter: str | None, out: str | None) -> None:
    """Refuse an adapter that is not there and a result file that could not be written at the end."""
    if adapter is not None and not Path(adapter).is_file():
        raise ValueError(f"no such adapter file: {adapter}; give the file that save_adapter wrote")
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out is {out}, a folder; give the name of a JSON file")
    if out is not None:
        try:
            write_probe(Path(out))
        except OSError as error:
            raise ValueError(f"out is {out}, which cannot be written ({error}); choose another place") from error


def write_probe(path: Path) -> None:
    """Write and remove a small file beside `path`, since the end of a run is too late for an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


def check_counts(**counts: int | None) -> None:
    """Refuse counts below 1, or too large for a slice; lm-eval would take a `limit` below 1 for a share of problems."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or not 1 <= count <= 10**15):
            raise ValueError(
                f"{name} is {count}; it must be a whole number of at least 1, at most 10**15, or None for the default"
            )


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy would not take."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 to 2**32 - 1, such as 1234")


def check_dtype(dtype: str | None) -> None:
    """Refuse a name that is not that of a floating-point dtype of at least 16 bits, in which models compute."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    computes = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    if dtype is not None and not computes:
        raise ValueError(f"dtype is {dtype!r}; use float32, bfloat16 or float16, or None for the default")


def check_device(device: str | None) -> None:
    """Refuse a device that is unknown, missing, or holds no numbers."""
    try:
        if device is not None:
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises each of them for some device
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device is {device!r}, which torch cannot use here ({reason}); use another, such as cpu"
        ) from error


def table(record: dict) -> str:
    """Format the scores of a record, in percent, the headline marked with a star."""
    lines = [f"{'task':<20} {'metric':<14} {'filter':<18} {'%':>7} {'+-':>6} {'n':>6} {'shots':>5}"]
    for name, task in record["tasks"].items():
        for metric, by_filter in task["scores"].items():
            for chosen, entry in by_filter.items():
                star = "*" if task["headline"] == {"metric": metric, "filter": chosen} else " "
                error = "-" if entry["stderr"] is None else f"{100 * entry['stderr']:.2f}"
                lines.append(
                    f"{name:<20} {metric:<14} {chosen + ' ' + star:<18} {100 * entry['value']:>7.2f} {error:>6} "
                    f"{entry['n']:>6} {task['fewshot'] if task['fewshot'] is not None else '-':>5}"
                )
    return "\n".join([*lines, "* the headline; +- one standard error"])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; every option is an argument of `score`."""
    parser = argparse.ArgumentParser(prog="python -m eval.score", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint folder or name on the hub; with --adapter, the base's")
    parser.add_argument("--tasks", nargs="+", required=True, help="lm-eval tasks, or demo, gsm8k_local")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl, for demo and gsm8k_local")
    parser.add_argument("--adapter", help="adapter file to load into the checkpoint")
    parser.add_argument("--limit", type=int, help="problems of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts scored together (default: 16)")
    parser.add_argument("--fewshot", type=int, help="solved examples before each problem (default: the task's own)")
    parser.add_argument("--chat-template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    parser.add_argument("--max-gen-tokens", type=int, help="limit of a generated answer (default: the task's own)")
    parser.add_argument(
        "--seed", type=int, default=1234, help="default 1234, which is lm-eval's own for few-shot examples"
    )
    parser.add_argument("--dtype", help="default: float32 on CPU, the checkpoint's own elsewhere")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Score from the command line, and print the table."""
    options = vars(parse_arguments())
    try:
        record = score(options.pop("checkpoint"), options.pop("tasks"), **options)
    except ValueError as error:
        raise SystemExit(f"eval.score: {error}") from error
    print(table(record))


if __name__ == "__main__":
    main()
