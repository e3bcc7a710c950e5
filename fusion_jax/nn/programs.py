"""Compiled programs where every width or rank needs some: made quickly, and let go of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 8
"""Compiled functions that are kept of each kind."""
RENEWED = 64
"""New compiled functions after which `jax.clear_caches` is called."""
_made = itertools.count(1)

_QUICK: Mapping[str, Sequence[Mapping[str, int | bool]]] = {
    # Most of the time goes into many small loops, and that of running into products of matrices,
    # which libraries compute.
    "cpu": (
        {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False},
        {"xla_backend_optimization_level": 1},
    ),
    # XLA would compile and time tens of kernels for each product, which takes most of the time. In
    # float32 the library's own are the fastest, and the same ones give the same bits.
    "gpu": ({"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},),
}
"""Compiler options by platform; the first ones that the installed version of XLA knows are used."""


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


@cache
def quick_options(platform: str) -> dict[str, int | bool] | None:
    """Returns options for `jax.jit` with which linear algebra compiles in less time.

    On a CPU in three quarters to three fifths of it. Not for derivatives of whole models, which
    would take more than twice as long there.

    Args:
        platform: As of `jax.default_backend`.

    Returns:
        Its ``compiler_options``; None where there is nothing to gain.

    Example:
        >>> quick_options("tpu") is None
        True
    """
    if jax.config.read("jax_disable_most_optimizations"):
        return None
    for options in _QUICK.get(platform, ()):
        try:
            jax.jit(lambda: jnp.int32(0), compiler_options=dict(options)).lower().compile()
        except jax.errors.JaxRuntimeError:  # this version of XLA has other options
            continue
        return dict(options)
    return None
