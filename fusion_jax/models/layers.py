"""Layers and attention, for all architectures."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.dtypes import wide

ArrayLike = Array | np.ndarray
"""The inputs of models: JAX arrays, or NumPy arrays as tokenizers return them."""


def split_key(key: Key[Array, ""] | None, count: int) -> tuple[Key[Array, ""] | None, ...]:
    """Returns random keys for several uses; None for each if there is no key."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def token_mask(
    ids: Int[Array, "b t"], attention_mask: Shaped[ArrayLike, "b t"] | None
) -> Bool[Array, "b t"]:
    """Returns where tokens are not padding; everywhere if there is no mask."""
    if attention_mask is None:
        return jnp.ones(ids.shape, bool)
    return jnp.asarray(attention_mask).astype(bool)


class Dropout(nnx.Dropout):
    """Dropout that is on exactly if it is called with a random key."""

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "*n"], key: Key[Array, ""] | None
    ) -> Float[Array, "*n"]:
        """Drops elements; returns the input if the key is None."""
        return super().__call__(x, rngs=key, deterministic=key is None)


class LayerNorm(nnx.LayerNorm):
    """Layer normalization, computed in float32 or wider and returned in the dtype of the input.

    Args:
        d: The number of features.
        offset: Added to the scale; the parameter begins at 1 - offset.
        **options: Further arguments of `flax.nnx.LayerNorm`.
    """

    def __init__(self, d: int, *, offset: float = 0.0, **options: Any):
        super().__init__(d, scale_init=nnx.initializers.constant(1.0 - offset), **options)
        self.offset = offset

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:  # type: ignore[override]
        """Normalises the last axis."""
        y = wide(x)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + jnp.asarray(self.epsilon, y.dtype))
        shape = (1,) * (y.ndim - 1) + (-1,)
        if self.scale is not None:
            scale = self.scale[...].astype(y.dtype).reshape(shape)
            y = y * (scale + self.offset if self.offset else scale)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype).reshape(shape)
        return y.astype(x.dtype)


class HeadNorms(nnx.Module):
    """Layer normalization of each head of attention, with a scale of its own.

    Args:
        heads: The number h of heads.
        f: The number of features of each.
        epsilon: Added to the variance.
        param_dtype: The dtype of the scales.
        rngs: Not used; the scales begin at 1.
    """

    def __init__(
        self, heads: int, f: int, *, epsilon: float, param_dtype: Any, rngs: nnx.Rngs | None = None
    ):
        self.scale = nnx.Param(jnp.ones((heads, f), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b t h f"]) -> Float[Array, "b t h f"]:
        """Normalizes the last axis."""
        y = wide(x)
        y = y - y.mean(-1, keepdims=True)
        variance = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + jnp.asarray(self.epsilon, y.dtype))
        return (y * self.scale[...].astype(y.dtype)[None, None]).astype(x.dtype)


class OutputBias(nnx.Module):
    """The bias of an output layer whose matrix is that of the token embeddings.

    Args:
        vocab: The number of tokens.
        param_dtype: The dtype of the bias.
    """

    def __init__(self, vocab: int, *, param_dtype: Any):
        self.bias = nnx.Param(jnp.zeros(vocab, param_dtype))

    def __call__(self, x: Float[Array, "*n vocab"]) -> Float[Array, "*n vocab"]:
        """Adds the bias to logits."""
        return x + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


class RmsNorm(nnx.RMSNorm):
    """Root-mean-square normalization, in float32 or wider; returned in the dtype of the scale."""

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:  # type: ignore[override]
        """Normalises the last axis."""
        y = wide(x)
        mean = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean + jnp.asarray(self.epsilon, y.dtype))
        assert self.scale is not None
        scale = self.scale[...]
        return scale.reshape((1,) * (y.ndim - 1) + (-1,)) * y.astype(scale.dtype)


class WideRmsNorm(RmsNorm):
    """Root-mean-square normalization that is rounded to the dtype of the input after the scale.

    Args:
        d: The number of features.
        offset: Added to the scale; the parameter begins at 1 - offset.
        **options: Further arguments of `flax.nnx.RMSNorm`.
    """

    def __init__(self, d: int, *, offset: float = 0.0, **options: Any):
        begin = nnx.initializers.constant(1.0 - offset)
        super().__init__(d, scale_init=begin, **options)
        self.offset = offset

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:  # type: ignore[override]
        """Normalizes the last axis."""
        y = wide(x)
        mean = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean + jnp.asarray(self.epsilon, y.dtype))
        assert self.scale is not None
        scale = self.scale[...].astype(y.dtype) + self.offset
        return (scale.reshape((1,) * (y.ndim - 1) + (-1,)) * y).astype(x.dtype)


def unit_rms(x: Float[Array, "*n d"], epsilon: float) -> Float[Array, "*n d"]:
    """Returns vectors divided by their root mean square, computed in float32 or wider."""
    y = wide(x)
    mean = jnp.square(y).mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(mean + jnp.asarray(epsilon, y.dtype))).astype(x.dtype)


