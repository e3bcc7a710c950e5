"""Masks of the largest entries of arrays, without sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def top_mask(scores: Float[Array, "*n"], keep: Int[Array, ""]) -> Bool[Array, "*n"]:
    """Returns a mask of the largest entries; among equal entries, the first are kept.

    The limit is found by interpolation and bisection in turns, over the bits of the numbers. This
    takes ten to twenty passes over the entries, at most 64 (128 in float64). The number of entries
    to keep may change from step to step without a new compilation. Entries smaller than 1e-38 in
    size may count as 0.

    Args:
        scores: An array without NaN.
        keep: The number of entries to keep, 0 to all.

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
    # Unsigned integers in the order of the numbers: for negative ones, all bits are flipped.
    flat = jnp.where(flat == 0, jnp.zeros((), flat.dtype), flat)  # -0 and 0 are equal
    raw = lax.bitcast_convert_type(flat, bits)
    top = jnp.asarray(1, bits) << (width - 1)
    ordered = jnp.where(raw & top != 0, ~raw, raw | top)

    def narrowed(state: _Bracket) -> _Bracket:
        low, high, reach_low, reach_high, step = state
        span, over, between = (
            x.astype(jnp.float32) for x in (high - low, reach_low - keep, reach_low - reach_high)
        )
        guess = jnp.where(step % 2 == 1, span / 2, span * over / between)
        # At least one step further, whatever the rounding, so that the loop ends.
        guess = low + jnp.clip(guess, 0, 2.0 ** (width - 1)).astype(bits)
        guess = jnp.clip(guess, low + 1, high - 1)
        reach = (ordered >= guess).sum(dtype=jnp.int32)
        enough = reach >= keep
        return _Bracket(
            low=jnp.where(enough, guess, low),
            high=jnp.where(enough, high, guess),
            reach_low=jnp.where(enough, reach, reach_low),
            reach_high=jnp.where(enough, reach_high, reach),
            step=step + 1,
        )

    def ties() -> Array:
        above, equal = ordered > limit, ordered == limit
        left = keep - above.sum(dtype=jnp.int32)
        return above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= left))

    count = jnp.int32(flat.size)
    start = _Bracket(ordered.min(), ordered.max() + 1, count, jnp.int32(0), jnp.int32(0))
    # The largest number that at least `keep` entries reach, or any that exactly `keep` reach.
    limit, _, reach, *_ = lax.while_loop(
        lambda s: (s.high - s.low > 1) & (s.reach_low != keep), narrowed, start
    )
    mask = lax.cond(reach == keep, lambda: ordered >= limit, ties)
    return mask.reshape(scores.shape)


class _Bracket(NamedTuple):
    """The state of `top_mask`: at least `keep` entries reach `low`, fewer reach `high`."""

    low: Array
    high: Array
    reach_low: Array  # entries of at least `low`
    reach_high: Array
    step: Array


def top_masks(scores: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Returns masks of the largest entries of several arrays together; of equal ones, the first.

    Args:
        scores: The arrays, without NaN.
        share: The share of all entries to keep, see `count_of`.

    Returns:
        A mask for each array.

    Example:
        >>> [m.tolist() for m in top_masks([np.array([3.0, 1.0]), np.array([3.0, 2.0])], 0.5)]
        [[True, False], [True, False]]
    """
    flat = np.concatenate([x.reshape(-1) for x in scores])
    keep = count_of(share, flat.size)
    limit = np.partition(flat, -keep)[-keep]
    mask = flat > limit
    mask[np.flatnonzero(flat == limit)[: keep - mask.sum()]] = True
    parts = np.split(mask, np.cumsum([x.size for x in scores])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, scores, strict=True)]


def count_of(share: float, size: int) -> int:
    """Returns the number of entries in a share: rounded down, safe from float errors, at least 1.

    Example:
        >>> count_of(0.29, 100), int(0.29 * 100), count_of(0.29, 3)
        (29, 28, 1)
    """
    return max(1, int(share * size + 1e-6))


def top_mask_of_share(scores: Float[Array, "*n"], share: float | Float[Array, ""]) -> Array:
    """Returns `top_mask` for a share of the entries, clipped to 0 to 1 and rounded down."""
    share = jnp.clip(jnp.asarray(share, jnp.float32), 0, 1)
    keep = jnp.floor(share * scores.size + 1e-4).astype(jnp.int32)
    return top_mask(scores, jnp.minimum(keep, scores.size))
