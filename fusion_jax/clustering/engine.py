"""k-means for few points per cluster in high dimension, for many problems at once.

Points are centered and scaled. All work is then done on their Gram matrix (`clustering.gram`) if it
fits into `GRAM_BYTES`, else on blocks of points (`clustering.points`). Besides a copy of the
points, Gram space takes three matrices of n^2 numbers: 113 MB for 3,072 points, 1.5 GB for 11,008.

Distances from inner products are off by about `eps` times the squares of the points. Where the
clusters found are not far above that, because a few points or groups are far from the others, all
is computed again from differences of coordinates. This is slower and has no such error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped

from fusion_jax.clustering import gram as gram_space
from fusion_jax.clustering import points as point_space
from fusion_jax.clustering import rounds as gram_rounds
from fusion_jax.clustering.labels import (
    Refinement,
    draw_distinct,
    indices,
    plus_plus,
    sum_by_label,
)
from fusion_jax.errors import InputError, nearest
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.dtypes import wide, wide_dtype
from fusion_jax.nn.programs import few_programs, quick_options

Init = Literal["auto", "ward", "k-means++", "random"]
Refine = Literal["auto", "hartigan", "lloyd"]

GRAM_BYTES = 4 * 2**30
"""The largest Gram matrix that is made: 32,768 points in float32."""

_NOISE = 400
"""Below this times `eps`, a share of inertia inside clusters is too near to the errors of distances
from inner products: they may be some percent of it."""


_IN_ROUNDS: bool | None = None
"""Whether Ward's merges and Hartigan's moves are made in rounds, or one by one; None for one by one
on CPUs only. Tests set it."""


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
        converged: Whether nothing was left to improve at the end. Under `jax.jit` and `jax.vmap`
            also False where points are so far apart that the precision does not tell.
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
    points: Shaped[ArrayLike, "n d"] | Sequence[object],
    k: int,
    *,
    key: Key[Array, ""],
    weights: Shaped[ArrayLike, " w"] | Sequence[object] | None = None,
    init: Init | Shaped[ArrayLike, "k d"] | Sequence[object] = "auto",
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
        points: (n, d), finite, an array of JAX or NumPy or nested lists; computed in float64 if
            they have that dtype, which takes ``jax_enable_x64``, else in float32.
        k: The number of clusters, 1 to n.
        key: Random key of the starts.
        weights: (n,) non-negative weights, at least k of them positive; None for all 1. Where the
            clusters are sought, a weight below ``eps^2`` of the largest counts as that.
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
    points = _numbers("points", points)
    weights = None if weights is None else _numbers("weights", weights)
    init = init if isinstance(init, str) else _numbers("init", init)
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
    positive = weights is None or _all_positive(weights, points)
    options = _Options(k, start, refine, n_init, fits, positive, _IN_ROUNDS, exact=False)
    if weights is None:
        weights = jnp.ones(points.shape[0], wide_dtype(points))
    limits = jnp.int32(max_iters), jnp.asarray(tol, wide_dtype(points))

    def run(options: _Options) -> KMeansResult:
        # Under a caller's jit, a program of our own would only keep what was traced for every k.
        traced = isinstance(points, Tracer)
        if traced:
            solve = partial(_kmeans, options, None)
        else:
            platform = next(iter(points.devices())).platform
            solve = _program(options, _mesh_of(points), platform)
        return solve(points, weights, centroids, key, *limits)

    result = run(options)
    fraction = result.inertia_fraction
    if isinstance(fraction, Tracer) or not bool(_unclear(fraction)):
        return result
    return run(options._replace(exact=True))


def _unclear(inertia_fraction: Array) -> Array:
    """Returns whether distances from inner products may be too inexact for a result."""
    least = _NOISE * jnp.finfo(inertia_fraction.dtype).eps
    return (inertia_fraction > 0) & (inertia_fraction < least)


def _numbers(name: str, value: object) -> Array:
    """Returns an argument as an array of JAX; numbers may be lost to its dtype only by rounding."""
    if isinstance(value, Array):
        return value
    try:
        given = np.asarray(value)
    except ValueError:  # lists of different lengths
        given = np.asarray(None)
    real = any(jnp.issubdtype(given.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    if not real:
        raise InputError(f"{name} must be an array of real numbers, or lists of one length of them")
    given = given if jnp.issubdtype(given.dtype, jnp.floating) else given.astype(np.float32)
    with np.errstate(over="ignore"):
        array = jnp.asarray(given)
    lost = (np.isfinite(given) & ~np.isfinite(array)) | ((given > 0) & (np.asarray(array) == 0))
    if lost.any():
        raise InputError(
            f"{name} hold {given[lost][0]:.3g}, which {array.dtype} cannot; "
            "scale them, or use float64 (jax_enable_x64)"
        )
    return array


def _check(
    points: Array,
    k: int,
    weights: Array | None,
    init: str | Array,
    refine: str,
    n_init: int,
    max_iters: int,
    tol: float,
) -> None:
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"points must be (n, d) and not empty; got shape {points.shape}")
    if not jnp.issubdtype(points.dtype, jnp.floating) and not jnp.issubdtype(
        points.dtype, jnp.integer
    ):
        raise InputError(f"points must be real numbers; got {points.dtype}")
    n = points.shape[0]
    if not 1 <= k <= n:
        raise InputError(f"k must be 1 to the number of points, {n}; got {k}")
    if isinstance(init, str) and init not in get_args(Init):
        raise InputError(f"unknown init {init!r}{nearest(init, get_args(Init))}")
    if not isinstance(init, str) and init.shape != (k, points.shape[1]):
        raise InputError(f"init must have shape {(k, points.shape[1])}; got {init.shape}")
    if not isinstance(init, str | Tracer) and not bool(jnp.isfinite(init).all()):
        raise InputError("init holds NaN or infinite values")
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
        least = jnp.finfo(wide_dtype(points)).tiny  # smaller numbers are zeros on most devices
        if not np.isfinite(w).all() or (w < 0).any() or (w >= least).sum() < k:
            raise InputError(
                f"weights must be finite, not negative, and at least k = {k} of them positive"
            )


def _all_positive(weights: Array, points: Array) -> bool:
    """Returns whether no weight can be zero where the clusters are computed."""
    least = jnp.finfo(wide_dtype(points)).tiny
    return not isinstance(weights, Tracer) and bool((np.asarray(weights) >= least).all())


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
    positive: bool  # all weights are
    in_rounds: bool | None
    exact: bool


@few_programs
def _program(options: _Options, mesh: Mesh | None, platform: str) -> Callable[..., KMeansResult]:
    """Returns the compiled k-means for some options."""
    # On a CPU its loops are worth compiling well.
    quick = None if platform == "cpu" else quick_options(platform)
    return jax.jit(partial(_kmeans, options, mesh), compiler_options=quick)


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
    points, scale = _scaled(wide(points))
    order = _canonical_order(points)
    points = points[order]
    weights = weights.astype(points.dtype)[order]
    # From here on, points and weights are scaled to about 1: squares neither overflow nor vanish.
    unit_weights = weights / weights.max()
    least = jnp.finfo(points.dtype).eps ** 2
    unit_weights = jnp.where(weights > 0, jnp.maximum(unit_weights, least), 0)
    # Differences need no centering, which would round small ones.
    place = (lambda x: x) if options.exact else _normalizer(points, unit_weights)
    unit = place(points)
    nearest = point_space.nearest_by_differences if options.exact else point_space.nearest
    if options.gram:
        if options.exact:
            x = -point_space.differences(unit, unit) / 2
        else:
            x = jnp.matmul(unit, unit.T, precision="highest")
        if mesh is not None:
            # The loops read one row after another: cheaper on each device than across them.
            x = lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
        lloyd: Callable[..., Refinement] = gram_space.lloyd
        distances_from: Callable[..., Array] = gram_space.distances_from
    else:
        x, lloyd = unit, partial(point_space.lloyd, nearest=nearest)
        by_differences = point_space.differences_from
        distances_from = by_differences if options.exact else point_space.distances_from

    def by_device(
        one_by_one: Callable[..., Any],
        in_rounds: Callable[..., Any],
        *arrays: Array,
        **limit: Array,
    ) -> Any:
        """Returns what the function gives that is faster where the program will run."""
        same = {"k": k, "distances": options.exact, **limit}
        cpu, other = partial(one_by_one, **same), partial(in_rounds, **same)
        if options.in_rounds is None:
            return lax.platform_dependent(*arrays, cpu=cpu, default=other)
        return (other if options.in_rounds else cpu)(*arrays)

    def start(key: Array) -> Array:
        if options.start == "ward":
            return by_device(gram_space.ward_start, gram_rounds.ward_start, x, unit_weights)
        if options.start == "k-means++":
            return plus_plus(partial(distances_from, x), unit_weights, k, key)
        if options.start == "random":
            chosen = unit[draw_distinct(unit_weights, k, key)]
        else:
            assert centroids is not None
            chosen = place(centroids.astype(unit.dtype) / scale)
        return nearest(unit, chosen)[0]

    def from_start(key: Array) -> tuple[Refinement, Array]:
        labels, moves = start(key), jnp.int32(0)
        refined = None
        if options.start != "ward" or options.refine == "lloyd":
            refined = lloyd(x, unit_weights, labels, k, max_iters, tol)
            labels = refined.labels
        if options.refine == "hartigan":
            functions = gram_space.hartigan, gram_rounds.hartigan
            moved = by_device(*functions, x, unit_weights, labels, max_rounds=max_iters)
            iterations = jnp.int32(0) if refined is None else refined.steps
            moves, refined = moved.steps, moved._replace(steps=iterations)
        assert refined is not None
        return refined, moves

    keys = jax.random.split(key, options.n_init)
    if options.n_init == 1:  # nothing to choose from: the objective is not computed
        refined, moves = from_start(keys[0])
    else:
        # A batch takes as long as its slowest start: worth it on accelerators, not on CPUs.
        batch = None if jax.default_backend() == "cpu" else options.n_init
        starts = lax.map(from_start, keys, batch_size=batch)
        best = jnp.argmin(starts[0].objective)
        refined, moves = jax.tree.map(lambda x: x[best], starts)
    labels = refined.labels
    if not options.positive:
        labels = lax.cond(
            (unit_weights > 0).all(),
            lambda labels: labels,
            # Points of weight zero have no part in the objective: they go to the nearest centroid.
            lambda labels: jnp.where(
                unit_weights > 0,
                labels,
                nearest(unit, point_space.means(unit, unit_weights, labels, k)[0])[0],
            ),
            labels,
        )
    labels = _numbered_by_first(labels, order, k)

    centroids, sizes, squares = _measured(points, weights, labels, k)
    _, _, squares_of_one = _measured(points, weights, jnp.zeros_like(labels), 1)
    inertia, total = ((weights / weights.max() * s).sum() for s in (squares, squares_of_one))
    # Times 0, so that points with NaN, which cannot be refused under jit, give NaN.
    fraction = jnp.where(total > 0, inertia / jnp.where(total > 0, total, 1), 0 * total)
    converged = refined.converged
    return KMeansResult(
        labels=jnp.zeros_like(labels).at[order].set(labels),
        centroids=centroids * scale,
        sizes=sizes,
        inertia=(squares * scale * weights * scale).sum(),
        inertia_fraction=fraction,
        iterations=refined.steps,
        moves=moves,
        converged=converged if options.exact else converged & ~_unclear(fraction),
    )


def _measured(x: Array, weights: Array, labels: Array, k: int) -> tuple[Array, Array, Array]:
    """Returns centroids, sums of weights, and the squared distances from points to centroids.

    Coordinates are taken from a member of each cluster, so that near points far from the origin
    lose nothing. Weights are taken relative to the largest of a cluster, so that no sum overflows
    or vanishes.
    """
    origin = x[jax.ops.segment_min(indices(len(x)), labels, k)]
    largest = jax.ops.segment_max(weights, labels, k)
    share = weights / largest[labels]
    mass = sum_by_label(share, labels, k)
    x = x - origin[labels]
    mean = sum_by_label(x * share[:, None], labels, k) / mass[:, None]
    return origin + mean, mass * largest, jnp.square(x - mean[labels]).sum(1)


def _scaled(x: Array) -> tuple[Array, Array]:
    """Returns points divided by a power of two, which rounds nothing, and that power.

    The largest coordinate is then 1 to 2.
    """
    _, exponent = jnp.frexp(jnp.abs(x).max())
    limits = jnp.finfo(x.dtype)
    scale = jnp.ldexp(jnp.ones((), x.dtype), (exponent - 1).clip(limits.minexp, limits.maxexp - 1))
    return x / scale, scale


def _canonical_order(x: Array) -> Array:
    """Returns an order of the points that does not depend on the given one: along a fixed line."""
    line = jax.random.normal(jax.random.key(0), x.shape[1:], x.dtype)
    # Row by row, without a matmul, so that a row's value does not depend on its place.
    return jnp.argsort((x * line[None]).sum(1)).astype(jnp.int32)


def _normalizer(x: Array, w: Array) -> Callable[[Array], Array]:
    """Returns a function that centers and scales points, x to a largest coordinate of 1."""

    def divisor(x: Array) -> Array:
        largest = jnp.abs(x).max()
        return jnp.where(largest > 0, largest, 1)

    first = divisor(x)
    mean = lax.platform_dependent(
        w / w.sum(), x / first, cpu=jnp.matmul, default=lambda w, x: (w[:, None] * x).sum(0)
    )
    second = divisor(x / first - mean[None])
    return lambda x: (x / first - mean[None]) / second


def _numbered_by_first(labels: Array, order: Array, k: int) -> Array:
    """Renumbers the clusters by their first members in the original order of the points."""
    first = jax.ops.segment_min(order, labels, k)
    rank = (first[None] < first[:, None]).sum(1, dtype=labels.dtype)
    return rank[labels]
