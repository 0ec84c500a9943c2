"""Descriptions of an adapter: the metadata of its file, and the model card of its folder."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from speft_optim.masks.collection import Masks
from speft_optim.version import __version__

# What is known about the base of an adapter.
BASE_KEYS = ("name", "revision", "fingerprint")


def notes_on(masks: Masks, whole: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the notes that a file holds about itself, for people and tools.

    Args:
        masks: the masks, without the parameters that were trained densely.
        whole: by name, the number of entries of those.
    """
    trained = ", ".join(f"{name} ({size:,})" for name, size in (whole or {}).items())
    return {
        "entries": masks.count,
        "density": masks.density,
        "masks": masks.fingerprint(),
        "speft_optim": __version__,
        "torch": torch.__version__,
        **({"trained whole": trained} if whole else {}),
    }


def check_details(details: Mapping[str, Any] | None) -> None:
    """Refuse notes of the user's that a file cannot hold, or whose names are taken.

    Raises:
        TypeError: they are no mapping, or hold something other than strings and numbers.
        ValueError: a name is one of those that are always noted.
    """
    if details is None:
        return
    if not isinstance(details, Mapping):
        raise TypeError(
            f"details is a {type(details).__name__}; pass a dict of strings and numbers, such as {{'data': 'gsm8k'}}."
        )
    for key, value in details.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise TypeError(f"details holds {key!r}: {value!r}; it takes strings and numbers by name.")
    reserved = [*notes_on(Masks()), "trained whole", *(f"base {key}" for key in BASE_KEYS)]
    if taken := [key for key in details if key in reserved]:
        raise ValueError(f"details names {taken}, but {reserved} are always written; choose other names.")


def model_card(base: Mapping[str, str], notes: Mapping[str, Any]) -> str:
    """Return the model card of an adapter's folder: front matter for model hubs, a table, and how to load it."""
    front = ["library_name: speft_optim", "tags: [sparse-fine-tuning, adapter]"]
    # Only a name on a hub is noted: a local folder means nothing to others.
    if base["name"].count("/") == 1 and not base["name"].startswith((".", "/", "~")):
        front.insert(0, f"base_model: {json.dumps(base['name'])}")
    rows = {f"base {key}": value for key, value in base.items() if value}
    rows.update({key: f"{value:,}" if isinstance(value, int) else value for key, value in notes.items()})
    beside = f" {notes['trained whole']} was trained whole beside them." if "trained whole" in notes else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{chr(10).join(front)}
---

# Sparse adapter

{notes["entries"]:,} entries ({notes["density"]:.3%} of the weights they lie in) to write into the base's
weights.{beside}

```python
from speft_optim import load_adapter, unload_adapter

load_adapter(model, "path/of/this/folder")  # the base it was trained on; any other is refused
unload_adapter(model)  # the base again, bit for bit
```

| | |
|---|---|
{table}
"""
