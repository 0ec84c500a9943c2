"""Checks of arguments, with uniform errors: the value, the limit, and what to pass instead."""

import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path


def is_whole(number: object) -> bool:
    """Tell whether an object is a whole number of Python or numpy; True and False are not."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def check_whole(name: str, value: object, *, least: int | None = None, usual: int | str) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Args:
        name: the argument's name.
        value: what was passed.
        least: the smallest number allowed; None for any.
        usual: an example, for the message.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is too small.
    """
    if not is_whole(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a whole number, such as {usual}.")
    if least is not None and value < least:
        raise ValueError(f"{name}={value} must be a whole number of at least {least}, such as {usual}.")


def check_share(name: str, value: object, meaning: str) -> None:
    """Refuse a value that is not a number in (0, 1].

    Args:
        name: the argument's name.
        value: what was passed.
        meaning: an example and its effect, for the message.

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside (0, 1], or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number in (0, 1].")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value} is outside (0, 1]; {meaning}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ValueError: it is not one of them.
    """
    if not isinstance(value, str) or value not in choices:
        *first, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is not known; choose {', '.join(first)} or {last}.")


def check_flag(name: str, value: object) -> None:
    """Refuse a value that is neither True nor False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass True or False.")


def check_callable(name: str, value: object, kind: str) -> None:
    """Refuse a value that is neither None nor callable.

    Args:
        name: the argument's name.
        value: what was passed.
        kind: the arguments of the function, for the message.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r} is not callable; pass a function of {kind}, or None.")


def checked_path(path: object) -> Path:
    """Return a path that a caller passed as a string or path.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{path!r} is a {type(path).__name__}; pass a path as a string or a pathlib.Path.")
    return Path(path)
