"""Bounds on the change of an MLP's kernels by fusing, of all three grades.

Axis letters in shapes: p width, c clusters, d inputs, o outputs, n and m examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk.arrays import host_float64, host_norms, require_finite
from ntk.bounds import a_priori
from ntk.bounds.balls import OUTWARD, Enclosure, gamma, tiny
from ntk.bounds.enclosure import (
    Directions,
    SplitFeature,
    enclose,
    principal_directions,
    split_feature,
)
from ntk.bounds.features import (
    Feature,
    kernel_features,
    kernel_scalars,
    magnitude,
    measured_error,
)
from ntk.bounds.norms import WeightNorms, weight_norms
from ntk.bounds.pairs import Inputs, Pair, prepare_pair
from ntk.bounds.stand_ins import StandIns, stand_ins
from ntk.errors import InputError, check_choice
from ntk.kinds import KernelKind
from ntk.mlp import traced_kernel, upstream_kernel

Grade = Literal["a priori", "data", "measured"]

Sketch = tuple[tuple[Directions, Directions], ...]
"""For each term of a kernel, the directions between and within clusters."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A certified interval for the change of each entry of a kernel, original minus fused.

    Args:
        mid: Middle of the interval, (n, m); zero for a priori bounds.
        radius: Half its length, (n, m).
        grade: The grade of the bound.
    """

    mid: Float[Array, "n m"]
    radius: Float[Array, "n m"]
    grade: Grade

    @property
    def bound(self) -> Float[Array, "n m"]:
        """Bounds on the absolute changes."""
        return jnp.abs(self.mid) + self.radius

    @property
    def frobenius(self) -> float:
        """A bound on the Frobenius norm of the change."""
        return OUTWARD * float(host_norms(host_float64(self.bound)))

    @property
    def spectral(self) -> float:
        """A bound on the spectral norm of the change.

        |mid + e|_2 <= |mid|_2 + |e|_2 and |e|_2 <= |radius|_2 where |e| <= radius entrywise.
        """
        parts = (float(np.linalg.norm(host_float64(x), 2)) for x in (self.mid, self.radius))
        return OUTWARD * sum(parts)


def kernel_change(
    pair: Pair,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    gx: Array | None = None,
    gz: Array | None = None,
    kind: KernelKind = "sgd",
    grade: Grade = "data",
    directions: int = 128,
    sketch: Sketch | None = None,
) -> Change:
    """Returns intervals for the change of a scalar kernel at all pairs of inputs.

    Args:
        pair: An MLP and its fused version.
        x: First inputs, (n, d).
        z: Second inputs, (m, d); None for the first.
        gx: Upstream gradients at x, (n, o), for `ntk.mlp.upstream_kernel`; None for the kernel
            summed over outputs, `ntk.mlp.traced_kernel`.
        gz: Upstream gradients at z.
        kind: ``"sgd"`` or ``"adam"``.
        grade: ``"a priori"``, ``"data"`` or ``"measured"``; see `ntk.bounds`.
        directions: The size of the sketches of the data grade. More directions give tighter bounds;
            with as many as there are inputs, the bound becomes the measurement.
        sketch: Directions from `fit_sketch`, for the data grade; None fits them to x.

    Returns:
        The interval of ``kernel(original) - kernel(fused)`` at each pair.

    Raises:
        InputError: The arguments do not fit together, or a value is not finite.

    Example:
        >>> key = jax.random.key(0)
        >>> from ntk.mlp import MlpWeights
        >>> up, down = jax.random.normal(key, (2, 6, 3))
        >>> mlp = MlpWeights(up=up, down=down, act="gelu")
        >>> halves = {"up": (up[:3] + up[3:]) / 2, "down": (down[:3] + down[3:]) / 2}
        >>> root = jnp.full(3, 2**0.5)
        >>> fused = MlpWeights(
        ...     **{k: v * root[:, None] for k, v in halves.items()},
        ...     outer=root, inner=1 / root, act="gelu")
        >>> both = Pair(mlp, fused, jnp.array([0, 1, 2, 0, 1, 2]))
        >>> x = jax.random.normal(key, (5, 3))
        >>> measured, data, prior = (
        ...     kernel_change(both, x, grade=g).bound for g in ("measured", "data", "a priori"))
        >>> bool((measured <= data).all()), bool((measured <= prior).all())
        (True, True)
    """
    pair, left, right = prepare_pair(pair, x, z, gx, gz)
    check_choice("kind", kind, KernelKind)
    check_choice("grade", grade, Grade)
    if sketch is not None and grade != "data":
        raise InputError(f"sketch is for the grade 'data', not {grade!r}")
    if grade == "data":
        if sketch is None:
            sketch = fit_sketch(pair, left.x, left.g, kind=kind, directions=directions)
        result = _data(pair, left, right, sketch, kind)
    elif grade == "measured":
        result = _measured(pair, left, right, kind)
    else:
        result = _a_priori(pair, left, right, kind)
    mid, radius = (require_finite(a) for a in result)
    return Change(mid=mid, radius=radius, grade=grade)


def fit_sketch(
    pair: Pair,
    x: Float[Array, "n _"],
    gx: Array | None = None,
    *,
    kind: KernelKind = "sgd",
    directions: int = 128,
) -> Sketch:
    """Returns the directions of the data grade in which features at some inputs are large.

    A bound is valid with the directions of any inputs; inputs that are similar to those of the
    bound make it tight.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d), of which up to 256 are used.
        gx: Upstream gradients, (n, o), or None.
        kind: ``"sgd"`` or ``"adam"``.
        directions: The number of directions.

    Returns:
        The sketch, for `kernel_change` at any inputs.

    Raises:
        InputError: The arguments do not fit together.
    """
    if directions < 0:
        raise InputError(f"directions must be at least 0; got {directions}")
    check_choice("kind", kind, KernelKind)
    some = slice(None, None, max(1, x.shape[0] // 256))
    pair, inputs, _ = prepare_pair(pair, x[some], gx=None if gx is None else gx[some])
    left = _split(kernel_features(pair, inputs, kind), pair)
    if kind == "sgd":
        return tuple(principal_directions([a], directions) for a in left)
    right = _split(kernel_features(pair, inputs, kind, right=True), pair)
    both = zip(left, right, strict=True)
    return tuple(principal_directions([a, b], directions) for a, b in both)


@jax.jit
def _split(features: list[Feature], pair: Pair) -> list[SplitFeature]:
    return [split_feature(f, pair.labels, pair.sizes) for f in features]


def _both_features(
    pair: Pair,
    left: Inputs,
    right: Inputs,
    kind: KernelKind,
    instead: tuple[StandIns, ...] | None = None,
) -> tuple[list[Feature], list[Feature]]:
    """Returns the left and the right features."""
    a = kernel_features(pair, left, kind, instead=instead)
    return a, a if kind == "sgd" and right is left else kernel_features(
        pair, right, kind, right=True, instead=instead
    )


def _data(pair: Pair, left: Inputs, right: Inputs, sketch: Sketch, kind: KernelKind) -> Enclosure:
    both = _both_features(pair, left, right, kind)
    split = _split(both[0], pair), _split(both[1], pair)
    return _enclosed(pair, left, right, both, split, sketch, kind)


@partial(jax.jit, static_argnames="kind")
def _enclosed(
    pair: Pair,
    left: Inputs,
    right: Inputs,
    features: tuple[list[Feature], list[Feature]],
    split: tuple[list[SplitFeature], list[SplitFeature]],
    sketch: Sketch,
    kind: KernelKind,
) -> Enclosure:
    errors = [measured_error(f, g) for f, g in zip(*features, strict=True)]
    parts = [enclose(*all_of) for all_of in zip(*split, sketch, strict=True)]
    terms = [Enclosure(e.mid, e.radius + more) for e, more in zip(parts, errors, strict=True)]
    return _weighted(terms, kernel_scalars(pair, left, right, kind), pair)


def _measured(pair: Pair, left: Inputs, right: Inputs, kind: KernelKind) -> Enclosure:
    return _compared(pair, left, right, _both_features(pair, left, right, kind), kind)


@partial(jax.jit, static_argnames="kind")
def _compared(
    pair: Pair,
    left: Inputs,
    right: Inputs,
    features: tuple[list[Feature], list[Feature]],
    kind: KernelKind,
) -> Enclosure:
    kernels = []
    for mlp in (pair.original, pair.fused):
        if left.g is None:
            kernels.append(traced_kernel(mlp, left.x, right.x, kind=kind))
        else:
            assert right.g is not None
            kernels.append(upstream_kernel(mlp, left.x, left.g, right.x, right.g, kind=kind))
    # Only the radius is used; the middle is what the error of a scalar multiplies.
    pairs = zip(*features, strict=True)
    terms = [Enclosure(magnitude(f, g), measured_error(f, g)) for f, g in pairs]
    radius = _weighted(terms, kernel_scalars(pair, left, right, kind), pair).radius
    return Enclosure(kernels[0] - kernels[1], radius)


def _weighted(terms: list[Enclosure], scalars: list[Enclosure], pair: Pair) -> Enclosure:
    """Returns the sum of terms times scalars.

    The error of a scalar is counted twice: for the kernels, and for this sum.
    """
    dtype = terms[0].mid.dtype
    one, least = int(pair.original.out_bias) * gamma(16, dtype), tiny(dtype)
    mid, radius = jnp.zeros_like(terms[0].mid), one * jnp.abs(scalars[0].mid)
    for term, c in zip(terms, scalars, strict=True):
        mid = mid + c.mid * term.mid
        size = jnp.abs(c.mid) + 2 * c.radius
        radius = radius + size * (term.radius + least) + 2 * c.radius * jnp.abs(term.mid)
    # Norms are sums of p squares; the sums of terms are rounded as well.
    radius = radius * (1 + gamma(4 * pair.original.width + 64, dtype))
    return Enclosure(mid, radius + gamma(8, dtype) * jnp.abs(mid) + 16 * least)


def _a_priori(pair: Pair, left: Inputs, right: Inputs, kind: KernelKind) -> Enclosure:
    both = _both_features(pair, left, right, kind, stand_ins(pair))
    split = _split(both[0], pair), _split(both[1], pair)
    return _bounded(pair, left, right, both, split, kind)


@partial(jax.jit, static_argnames="kind")
def _bounded(
    pair: Pair,
    left: Inputs,
    right: Inputs,
    features: tuple[list[Feature], list[Feature]],
    split: tuple[list[SplitFeature], list[SplitFeature]],
    kind: KernelKind,
) -> Enclosure:
    terms = []
    for a, b, f, g in zip(*split, *features, strict=True):
        enclosed = enclose(a, b)  # its middle is zero
        most = jnp.minimum(enclosed.radius, magnitude(f, g))
        terms.append(enclosed._replace(radius=most + measured_error(f, g)))
    return _weighted(terms, kernel_scalars(pair, left, right, kind), pair)


def uniform_bound(pair: Pair | WeightNorms, radius: float, *, kind: KernelKind = "sgd") -> float:
    """Returns a bound on the change of the traced kernel at any two inputs up to a radius.

    Args:
        pair: An MLP and its fused version, or their norms from `weight_norms`.
        radius: The largest |x|.
        kind: ``"sgd"`` or ``"adam"``.

    Returns:
        A bound on every entry of the change of the exact kernel.

    Raises:
        InputError: The parts of the pair do not fit together, or the radius is negative.

    Example:
        >>> from ntk.mlp import MlpWeights
        >>> mlp = MlpWeights(up=jnp.ones((2, 3)), down=jnp.ones((2, 1)), act="gelu")
        >>> fused = MlpWeights(
        ...     up=jnp.ones((1, 3)), down=jnp.ones((1, 1)), outer=jnp.full(1, 2.0), act="gelu")
        >>> bool(uniform_bound(Pair(mlp, fused, jnp.zeros(2, int)), 10.0, kind="adam") > 0)
        True
    """
    check_choice("kind", kind, KernelKind)
    if not radius >= 0:
        raise InputError(f"radius must be at least 0; got {radius}")
    norms = pair if isinstance(pair, WeightNorms) else weight_norms(pair)
    return a_priori.traced_kernel_bound(norms, radius, kind)
