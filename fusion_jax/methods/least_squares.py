"""Fits output weights, and the factors of the kernel, to calibration inputs after clustering.

Both are linear least squares in closed form. Sums run over blocks of positions, so that no whole
matrix of activations is in memory.

Axis letters in shapes: p width, c clusters, d inputs, o outputs, t positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusion_jax.calibration.data import Calibration
from fusion_jax.clustering.labels import sum_by_label
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.fused import Factors, Scaling, factors
from fusion_jax.nn.submlps import SubMLPs, responses

BLOCK = 1024
"""The number of positions whose activations are in memory at a time."""
KERNEL_POSITIONS = 2048
"""The number of positions that factors are fitted at; every pair of positions counts."""
PAIRED_POSITIONS = 128
"""The number of positions whose pairs, one by one, the second factors for Adam are fitted at."""
RIDGE_OF_FACTORS = 1e-2
FACTOR_FLOOR = 1e-2
"""The smallest fitted coefficient, relative to its start, so that no kernel term vanishes."""

_product = partial(jnp.matmul, precision="highest")


def _sum_over_blocks(f: Callable[..., Any], *arrays: Array) -> Any:
    """Returns the sum of f over blocks of positions; the last block is padded with zero rows."""
    count = arrays[0].shape[0]
    size = min(BLOCK, count)
    blocks = -(-count // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * size - count), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(blocks, size, *x.shape[1:])

    parts = jax.tree.map(split, arrays)
    first = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda p: f(*jax.tree.map(lambda x: x[0], p)), parts),
    )
    step = lambda total, block: (jax.tree.map(jnp.add, total, f(*block)), None)  # noqa: E731
    return lax.scan(step, first, parts)[0]


@partial(jax.jit, static_argnames="act")
def refitted(
    effective: SubMLPs, subs: SubMLPs, calibration: Calibration, act: str, ridge: Any
) -> SubMLPs:
    r"""Fits the output weights of the units left to the original's outputs, by ridge regression.

    ``V + (H^T H + l I)^(-1) H^T (T - H V)`` with H the units' hidden values at the calibration
    inputs, T the target outputs, V the present output weights, and l = ``ridge`` trace(H^T H) / c.
    The regression shrinks towards V: where the text has no influence, the clusters' weights stay.

    Args:
        effective: The c units left, with the sizes of clusters in their output weights.
        subs: The p original units; their outputs are the target if the calibration has none.
        calibration: Inputs, and perhaps outputs.
        act: The activation's name.
        ridge: The strength, above 0.

    Returns:
        The units left, with new output weights.

    References:
        Hoerl and Kennard, Ridge Regression (Technometrics 1970).
    """
    down, original = wide(effective.down), wide(subs.down)
    root = calibration.root_weights()
    known = () if calibration.outputs is None else (wide(calibration.outputs),)

    def moments(x: Array, r: Array, *outputs: Array) -> tuple[Array, Array]:
        hidden = responses(effective, x, act).hidden
        target = outputs[0] if outputs else _product(responses(subs, x, act).hidden, original)
        hidden, error = r[:, None] * hidden, r[:, None] * (target - _product(hidden, down))
        return _product(hidden.T, hidden), _product(hidden.T, error)

    gram, error = _sum_over_blocks(moments, wide(calibration.inputs), root, *known)
    return effective._replace(down=down + _ridge(gram, error, ridge))


def _ridge(gram: Array, right: Array, ridge: Any) -> Array:
    """Returns ``(gram + l I)^(-1) right`` with l = ridge times the mean of gram's diagonal."""
    size = gram.shape[0]
    level = ridge * jnp.trace(gram) / size
    level = jnp.where(level > 0, level, 1)
    return jax.scipy.linalg.solve(
        gram + level * jnp.eye(size, dtype=gram.dtype), right, assume_a="pos"
    )


