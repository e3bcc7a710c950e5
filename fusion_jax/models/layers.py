"""What two or more architectures share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.nn.dtypes import wide

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


class RmsNorm(nnx.RMSNorm):
    """Root-mean-square normalisation in float32 at least, returned in the dtype of its input."""

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:  # type: ignore[override]
        """Normalises the last axis."""
        y = wide(x)
        mean = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean + jnp.asarray(self.epsilon, y.dtype))
        assert self.scale is not None
        return self.scale[...].reshape((1,) * (y.ndim - 1) + (-1,)) * y.astype(x.dtype)


def attention(
    query: Float[Array, "b t h f"],
    key: Float[Array, "b s g f"],
    value: Float[Array, "b s g f"],
    visible: Bool[Array, "b 1 #t s"],
    dropout: nnx.Dropout,
    dropout_key: Key[Array, ""] | None,
    *,
    scale: float | None = None,
    bias: Float[Array, "1 h t s"] | None = None,
) -> Float[Array, "b t h f"]:
    """Scaled dot-product attention, with the softmax in float32 at least.

    Args:
        query: (b, t, h, f) for b examples, t positions, h heads of f features.
        key: (b, s, g, f) for g groups of heads that share keys and values; mostly g = h.
        value: (b, s, g, f).
        visible: Which positions s each position t sees; broadcast over positions.
        dropout: Dropout of the attention weights.
        dropout_key: Its random key, or None for none.
        scale: Factor of the scores; None for 1 / sqrt(f).
        bias: What is added to the scores of each head.

    Returns:
        (b, t, h, f) in the dtype of the values.
    """
    b, t, h, f = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, f)
    scores = wide(jnp.einsum("btgrf,bsgf->bgrts", grouped, key))
    scores = scores * (1 / math.sqrt(f) if scale is None else scale)
    if bias is not None:
        scores = scores + wide(bias).reshape(1, *scores.shape[1:])
    # Finite, so that a row that sees nothing (padding) gives numbers and not NaN.
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, rngs=dropout_key, deterministic=dropout_key is None)
    return jnp.einsum("bgrts,bsgf->btgrf", weights, value).reshape(b, t, h, f)


class Cache(NamedTuple):
    """Keys and values of the positions that a decoder has read, in a fixed number of slots.

    Args:
        keys: (b, s, g, f) of every layer.
        values: Likewise.
        real: (b, s), which slots hold tokens: not padding, and written already.
        length: How many slots are written.
    """

    keys: tuple[Float[Array, "b s g f"], ...]
    values: tuple[Float[Array, "b s g f"], ...]
    real: Bool[Array, "b s"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, b: int, slots: int, layers: int, groups: int, f: int, dtype: Any) -> Cache:
        """A cache of which no slot is written."""
        empty = (jnp.zeros((b, slots, groups, f), dtype),) * layers
        return cls(empty, empty, jnp.zeros((b, slots), bool), jnp.int32(0))


class Window(NamedTuple):
    """What the positions of one call see: earlier ones in the cache, and each other.

    Args:
        visible: (b, 1, t, s) which slots, or positions, each position sees.
        real: (b, s) which slots hold tokens, those of this call included.
        slots: (t,) the slots of this call's positions.
        positions: (b, t) the number of each token in its text, not counting padding.
    """

    visible: Bool[Array, "b 1 t s"]
    real: Bool[Array, "b s"]
    slots: Int[Array, " t"]
    positions: Int[Array, "b t"]


def window(real: Bool[Array, "b t"], cache: Cache | None, reach: int | None = None) -> Window:
    """What a causal decoder's positions see.

    Args:
        real: Where this call's tokens are not padding.
        cache: What earlier calls left, if anything.
        reach: How many slots back a position sees, itself included; None for all.

    Returns:
        The window.
    """
    t = real.shape[1]
    slots = jnp.arange(t)
    if cache is not None:
        slots = slots + cache.length
        real = lax.dynamic_update_slice(cache.real, real, (jnp.int32(0), cache.length))
    counts = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(counts[:, slots] - 1, 0)
    distance = slots[:, None] - jnp.arange(real.shape[1])[None]
    seen = (distance >= 0) & (distance < (real.shape[1] if reach is None else reach))
    return Window(seen[None, None] & real[:, None, None], real, slots, positions)


class Memory:
    """Reads and writes a cache layer by layer, within one call.

    Args:
        cache: The cache, or None to keep nothing.
    """

    def __init__(self, cache: Cache | None):
        self.cache = cache
        self._new: list[tuple[Array, Array]] = []

    def extended(
        self, key: Float[Array, "b t g f"], value: Float[Array, "b t g f"]
    ) -> tuple[Float[Array, "b s g f"], Float[Array, "b s g f"]]:
        """The next layer's keys and values: those in the cache, then these."""
        if self.cache is None:
            return key, value
        layer, zero = len(self._new), jnp.int32(0)
        at = (zero, self.cache.length, zero, zero)
        old = self.cache.keys[layer], self.cache.values[layer]
        k, v = (lax.dynamic_update_slice(o, n, at) for o, n in zip(old, (key, value), strict=True))
        self._new.append((k, v))
        return k, v

    def written(self, seen: Window) -> Cache | None:
        """The cache after all layers."""
        if self.cache is None:
            return None
        keys, values = zip(*self._new, strict=True)
        return Cache(keys, values, seen.real, self.cache.length + len(seen.slots))
