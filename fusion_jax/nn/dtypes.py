"""Converts arrays to the dtypes of computations, whatever the model's dtype."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def wide(x: Array) -> Array:
    """Returns the array in float32, or unchanged if it is float64."""
    return x.astype(wide_dtype(x))


def wide_dtype(x: Array) -> DTypeLike:
    """Returns float64 for an array of float64, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32
