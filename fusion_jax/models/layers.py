"""What two or more architectures share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.mlp import wide

ArrayLike = Array | np.ndarray
"""What models take: JAX arrays, or NumPy's as tokenizers give them."""


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation computed in float32 at least and returned in the dtype of its input."""

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:  # type: ignore[override]
        """Normalises the last axis."""
        y = wide(x)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + jnp.asarray(self.epsilon, y.dtype))
        shape = (1,) * (y.ndim - 1) + (-1,)
        assert self.scale is not None and self.bias is not None
        scale, bias = (v[...].astype(y.dtype).reshape(shape) for v in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def attention(
    query: Float[Array, "b t h f"],
    key: Float[Array, "b s h f"],
    value: Float[Array, "b s h f"],
    visible: Bool[Array, " b #h #t s"],
    dropout: nnx.Dropout,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "b t h f"]:
    """Scaled dot-product attention, with the softmax in float32 at least.

    Args:
        query: (b, t, h, f) for b examples, t positions, h heads of f features.
        key: (b, s, h, f).
        value: (b, s, h, f).
        visible: Which positions s each position t sees; broadcast over heads and positions.
        dropout: Dropout of the attention weights.
        dropout_key: Its random key, or None for none.

    Returns:
        (b, t, h, f) in the dtype of the values.
    """
    scores = wide(jnp.einsum("bthf,bshf->bhts", query, key)) / math.sqrt(query.shape[-1])
    # Finite, so that a row that sees nothing (padding) gives numbers and not NaN.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, rngs=dropout_key, deterministic=dropout_key is None)
    return jnp.einsum("bhts,bshf->bthf", weights, value)
