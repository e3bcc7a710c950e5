"""The dtypes that numbers are computed in, whatever the model's dtype."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def wide(x: Array) -> Array:
    """The array in float32, or unchanged if it is float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def wide_dtype(x: Array) -> Any:
    """float64 for float64, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32
