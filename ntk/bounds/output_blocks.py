"""Bounds on the change of the kernel's blocks over outputs: the norm of an (o, o) matrix per pair.

The block of SGD's kernel at a pair of inputs is ``(H . H' + 1) I + (x^ . z^) M^T M'`` with the rows
c_i v_i as M; Adam's has signs on the right. Identity (1) of `ntk.enclosure` holds with matrix
products M^T M' in place of inner products, and for each of its pieces

    |A^T B|_2 <= |A|_2 |B|_2,    |A^T B|_F <= |A A^T|_F^(1/2) |B B^T|_F^(1/2),

the second as |A^T B|_F^2 = <A A^T, B B^T> and Cauchy-Schwarz. So one norm is taken per input and
piece, p o^2 operations, where a measured block costs that per *pair* of inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ntk.bounds import a_priori as apriori
from ntk.bounds.balls import gamma, norms
from ntk.bounds.changes import Change, Grade, Sketch, fit_sketch, on_host, weighted
from ntk.bounds.enclosure import Enclosure, enclose, take_apart
from ntk.bounds.features import features, measured_error, scalars, unit_balls
from ntk.bounds.pairs import Pair, Side, prepared_pair
from ntk.errors import InputError, nearest
from ntk.mlp import Kind, finite, full_kernel, second
from ntk.units import MlpWeights

Norm = Literal["spectral", "frobenius"]


def block_change(
    pair: Pair,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    kind: Kind | str = "sgd",
    norm: Norm | str = "spectral",
    grade: Grade | str = "data",
    directions: int = 64,
) -> Change:
    """Bounds the norm of the change of each (o, o) block of `ntk.mlp.full_kernel`.

    What holds for the spectral norm of SGD's blocks holds for all upstream vectors at once: the
    kernel of ``G . f`` changes by no more than it times |G| |G'|.

    Args:
        pair: An MLP and its fused version.
        x: First inputs, (n, d).
        z: Second inputs, (m, d); None for the first.
        kind: ``"sgd"`` or ``"adam"``.
        norm: ``"spectral"`` or ``"frobenius"``.
        grade: ``"a priori"``, ``"data"`` or ``"measured"``, as in `ntk.bounds`.
        directions: As in `ntk.bounds.kernel_change`, for the term of the output weights.

    Returns:
        Bounds on the norms as ``radius``, with a ``mid`` of zero; for measured blocks their norms
        as ``mid``.

    Raises:
        InputError: Something does not fit together, or a value is not finite.
    """
    pair, left, right = prepared_pair(pair, x, z, None, None)
    second(kind)
    for name, value, known in (("norm", norm, Norm), ("grade", grade, Grade)):
        if value not in get_args(known):
            raise InputError(f"unknown {name} {value!r}{nearest(str(value), get_args(known))}")
    if grade == "measured":
        result = _measured(pair, left, right, str(kind), str(norm))
    else:
        if grade == "data":
            sketch = fit_sketch(pair, left.x, kind=kind, directions=directions)
            hidden = _hidden(pair, left, right, sketch, str(kind))
            sizes = [
                _data_sizes(pair, s, str(kind), str(norm), i) for i, s in ((0, left), (1, right))
            ]
            slopes = [apriori.product_bound(a, b) for a, b in zip(*sizes, strict=True)]
        else:
            hidden, slopes = _a_priori(pair, left, right, str(kind), str(norm))
        dtype = left.x.dtype
        root = np.sqrt(pair.original.down.shape[1]) if norm == "frobenius" else 1.0
        zero = jnp.zeros_like(hidden)
        terms = [Enclosure(zero, jnp.asarray(b, dtype)) for b in (hidden * root, *slopes)]
        result = weighted(terms, scalars(pair, left, right, str(kind), outputs=1), pair)
    return Change(mid=finite(result.mid), radius=finite(result.radius), grade=str(grade))


@partial(jax.jit, static_argnames="kind")
def _hidden(pair: Pair, left: Side, right: Side, sketch: Sketch, kind: str) -> Array:
    """Bounds on |H . H' - F . F'|, from both MLPs' hidden units."""
    parts = [
        take_apart(features(pair, side, kind, right=bool(i))[0], pair.labels, pair.sizes)
        for i, side in enumerate((left, right))
    ]
    enclosure = enclose(parts[0], parts[1], sketch[0])
    return jnp.abs(enclosure.mid) + enclosure.radius


def _data_sizes(pair: Pair, side: Side, kind: str, norm: str, right: int) -> list[apriori.Sizes]:
    return [
        apriori.Sizes(*(on_host(a) for a in parts))
        for parts in _piece_norms(pair, side, kind, norm, bool(right))
    ]


