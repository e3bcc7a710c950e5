"""Fits output weights, and the factors of the kernel, to calibration inputs after clustering.

Both are linear least squares in closed form. Sums run over blocks of positions, so that no whole
matrix of activations is in memory.

Axis letters in shapes: p width, c clusters, d inputs, o outputs, t positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusion_jax.calibration.data import Calibration
from fusion_jax.clustering.labels import sum_by_label
from fusion_jax.methods.gram import gram_of, level_of, product, sum_over_blocks
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.fused import Factors, Scaling, factors
from fusion_jax.nn.submlps import SubMLPs, responses
from ntk.activations import Activation

KERNEL_POSITIONS = 1024
"""The number of positions that factors are fitted at; every pair of positions counts."""
PAIRED_POSITIONS = 128
"""The number of positions whose pairs, one by one, the second factors for Adam are fitted at."""
RIDGE_OF_FACTORS = 1e-2
CG_STEPS = 30
"""The largest number of steps of conjugate gradients for factors."""
FACTOR_RANGE = 8.0
"""Fitted factors are at most this many times larger or smaller than the standard ones. Stored
weights are divided by them and do not train with them: a step of Adam changes what a unit does by
as many times more or less."""
PAIRS_PER_FACTOR = 4
"""A factor has the whole range if there are so many pairs of positions per factor."""
DEAD = 1e-5
"""A unit that does less than this share of what the most active unit does on the text counts as
dead there: nothing is known of it."""


@partial(jax.jit, static_argnames="act")
def refitted(
    effective: SubMLPs,
    subs: SubMLPs,
    calibration: Calibration,
    act: Activation,
    ridge: float | Float[Array, ""],
) -> SubMLPs:
    r"""Fits the output weights of the units left to the original's outputs, by ridge regression.

    ``V + (H^T H + l I)^(-1) H^T (T - H V)`` with H the units' hidden values at the calibration
    inputs, T the target outputs, V the present output weights, and l = ``ridge`` trace(H^T H) / c.
    The regression shrinks towards V: where the text has no influence, the clusters' weights stay.

    Args:
        effective: The c units left, with the sizes of clusters in their output weights.
        subs: The p original units; their outputs are the target if the calibration has none.
        calibration: Inputs, and perhaps outputs.
        act: The activation.
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
        target = outputs[0] if outputs else product(responses(subs, x, act).hidden, original)
        hidden, error = r[:, None] * hidden, r[:, None] * (target - product(hidden, down))
        return gram_of(hidden), product(hidden.T, error)

    gram, error = sum_over_blocks(moments, wide(calibration.inputs), root, *known)
    return effective._replace(down=down + _ridge(gram, error, ridge))


@jax.jit
def refitted_selection(
    subs: SubMLPs,
    chosen: Int[Array, " c"],
    gram: Float[Array, "p p"],
    ridge: float | Float[Array, ""],
) -> SubMLPs:
    """Returns some of an MLP's units, refitted as by `refitted`, from one Gram matrix of all units.

    What the units left have to make up for is what the others do, so that the moments of the
    regression are parts of the Gram matrix, and the text need not be read again.

    Args:
        subs: The p original units.
        chosen: The units left.
        gram: The Gram matrix of the units' hidden values, at the positions of the text.
        ridge: The strength, above 0.

    Returns:
        The c units left, with new output weights.
    """
    left = jax.tree.map(lambda x: wide(x)[chosen], subs)
    others = wide(subs.down).at[chosen].set(0)
    rows = gram[chosen]
    return left._replace(down=left.down + _ridge(rows[:, chosen], product(rows, others), ridge))


def _ridge(gram: Array, right: Array, ridge: float | Float[Array, ""]) -> Array:
    """Returns ``(gram + l I)^(-1) right`` with l = ridge times the mean of gram's diagonal."""
    return _solved(gram, right, level_of(gram, ridge))


def _solved(gram: Array, right: Array, level: Array) -> Array:
    """Returns ``(gram + level I)^-1 right``; a level for all, or one for each unknown."""
    levels = jnp.diag(jnp.broadcast_to(level, gram.shape[:1]))
    return jax.scipy.linalg.solve(gram + levels, right, assume_a="pos")


