"""Clustering for so many points that their Gram matrix does not fit into memory.

Distances are computed for blocks of points, so that besides points and centroids only the distances
of one block are in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from fusion_jax.clustering.labels import (
    ClusterLabels,
    Refinement,
    Weights,
    first_min,
    lloyd_iterations,
    refilled,
    sum_by_label,
)

Points = Float[Array, "n d"]
Centroids = Float[Array, "k d"]

_BLOCK_BYTES = 64 * 2**20


def by_blocks(f: Callable[[Array], PyTree], x: Points, size: int) -> PyTree:
    """Returns f(x), computed on one block of rows after another."""
    n = x.shape[0]
    if n <= size:
        return f(x)
    count = -(-n // size)
    padded = jnp.pad(x, ((0, count * size - n), (0, 0))).reshape(count, size, -1)
    return jax.tree.map(lambda y: y.reshape(count * size, *y.shape[2:])[:n], lax.map(f, padded))


def nearest(x: Points, centroids: Centroids) -> tuple[ClusterLabels, Float[Array, " n"]]:
    """Returns the nearest centroid of each point, and the squared distance to it."""
    k = centroids.shape[0]
    squares = jnp.square(centroids).sum(1)

    def block(rows: Array) -> tuple[Array, Array]:
        relative = squares[:, None] - 2 * jnp.matmul(centroids, rows.T, precision="highest")
        least, label = first_min(relative)
        return label, jnp.maximum(least + jnp.square(rows).sum(1), 0)

    return by_blocks(block, x, max(1, _BLOCK_BYTES // (k * x.dtype.itemsize)))


def differences(a: Float[Array, "k d"], b: Points) -> Float[Array, "k n"]:
    """Returns squared distances from differences of coordinates: slow, and never canceling."""
    return jnp.square(a[:, None] - b[None]).sum(-1)


def nearest_by_differences(
    x: Points, centroids: Centroids
) -> tuple[ClusterLabels, Float[Array, " n"]]:
    """Returns what `nearest` returns, from differences of coordinates."""

    def block(rows: Array) -> tuple[Array, Array]:
        least, label = first_min(differences(centroids, rows))
        return label, least

    return by_blocks(block, x, max(1, _BLOCK_BYTES // (centroids.size * x.dtype.itemsize)))


def differences_from(x: Points, chosen: Int[Array, " c"]) -> Float[Array, "c n"]:
    """Returns what `distances_from` returns, from differences of coordinates."""
    return differences(x[chosen], x)


def distances_from(x: Points, chosen: Int[Array, " c"]) -> Float[Array, "c n"]:
    """Returns squared distances from some of the points to all; exactly 0 for duplicates."""
    square = jnp.square(x).sum(1)
    norms = square[chosen][:, None] + square[None]
    d = norms - 2 * jnp.matmul(x[chosen], x.T, precision="highest")
    return jnp.where(d > 32 * jnp.finfo(x.dtype).eps * norms, d, 0)


def means(
    x: Points, weights: Weights, labels: ClusterLabels, k: int
) -> tuple[Centroids, Float[Array, " k"]]:
    """Returns weighted means by label, and sums of weights; every label needs some weight."""
    sizes = sum_by_label(weights, labels, k)
    return sum_by_label(x * weights[:, None], labels, k) / sizes[:, None], sizes


def objective(x: Points, weights: Weights, labels: ClusterLabels, k: int) -> Float[Array, ""]:
    """Returns the weighted sum of squared distances from the points to their centroids."""
    centroids, _ = means(x, weights, labels, k)
    return (jnp.square(x - centroids[labels]).sum(1) * weights).sum()


def lloyd(
    x: Points,
    weights: Weights,
    labels: ClusterLabels,
    k: int,
    max_iters: Int[Array, ""],
    tol: Float[Array, ""],
    *,
    nearest: Callable[[Points, Centroids], tuple[Array, Array]] = nearest,
) -> Refinement:
    """Runs Lloyd's iterations over blocks of points; for the arguments see `lloyd_iterations`."""

    def assign(labels: Array, _: None) -> Array:
        new, distance = nearest(x, means(x, weights, labels, k)[0])
        return refilled(new, weights, distance, k)

    labels = refilled(labels, weights, jnp.zeros(x.shape[0], x.dtype), k)
    return lloyd_iterations(
        assign, lambda labels: (None, objective(x, weights, labels, k)), labels, max_iters, tol
    )
