"""The features whose inner products make an MLP's kernels, before and after fusing.

A kernel is ``sum_t scalar_t(x, z) (phi_t(x) . psi_t(z))``, with a term for the output weights and
one for each linear map of the input. `ntk.mlp` computes the kernel; this module computes its parts
with error bounds.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk.arrays import row_norms
from ntk.bounds.balls import Ball, Enclosure, ball_products, ball_units, gamma, tiny
from ntk.bounds.pairs import Inputs, Pair
from ntk.bounds.stand_ins import StandIns, stood_in_units
from ntk.kinds import KernelKind, second_transform
from ntk.mlp import input_products
from ntk.units import MlpWeights


class Feature(NamedTuple):
    """One factor of one inner product, before and after fusing, at n inputs.

    Args:
        unit: phi, (n, p), of the original's units.
        fused: F, (n, c), of the fused MLP's units.
        unit_error: Bounds on the norms of the errors of ``unit``, (n,).
        fused_error: Bounds on the norms of the errors of ``fused``, (n,).
        unit_measured: The same, (n,), for phi as `ntk.mlp` computes it; only signs differ.
        fused_measured: The same, (n,), for F.
    """

    unit: Float[Array, "n p"]
    fused: Float[Array, "n c"]
    unit_error: Float[Array, " n"]
    fused_error: Float[Array, " n"]
    unit_measured: Float[Array, " n"]
    fused_measured: Float[Array, " n"]


_Units = tuple[Ball, tuple[Ball, ...]]
# Programs of their own, which all bounds and both kernels share: they take long to compile.
_run = jax.jit(ball_units)
_stood_in = jax.jit(stood_in_units)


def kernel_features(
    pair: Pair,
    inputs: Inputs,
    kind: KernelKind,
    *,
    right: bool = False,
    instead: tuple[StandIns, ...] | None = None,
) -> list[Feature]:
    """Returns the left or right features for each term.

    For Adam the right features are signs. The fused MLP's are divided by sqrt(n_c) on the left and
    multiplied by it on the right, so that both are as large as the original's.

    Args:
        pair: An MLP and its fused version.
        inputs: The inputs.
        kind: ``"sgd"`` or ``"adam"``.
        right: Whether the features are those on the right.
        instead: From `stand_ins`, to not run the fused MLP; None runs it.
    """
    found = (
        _run(pair.original, inputs.x),
        (_run(pair.fused, inputs.x) if instead is None else _stood_in(pair, inputs.x, instead)),
    )
    return _features(pair, inputs, found, kind, right)


@partial(jax.jit, static_argnames=("kind", "right"))
def _features(
    pair: Pair, inputs: Inputs, found: tuple[_Units, _Units], kind: KernelKind, right: bool
) -> list[Feature]:
    units, fused = (
        _feature_balls(mlp, inputs, kind, *of_mlp)
        for mlp, of_mlp in zip((pair.original, pair.fused), found, strict=True)
    )
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
        errors = (row_norms(e) for e in (a.error, b.error, *measured))
        result.append(Feature(a.value, b.value, *errors))
    return result


def _feature_balls(
    mlp: MlpWeights, inputs: Inputs, kind: KernelKind, hidden: Ball, slopes: tuple[Ball, ...]
) -> list[Ball]:
    """Returns the left features of one MLP, for each term."""
    if inputs.g is not None:
        up = ball_products(inputs.g, mlp.down, None)
        return [hidden, *(c.times(up) for c in slopes)]
    v = mlp.down
    size = (row_norms(v) if kind == "sgd" else jnp.abs(v).sum(1))[None]
    rounding = gamma(v.shape[1] + 8, v.dtype)
    return [hidden, *(c.scaled(size, rounding) for c in slopes)]


def kernel_scalars(pair: Pair, left: Inputs, right: Inputs, kind: KernelKind) -> list[Enclosure]:
    """Returns the scalar factors of the inner products of the features, for each term."""
    second = second_transform(kind)
    dtype = left.x.dtype
    shape = (left.x.shape[0], right.x.shape[0])

    def dot(a: Array, b: Array, bias: Array | None) -> Enclosure:
        # With a bias, a sum of products and 1.
        one = 0 if bias is None else 1
        length, length2 = row_norms(a) + one, row_norms(second(b)) + one
        lost = (a.shape[1] + 8) * tiny(dtype) * (1 + length[:, None] + length2[None])
        error = gamma(a.shape[1] + 4, dtype) * jnp.outer(length, length2) + lost
        return Enclosure(input_products(a, b, bias, kind), error)

    if left.g is None or right.g is None:
        outputs = pair.original.down.shape[1]
        first = Enclosure(jnp.full(shape, outputs, dtype), jnp.zeros(shape, dtype))
    else:
        first = dot(left.g, right.g, None)
    return [first, *(dot(left.x, right.x, bias) for _, bias in pair.original.maps)]


def measured_error(left: Feature, right: Feature) -> Float[Array, "n m"]:
    """Returns bounds on the errors of ``phi . psi`` plus ``F . Psi`` as `ntk.mlp` computes them.

    They consist of the errors of the computed features, and of gamma for the sums of products.
    """
    total = jnp.zeros((left.unit.shape[0], right.unit.shape[0]), left.unit.dtype)
    for a, b, ea, eb in (
        (left.unit, right.unit, left.unit_measured, right.unit_measured),
        (left.fused, right.fused, left.fused_measured, right.fused_measured),
    ):
        size, size2 = row_norms(a), row_norms(b)
        rounding = gamma(a.shape[1] + 16, a.dtype)
        lost = 4 * (a.shape[1] + 16) * tiny(a.dtype)
        total = total + jnp.outer(ea, size2 + eb) + jnp.outer(size, eb + rounding * size2)
        total = total + lost * (1 + size[:, None] + size2[None])
    return total


def magnitude(left: Feature, right: Feature) -> Float[Array, "n m"]:
    """Returns bounds on ``|phi . psi|`` plus ``|F . Psi|``."""
    total = jnp.zeros((left.unit.shape[0], right.unit.shape[0]), left.unit.dtype)
    for a, b, ea, eb in (
        (left.unit, right.unit, left.unit_error, right.unit_error),
        (left.fused, right.fused, left.fused_error, right.fused_error),
    ):
        total = total + jnp.outer(row_norms(a) + ea, row_norms(b) + eb)
    rounding = gamma(2 * left.unit.shape[1] + 16, total.dtype)
    return total * (1 + rounding) + 4 * tiny(total.dtype)