def soft_capped(x: Float[Array, "*n"], cap: float | None) -> Float[Array, "*n"]:
    """Returns cap * tanh(x / cap), which is between -cap and cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    query: Float[Array, "b t h f"],
    key: Float[Array, "b s g f"],
    value: Float[Array, "b s g v"],
    visible: Bool[Array, "b 1 #t s"],
    dropout: Dropout,
    dropout_key: Key[Array, ""] | None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    bias: Float[Array, "#b h #t s"] | None = None,
    sinks: Float[Array, " h"] | None = None,
) -> Float[Array, "b t h v"]:
    """Computes scaled dot-product attention, with the softmax in float32 or wider.

    Args:
        query: (b, t, h, f) for b examples, t positions, h heads of f features.
        key: (b, s, g, f) for s positions and g key-value heads; h / g query heads share each of
            them.
        value: (b, s, g, v).
        visible: (b, 1, t, s) or (b, 1, 1, s): which positions s each position t attends to.
        dropout: Dropout of the attention weights.
        dropout_key: Its random key; None for no dropout.
        scale: The factor of the scores; None for 1 / sqrt(f).
        cap: The soft cap of the scores, see `soft_capped`; None for none.
        bias: (b, h, t, s), added to the scores; b and t may be 1.
        sinks: (h,) the score of one more position, whose value is zero; None for none.

    Returns:
        (b, t, h, v) in the dtype of the values.
    """
    b, t, h, f = query.shape
    grouped = query.reshape(b, t, key.shape[2], -1, f)
    scores = wide(jnp.einsum("btgrf,bsgf->bgrts", grouped, key))
    scores = soft_capped(scores * (1 / math.sqrt(f) if scale is None else scale), cap)
    if bias is not None:
        groups = scores.shape[1:3]
        scores = scores + wide(bias).reshape(len(bias), *groups, *bias.shape[2:])
    # Finite, so that a position that sees nothing (padding) gives numbers instead of NaN.
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:
        more = wide(sinks).reshape(1, *scores.shape[1:3], 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(more, (*scores.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : key.shape[1]].astype(value.dtype)
    weights = dropout(weights, dropout_key)
    return jnp.einsum("bgrts,bsgv->btgrv", weights, value).reshape(b, t, h, -1)


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns how much the scores of each head change per position, (heads,) in float32.

    References:
        ALiBi (arXiv 2108.12409), section 3.
    """
    power = 2 ** int(math.log2(heads))
    base, between = (np.float32(2 ** -(2.0 ** (3 - math.log2(n)))) for n in (power, 2 * power))
    whole = base ** np.arange(1, power + 1, dtype=np.float32)
    rest = between ** np.arange(1, 2 * (heads - power), 2, dtype=np.float32)
    return np.concatenate([whole, rest]).astype(np.float32)


def alibi_bias(
    real: Bool[Array, "b s"], heads: int, *, rounded: bool = False
) -> Float[Array, "b h 1 s"]:
    """Returns the bias of the scores of each head, which grows with the position attended to.

    Args:
        real: (b, s) where tokens are not padding.
        heads: The number h of heads.
        rounded: Whether it is computed in bfloat16, whatever the dtype of the model.
    """
    counts = jnp.cumsum(real, axis=1, dtype=jnp.float32)
    positions = jnp.where(real, counts - 1, 0)
    slopes = jnp.asarray(alibi_slopes(heads))
    if not rounded:
        return slopes[None, :, None, None] * positions[:, None, None]
    # Explicitly, since a compiler may leave out a conversion to bfloat16 and back.
    slopes, positions = (lax.reduce_precision(x, 8, 7) for x in (slopes, positions))
    return lax.reduce_precision(slopes[None, :, None, None] * positions[:, None, None], 8, 7)


def distance_buckets(far: int, count: int, *, causal: bool = False) -> np.ndarray:
    """Returns the bucket of each distance, from 0 (causal) or -far to far.

    Half of the buckets are for single distances, half for ranges of growing size; without
    ``causal``, both halves are there once for each direction. Rounded in float32, as T5 was
    trained.

    References:
        T5 (arXiv 1910.10683), section 2.1.
    """
    count = count if causal else count // 2
    exact = count // 2
    distance = np.arange(far + 1, dtype=np.float32)
    with np.errstate(divide="ignore"):
        logs = np.log(distance / np.float32(exact)) / np.float32(np.log(far / exact))
    large = exact + np.maximum(logs * np.float32(count - exact), 0).astype(np.int32)
    back = np.where(distance < exact, distance, np.minimum(large, count - 1)).astype(np.int32)
    return back if causal else np.concatenate([count + back[:0:-1], back])


def relative_bias(
    embed: AnyEmbed,
    slots: Int[Array, " t"],
    count: int,
    *,
    far: int,
    buckets: int,
    causal: bool = False,
) -> Float[Array, "1 h t s"]:
    """Returns the bias of the scores of each head, which depends on relative positions.

    Distances are counted in slots, including padding.

    Args:
        embed: The bias of each bucket and head.
        slots: (t,) the slots of the tokens that attend.
        count: The number s of slots that they attend to.
        far: The distance from which on all have the same bias.
        buckets: The number of buckets.
        causal: Whether tokens attend to those before them alone.
    """
    distance = slots[:, None] - jnp.arange(count)[None]
    table = jnp.asarray(distance_buckets(far, buckets, causal=causal))
    least = 0 if causal else -far
    return embed(table[jnp.clip(distance, least, far) - least]).transpose(2, 0, 1)[None]
