"""The exception for input that cannot be used, and help for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import get_args


class InputError(ValueError):
    """Raised before any long work if an argument, a model or a file cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name.

    Args:
        name: The unknown name.
        known: The names that exist.

    Returns:
        ``"; did you mean 'x'?"`` if a known name is close, else the list of known names.

    Example:
        >>> nearest("widht", ["width", "scaling"])
        "; did you mean 'width'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_at_least(least: int, **values: int | None) -> None:
    """Checks that numbers, by the names of their arguments, are not below a limit."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}; got {value}")


def check_choice(argument: str, value: object, literal: object) -> None:
    """Checks that the value of an argument is one of those of a `typing.Literal`.

    Raises:
        InputError: The value is none of them; the message names the closest one.

    Example:
        >>> from typing import Literal
        >>> check_choice("kind", "adam", Literal["sgd", "adam"])
    """
    known = get_args(literal)
    if value not in known:
        raise InputError(f"unknown {argument} {value!r}{nearest(str(value), known)}")
