"""The features whose inner products make an MLP's kernels, before and after fusing.

A kernel is ``sum_t scalar_t(x, z) (phi_t(x) . psi_t(z))``, with a term for the output weights and
one for each linear map of the input. `ntk.mlp` computes it; here are its parts, with error bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk.bounds.balls import Ball, ball_product, ball_units, gamma, norms
from ntk.bounds.pairs import Pair, Side
from ntk.mlp import input_product, second
from ntk.units import MlpWeights


class Feature(NamedTuple):
    """One side of one inner product, before and after fusing, at n inputs.

    Args:
        unit: phi, (n, p), of the original's units.
        fused: F, (n, c), of the fused MLP's.
        unit_error: Bounds on the norms of unit's errors, (n,).
        fused_error: Bounds on the norms of fused's errors, (n,).
        unit_measured: The same, (n,), for phi as `ntk.mlp` computes it; only signs differ.
        fused_measured: The same, (n,), for F.
    """

    unit: Float[Array, "n p"]
    fused: Float[Array, "n c"]
    unit_error: Float[Array, " n"]
    fused_error: Float[Array, " n"]
    unit_measured: Float[Array, " n"]
    fused_measured: Float[Array, " n"]


class Scalar(NamedTuple):
    """What multiplies an inner product: values (n, m) and bounds on their errors."""

    value: Float[Array, "n m"]
    error: Float[Array, "n m"]


def features(pair: Pair, side: Side, kind: str, *, right: bool) -> list[Feature]:
    """The features of one side, for each term.

    For Adam the right ones are signs. There the fused ones are divided by sqrt(n_c) on the left and
    multiplied on the right, so that both sides are as large as the original's.
    """
    units, fused = (unit_balls(mlp, side, kind) for mlp in (pair.original, pair.fused))
    root = jnp.sqrt(pair.sizes)[None]
    result = []
    for a, b in zip(units, fused, strict=True):
        if kind == "sgd":
            measured = a.error, b.error
        elif right:
            (a, lost), (b, lost2) = a.signs(), b.signs()
            b, measured = b.scaled(root), (lost, lost2 * root)
        else:
            b = b.scaled(1 / root)
            measured = a.error, b.error
        errors = (norms(e) for e in (a.error, b.error, *measured))
        result.append(Feature(a.value, b.value, *errors))
    return result


def unit_balls(mlp: MlpWeights, side: Side, kind: str) -> list[Ball]:
    """The left features of one MLP, for each term."""
    hidden, slopes = ball_units(mlp, side.x)
    if side.g is not None:
        up = ball_product(side.g, mlp.down, None)
        return [hidden, *(c.times(up) for c in slopes)]
    v = mlp.down
    size = (norms(v) if kind == "sgd" else jnp.abs(v).sum(1))[None]
    rounding = gamma(v.shape[1] + 8, v.dtype)
    return [hidden, *(c.scaled(size, rounding) for c in slopes)]


def scalars(pair: Pair, left: Side, right: Side, kind: str) -> list[Scalar]:
    """What multiplies the inner products of the features."""
    f = second(kind)
    dtype = left.x.dtype
    shape = (left.x.shape[0], right.x.shape[0])

    def dot(a: Array, b: Array, bias: Array | None) -> Scalar:
        size = jnp.outer(norms(a) + 1, norms(f(b)) + 1)
        return Scalar(input_product(a, b, bias, f), gamma(a.shape[1] + 4, dtype) * size)

    if left.g is None or right.g is None:
        outputs = pair.original.down.shape[1]
        first = Scalar(jnp.full(shape, outputs, dtype), jnp.zeros(shape, dtype))
    else:
        first = dot(left.g, right.g, None)
    return [first, *(dot(left.x, right.x, bias) for _, bias in pair.original.maps)]


def measured_error(left: Feature, right: Feature) -> Float[Array, "n m"]:
    """How far ``phi . psi`` and ``F . Psi``, as `ntk.mlp` computes them, are from exact ones.

    From the errors of the computed features, and gamma for the sums of products.
    """
    total = jnp.zeros((left.unit.shape[0], right.unit.shape[0]), left.unit.dtype)
    for a, b, ea, eb in (
        (left.unit, right.unit, left.unit_measured, right.unit_measured),
        (left.fused, right.fused, left.fused_measured, right.fused_measured),
    ):
        size, size2 = norms(a), norms(b)
        rounding = gamma(a.shape[1] + 16, a.dtype)
        total = total + jnp.outer(ea, size2 + eb) + jnp.outer(size, eb + rounding * size2)
    return total


def magnitude(left: Feature, right: Feature) -> Float[Array, "n m"]:
    """The most that ``phi . psi`` and ``F . Psi`` can be together."""
    total = jnp.outer(norms(left.unit), norms(right.unit))
    return total + jnp.outer(norms(left.fused), norms(right.fused))
