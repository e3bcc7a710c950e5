"""k-means in the regime of MLP Fusion: few points per cluster, high dimension, many problems.

All work after one Gram matrix G = X X^T is in its space: with a cluster's sum of rows S = C G,
a squared distance is G_jj - 2 S_cj / m_c + Q_c / m_c^2, so that a step costs n^2 operations
whatever the dimension. Memory is n^2 numbers: 38 MB for 3,072 points, 3.3 GB for 28,672.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.mlp import wide


class KMeansResult(NamedTuple):
    """A clustering and the facts of how it was found.

    Args:
        labels: The cluster of every point, numbered by first appearance.
        centroids: The (weighted) means of the clusters.
        sizes: The sums of weights in the clusters; counts if there are no weights.
        inertia: The (weighted) sum of squared distances to the own centroid.
        inertia_fraction: The same over that to the mean of all points, in [0, 1]; finite even
            where the scale of the points makes `inertia` overflow.
        iterations: Lloyd iterations of the best start.
        converged: Whether they ended before ``max_iters``.
    """

    labels: Int[Array, "*s n"]
    centroids: Float[Array, "*s k d"]
    sizes: Float[Array, "*s k"]
    inertia: Float[Array, "*s"]
    inertia_fraction: Float[Array, "*s"]
    iterations: Int[Array, "*s"]
    converged: Bool[Array, "*s"]


def kmeans(
    points: Shaped[Array, "n d"],
    k: int,
    *,
    key: Key[Array, ""],
    weights: Float[Array, " w"] | None = None,
    n_init: int = 1,
    max_iters: int = 300,
    tol: float = 0.0,
) -> KMeansResult:
    """Clusters points by greedy k-means++ and Lloyd's iterations, best of several starts.

    No cluster of the result is empty. The result does not depend on the order of the points (but
    for the numbering of clusters), and the same key gives the same bits on one backend. May be
    called under `jax.jit` and `jax.vmap`.

    Args:
        points: (n, d), finite; computed in float32, or float64 if they are.
        k: The number of clusters, 1 to n.
        key: Random key of the starts.
        weights: (n,) non-negative weights, at least k of them positive; None for all 1.
        n_init: Starts, of which the one with the lowest inertia is kept.
        max_iters: Most Lloyd iterations per start.
        tol: Stop when an iteration lowers the inertia by no more than this fraction of it; 0 goes
            on until the labels are stable.

    Returns:
        The clustering, in float32 or float64.

    Raises:
        InputError: k, the shapes, the weights or the options make no sense, or a point is not
            finite (values are only looked at outside of transformations).

    References:
        Arthur and Vassilvitskii, k-means++ (SODA 2007), with greedy trials as in scikit-learn.

    Example:
        >>> x = jnp.array([[0.0], [0.1], [5.0], [5.1]])
        >>> result = kmeans(x, 2, key=jax.random.key(0))
        >>> result.labels.tolist(), result.sizes.tolist(), bool(result.converged)
        ([0, 0, 1, 1], [2.0, 2.0], True)
    """
    _check(points, k, weights, n_init, max_iters, tol)
    return _kmeans(points, k, key, weights, n_init, max_iters, tol)


def _check(points, k, weights, n_init, max_iters, tol) -> None:
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"points must be (n, d) and not empty; got shape {points.shape}")
    n = points.shape[0]
    if not 1 <= k <= n:
        raise InputError(f"k must be 1 to the number of points, {n}; got {k}")
    if n_init < 1 or max_iters < 1 or tol < 0:
        raise InputError(
            "n_init and max_iters must be at least 1 and tol at least 0; "
            f"got {n_init}, {max_iters}, {tol}"
        )
    if not isinstance(points, Tracer) and not bool(jnp.isfinite(points).all()):
        raise InputError("points hold NaN or infinite values")
    if weights is None:
        return
    if weights.shape != (n,):
        raise InputError(f"weights must have shape ({n},); got {weights.shape}")
    if not isinstance(weights, Tracer):
        w = np.asarray(weights)
        if not np.isfinite(w).all() or (w < 0).any() or (w > 0).sum() < k:
            raise InputError(
                f"weights must be finite, not negative, and at least k = {k} of them positive"
            )


@partial(jax.jit, static_argnames=("k", "n_init"))
def _kmeans(points, k, key, weights, n_init, max_iters, tol) -> KMeansResult:
    points = wide(points)
    order = _canonical_order(points)
    points = points[order]
    weights = None if weights is None else weights.astype(points.dtype)[order]
    unit, scale = _normalised(points, weights)
    unit_weights = None if weights is None else weights / weights.max()
    gram = jnp.matmul(unit, unit.T, precision="highest")

    def start(key: Array) -> tuple[Array, Array, Array, Array]:
        labels = _greedy_plus_plus(gram, unit_weights, k, key)
        return _lloyd(gram, unit_weights, labels, k, max_iters, tol)

    # Under vmap the slowest start decides, which an accelerator's parallelism pays for and a
    # CPU's does not.
    batch = None if jax.default_backend() == "cpu" else n_init
    labels, objective, iterations, converged = lax.map(
        start, jax.random.split(key, n_init), batch_size=batch
    )
    best = jnp.argmin(objective)
    labels = _numbered_by_first(labels[best], order, k)

    # From the points: where distances are small, the Gram matrix cancels.
    inertia = _inertia(unit, unit_weights, labels, k)
    total = _inertia(unit, unit_weights, jnp.zeros_like(labels), 1)
    centroids, sizes = _means(points, weights, labels, k)
    weight_scale = 1.0 if weights is None else weights.max()
    return KMeansResult(
        labels=jnp.zeros_like(labels).at[order].set(labels),
        centroids=centroids,
        sizes=sizes,
        inertia=inertia * weight_scale * scale * scale,
        inertia_fraction=jnp.where(total > 0, inertia / jnp.where(total > 0, total, 1), 0),
        iterations=iterations[best],
        converged=converged[best],
    )


def _range(n: int) -> Array:
    # int32 with and without jax_enable_x64, as all labels are.
    return jnp.arange(n, dtype=jnp.int32)


def _canonical_order(x: Array) -> Array:
    """An order of the points that is the same however they come: along a fixed random line."""
    line = jax.random.normal(jax.random.key(0), x.shape[1:], x.dtype)
    # Products and a sum along rows, no matmul, so that a row's value does not depend on its place.
    return jnp.argsort((x * line[None]).sum(1)).astype(jnp.int32)


def _normalised(x: Array, w: Array | None) -> tuple[Array, Array]:
    """Centred points of largest coordinate 1, whose squares neither overflow nor vanish; scale."""

    def divisor(x: Array) -> Array:
        largest = jnp.abs(x).max()
        return jnp.where(largest > 0, largest, 1)

    first = divisor(x)
    x = x / first
    mean = x.mean(0) if w is None else (w / w.sum()) @ x
    x = x - mean[None]
    second = divisor(x)
    return x / second, first * second


def _label_sum(x: Array, labels: Array, k: int) -> Array:
    """Sums of x's rows by label, (k, ...)."""

    def scatter(x: Array, labels: Array) -> Array:
        return jax.ops.segment_sum(x, labels, k)

    def product(x: Array, labels: Array) -> Array:
        one_hot = (labels[None] == _range(k)[:, None]).astype(x.dtype)
        return jnp.tensordot(one_hot, x, 1, precision="highest")

    # Scatters are cheap on a CPU; on accelerators they are slow and their order is not fixed.
    return lax.platform_dependent(x, labels, cpu=scatter, default=product)


