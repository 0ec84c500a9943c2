"""Make the table and the plots of a comparison of methods that `recipes.compare` trained.

    python -m eval.methods out/compare
    python -m eval.methods out/compare --markdown --plots out/pictures

For each method and budget the table has the rate with the lowest loss. It is **bracketed** if a lower and a
higher rate were tried and both are worse; else the best rate may be one that was not tried.
"""

import argparse
import math
from pathlib import Path
from statistics import median

from eval.entries import ADAPTERS, Entry, best_of, difference, read_entries, sweeps
from eval.method_plots import draw

HEADS = (
    *("method", "trained", "share", "rate", "bracketed", "loss", "sd", "n", "to best adapter"),
    *("own texts", "documentation", "peak GB", "tokens/s"),
)


def rows(entries: list[Entry]) -> list[tuple[str, ...]]:
    """Return a row of text for each method and budget, the best first within a budget."""
    chosen = {key: best_of(sweep) for key, sweep in sweeps(entries).items()}
    ordered = sorted(chosen.values(), key=lambda one: (one[0].budget_rank or math.inf, one[0].mean))
    found = []
    for best, bracketed in ordered:
        rivals = [e for e, _ in chosen.values() if e.method in ADAPTERS and e.budget_rank == best.budget_rank]
        found.append(_row(best, bracketed, min(rivals, key=lambda entry: entry.mean, default=None)))
    return found


def _row(best: Entry, bracketed: bool, rival: Entry | None) -> tuple[str, ...]:
    shared = any(cell["workers"] > 1 for cell in best.cells)
    speed = median(cell["tokens_per_second"] for cell in best.cells)
    trained, share = best.cells[0]["trained"], best.cells[0].get("density")
    compared = rival is not None and rival is not best and math.isfinite(best.mean + rival.mean)
    against = _signed(*difference(best, rival)) if compared else ""
    forgotten = [best.mean_of(lambda cell, kind=kind: cell["forgetting"][kind]) for kind in ("own", "documentation")]
    peak = best.mean_of(lambda cell: cell["peak_bytes"])
    return (
        best.method,
        f"{trained:,}",
        "all" if share is None else f"{share:.2%}",
        f"{best.rate:g}",
        "yes" if bracketed else "no",
        "diverged" if math.isinf(best.mean) else f"{best.mean:.4f}",
        "" if best.deviation is None else f"{best.deviation:.4f}",
        str(len(best.cells)),
        against,
        *("" if number is None else f"{number:+.4f}" for number in forgotten),
        "" if peak is None else f"{peak / 1e9:.2f}",
        f"{speed:,.0f}" + ("*" if shared else ""),
    )


def _signed(value: float, error: float | None) -> str:
    return f"{value:+.4f}" + ("" if error is None else f" +- {error:.4f}")


NOTES = (
    "loss: mean over the answer tokens of the test problems, over n seeds; sd between seeds. own texts, documentation: "
    "rise of the loss on texts of the base model and on Python's reference. to best adapter: difference of the means "
    "at this budget +- its standard error."
)


def table(entries: list[Entry], *, markdown: bool = False) -> str:
    """Format the comparison."""
    lines = [HEADS, *rows(entries)]
    shared = "* several workers shared the GPU" if any(line[-1].endswith("*") for line in lines) else ""
    notes = "\n".join(filter(None, [NOTES, shared]))
    if markdown:
        text = ["| " + " | ".join(line) + " |" for line in lines]
        text.insert(1, "|" + "---|" * len(HEADS))
        return "\n".join(text) + "\n\n" + notes.replace("*", "\\*")
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*text, "", notes])


def main(arguments: list[str] | None = None) -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.methods", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="--out of recipes.compare")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    parser.add_argument("--plots", help="folder for four PNGs")
    options = parser.parse_args(arguments)
    try:
        entries = read_entries(Path(options.folder))
        print(table(entries, markdown=options.markdown))
        if options.plots is not None:
            print("\n" + "\n".join(str(path) for path in draw(entries, Path(options.plots))))
    except ValueError as error:
        raise SystemExit(f"eval.methods: {error}") from error


if __name__ == "__main__":
    main()