def _bounded_ridge(
    times: Callable[[Array], Array],
    diagonal: Array,
    right: Array,
    start: Array,
    low: Array,
    high: Array,
) -> Array:
    """Returns the coefficients of a ridge regression that shrinks to a start, within bounds.

    What comes out beyond a bound is fixed there, and the others are fitted again. Each fit is by
    conjugate gradients: a few products with the Gram matrix.

    Args:
        times: Returns the product of the Gram matrix with a vector.
        diagonal: The diagonal of the Gram matrix, (c,).
        right: The products of the terms with what the start leaves, (c,).
        start: (c,).
        low: (c,) smallest coefficients.
        high: (c,) largest coefficients.

    Returns:
        (c,).
    """
    level = _own_levels(diagonal)
    root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1) + level)

    def fitted(fixed: Array, x: Array) -> Array:
        known = jnp.where(fixed, x - start, 0)
        left = jnp.where(fixed, 0, right - times(known)) / root

        def regular(y: Array) -> Array:
            free = jnp.where(fixed, 0, y / root)
            return jnp.where(fixed, y, (times(free) + level * free) / root)

        change = jax.scipy.sparse.linalg.cg(regular, left, tol=1e-6, maxiter=CG_STEPS)[0]
        return jnp.where(fixed, x, start + change / root)

    return _within(fitted, start, low, high)


def _own_levels(diagonal: Array) -> Array:
    """Returns the strength of the ridge for each factor.

    It is relative to the size of the factor's own term: the units that stand for clusters differ in
    size by orders of magnitude, and one strength for all would leave the small ones at their start.
    """
    return RIDGE_OF_FACTORS * jnp.where(diagonal > 0, diagonal, 1)


def _within(
    fitted: Callable[[Array, Array], Array], start: Array, low: Array, high: Array
) -> Array:
    """Returns the fit within bounds: what comes out beyond one is fixed there, and then again.

    Args:
        fitted: (which are fixed, coefficients) -> the best coefficients beside the fixed ones.
        start: (c,).
        low: (c,).
        high: (c,).
    """

    def outside(x: Array) -> Array:
        return (x < low) | (x > high) | ~jnp.isfinite(x)

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        fixed, x, round_ = state
        fixed = fixed | outside(x)
        return fixed, fitted(fixed, jnp.clip(x, low, high)), round_ + 1

    fixed, inside = low == high, jnp.clip(start, low, high)
    state = fixed, fitted(fixed, inside), jnp.int32(0)
    x = lax.while_loop(lambda s: outside(s[1]).any() & (s[2] < 8), again, state)[1]
    return jnp.clip(jnp.where(jnp.isfinite(x), x, inside), low, high)


