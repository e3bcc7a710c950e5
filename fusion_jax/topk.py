"""The largest entries of an array as a mask, without sorting it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def top_mask(scores: Float[Array, "*n"], keep: Int[Array, ""]) -> Bool[Array, "*n"]:
    """Where the largest entries are; of equal ones, the first. What is below 1e-38 may count as 0.

    By bisection over the bits of the numbers: 32 passes that count (64 in float64), and the number
    kept may change from step to step without compiling again.

    Args:
        scores: Any array without NaN.
        keep: How many entries to keep, 0 to all.

    Returns:
        A mask with exactly ``keep`` true entries.

    Example:
        >>> top_mask(jnp.array([3.0, -1.0, 7.0, 3.0]), jnp.int32(2)).tolist()
        [True, False, True, False]
    """
    flat = scores.reshape(-1)
    bits = jnp.uint64 if flat.dtype == jnp.float64 else jnp.uint32
    width = jnp.iinfo(bits).bits
    flat = flat if flat.dtype == jnp.float64 else flat.astype(jnp.float32)
    # Unsigned integers in the order of the numbers: of negative ones, all bits are flipped.
    flat = jnp.where(flat == 0, jnp.zeros((), flat.dtype), flat)  # -0 and 0 are equal
    raw = lax.bitcast_convert_type(flat, bits)
    top = jnp.asarray(1, bits) << (width - 1)
    ordered = jnp.where(raw & top != 0, ~raw, raw | top)

    def narrowed(i: Array, limit: Array) -> Array:
        candidate = limit | (top >> i.astype(bits))
        return jnp.where((ordered >= candidate).sum(dtype=jnp.int32) >= keep, candidate, limit)

    # The largest number that at least `keep` entries reach.
    limit = lax.fori_loop(0, width, narrowed, jnp.asarray(0, bits))
    above, equal = ordered > limit, ordered == limit
    left = keep - above.sum(dtype=jnp.int32)
    mask = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= left))
    return mask.reshape(scores.shape)


def top_mask_of_share(scores: Float[Array, "*n"], share: float | Float[Array, ""]) -> Array:
    """`top_mask` for a share of the entries, rounded down.

    Args:
        scores: Any array without NaN.
        share: The share to keep, clipped to 0 to 1.

    Returns:
        The mask.
    """
    share = jnp.clip(jnp.asarray(share, jnp.float32), 0, 1)
    keep = jnp.floor(share * scores.size + 1e-4).astype(jnp.int32)
    return top_mask(scores, jnp.minimum(keep, scores.size))
