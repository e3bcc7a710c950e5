"""k-means for few points per cluster in high dimension, for many problems at once.

Points are centered and scaled. All work is then done on their Gram matrix (`clustering.gram`) if it
fits into `GRAM_BYTES`, else on blocks of points (`clustering.points`). Besides a copy of the
points, Gram space takes three matrices of n^2 numbers: 113 MB for 3,072 points, 1.5 GB for 11,008.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.clustering import gram as gram_space
from fusion_jax.clustering import points as point_space
from fusion_jax.clustering.labels import Refinement, draw_distinct, indices, plus_plus
from fusion_jax.errors import InputError, nearest
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.dtypes import wide, wide_dtype
from fusion_jax.programs import few_programs

Init = Literal["auto", "ward", "k-means++", "random"]
Refine = Literal["auto", "hartigan", "lloyd"]

GRAM_BYTES = 4 * 2**30
"""The largest Gram matrix that is made: 32,768 points in float32."""


class KMeansResult(NamedTuple):
    """A clustering, and how it was found.

    Args:
        labels: The cluster of every point, numbered by first appearance.
        centroids: The (weighted) means of the clusters.
        sizes: The sum of weights in each cluster; the number of points if there are no weights.
        inertia: The (weighted) sum of squared distances from the points to their centroids.
        inertia_fraction: The inertia divided by that of a single cluster, in [0, 1]; finite even
            where the scale of the points makes `inertia` overflow.
        iterations: Lloyd iterations of the best start.
        moves: Moves of single points after them.
        converged: Whether nothing was left to improve at the end.
    """

    labels: Int[Array, "*s n"]
    centroids: Float[Array, "*s k d"]
    sizes: Float[Array, "*s k"]
    inertia: Float[Array, "*s"]
    inertia_fraction: Float[Array, "*s"]
    iterations: Int[Array, "*s"]
    moves: Int[Array, "*s"]
    converged: Bool[Array, "*s"]


@on_auto_axes
def kmeans(
    points: Shaped[Array, "n d"],
    k: int,
    *,
    key: Key[Array, ""],
    weights: Float[Array, " w"] | None = None,
    init: Init | Float[Array, "k d"] = "auto",
    refine: Refine = "auto",
    n_init: int = 1,
    max_iters: int = 300,
    tol: float = 0.0,
) -> KMeansResult:
    """Clusters points: makes a start and refines it until no move of one point is an improvement.

    No cluster of the result is empty. The result does not depend on the order of the points, except
    for the numbers of the clusters, and the same key gives the same bits on one backend. May be
    called under `jax.jit` and `jax.vmap`. Points may be sharded over a mesh: the Gram matrix is
    then computed on all its devices.

    Args:
        points: (n, d), finite; computed in float64 if they have that dtype, else in float32.
        k: The number of clusters, 1 to n.
        key: Random key of the starts.
        weights: (n,) non-negative weights, at least k of them positive; None for all 1.
        init: ``"ward"`` (Ward's agglomeration: the best start, and independent of the key),
            ``"k-means++"`` (greedy, with as many trials as scikit-learn), ``"random"`` (points), or
            (k, d) centroids. ``"auto"`` is ``"ward"`` where the Gram matrix fits into
            `GRAM_BYTES`, else ``"k-means++"``.
        refine: ``"lloyd"``, or ``"hartigan"``: moves of single points, after Lloyd's iterations
            unless the start is Ward's. ``"auto"`` is ``"hartigan"`` where the Gram matrix fits.
        n_init: The number of random starts, of which the best is kept.
        max_iters: The largest number of Lloyd iterations per start, and of rounds of moves.
        tol: Lloyd stops when an iteration lowers the inertia by at most this fraction; with 0, when
            the labels are stable.

    Returns:
        The clustering, in float32 or float64.

    Raises:
        InputError: k, a shape, the weights or an option is invalid, or a point is not finite;
            values are not checked under transformations.

    Example:
        >>> x = jnp.array([[0.0], [0.1], [5.0], [5.1]])
        >>> result = kmeans(x, 2, key=jax.random.key(0))
        >>> result.labels.tolist(), result.sizes.tolist(), bool(result.converged)
        ([0, 0, 1, 1], [2.0, 2.0], True)
    """
    _check(points, k, weights, init, refine, n_init, max_iters, tol)
    fits = points.shape[0] ** 2 * jnp.dtype(wide_dtype(points)).itemsize <= GRAM_BYTES
    centroids = None if isinstance(init, str) else init
    start = init if isinstance(init, str) else "centroids"
    if start == "auto":
        start = "ward" if fits else "k-means++"
    if refine == "auto":
        refine = "hartigan" if fits else "lloyd"
    if not fits and (start == "ward" or refine == "hartigan"):
        what = "init='ward'" if start == "ward" else "refine='hartigan'"
        raise InputError(
            f"{what} needs the Gram matrix, which for {points.shape[0]} points is above "
            f"GRAM_BYTES = {GRAM_BYTES}"
        )
    if start in ("ward", "centroids"):
        n_init = 1
    options = _Options(k, start, refine, n_init, fits)
    if weights is None:
        weights = jnp.ones(points.shape[0], wide_dtype(points))
    # Under a caller's jit, a program of our own would only keep what was traced for every k.
    run: Callable[..., KMeansResult] = partial(_kmeans, options, None)
    if not isinstance(points, Tracer):
        run = _program(options, _mesh_of(points))
    limits = jnp.int32(max_iters), jnp.asarray(tol, wide_dtype(points))
    return run(points, weights, centroids, key, *limits)


def _check(
    points: Array,
    k: int,
    weights: Array | None,
    init: Any,
    refine: str,
    n_init: int,
    max_iters: int,
    tol: float,
) -> None:
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"points must be (n, d) and not empty; got shape {points.shape}")
    n = points.shape[0]
    if not 1 <= k <= n:
        raise InputError(f"k must be 1 to the number of points, {n}; got {k}")
    if isinstance(init, str) and init not in get_args(Init):
        raise InputError(f"unknown init {init!r}{nearest(init, get_args(Init))}")
    if not isinstance(init, str) and init.shape != (k, points.shape[1]):
        raise InputError(f"init must have shape {(k, points.shape[1])}; got {init.shape}")
    if refine not in get_args(Refine):
        raise InputError(f"unknown refine {refine!r}{nearest(refine, get_args(Refine))}")
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


def _mesh_of(points: Array) -> Mesh | None:
    """Returns the mesh that points are split over, or None."""
    sharding = None if isinstance(points, Tracer) else points.sharding
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


class _Options(NamedTuple):
    k: int
    start: str
    refine: str
    n_init: int
    gram: bool


@few_programs
def _program(options: _Options, mesh: Mesh | None) -> Callable[..., KMeansResult]:
    """Returns the compiled k-means for some options."""
    return jax.jit(partial(_kmeans, options, mesh))


def _kmeans(
    options: _Options,
    mesh: Mesh | None,
    points: Array,
    weights: Array,
    centroids: Array | None,
    key: Array,
    max_iters: Array,
    tol: Array,
) -> KMeansResult:
    k = options.k
    points = wide(points)
    order = _canonical_order(points)
    points = points[order]
    weights = weights.astype(points.dtype)[order]
    # From here on, points and weights are scaled to at most 1: squares neither overflow nor vanish.
    unit, shift, scale = _normalized(points, weights)
    unit_weights = weights / weights.max()
    if options.gram:
        x = jnp.matmul(unit, unit.T, precision="highest")
        if mesh is not None:
            # The loops read one row after another: cheaper on each device than across them.
            x = lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
        space: Any = gram_space
    else:
        x, space = unit, point_space

    def start(key: Array) -> Array:
        if options.start == "ward":
            return gram_space.ward_start(x, unit_weights, k)
        if options.start == "k-means++":
            return plus_plus(partial(space.distances_from, x), unit_weights, k, key)
        if options.start == "random":
            chosen = unit[draw_distinct(unit_weights, k, key)]
        else:
            assert centroids is not None
            chosen = (centroids.astype(unit.dtype) - shift[None]) / scale
        return point_space.nearest(unit, chosen)[0]

    def from_start(key: Array) -> tuple[Refinement, Array]:
        labels, moves = start(key), jnp.int32(0)
        refined = None
        if options.start != "ward" or options.refine == "lloyd":
            refined = space.lloyd(x, unit_weights, labels, k, max_iters, tol)
            labels = refined.labels
        if options.refine == "hartigan":
            moved = gram_space.hartigan(x, unit_weights, labels, k, max_iters)
            iterations = jnp.int32(0) if refined is None else refined.steps
            moves, refined = moved.steps, moved._replace(steps=iterations)
        assert refined is not None
        return refined, moves

    # A batch takes as long as its slowest start: worth it on accelerators, not on CPUs.
    batch = None if jax.default_backend() == "cpu" else options.n_init
    refined, moves = lax.map(from_start, jax.random.split(key, options.n_init), batch_size=batch)
    best = jnp.argmin(refined.objective)
    labels = lax.cond(
        (unit_weights > 0).all(),
        lambda labels: labels,
        # Points of weight zero have no part in the objective: they go to the nearest centroid.
        lambda labels: jnp.where(
            unit_weights > 0,
            labels,
            point_space.nearest(unit, point_space.means(unit, unit_weights, labels, k)[0])[0],
        ),
        refined.labels[best],
    )
    labels = _numbered_by_first(labels, order, k)

    # Computed from the points: small distances cancel in the Gram matrix.
    inertia = point_space.objective(unit, unit_weights, labels, k)
    total = point_space.objective(unit, unit_weights, jnp.zeros_like(labels), 1)
    centroids, sizes = point_space.means(points, weights, labels, k)
    return KMeansResult(
        labels=jnp.zeros_like(labels).at[order].set(labels),
        centroids=centroids,
        sizes=sizes,
        inertia=inertia * weights.max() * scale * scale,
        # Times 0, so that points with NaN, which cannot be refused under jit, give NaN.
        inertia_fraction=jnp.where(total > 0, inertia / jnp.where(total > 0, total, 1), 0 * total),
        iterations=refined.steps[best],
        moves=moves[best],
        converged=refined.converged[best],
    )


def _canonical_order(x: Array) -> Array:
    """Returns an order of the points that does not depend on the given one: along a fixed line."""
    line = jax.random.normal(jax.random.key(0), x.shape[1:], x.dtype)
    # Row by row, without a matmul, so that a row's value does not depend on its place.
    return jnp.argsort((x * line[None]).sum(1)).astype(jnp.int32)


def _normalized(x: Array, w: Array) -> tuple[Array, Array, Array]:
    """Returns centered points of largest coordinate 1, and the shift and scale taken out."""

    def divisor(x: Array) -> Array:
        largest = jnp.abs(x).max()
        return jnp.where(largest > 0, largest, 1)

    first = divisor(x)
    x = x / first
    mean = (w / w.sum()) @ x
    x = x - mean[None]
    second = divisor(x)
    return x / second, mean * first, first * second


def _numbered_by_first(labels: Array, order: Array, k: int) -> Array:
    """Renumbers the clusters by their first members in the original order of the points."""
    first = jax.ops.segment_min(order, labels, k)
    rank = jnp.zeros(k, labels.dtype).at[jnp.argsort(first)].set(indices(k))
    return rank[labels]