@partial(jax.jit, static_argnames=("act", "scaling"))
def matched(
    effective: SubMLPs,
    subs: SubMLPs,
    labels: Int[Array, " p"],
    loads: Float[Array, " c"],
    calibration: Calibration,
    act: Activation,
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
    its mean absolute value. They stay within `FACTOR_RANGE` of the standard factors, and nearer to
    them where a unit is active at few positions; a unit that is dead on the text keeps its standard
    factors exactly. The bounds are part of the fit: where some factors are at them, the others are
    the best beside these.

    Args:
        effective: The c units left, with the sizes of clusters in their output weights.
        subs: The p original units.
        labels: The cluster of each original unit.
        loads: How many units like itself each unit left stands for; for means the cluster sizes.
        calibration: Inputs.
        act: The activation.
        scaling: The kernel to match, ``"adam"`` or ``"sgd"``; ``"folded"`` has no factors.

    Returns:
        The factors.
    """
    standard = factors(loads, scaling)
    if scaling == "folded":
        return standard
    sample = calibration.head(KERNEL_POSITIONS)
    root = sample.root_weights()[:, None]
    old, new = responses(subs, sample.inputs, act), responses(effective, sample.inputs, act)
    size, new_size = (jnp.linalg.norm(wide(m.down), axis=1)[None] for m in (subs, effective))

    power = 1 if scaling == "adam" else 2

    def bounds(factor: Array, b: Array, positions: int) -> tuple[Array, Array]:
        """Returns the smallest and largest coefficients, given the activity of each unit."""
        use = jnp.square(root) * jnp.abs(b)
        total = use.sum(0)
        dead = total <= DEAD * total.max()
        # The number of positions that a unit is active at, if it were equally active at each.
        use = use[:positions] / jnp.where(dead, 1, total)[None]
        count = jnp.square(use.sum(0)) / jnp.maximum(jnp.square(use).sum(0), jnp.finfo(use).tiny)
        pairs = count * (count + 1) / 2
        trust = jnp.where(dead, 0, jnp.minimum(1, pairs / (PAIRS_PER_FACTOR * b.shape[1])))
        most = FACTOR_RANGE ** (power * trust)
        return factor**power / most, factor**power * most

    def fitted(a: Array, b: Array, start: Array, factor: Array) -> Array:
        """Returns the coefficients of b's kernels; for Adam, the second factors are signs."""
        low, high = bounds(factor, b, len(b))
        a, b, signs_a, signs_b = (root * x for x in (a, b, jnp.sign(a), jnp.sign(b)))
        seconds = (signs_a, signs_b) if scaling == "adam" else (a, b)
        gram = gram_of(b) * gram_of(seconds[1])
        times = partial(product, gram)
        right = (b * product(product(a, seconds[0].T), seconds[1])).sum(0) - times(start)
        return _bounded_ridge(times, jnp.diagonal(gram), right, start, low, high)

    def kept(a: Array, b: Array) -> Array:
        """Returns the coefficients that keep the mean of a power over each cluster."""
        total = sum_by_label((root**2 * jnp.abs(a) ** power).sum(0), labels, loads.shape[0])
        mean = (root**2 * jnp.abs(b) ** power).sum(0)
        return total / jnp.where(mean > 0, mean, 1)

    def paired(s: Array, z: Array, bias: Array | None, start: Array, factor: Array) -> Array:
        """Returns the coefficients of the Adam kernel's second term, given the slopes."""
        low, high = bounds(factor, z * new_size, PAIRED_POSITIONS)
        x, r, s, z = (u[:PAIRED_POSITIONS] for u in (wide(sample.inputs), root, s, z))
        above = jax.random.normal(jax.random.key(0), (x.shape[0], subs.down.shape[1]), r.dtype)
        a, b = (
            slopes * product(above, wide(units.down).T)
            for slopes, units in ((s, subs), (z, effective))
        )
        signs_a, signs_b = jnp.sign(a), jnp.sign(b)
        weights = (product(x, jnp.sign(x).T) + int(bias is not None)) * r * r.T

        def kernel(v: Array) -> Array:
            return weights * product(b * v[None], signs_b.T)

        def back(k: Array) -> Array:
            return (b * product(weights * k, signs_b)).sum(0)

        diagonal = (jnp.square(b) * product(jnp.square(weights), jnp.square(signs_b))).sum(0)
        right = back(weights * product(a, signs_a.T) - kernel(start))
        return _bounded_ridge(lambda v: back(kernel(v)), diagonal, right, start, low, high)

    outer = fitted(old.hidden, new.hidden, standard.outer**power, standard.outer)
    inner = []
    biases = [subs.up_bias] if subs.gate is None else [subs.gate_bias, subs.up_bias]
    around = (standard.inner, standard.middle)
    for s, z, bias, factor in zip(old.slopes, new.slopes, biases, around, strict=False):
        start = kept(s * size, z * new_size)
        if scaling == "adam":
            inner.append(paired(s, z, bias, start, factor))
        else:
            inner.append(fitted(s * size, z * new_size, start, factor))
    if scaling == "sgd":
        outer, *inner = (jnp.sqrt(x) for x in (outer, *inner))
    return Factors(outer, inner[0], inner[1] if len(inner) > 1 else jnp.ones_like(inner[0]))