def _means(x: Array, w: Array | None, labels: Array, k: int) -> tuple[Array, Array]:
    """Weighted means (k, d) and sums of weights (k,) by label."""
    w = jnp.ones(x.shape[0], x.dtype) if w is None else w
    sizes = _label_sum(w, labels, k)
    return _label_sum(x * w[:, None], labels, k) / sizes[:, None], sizes


def _inertia(x: Array, w: Array | None, labels: Array, k: int) -> Array:
    means, _ = _means(x, w, labels, k)
    squares = jnp.square(x - means[labels]).sum(1)
    return squares.sum() if w is None else (squares * w).sum()


def _numbered_by_first(labels: Array, order: Array, k: int) -> Array:
    """Renumbers clusters by the first of their members in the original order of the points."""
    first = jax.ops.segment_min(order, labels, k)
    rank = jnp.zeros(k, labels.dtype).at[jnp.argsort(first)].set(_range(k))
    return rank[labels]


def _first_min(a: Array) -> tuple[Array, Array]:
    """Minimum and its first index along axis 0 (XLA's argmin is several times slower on CPU)."""
    least = a.min(0)
    index = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    return least, jnp.where(a == least[None], index, a.shape[0] - 1).min(0)


def _greedy_plus_plus(gram: Array, w: Array | None, k: int, key: Array) -> Array:
    """Labels (n,) by the nearest of k points that greedy k-means++ chose."""
    n, dtype = gram.shape[0], gram.dtype
    square = jnp.diagonal(gram)
    trials = 2 + int(math.log(k))
    noise = 32 * jnp.finfo(dtype).eps
    weight = jnp.ones(n, dtype) if w is None else w

    def distances(j: Array) -> Array:
        norms = square[j][:, None] + square[None]
        d = norms - 2 * gram[j]
        # What cancellation leaves of a duplicate must not be drawn.
        return jnp.where(d > noise * norms, d, 0)

    def draw(potential: Array, u: Array) -> Array:
        cumulative = jnp.cumsum(potential)
        return jnp.minimum(jnp.searchsorted(cumulative, u * cumulative[-1], side="right"), n - 1)

    first_key, key = jax.random.split(key)
    first = draw(weight, jax.random.uniform(first_key, (1,), dtype))
    uniforms = jax.random.uniform(key, (k, trials), dtype)

    def choose(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        nearest, labels = state
        candidates = draw(weight * nearest, uniforms[t])
        closer = jnp.minimum(nearest[None], distances(candidates))
        best = closer[jnp.argmin((closer * weight[None]).sum(1))]
        return best, jnp.where(best < nearest, t, labels)

    state = distances(first)[0], jnp.zeros(n, jnp.int32)
    _, labels = lax.fori_loop(1, k, choose, state)
    return labels


class _Statistics(NamedTuple):
    """Of a labelling in Gram space: S = C W G, the masses m, and Q = diag(S W C^T)."""

    sums: Array
    mass: Array
    inner: Array


def _statistics(gram: Array, weight: Array, labels: Array, k: int) -> _Statistics:
    sums = _label_sum(weight[:, None] * gram, labels, k)
    own = sums[labels, _range(gram.shape[0])]
    return _Statistics(sums, _label_sum(weight, labels, k), _label_sum(own * weight, labels, k))


def _lloyd(
    gram: Array, w: Array | None, labels: Array, k: int, max_iters: Array, tol: Array
) -> tuple[Array, Array, Array, Array]:
    """Lloyd's iterations: labels, objective, iterations, converged."""
    n = gram.shape[0]
    points = _range(n)
    square = jnp.diagonal(gram)
    weight = jnp.ones(n, gram.dtype) if w is None else w
    total = (square * weight).sum()

    def objective(s: _Statistics) -> Array:
        return total - (s.inner / s.mass).sum()

    def step(state):
        labels, s, value, iteration, _ = state
        # Squared distances without the term |x_j|^2, which is the same for all clusters.
        relative = (s.inner / s.mass**2)[:, None] - s.sums * (2 / s.mass)[:, None]
        least, nearest = _first_min(relative)
        own = relative[labels, points]
        new = jnp.where(own <= least, labels, nearest)
        new = _refilled(new, weight, square + least, k)
        new_s = _statistics(gram, weight, new, k)
        new_value = objective(new_s)
        # In exact arithmetic the objective falls until the labels are stable; rounding may
        # swap labels for ever, so that a step which does not improve ends the iterations.
        improved = new_value < value
        done = ~improved | (value - new_value <= tol * value)
        labels, s, value = jax.tree.map(
            partial(jnp.where, improved), (new, new_s, new_value), (labels, s, value)
        )
        return labels, s, value, iteration + 1, done

    labels = _refilled(labels, weight, jnp.zeros(n, gram.dtype), k)
    s = _statistics(gram, weight, labels, k)
    state = labels, s, objective(s), jnp.int32(0), jnp.array(False)
    labels, _, value, iterations, converged = lax.while_loop(
        lambda state: ~state[4] & (state[3] < max_iters), step, state
    )
    return labels, value, iterations, converged


def _refilled(labels: Array, weight: Array, distance: Array, k: int) -> Array:
    """Labels in which every empty cluster gets a point far from its own centroid.

    Each cluster that is not empty keeps the member nearest to its centroid, so that with at least
    k points of positive weight none is empty in the end. No move raises the objective.
    """
    n = labels.shape[0]
    mass = _label_sum(weight, labels, k)

    def refill(labels: Array) -> Array:
        points = _range(n)
        real = weight > 0
        least = jax.ops.segment_min(jnp.where(real, distance, jnp.inf), labels, k)
        stays = jax.ops.segment_min(
            jnp.where(real & (distance == least[labels]), points, n), labels, k
        )
        movable = real & (points != stays[labels])
        farthest = jnp.argsort(jnp.where(movable, -distance, jnp.inf))[:k]
        (empty,) = jnp.nonzero(mass <= 0, size=k, fill_value=k)
        empty = empty.astype(jnp.int32)
        return labels.at[farthest].set(jnp.where(empty < k, empty, labels[farthest]))

    return lax.cond((mass <= 0).any(), refill, lambda labels: labels, labels)
