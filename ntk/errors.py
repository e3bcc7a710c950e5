"""The one exception for input that cannot be used, and help for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Raised before any long work when what the caller gave cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error message about an unknown name.

    Args:
        name: What was written.
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
