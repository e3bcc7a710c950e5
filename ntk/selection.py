"""One way to choose among items with paths, such as the MLPs or the parameters of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex

from ntk.errors import InputError

Selection = str | SupportsIndex | slice | Iterable[SupportsIndex] | Callable[..., bool] | None
"""A regular expression that matches whole paths; an index, several indices or a slice, where
negative numbers count from the end; a function that returns whether to choose an item; None for
all."""

_LISTED = 40
"""The largest number of paths that an error message lists."""


def select(
    selection: Selection,
    paths: Sequence[str],
    *,
    argument: str,
    noun: str,
    items: Sequence[object] | None = None,
) -> list[int]:
    r"""Returns the positions of the chosen paths, in order.

    Args:
        selection: What to choose.
        paths: The paths of the items to choose from.
        argument: The name of the caller's argument, for error messages.
        noun: The name of an item, such as ``"site"``, for error messages.
        items: The items, with which a function is called; None to call it with the paths.

    Returns:
        Positions in ``paths``.

    Raises:
        InputError: There is nothing to choose from, the expression is not valid, an index is out of
            range, or no item is chosen; the message lists the paths.

    Example:
        >>> select(r"layers\.\d+", ["embed", "layers.0", "layers.1"], argument="wrt", noun="part")
        [1, 2]
        >>> select(slice(-1, None), ["a", "b"], argument="layers", noun="site")
        [1]
    """
    count = len(paths)
    if not count:
        raise InputError(f"{argument}: the model has no {noun}")
    if selection is None:
        return list(range(count))
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise InputError(
                f"{argument} {selection!r} is not a regular expression: {error}"
            ) from None
        chosen = [i for i, path in enumerate(paths) if pattern.fullmatch(path)]
    elif isinstance(selection, slice):
        chosen = list(range(count))[selection]
    elif callable(selection):
        chosen = [i for i, item in enumerate(paths if items is None else items) if selection(item)]
    else:
        indices = list(selection) if isinstance(selection, Iterable) else [selection]
        for i in indices:
            whole = isinstance(i, SupportsIndex) and not isinstance(i, bool)
            if not whole or not -count <= int(i) < count:
                raise InputError(f"{argument}: no {noun} {i!r}; there are {_listing(paths)}")
        chosen = sorted({int(i) % count for i in indices})
    if not chosen:
        shown = "" if callable(selection) else f" {selection!r}"
        hint = " (an expression must match a whole path)" if isinstance(selection, str) else ""
        raise InputError(f"{argument}{shown} matches no {noun}{hint}; there are {_listing(paths)}")
    return chosen


def _listing(paths: Sequence[str]) -> str:
    named = [f"{i}: {path or '(the model)'}" for i, path in enumerate(paths[:_LISTED])]
    return ", ".join(named + ["..."] * (len(paths) > _LISTED))
