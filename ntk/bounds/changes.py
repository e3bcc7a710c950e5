"""Certified bounds on what fusing an MLP does to its outputs and to its neural tangent kernels.

Three grades, by what a bound looks at:

- ``"a priori"``: norms of the weights, of the centroids and of the rows' distances to them; of an
  input only |x|, x . z, and norms of what the original computes there: of its gradients, which are
  the parts of its kernel at (x, x), and of its hidden units' values (`ntk.jensen`). The fused MLP
  is never run. `uniform_bound` sees no input at all and holds for every input of a given norm
  (`ntk.apriori` has the theorems).
- ``"data"``: each input alone is run through both MLPs and reduced to a sketch of a few hundred
  numbers; the change at a pair of inputs is enclosed from two sketches (`ntk.enclosure`).
- ``"measured"``: the change itself, from both kernels.

All are statements about the smaller MLP *as it is*: whatever its factors are, and whether or not
its rows are means of clusters. Where its kernel is near, data-grade bounds are small; those a
priori, if also its factors make its kernel the wide copy's (`ntk.apriori`).

All are certificates for the exact change, that of real numbers: their own rounding is part of them
(`ntk.balls`), a few percent of |phi| |psi| at worst in float32, so that small changes are better
certified in float64 (``jax_enable_x64``). A kernel that is measured has errors too; the grade
``"measured"`` says how large they can be.

Axis letters in shapes: p width, c clusters, d inputs, o outputs, n and m examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk.bounds import a_priori as apriori
from ntk.bounds.balls import gamma, norms
from ntk.bounds.enclosure import Directions, Enclosure, enclose, fit, take_apart
from ntk.bounds.features import Scalar, features, magnitude, measured_error, scalars, unit_balls
from ntk.bounds.jensen import wide_norms
from ntk.bounds.pairs import Pair, Side, prepared_pair
from ntk.bounds.pairs import pair as pair
from ntk.errors import InputError, nearest
from ntk.mlp import Kind, finite, second, traced_kernel, upstream_kernel
from ntk.units import MlpWeights, product

Grade = Literal["a priori", "data", "measured"]

_OUTWARD = 1 + 1e-6
"""What is computed in float64 on the host is rounded up by this, many times its rounding."""

Sketch = tuple[tuple[Directions, Directions], ...]
"""For each term of a kernel, the directions between and within clusters."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A certified interval for the change of each entry of a kernel, original less fused.

    Args:
        mid: Middle of the interval, (n, m); zero for a priori bounds.
        radius: Half its length, (n, m).
        grade: What the bound looked at.
    """

    mid: Float[Array, "n m"]
    radius: Float[Array, "n m"]
    grade: str

    @property
    def bound(self) -> Float[Array, "n m"]:
        """What the absolute change is at most."""
        return jnp.abs(self.mid) + self.radius

    @property
    def frobenius(self) -> float:
        """What the Frobenius norm of the change is at most."""
        return _OUTWARD * float(np.linalg.norm(on_host(self.bound)))

    @property
    def spectral(self) -> float:
        """What the spectral norm of the change is at most.

        |mid + e|_2 <= |mid|_2 + |e|_2 and |e|_2 <= |radius|_2 where |e| <= radius entrywise.
        """
        parts = (float(np.linalg.norm(on_host(x), 2)) for x in (self.mid, self.radius))
        return _OUTWARD * sum(parts)


def kernel_change(
    pair: Pair,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    gx: Array | None = None,
    gz: Array | None = None,
    kind: Kind | str = "sgd",
    grade: Grade | str = "data",
    directions: int = 64,
    sketch: Sketch | None = None,
    constants: apriori.Constants | None = None,
) -> Change:
    """Encloses the change of a scalar kernel at all pairs of inputs.

    Args:
        pair: An MLP and its fused version.
        x: First inputs, (n, d).
        z: Second inputs, (m, d); None for the first.
        gx: Upstream gradients at x, (n, o), for `ntk.mlp.upstream_kernel`; None for the kernel
            summed over outputs, `ntk.mlp.traced_kernel`.
        gz: Upstream gradients at z.
        kind: ``"sgd"`` or ``"adam"``.
        grade: ``"a priori"``, ``"data"`` or ``"measured"``.
        directions: The size of the sketches of the data grade. More are tighter; with as many as
            there are inputs the bound becomes the measurement.
        sketch: Directions from `fit_sketch`, for the data grade; None fits them to x.
        constants: From `ntk.apriori.constants`, for the a priori grade; None computes them.

    Returns:
        The interval for ``kernel(original) - kernel(fused)`` at each pair.

    Raises:
        InputError: Something does not fit together, or a value is not finite.

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
    pair, left, right = prepared_pair(pair, x, z, gx, gz)
    second(kind)
    for name, given, grade_of in (("sketch", sketch, "data"), ("constants", constants, "a priori")):
        if given is not None and grade != grade_of:
            raise InputError(f"{name} is for the grade {grade_of!r}, not {grade!r}")
    if grade == "data":
        if sketch is None:
            sketch = fit_sketch(pair, left.x, left.g, kind=kind, directions=directions)
        result = _data(pair, left, right, sketch, str(kind))
    elif grade == "measured":
        result = _measured(pair, left, right, str(kind))
    elif grade == "a priori":
        result = _a_priori(pair, left, right, str(kind), constants)
    else:
        raise InputError(f"unknown grade {grade!r}{nearest(str(grade), get_args(Grade))}")
    return Change(mid=finite(result.mid), radius=finite(result.radius), grade=str(grade))


