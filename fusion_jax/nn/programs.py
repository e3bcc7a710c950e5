"""Lets go of compiled programs, where every width or rank needs some of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 8
"""Compiled functions that are kept of each kind."""
RENEWED = 64
"""New compiled functions after which `jax.clear_caches` is called."""
_made = itertools.count(1)


class ByValue:
    """A value as a key of a cache, even if it cannot be hashed, as configurations of models.

    Example:
        >>> {ByValue([1]): "a"}[ByValue([1])]
        'a'
    """

    def __init__(self, value: Any):
        self.value = value
        try:
            self._hash = hash(value)
        except TypeError:
            self._hash = 0

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByValue) and bool(self.value == other.value)


def few_programs(make: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that returns a compiled function: only the last few are kept.

    The programs of a compiled function go with it. With one function for all widths they would
    remain: after about 90 widths a process has no memory maps left (Linux gives it 65,530), and XLA
    crashes. What JAX itself keeps of each shape, some megabytes, goes now and then.

    Args:
        make: Returns a function that `jax.jit` made; its arguments are hashable.

    Returns:
        The function, which returns the same object for the same arguments.

    Example:
        >>> @few_programs
        ... def times(factor):
        ...     return jax.jit(lambda x: factor * x)
        >>> int(times(2)(3)), times(2) is times(2)
        (6, True)
    """

    @lru_cache(maxsize=KEPT)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        if next(_made) % RENEWED == 0:
            jax.clear_caches()
        return make(*args, **kwargs)

    return kept  # type: ignore[return-value]
