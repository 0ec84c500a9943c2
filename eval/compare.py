"""Compare score files: a table with the difference to the first, and a bar chart.

    python -m eval.compare before.json after.json --plot scores.png

Two runs on the same problems are compared problem by problem: what both solve or both miss says nothing about their
difference, so its standard error is that of the per-problem differences, usually well below that of two independent
samples. Runs on different problems are treated as independent.
"""

import argparse
import json
import math
from pathlib import Path

import numpy

from eval.records import save_figure

# If runs differ in one of these settings, not their weights alone make the difference.
SETTINGS = ("chat_template", "prepends_bos", "batch_size", "max_gen_tokens", "dtype", "seed", "limit")


def read_records(paths: list[str]) -> dict[str, dict]:
    """Read score files, by a short label each.

    Args:
        paths: at least two files that `eval.score` wrote.

    Returns:
        Records by file stem, or by whole path where two stems are equal.

    Raises:
        ValueError: there are fewer than two, a file is named twice, or one is not a score file.
    """
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ValueError(f"got {len(paths)} score files ({', '.join(paths)}); give at least two different ones")
    stems = [Path(path).stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else paths
    return {label: read_record(Path(path)) for label, path in zip(labels, paths, strict=True)}


def read_record(path: Path) -> dict:
    """Read one score file."""
    if not path.is_file():
        raise ValueError(f"no such score file: {path}; write one with `python -m eval.score ... --out {path}`")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file that eval.score wrote") from error
    if not isinstance(record, dict) or not isinstance(record.get("tasks"), dict):
        raise ValueError(f"{path} holds no tasks; give a file that eval.score wrote")
    return record


def common_scores(records: dict[str, dict]) -> list[tuple[str, str, str]]:
    """List the (task, metric, filter) that every record has, in the order of the first."""
    keys = [
        {
            (task, metric, chosen): None
            for task, result in record["tasks"].items()
            for metric, by_filter in result["scores"].items()
            for chosen in by_filter
        }
        for record in records.values()
    ]
    common = [key for key in keys[0] if all(key in others for others in keys)]
    if not common:
        tasks = "; ".join(f"{label}: {', '.join(record['tasks'])}" for label, record in records.items())
        raise ValueError(f"these files have no score in common ({tasks}); score all of them on one task")
    return common


def difference(first: dict, second: dict, *, paired: bool) -> tuple[float, float | None]:
    """Difference of two scores and its standard error.

    Args:
        first: one filter's entry in a record.
        second: the same filter's entry in another record.
        paired: both are about the same problems, so `each` lines up.

    Returns:
        (second - first, its standard error or None where it is unknown).
    """
    value = second["value"] - first["value"]
    if paired and first["each"] and second["each"] and len(first["each"]) == len(second["each"]) > 1:
        changes = numpy.subtract(second["each"], first["each"])
        return value, float(changes.std(ddof=1) / math.sqrt(len(changes)))
    if first["stderr"] is None or second["stderr"] is None:
        return value, None
    return value, math.hypot(first["stderr"], second["stderr"])


def rows(records: dict[str, dict]) -> list[dict]:
    """Compute one row for each score and record.

    Returns:
        Dicts with task, metric, filter, label, value, stderr, n, and difference and difference_stderr to the first
        record (None in the first record's own rows).
    """
    reference = next(iter(records))
    found = []
    for task, metric, chosen in common_scores(records):
        base = records[reference]["tasks"][task]
        for label, record in records.items():
            result = record["tasks"][task]
            entry = result["scores"][metric][chosen]
            gain, error = None, None
            if label != reference:
                same = base["problems_sha256"] is not None and base["problems_sha256"] == result["problems_sha256"]
                gain, error = difference(base["scores"][metric][chosen], entry, paired=same)
            found.append(
                {"task": task, "metric": metric, "filter": chosen, "label": label}
                | {key: entry[key] for key in ("value", "stderr", "n")}
                | {"difference": gain, "difference_stderr": error}
            )
    return found


def differing_settings(records: dict[str, dict]) -> dict[str, list]:
    """Find the settings in which the records differ, with every record's value."""
    values = {name: [record.get(name) for record in records.values()] for name in SETTINGS}
    for task, *_ in common_scores(records):
        for name in ("fewshot", "problems_sha256"):
            values[f"{name} of {task}"] = [record["tasks"][task][name] for record in records.values()]
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def table(records: dict[str, dict]) -> str:
    """Format the comparison, in percent, with a note on settings that differ."""
    width = max(len(label) for label in (*records, "run"))
    lines = []
    previous = None
    for row in rows(records):
        if previous != (previous := (row["task"], row["metric"], row["filter"])):
            lines += ["", " / ".join(previous), f"  {'run':<{width}} {'score %':>15} {'n':>6} {'to the first':>17}"]
        score, gain = percent(row["value"], row["stderr"]), ""
        if row["difference"] is not None:
            gain = percent(row["difference"], row["difference_stderr"], sign="+")
        lines.append(f"  {row['label']:<{width}} {score:>15} {row['n']:>6} {gain:>17}")
    differing = differing_settings(records)
    if differing:
        lines += ["", "note: these runs differ in more than their weights:"]
        lines += [f"  {name}: {', '.join(str(value)[:12] for value in found)}" for name, found in differing.items()]
    return "\n".join([*lines, "", "+- one standard error"]).lstrip("\n")


def percent(value: float, stderr: float | None, sign: str = "") -> str:
    """Format a share and its standard error in percent."""
    return f"{100 * value:{sign}.2f} +- " + ("?" if stderr is None else f"{100 * stderr:.2f}")


def draw(records: dict[str, dict], path: Path) -> None:
    """Draw grouped bars, one group a score and one colour a record, with standard errors.

    Args:
        records: from `read_records`.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system and no global state

    groups = common_scores(records)
    found = rows(records)
    width = 0.8 / len(records)
    figure = Figure(figsize=(max(5.0, 1.0 + len(groups) * (0.8 + 0.45 * len(records))), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, label in enumerate(records):
        own = [row for row in found if row["label"] == label]
        centres = numpy.arange(len(groups)) + (place - (len(records) - 1) / 2) * width
        heights = [100 * row["value"] for row in own]
        errors = [100 * (row["stderr"] or 0.0) for row in own]
        bars = axes.bar(centres, heights, width, yerr=errors, capsize=3, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(numpy.arange(len(groups)), [group_name(key, found) for key in groups])
    axes.set_ylabel("score in percent, +- one standard error")
    tallest = max(100 * (row["value"] + (row["stderr"] or 0.0)) for row in found)
    axes.set_ylim(0, 1.25 * max(tallest, 1.0))  # room for the numbers and the legend, also where every score is 0
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def group_name(key: tuple[str, str, str], found: list[dict]) -> str:
    """Name one group of bars; several numbers of problems where the records differ."""
    task, metric, chosen = key
    counts = dict.fromkeys(str(row["n"]) for row in found if (row["task"], row["metric"], row["filter"]) == key)
    return f"{task}\n{metric if chosen == 'none' else chosen}\nn = {', '.join(counts)}"


def main(arguments: list[str] | None = None) -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.splitlines()[0])
    parser.add_argument("scores", nargs="+", help="files that eval.score wrote; differences are to the first")
    parser.add_argument("--plot", help="PNG to draw")
    options = parser.parse_args(arguments)
    try:
        records = read_records(options.scores)
        print(table(records))
        if options.plot is not None:
            draw(records, Path(options.plot))
    except ValueError as error:
        raise SystemExit(f"eval.compare: {error}") from error


if __name__ == "__main__":
    main()