@partial(jax.jit, static_argnames=("act", "scaling"))
def matched(
    effective: SubMLPs,
    subs: SubMLPs,
    labels: Int[Array, " p"],
    sizes: Float[Array, " c"],
    calibration: Calibration,
    act: str,
    scaling: Scaling,
) -> Factors:
    r"""Returns the factors that bring the fused kernel nearest to the original's.

    Averaging makes units smaller where their members disagree. This shrinks the kernel, above all
    its second term. The factors around the parameters change the kernel but not the function.
    With effective weights (w, V), hidden values h~ and slopes s~, the fused MLP's SGD kernel is

        ``sum_c outer_c^2 h~_c(x) h~_c(z) + (x^ . z^) sum_c inner_c^2 |V_c|^2 s~_c(x) s~_c(z)``,

    linear in the squares of the factors. These are two least-squares solutions over all pairs of
    positions, against the original's ``sum_i h_i(x) h_i(z)`` and ``sum_i |v_i|^2 s_i(x) s_i(z)``.
    The Adam kernel is linear in the factors themselves. Its first term is fitted in the same way.
    Its second, ``(x^ . sign z^) sum_c inner_c a_c(x) sign a_c(z)`` with ``a_c = s~_c V_c . G``,
    depends on the upstream gradient G, which Gaussian numbers replace here. The factor in front is
    by far the largest where x is z, so that each pair of positions counts as its square. A gated
    MLP has a second term for each of its two slopes.

    All solutions are shrunk towards the coefficients that keep a cluster's mean square, for Adam
    its mean absolute value, and are kept positive.

    Args:
        effective: The c units left, with the sizes of clusters in their output weights.
        subs: The p original units.
        labels: The cluster of each original unit.
        sizes: Cluster sizes.
        calibration: Inputs.
        act: The activation's name.
        scaling: The kernel to match, ``"adam"`` or ``"sgd"``; ``"folded"`` has no factors.

    Returns:
        The factors.
    """
    if scaling == "folded":
        return factors(sizes, scaling)
    sample = calibration.head(KERNEL_POSITIONS)
    root = sample.root_weights()[:, None]
    old, new = responses(subs, sample.inputs, act), responses(effective, sample.inputs, act)
    size, new_size = (jnp.linalg.norm(wide(m.down), axis=1)[None] for m in (subs, effective))

    def positive(x: Array) -> Array:
        # A cluster without members, or one that is zero on this text, keeps the factor 1.
        return jnp.where((x > 0) & jnp.isfinite(x), x, 1)

    def fitted(a: Array, b: Array, start: Array) -> Array:
        """Returns the coefficients of b's kernels; for Adam, the second factors are signs."""
        a, b, signs_a, signs_b = (root * x for x in (a, b, jnp.sign(a), jnp.sign(b)))
        seconds = (signs_a, signs_b) if scaling == "adam" else (a, b)
        gram = _product(b.T, b) * _product(seconds[1].T, seconds[1])
        cross = _product(a.T, b) * _product(seconds[0].T, seconds[1])
        change = _ridge(gram, (cross.sum(0) - gram @ start)[:, None], RIDGE_OF_FACTORS)[:, 0]
        return jnp.maximum(start + change, FACTOR_FLOOR * start)

    def kept(a: Array, b: Array, power: int) -> Array:
        """Returns the coefficients that keep the mean of a power over each cluster."""
        total = sum_by_label((root**2 * jnp.abs(a) ** power).sum(0), labels, sizes.shape[0])
        mean = (root**2 * jnp.abs(b) ** power).sum(0)
        return total / jnp.where(mean > 0, mean, 1)

    def paired(s: Array, z: Array, bias: Array | None, start: Array) -> Array:
        """Returns the coefficients of the Adam kernel's second term, given the slopes."""
        x, r, s, z = (u[:PAIRED_POSITIONS] for u in (wide(sample.inputs), root, s, z))
        above = jax.random.normal(jax.random.key(0), (x.shape[0], subs.down.shape[1]), r.dtype)
        a, b = (
            slopes * _product(above, wide(units.down).T)
            for slopes, units in ((s, subs), (z, effective))
        )
        signs_a, signs_b = jnp.sign(a), jnp.sign(b)
        weights = (_product(x, jnp.sign(x).T) + int(bias is not None)) * r * r.T

        def add(total: tuple[Array, Array], row: tuple[Array, Array, Array]) -> Any:
            old, new, weight = row
            terms = weight[:, None] * new[None] * signs_b
            left = weight * _product(signs_a, old) - _product(terms, start)
            gram, right = _product(terms.T, terms), _product(terms.T, left)
            return (total[0] + gram, total[1] + right), None

        zero = jnp.zeros_like(start)
        (gram, right), _ = lax.scan(add, (zero[None] * zero[:, None], zero), (a, b, weights))
        change = _ridge(gram, right[:, None], RIDGE_OF_FACTORS)[:, 0]
        return jnp.maximum(start + change, FACTOR_FLOOR * start)

    outer = fitted(old.hidden, new.hidden, sizes)
    inner = []
    biases = [subs.up_bias] if subs.gate is None else [subs.gate_bias, subs.up_bias]
    for s, z, bias in zip(old.slopes, new.slopes, biases, strict=True):
        start = kept(s * size, z * new_size, 1 if scaling == "adam" else 2)
        if scaling == "adam":
            inner.append(paired(s, z, bias, start))
        else:
            inner.append(fitted(s * size, z * new_size, start))
    if scaling == "sgd":
        outer, *inner = (jnp.sqrt(x) for x in (outer, *inner))
    outer, *inner = (positive(x) for x in (outer, *inner))
    return Factors(outer, inner[0], inner[1] if len(inner) > 1 else jnp.ones_like(inner[0]))
