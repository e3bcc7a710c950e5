"""Small helpers for arrays: products in full precision, float64 on the host, a check for NaN."""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from ntk.errors import InputError


def inner_products(a: Float[Array, "n k"], b: Float[Array, "m k"]) -> Float[Array, "n m"]:
    """Returns the inner products of the rows of two matrices, in the highest precision."""
    return jnp.matmul(a, b.T, precision="highest")


def row_norms(x: Float[Array, "*n k"]) -> Float[Array, "*n"]:
    """Returns Euclidean norms along the last axis; squares neither overflow nor underflow."""
    largest = jnp.abs(x).max(-1, keepdims=True, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    return largest[..., 0] * jnp.sqrt(jnp.square(x / largest).sum(-1))


@overload
def host_norms(x: np.ndarray, axis: int) -> np.ndarray: ...
@overload
def host_norms(x: np.ndarray) -> np.floating: ...
def host_norms(x: np.ndarray, axis: int | None = None) -> np.ndarray | np.floating:
    """Returns Euclidean norms along an axis, or of all numbers, as `row_norms` does."""
    largest = np.abs(x).max(axis=axis, keepdims=True, initial=0)
    largest = np.where(largest > 0, largest, 1)
    return np.squeeze(largest, axis) * np.sqrt(np.square(x / largest).sum(axis))


def host_float64(x: npt.ArrayLike) -> np.ndarray:
    """Returns an array, of any dtype, as float64 on the host."""
    return np.asarray(x).astype(np.float64)


def require_finite(result: Array) -> Array:
    """Returns a result if all its values are finite; under a transformation it is not checked.

    Raises:
        InputError: A value is NaN or infinite.
    """
    # Results are checked instead of arguments, as weights are thousands of times larger.
    if not isinstance(result, Tracer):
        with jax.ensure_compile_time_eval():
            if not all_finite(result):
                raise InputError("weights or inputs hold NaN or infinite values, or overflow")
    return result


def all_finite(x: ArrayLike) -> Bool[Array, ""] | bool:
    """Returns whether all numbers of an array are finite."""
    # On the host no program is compiled for each shape, which takes longer than to look.
    return bool(np.isfinite(np.asarray(x)).all()) if on_host(x) else _all_finite(x)


def on_host(x: ArrayLike) -> bool:
    """Returns whether NumPy can read an array where it is, without a copy."""
    if not isinstance(x, jax.Array):
        return True
    if isinstance(x, Tracer) or not x.is_fully_addressable:
        return False
    return [device.platform for device in x.devices()] == ["cpu"]


@jax.jit
def _all_finite(x: Array) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()
