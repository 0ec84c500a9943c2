"""Checks of arguments that several functions take, each in one wording: the value, the limit, and what to pass."""

import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path


def is_whole(number: object) -> bool:
    """Tell whether it is a whole number of Python or numpy, and no truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_whole(name: str, value: object, *, least: int | None = None, usual: int | str) -> None:
    """Refuse what is no whole number, or less than `least`.

    Args:
        name: of the argument.
        value: what was passed.
        least: the smallest number allowed; None for any.
        usual: an example, for the message.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.
    """
    if not is_whole(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a whole number, such as {usual}.")
    if least is not None and value < least:
        raise ValueError(f"{name}={value} must be a whole number of at least {least}, such as {usual}.")


def check_share(name: str, value: object, meaning: str) -> None:
    """Refuse what is no number in (0, 1].

    Args:
        name: of the argument.
        value: what was passed.
        meaning: an example and what it does, for the message.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside (0, 1], or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number in (0, 1].")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value} is outside (0, 1]; {meaning}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        *first, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is not known; choose {', '.join(first)} or {last}.")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass True or False.")


def check_callable(name: str, value: object, kind: str) -> None:
    """Refuse what is neither None nor can be called.

    Args:
        name: of the argument.
        value: what was passed.
        kind: what the function is of, for the message.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r} is not callable; pass a function of {kind}, or None.")


def checked_path(path: object) -> Path:
    """What a caller passed as a path.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{path!r} is a {type(path).__name__}; pass a path as a string or a pathlib.Path.")
    return Path(path)