@partial(jax.jit, static_argnames=("kind", "norm", "right"))
def _piece_norms(
    pair: Pair, side: Side, kind: str, norm: str, right: bool
) -> list[tuple[Array, ...]]:
    """Norms, with their errors, of M, F, P M - F and Q M for each linear map, (n,) each."""
    signs = right and kind == "adam"
    root = jnp.sqrt(pair.sizes)
    scale = (root if right else 1 / root) if kind == "adam" else jnp.ones_like(root)

    def rows(mlp: MlpWeights) -> list[tuple[Array, Array]]:
        """Values of c_i and bounds on the norms of the errors of rows c_i v_i, in the other MLP."""
        _, *slopes = unit_balls(mlp, side, "none")
        slopes = [ball.signs()[0] for ball in slopes] if signs else slopes
        return [(ball.value, ball.error) for ball in slopes]

    v, w = (jnp.sign(m.down) if signs else m.down for m in (pair.original, pair.fused))
    result = []
    for (c, e), (f, g) in zip(rows(pair.original), rows(pair.fused), strict=True):

        def at(one: tuple[Array, ...]) -> tuple[Array, ...]:
            c, e, f, g = one
            m, fused = c[:, None] * v, (f * scale)[:, None] * w
            between = jax.ops.segment_sum(m, pair.labels, root.shape[0]) / root[:, None]
            within = m - (between / root[:, None])[pair.labels]
            error, error2 = norms(e * norms(v)), norms(g * scale * norms(w))
            size = jnp.linalg.norm(m)
            rounding = gamma(m.shape[0] + 16, m.dtype) * (size + jnp.linalg.norm(fused))
            total = error + error2 + 2 * rounding
            return tuple(_norm(a, norm) + total for a in (m, fused, between - fused, within))

        result.append(lax.map(at, (c, e, f, g)))
    return result


def _norm(a: Array, norm: str) -> Array:
    """The spectral norm, or |A A^T|_F^(1/2), rounded up: both from the smaller Gram matrix."""
    a = a if a.shape[0] < a.shape[1] else a.T
    gram = jnp.matmul(a, a.T, precision="highest")
    rounding = gamma(a.shape[1] + 8, a.dtype) * jnp.trace(gram)
    if norm == "frobenius":
        return jnp.sqrt(jnp.linalg.norm(gram) * (1 + gamma(gram.size, a.dtype)) + rounding)
    top = jnp.linalg.eigvalsh(gram)[-1]
    return jnp.sqrt(jnp.maximum(top, 0) * (1 + gamma(16 * a.shape[0], a.dtype)) + rounding)


def _a_priori(
    pair: Pair, left: Side, right: Side, kind: str, norm: str
) -> tuple[Array, list[np.ndarray]]:
    k = apriori.constants(pair)
    off = k.mismatch[kind]
    x, z = (on_host(norms(side.x)) for side in (left, right))
    balls = [unit_balls(pair.original, side, kind)[0] for side in (left, right)]
    spectral = [apriori.slope_sizes(k, r, "spectral") for r in (x, z)]
    frobenius = [apriori.slope_sizes(k, r, "frobenius") for r in (x, z)]
    firsts = spectral[0] if norm == "spectral" else frobenius[0]
    if kind == "sgd":
        a, b = (
            apriori.hidden_sizes(k, r, on_host(norms(ball.value) + norms(ball.error)))
            for r, ball in zip((x, z), balls, strict=True)
        )
        hidden = apriori.product_bound(a, b) + off[0] * np.outer(a.fused, b.fused)
        slopes = [
            apriori.product_bound(a, b) + w * np.outer(a.fused, b.fused)
            for a, b, w in zip(firsts, spectral[1], off[1:], strict=True)
        ]
    else:
        ones = np.ones_like(z)
        units = [on_host((jnp.abs(balls[0].value) + balls[0].error).sum(1))]
        units += [np.zeros_like(x)] * len(k.maps)
        h = apriori.absolute_sizes(k, x, units, 0.0)[0]
        hidden = np.outer(h.unit + (1 + off[0]) * h.fused, ones)
        slopes = [
            np.outer(a.unit * k.signs[0] + (1 + w) * a.fused * k.signs[1], ones)
            for a, w in zip(firsts, off[1:], strict=True)
        ]
    return jnp.asarray(hidden, left.x.dtype), slopes


def _measured(pair: Pair, left: Side, right: Side, kind: str, norm: str) -> Enclosure:
    order = 2 if norm == "spectral" else "fro"
    rows = []
    for i in range(left.x.shape[0]):
        one = left.x[i : i + 1]
        full = [full_kernel(mlp, one, right.x, kind=kind) for mlp in (pair.original, pair.fused)]
        rows.append(jnp.linalg.norm(full[0] - full[1], ord=order, axis=(2, 3)))
    return Enclosure(jnp.concatenate(rows), _measured_radius(pair, left, right, kind))


@partial(jax.jit, static_argnames="kind")
def _measured_radius(pair: Pair, left: Side, right: Side, kind: str) -> Array:
    """The error of a block's Frobenius norm.

    For SGD |M|_F is the traced kernel's |phi|; for Adam |M|_F |M'|_F <= sqrt(o) |phi| |psi|.
    """
    a, b = features(pair, left, kind, right=False), features(pair, right, kind, right=True)
    root = pair.original.down.shape[1] ** 0.5
    errors = [measured_error(f, g) for f, g in zip(a, b, strict=True)]
    terms = [Enclosure(jnp.zeros_like(e), e * root) for e in errors]
    return weighted(terms, scalars(pair, left, right, kind, outputs=1), pair).radius
