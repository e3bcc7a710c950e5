r"""Bounds the smaller MLP's hidden units from the original's values: it need not be run.

Each row of the smaller MLP, times its factor, is written as a multiple of the mean of its cluster's
rows, or of one of those rows, plus a rest,

    u_c  =  a_c r_c + e_c,      r_c = mean u_i,  or one u_i with i in c.

The value of r_c at an input is known from the values z_i of the original's units, by linearity, so
that the value of u_c is within |e_c| |x^| of a_c times it. The choice with the shortest rest is
taken: it is zero for means of clusters and for units that were selected, scaled or not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ntk.arrays import host_norms, row_norms
from ntk.bounds.balls import (
    OUTWARD,
    Ball,
    ball_products,
    gamma,
    scaled_units,
    tiny,
    uncertain,
)
from ntk.bounds.norms import effective_rows, stored_rows
from ntk.bounds.pairs import Pair


class StandIns(NamedTuple):
    """What the rows of one linear map of the smaller MLP are written as.

    Args:
        unit: A unit of the original for each cluster, (c,), used where ``single`` is true.
        single: Whether that unit stands for the row, (c,); otherwise the mean of the cluster.
        scale: The multiples a_c, (c,).
        rest: Bounds on |e_c|, (c,).
    """

    unit: Int[Array, " c"]
    single: Bool[Array, " c"]
    scale: Float[Array, " c"]
    rest: Float[Array, " c"]


def stand_ins(pair: Pair) -> tuple[StandIns, ...]:
    """Returns the stand-ins for each linear map, the one inside the activation first.

    They are computed in float64 on the host.

    Args:
        pair: An MLP and its fused version, checked.
    """
    names = ["up"] if pair.original.gate is None else ["gate", "up"]
    return tuple(_of_map(pair, name) for name in names)


def _of_map(pair: Pair, name: str) -> StandIns:
    labels, count = np.asarray(pair.labels), pair.fused.width
    rows, wanted = stored_rows(pair.original, name), effective_rows(pair.fused, name)
    dtype = pair.original.up.dtype
    sizes = np.bincount(labels, minlength=count)
    means = np.zeros_like(wanted)
    np.add.at(means, labels, rows)
    means /= sizes[:, None]
    # What the mean of these rows may be off by in float64.
    largest = np.zeros(count)
    np.maximum.at(largest, labels, host_norms(rows, axis=1))
    rounding = 4 * (sizes + 4) * np.finfo(np.float64).eps * largest

    def fit(wanted: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best multiples, as numbers of the dtype, and the lengths of the rests."""
        size = np.maximum(np.abs(found).max(1), np.finfo(np.float64).tiny)[:, None]
        unit = found / size
        square = np.square(unit).sum(1)
        best = (wanted / size * unit).sum(1) / np.where(square > 0, square, 1)
        near = np.abs(best - 1) < 64 * np.finfo(dtype).eps
        scale = np.where(near, 1, best).astype(dtype).astype(np.float64)
        return scale, host_norms(wanted - scale[:, None] * found, axis=1)

    mean_scale, mean_rest = fit(wanted, means)
    mean_rest = mean_rest + rounding * np.abs(mean_scale)
    unit_scale, unit_rest = fit(wanted[labels], rows)
    order = np.lexsort((unit_rest, labels))
    first = order[np.searchsorted(labels[order], np.arange(count))]
    single = unit_rest[first] < mean_rest
    rest = np.where(single, unit_rest[first], mean_rest)
    rest = rest + 8 * np.finfo(np.float64).eps * host_norms(wanted, axis=1)
    with np.errstate(over="ignore"):  # infinite rests are an error where they are used
        rest = jnp.asarray(rest * OUTWARD + 2 * tiny(dtype) * (rest > 0), dtype)
    scale = np.where(single, unit_scale[first], mean_scale)
    return StandIns(jnp.asarray(first), jnp.asarray(single), jnp.asarray(scale, dtype), rest)


def stood_in_units(
    pair: Pair, x: Float[Array, "n d"], found: tuple[StandIns, ...]
) -> tuple[Ball, tuple[Ball, ...]]:
    """Returns the values of the smaller MLP's hidden units as `ntk.bounds.balls.ball_units` does.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d).
        found: From `stand_ins`.
    """
    values = []
    for (rows, bias), those in zip(pair.original.maps, found, strict=True):
        length = row_norms(x) if bias is None else jnp.hypot(row_norms(x), 1.0)
        most = length[:, None] * (1 + gamma(x.shape[1] + 8, x.dtype))
        values.append(_values(ball_products(x, rows, bias), pair, those, most))
    return scaled_units(pair.fused, *values)


def _values(z: Ball, pair: Pair, those: StandIns, length: Float[Array, "n 1"]) -> Ball:
    """Returns the values of the smaller MLP's rows, factors included."""
    sizes = pair.sizes

    def mean(a: Array) -> Array:
        return jax.ops.segment_sum(a.T, pair.labels, sizes.shape[0]).T / sizes[None]

    dtype = z.value.dtype
    rounding = gamma(z.value.shape[1] + 8, dtype)
    value = jnp.where(those.single[None], z.value[:, those.unit], mean(z.value))
    lost = 8 * z.value.shape[1] * tiny(dtype)
    around = mean(z.error) * (1 + rounding) + rounding * mean(jnp.abs(z.value)) + lost
    error = jnp.where(those.single[None], z.error[:, those.unit], around)
    scale, rest = those.scale[None], those.rest[None]
    value, error = scale * value, jnp.abs(scale) * error
    error = error + gamma(2, dtype) * jnp.abs(value)
    return uncertain(value, error + rest * length + 8 * tiny(dtype))