def fit_sketch(
    pair: Pair,
    x: Float[Array, "n _"],
    gx: Array | None = None,
    *,
    kind: Kind | str = "sgd",
    directions: int = 64,
) -> Sketch:
    """Chooses the directions of the data grade: those in which features at some inputs are large.

    Any inputs will do for a valid bound; those alike the ones it is for make it tight.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d), of which up to 256 are used.
        gx: Upstream gradients, (n, o), or None.
        kind: ``"sgd"`` or ``"adam"``.
        directions: How many.

    Returns:
        The sketch, for `kernel_change` at any inputs.

    Raises:
        InputError: Something does not fit together.
    """
    if directions < 0:
        raise InputError(f"directions must be at least 0; got {directions}")
    some = slice(None, None, max(1, x.shape[0] // 256))
    pair, side, _ = prepared_pair(pair, x[some], None, None if gx is None else gx[some], None)
    second(kind)
    left = _pieces(pair, side, str(kind), False)
    right = left if kind == "sgd" else _pieces(pair, side, str(kind), True)
    both = zip(left, right, strict=True)
    return tuple(fit([a] if kind == "sgd" else [a, b], directions) for a, b in both)


@partial(jax.jit, static_argnames=("kind", "right"))
def _pieces(pair: Pair, side: Side, kind: str, right: bool) -> Any:
    return [take_apart(f, pair.labels, pair.sizes) for f in features(pair, side, kind, right=right)]


@partial(jax.jit, static_argnames="kind")
def _data(pair: Pair, left: Side, right: Side, sketch: Sketch, kind: str) -> Enclosure:
    a, b = features(pair, left, kind, right=False), features(pair, right, kind, right=True)
    sizes = pair.sizes
    terms = []
    for f, g, directions in zip(a, b, sketch, strict=True):
        e = enclose(
            take_apart(f, pair.labels, sizes), take_apart(g, pair.labels, sizes), directions
        )
        terms.append(Enclosure(e.mid, e.radius + measured_error(f, g)))
    return weighted(terms, scalars(pair, left, right, kind), pair)


@partial(jax.jit, static_argnames="kind")
def _measured(pair: Pair, left: Side, right: Side, kind: str) -> Enclosure:
    kernels = []
    for mlp in (pair.original, pair.fused):
        if left.g is None:
            kernels.append(traced_kernel(mlp, left.x, right.x, kind=kind))
        else:
            assert right.g is not None
            kernels.append(upstream_kernel(mlp, left.x, left.g, right.x, right.g, kind=kind))
    a, b = features(pair, left, kind, right=False), features(pair, right, kind, right=True)
    # Only the radius is wanted; the middle stands for what an error of a scalar multiplies.
    terms = [Enclosure(magnitude(f, g), measured_error(f, g)) for f, g in zip(a, b, strict=True)]
    radius = weighted(terms, scalars(pair, left, right, kind), pair).radius
    return Enclosure(kernels[0] - kernels[1], radius)


def weighted(terms: list[Enclosure], scalars: list[Scalar], pair: Pair) -> Enclosure:
    """The sum of terms times scalars. A scalar's error counts twice: in the kernels and here."""
    dtype = terms[0].mid.dtype
    one = int(pair.original.out_bias) * gamma(16, dtype)
    mid, radius = jnp.zeros_like(terms[0].mid), one * jnp.abs(scalars[0].value)
    for term, c in zip(terms, scalars, strict=True):
        mid = mid + c.value * term.mid
        size = jnp.abs(c.value) + 2 * c.error
        radius = radius + size * term.radius + 2 * c.error * jnp.abs(term.mid)
    # Norms are sums of p squares; the sums of terms round as well.
    radius = radius * (1 + gamma(4 * pair.original.width + 64, dtype))
    return Enclosure(mid, radius + gamma(8, dtype) * jnp.abs(mid))


def _a_priori(
    pair: Pair, left: Side, right: Side, kind: str, k: apriori.Constants | None
) -> Enclosure:
    k = apriori.constants(pair) if k is None else k
    dtype = left.x.dtype
    sizes = [_sizes(pair, k, left, kind)]
    # Of the right side of Adam's kernel only signs matter, which all have.
    sizes.append(sizes[0] if right is left or kind == "adam" else _sizes(pair, k, right, kind))
    off = k.mismatch[kind]
    mids = jnp.zeros((left.x.shape[0], right.x.shape[0]), dtype)
    terms = []
    for t, (a, b) in enumerate(zip(*sizes, strict=True)):
        if kind == "sgd":
            bound = apriori.product_bound(a, b) + off[t] * np.outer(a.fused, b.fused)
        else:
            bound = np.outer(a.unit + (1 + off[t]) * a.fused, np.ones(mids.shape[1]))
        terms.append(Enclosure(mids, jnp.asarray(bound, dtype)))
    return weighted(terms, scalars(pair, left, right, kind), pair)


def _sizes(pair: Pair, k: apriori.Constants, side: Side, kind: str) -> list[apriori.Sizes]:
    """Of each term at the inputs: Euclidean norms for SGD, sums of absolute values for Adam."""
    x, dtype = on_host(norms(side.x)), side.x.dtype
    out, sizes = None, apriori.wide_sizes(pair, kind)
    if side.g is not None:
        out, sizes = apriori.upstream_norms(pair, side.g)
    offsets = tuple(jnp.asarray(m.offset * _OUTWARD, dtype) for m in k.maps)
    at_most = jnp.asarray(sizes * _OUTWARD, dtype)
    wide = wide_norms(pair.original, side.x, offsets, at_most, power=2 if kind == "sgd" else 1)
    wide = [on_host(w) for w in wide]
    hidden, *slopes = units = [on_host(u) for u in _unit_sizes(pair.original, side, kind)]
    if kind == "adam":
        total = k.absolute[1] if side.g is None else sizes.sum(1)
        return apriori.absolute_sizes(k, x, units, total, wide)
    return [
        apriori.hidden_sizes(k, x, hidden, wide[0]),
        *apriori.slope_sizes(k, x, out, slopes, wide[1:]),
    ]


@partial(jax.jit, static_argnames="kind")
def _unit_sizes(mlp: MlpWeights, side: Side, kind: str) -> list[Array]:
    """The same of the original's features, with their errors."""
    balls = unit_balls(mlp, side, kind)
    if kind == "adam":
        return [(jnp.abs(b.value) + b.error).sum(1) for b in balls]
    return [norms(b.value) + norms(b.error) for b in balls]


def on_host(x: Array) -> np.ndarray:
    """The array in float64 on the host."""
    return np.asarray(x).astype(np.float64)


def output_change(
    pair: Pair,
    x: Float[Array, "n _"],
    *,
    grade: Grade | str = "data",
    constants: apriori.Constants | None = None,
) -> Float[Array, " n"]:
    """What the Euclidean norm of the change of the outputs is at most.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d).
        grade: ``"a priori"`` sees norms, |x| and the norm of the original's hidden units;
            ``"data"`` the norms of P H - F and of Q H, see (6) in `ntk.apriori`, and no output;
            ``"measured"`` the outputs.
        constants: From `ntk.apriori.constants`; None computes them.

    Returns:
        Bounds, (n,).

    Raises:
        InputError: Something does not fit together, or a value is not finite.
    """
    pair, side, _ = prepared_pair(pair, x, None, None, None)
    if grade not in get_args(Grade):
        raise InputError(f"unknown grade {grade!r}{nearest(str(grade), get_args(Grade))}")
    moved, change, within, unit, noise = _outputs(pair, side)
    if grade == "measured":
        return finite(moved)
    k = apriori.constants(pair) if constants is None else constants
    sizes = apriori.hidden_sizes(k, on_host(norms(side.x)), on_host(unit))
    if grade == "data":
        sizes = sizes._replace(change=on_host(change), within=on_host(within))
    return finite(jnp.asarray(apriori.output_bound(k, sizes), noise.dtype) + noise)


@jax.jit
def _outputs(pair: Pair, side: Side) -> tuple[Array, ...]:
    """The norms of the change of the outputs, of P H - F, Q H and H, and of rounding."""
    feature = features(pair, side, "sgd", right=False)[0]
    sizes = pair.sizes
    # The wide copy's hidden units, sqrt(n_c) times: the factors that are not in the activation are
    # its output weights'.
    factor = jnp.sqrt(sizes) / (1 if pair.fused.outer is None else pair.fused.outer)
    wide = feature._replace(
        fused=feature.fused * factor[None], fused_error=feature.fused_error * factor.max()
    )
    pieces = take_apart(wide, pair.labels, sizes)
    outputs, noise = [], jnp.zeros_like(feature.unit_error)
    for h, error, v in (
        (feature.unit, feature.unit_error, pair.original.down),
        (feature.fused, feature.fused_error, pair.fused.down),
    ):
        outputs.append(product(h, v.T))
        size = jnp.linalg.norm(v)
        noise = noise + (error + gamma(v.shape[0] + 16, v.dtype) * norms(h)) * size
    change, within = (norms(p.vector) + p.error for p in (pieces.change, pieces.within))
    unit = norms(feature.unit) + feature.unit_error
    return norms(outputs[0] - outputs[1]), change, within, unit, 2 * noise


def uniform_bound(
    pair: Pair | apriori.Constants, radius: float, *, kind: Kind | str = "sgd"
) -> float:
    """What the traced kernel changes at most at any two inputs no longer than a radius.

    Args:
        pair: An MLP and its fused version, or the constants of one.
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
    second(kind)
    if not radius >= 0:
        raise InputError(f"radius must be at least 0; got {radius}")
    k = pair if isinstance(pair, apriori.Constants) else apriori.constants(pair)
    return apriori.uniform(k, radius, str(kind))
