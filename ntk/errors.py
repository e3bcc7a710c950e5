"""The exception for input that cannot be used, and help for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args


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


def check_choice(argument: str, value: object, literal: Any) -> None:
    """Checks that a value is one of the values of a `typing.Literal`.

    Args:
        argument: The name of the argument, for the error message.
        value: The value.
        literal: The `typing.Literal`.

    Raises:
        InputError: The value is none of them; the message names the closest one.

    Example:
        >>> from typing import Literal
        >>> check_choice("kind", "adam", Literal["sgd", "adam"])
    """
    known = get_args(literal)
    if value not in known:
        raise InputError(f"unknown {argument} {value!r}{nearest(str(value), known)}")
