"""Starts, sums by label and empty clusters, for clustering by Gram matrix and by points.

Weights are positive or zero, scaled to at most 1, and at least k of them are positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Weights = Float[Array, " n"]
ClusterLabels = Int[Array, " n"]


class Refinement(NamedTuple):
    """The result of a refinement.

    Args:
        labels: (n,) int32.
        objective: The weighted sum of squared distances from the points to their centroids.
        steps: Iterations (Lloyd) or moves of single points (Hartigan).
        converged: Whether nothing was left to improve.
    """

    labels: ClusterLabels
    objective: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


def indices(n: int) -> Int[Array, " n"]:
    """Returns 0 to n - 1 as int32, with and without ``jax_enable_x64``."""
    return jnp.arange(n, dtype=jnp.int32)


def sum_by_label(x: Float[Array, " n *d"], labels: ClusterLabels, k: int) -> Float[Array, " k *d"]:
    """Returns the sums of the rows that have the same label."""

    def scatter(x: Array, labels: Array) -> Array:
        return jax.ops.segment_sum(x, labels, k)

    def product(x: Array, labels: Array) -> Array:
        one_hot = labels[None] == indices(k)[:, None]
        # Products are tuned when they are compiled, a second for each: few programs have many.
        if x.ndim == 1:
            return jnp.where(one_hot, x[None], 0).sum(1)
        if k == 1:
            return jnp.where(one_hot[0][:, None], x, 0).sum(0)[None]
        return jnp.tensordot(one_hot.astype(x.dtype), x, 1, precision="highest")

    # A scatter is fast on a CPU; on accelerators it is slow, and its order of sums varies.
    return lax.platform_dependent(x, labels, cpu=scatter, default=product)


def first_min(a: Array) -> tuple[Array, Array]:
    """Returns minima along the first axis and their first indices, (n,) -> () or (k, n) -> (n,).

    A comparison with the minimum would not do: a compiler may compute the numbers once for the
    minimum and once more for the comparison, with other roundings, so that none is equal. XLA's
    argmin is several times slower on CPUs.
    """
    if a.ndim > 1:
        return lax.platform_dependent(a, cpu=_row_by_row, default=_by_argmin)
    least = a.min()
    first = jnp.where(a == least, indices(len(a)), len(a)).min()
    index = lax.cond(first < len(a), lambda a, i: i, lambda a, _: _by_argmin(a)[1], a, first)
    return least, index


def _row_by_row(a: Array) -> tuple[Array, Array]:
    def row(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, index = best
        better = a[i] < least
        return jnp.where(better, a[i], least), jnp.where(better, i, index)

    start = a[0], jnp.zeros(a.shape[1:], jnp.int32)
    return lax.fori_loop(jnp.int32(1), jnp.int32(a.shape[0]), row, start)


def _by_argmin(a: Array) -> tuple[Array, Array]:
    return a.min(0), jnp.argmin(a, 0).astype(jnp.int32)


def draw_distinct(weights: Weights, k: int, key: Key[Array, ""]) -> Int[Array, " k"]:
    """Draws k different points with probabilities proportional to their weights."""
    # The k largest values of an exponential race are a draw without replacement.
    race = jnp.log(weights) + jax.random.gumbel(key, weights.shape, weights.dtype)
    return lax.top_k(race, k)[1].astype(jnp.int32)


def plus_plus(
    distances: Callable[[Array], Array], weights: Weights, k: int, key: Key[Array, ""]
) -> ClusterLabels:
    """Returns labels by the nearest of k points that greedy k-means++ chooses.

    Each new point is the best of 2 + log(k) candidates drawn with probability proportional to
    weight times squared distance, as in scikit-learn.

    Args:
        distances: Maps (c,) indices of points to (c, n) squared distances from them to all points.
        weights: The weights.
        k: The number of clusters.
        key: Random key.

    Returns:
        The labels.

    References:
        Arthur and Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007).
    """
    n, dtype = weights.shape[0], weights.dtype
    trials = 2 + int(math.log(k))

    def draw(potential: Array, u: Array) -> Array:
        cumulative = jnp.cumsum(potential)
        return jnp.minimum(jnp.searchsorted(cumulative, u * cumulative[-1], side="right"), n - 1)

    first_key, key = jax.random.split(key)
    first = draw(weights, jax.random.uniform(first_key, (1,), dtype))
    uniforms = jax.random.uniform(key, (k, trials), dtype)

    def choose(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        nearest, labels = state
        candidates = draw(weights * nearest, uniforms[t])
        closer = jnp.minimum(nearest[None], distances(candidates))
        best = closer[jnp.argmin((closer * weights[None]).sum(1))]
        return best, jnp.where(best < nearest, t, labels)

    state = distances(first)[0], jnp.zeros(n, jnp.int32)
    return lax.fori_loop(1, k, choose, state)[1]


def refilled(
    labels: ClusterLabels, weights: Weights, distance: Float[Array, " n"], k: int
) -> ClusterLabels:
    """Returns labels in which every empty cluster gets a point far from its centroid.

    Each other cluster keeps the member nearest to its centroid, so that with at least k points of
    positive weight no cluster is empty in the end. No move raises the objective.

    Args:
        labels: The labels.
        weights: The weights; a cluster with only zeros counts as empty.
        distance: (n,) squared distances from the points to their centroids.
        k: The number of clusters.

    Returns:
        The labels, changed only if a cluster was empty.
    """
    n = labels.shape[0]
    mass = sum_by_label(weights, labels, k)

    def refill(labels: Array) -> Array:
        points = indices(n)
        real = weights > 0
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


def lloyd_iterations(
    assign: Callable[[Array, PyTree], Array],
    evaluate: Callable[[Array], tuple[PyTree, Array]],
    labels: ClusterLabels,
    max_iters: Int[Array, ""],
    tol: Float[Array, ""],
) -> Refinement:
    """Runs Lloyd's iterations.

    Args:
        assign: Returns the next labels, for labels and their statistics; no cluster is empty.
        evaluate: Returns the statistics of labels, and the objective.
        labels: The labels to start from; no cluster is empty.
        max_iters: The largest number of iterations.
        tol: Stop when an iteration lowers the objective by at most this fraction.

    Returns:
        The refined labels.
    """

    def step(state: tuple) -> tuple:
        labels, statistics, value, iteration, _ = state
        new = assign(labels, statistics)
        new_statistics, new_value = evaluate(new)
        # In exact arithmetic the objective falls until the labels are stable; rounding may swap
        # labels forever, so that an iteration without improvement is the last.
        improved = new_value < value
        done = ~improved | (value - new_value <= tol * value)
        kept = jax.tree.map(
            lambda new, old: jnp.where(improved, new, old),
            (new, new_statistics, new_value),
            (labels, statistics, value),
        )
        return *kept, iteration + 1, done

    start = labels, *evaluate(labels), jnp.int32(0), jnp.array(False)
    labels, _, value, iterations, converged = lax.while_loop(
        lambda state: ~state[4] & (state[3] < max_iters), step, start
    )
    return Refinement(labels, value, iterations, converged)
