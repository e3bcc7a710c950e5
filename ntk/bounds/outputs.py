"""Bounds on the change of an MLP's outputs by fusing, of all three grades."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk.arrays import host_float64, inner_products, require_finite, row_norms
from ntk.bounds import a_priori
from ntk.bounds.balls import gamma, tiny
from ntk.bounds.changes import Grade
from ntk.bounds.enclosure import split_feature
from ntk.bounds.features import Feature, kernel_features
from ntk.bounds.norms import WeightNorms, weight_norms
from ntk.bounds.pairs import Pair, prepare_pair
from ntk.bounds.stand_ins import stand_ins
from ntk.errors import check_choice


def output_change(
    pair: Pair,
    x: Float[Array, "n _"],
    *,
    grade: Grade = "data",
    norms: WeightNorms | None = None,
) -> Float[Array, " n"]:
    """Returns bounds, (n,), on the Euclidean norms of the change of the outputs.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d).
        grade: ``"a priori"`` and ``"data"`` use norms of H, P H - F and Q H, see (6) in
            `ntk.bounds.a_priori`; the first does not run the fused MLP, see `ntk.bounds.stand_ins`.
            ``"measured"`` uses the outputs.
        norms: Norms from `weight_norms`; None computes them.

    Raises:
        InputError: The arguments do not fit together, or a value is not finite.
    """
    pair, inputs, _ = prepare_pair(pair, x)
    check_choice("grade", grade, Grade)
    feature = kernel_features(pair, inputs, "sgd")[0]
    moved, noise = _outputs(pair, feature)
    if grade == "measured":
        return require_finite(moved)
    if grade == "a priori":
        feature = kernel_features(pair, inputs, "sgd", instead=stand_ins(pair))[0]
    norms = weight_norms(pair) if norms is None else norms
    sizes = map(host_float64, _sizes(pair, feature))
    bounds = a_priori.output_bound(norms.spectral, *sizes)
    return require_finite(jnp.asarray(bounds, noise.dtype) + noise)


@jax.jit
def _sizes(pair: Pair, feature: Feature) -> tuple[Array, ...]:
    """Returns the norms of P H - F, Q H, H and F."""
    sizes = pair.sizes
    # The wide copy's hidden units times sqrt(n_c). The factors outside of the activation belong to
    # its output weights.
    factor = jnp.sqrt(sizes) / (1 if pair.fused.outer is None else pair.fused.outer)
    wide = feature._replace(
        fused=feature.fused * factor[None], fused_error=feature.fused_error * factor.max()
    )
    parts = split_feature(wide, pair.labels, sizes)
    change, within = (row_norms(p.vector) + p.error for p in (parts.change, parts.within))
    unit, fused = (
        row_norms(value) + error
        for value, error in ((wide.unit, wide.unit_error), (wide.fused, wide.fused_error))
    )
    # Norms of up to p numbers.
    outward = 1 + gamma(feature.unit.shape[1] + 16, unit.dtype)
    return change, within, outward * unit, outward * fused


@jax.jit
def _outputs(pair: Pair, feature: Feature) -> tuple[Array, Array]:
    """Returns the norms of the change of the outputs, and of rounding."""
    outputs, noise = [], jnp.zeros_like(feature.unit_error)
    for h, error, v in (
        (feature.unit, feature.unit_error, pair.original.down),
        (feature.fused, feature.fused_error, pair.fused.down),
    ):
        outputs.append(inner_products(h, v.T))
        size, length = row_norms(v.ravel()), row_norms(h)
        noise = noise + (error + gamma(v.shape[0] + 16, v.dtype) * length) * size
        noise = noise + 4 * v.size * tiny(v.dtype) * (1 + size + length)
    return row_norms(outputs[0] - outputs[1]), 2 * noise
