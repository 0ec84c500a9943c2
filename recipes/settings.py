"""The settings shared by all cells of a comparison, in a file beside them."""

import json
from argparse import Namespace
from pathlib import Path

from eval.records import write_json

# These options may differ between commands that fill one folder.
FREE = ("cells", "methods", "budget_ranks", "rates", "seeds", "out", "workers", "minutes", "cache")


def check_settings(args: Namespace, out: Path) -> None:
    """Compare the settings of a command with those in the folder, if there are any.

    Raises:
        ValueError: cells of this command could not be compared with those in the folder.
    """
    path = out / "settings.json"
    if not path.is_file():
        return
    settings, before = _settings(args), json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)):
        name = differing[0]
        raise ValueError(
            f"--{name.replace('_', '-')} is {settings.get(name)}, but the cells in {out} were trained with "
            f"{before.get(name)}; repeat that, or choose another --out"
        )


def keep_settings(args: Namespace, out: Path) -> None:
    """Write the settings, or compare them with those that are there; only one process at a time may do so.

    Raises:
        ValueError: see `check_settings`.
    """
    check_settings(args, out)
    write_json(_settings(args), out / "settings.json")


def _settings(args: Namespace) -> dict:
    return {key: value for key, value in vars(args).items() if key not in FREE}
