r"""Encloses the change of a kernel from sketches of each input's features: the data grade.

Every kernel of an MLP is a sum of inner products over hidden units, ``phi(x) . psi(z)``, times
known numbers. Fusing replaces it by ``F(x) . Psi(z)`` over clusters, where F and Psi are the fused
MLP's own features. For SGD phi = psi and F = Psi; for Adam psi and Psi are signs. Let
B_c = sum_{i in c} phi_i / sqrt(n_c), and let q_i = phi_i - B_c / sqrt(n_c) be the rest of phi
within its cluster; B' and q' are the same for psi. Then

    phi . psi - F . Psi  =  1/2 [(B - F) . (B' + Psi) + (B + F) . (B' - Psi)]  +  q . q'.     (1)

*Proof.* phi is the sum of B, spread evenly over each cluster, and q. The two are orthogonal, so
that phi . psi = B . B' + q . q'. And B . B' - F . Psi is half the bracket, multiplied out.

For centroids that are means and smooth activations, B - F and q . q' are both of second order in
the distance of the rows from their centroids: the change has no first-order part (see
`ntk.bounds.a_priori`).

Each of the three inner products in (1) is enclosed from numbers that are computed for each input
alone: its products with k fixed orthonormal directions E, and the norm of the rest. With
a = E^T alpha and b = E^T beta,

    | alpha . beta - a . b |  <=  |alpha - E a| |beta - E b|.                                (2)

*Proof.* alpha . beta = a . b + (alpha - E a) . (beta - E b), as the rests are orthogonal to E; the
rest is Cauchy-Schwarz. The bound holds for every E; good directions make it tight.

So each input is reduced to about 2 (3 k + 3) numbers, and no inner product over units is computed
for a pair of inputs: n inputs cost n forward passes and n^2 k operations instead of n^2 p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntk.arrays import host_norms, inner_products, require_finite, row_norms
from ntk.bounds.balls import Enclosure, gamma, tiny
from ntk.bounds.features import Feature


class UncertainVectors(NamedTuple):
    """Vectors of n inputs, and bounds on the norms of their errors."""

    vector: Float[Array, "n k"]
    error: Float[Array, " n"]


class SplitFeature(NamedTuple):
    """A feature split as in (1): B - F and B + F between clusters, q within clusters."""

    change: UncertainVectors
    total: UncertainVectors
    within: UncertainVectors


class Directions(NamedTuple):
    """Orthonormal directions.

    Args:
        basis: (m, k).
        defect: A bound on the spectral norm of ``basis.T @ basis`` minus the identity.
    """

    basis: Float[Array, "m k"]
    defect: Float[Array, ""]


def split_feature(
    feature: Feature, labels: Int[Array, " p"], sizes: Float[Array, " c"]
) -> SplitFeature:
    """Returns the parts of (1), with error bounds.

    A cluster's sum of at most p terms is off by gamma_p times its sum of absolute values, which is
    at most sqrt(n_c) times its norm.
    """
    phi, fused = feature.unit, feature.fused
    root = jnp.sqrt(sizes)[None]
    between = jax.ops.segment_sum(phi.T, labels, sizes.shape[0]).T / root
    within = phi - (between / root)[:, labels]
    eps = jnp.finfo(phi.dtype).eps
    size = row_norms(phi)
    rounding = gamma(phi.shape[1] + 8, phi.dtype) * size
    lost = 8 * phi.shape[1] * tiny(phi.dtype)  # of sums, quotients and these norms
    rounding = rounding + lost
    error = feature.unit_error + feature.fused_error + rounding + 2 * eps * row_norms(fused)
    return SplitFeature(
        UncertainVectors(between - fused, error),
        UncertainVectors(between + fused, error),
        UncertainVectors(within, feature.unit_error + 2 * rounding),
    )


def principal_directions(
    features: list[SplitFeature], count: int, rows: int = 256
) -> tuple[Directions, Directions]:
    """Returns the principal directions of features between and within clusters.

    They are computed in float64 on the host, so that they are orthonormal up to the rounding of
    their dtype.

    Args:
        features: Left and right features at some inputs.
        count: The largest number of directions.
        rows: The number of inputs to use, evenly spaced.

    Returns:
        Directions for ``change`` and ``total``, and for ``within``.

    Raises:
        InputError: A feature is not finite.
    """

    def principal(parts: list[Array]) -> Directions:
        some = []
        for part in parts:
            a = np.asarray(require_finite(part)[:: max(1, part.shape[0] // rows)], np.float64)
            size = host_norms(a)
            # All parts have the same weight: a bound is a product of the rests of two parts.
            some.append(a / size if size > 0 else a)
        stack = np.concatenate(some)
        k = min(count, stack.shape[1])
        _, vectors = np.linalg.eigh(stack @ stack.T)
        basis = np.linalg.qr(stack.T @ vectors[:, ::-1][:, :k])[0]
        rounded = jnp.asarray(basis, parts[0].dtype)
        exact = np.asarray(rounded, np.float64)
        defect = np.linalg.norm(exact.T @ exact - np.eye(exact.shape[1]))
        return Directions(rounded, jnp.asarray(defect * 1.01 + 1e-12, rounded.dtype))

    between = [part.vector for f in features for part in (f.change, f.total)]
    return principal(between), principal([f.within.vector for f in features])


def _enclose(
    left: UncertainVectors, right: UncertainVectors, directions: Directions | None
) -> Enclosure:
    """Encloses alpha . beta by (2) with rounding.

    The computed a is off by gamma sqrt(k) |alpha|, so that the rest is orthogonal to E only up to
    that and the defect of E. E a, the rest and the final products are rounded as well.
    """
    if directions is None:
        none = jnp.zeros((left.vector.shape[1], 0), left.vector.dtype)
        directions = Directions(none, jnp.zeros((), none.dtype))
    basis = directions.basis
    m, k = basis.shape
    a, b = (jnp.matmul(s.vector, basis, precision="highest") for s in (left, right))
    rest = [
        row_norms(s.vector - jnp.matmul(t, basis.T, precision="highest"))
        for s, t in ((left, a), (right, b))
    ]
    size, size2 = row_norms(left.vector), row_norms(right.vector)
    # What is lost below `tiny` in m k products, for each side.
    lost = 8 * m * (k + 1) * tiny(basis.dtype)
    slack = (4 * math.sqrt(k) + 8) * gamma(m + k + 8, basis.dtype) + 4 * directions.defect
    noise = jnp.outer(left.error, size2 + right.error) + jnp.outer(size, right.error)
    radius = jnp.outer(rest[0], rest[1]) + noise + slack * jnp.outer(size, size2)
    radius = radius + lost * (1 + size[:, None] + size2[None])
    return Enclosure(inner_products(a, b), radius)


def enclose(
    left: SplitFeature,
    right: SplitFeature,
    directions: tuple[Directions, Directions] | None = None,
) -> Enclosure:
    """Encloses phi . psi - F . Psi by (1) and (2); without directions, by norms alone."""
    between, within = directions or (None, None)
    parts = [
        (0.5, _enclose(left.change, right.total, between)),
        (0.5, _enclose(left.total, right.change, between)),
        (1.0, _enclose(left.within, right.within, within)),
    ]
    mid = sum((w * e.mid for w, e in parts[1:]), parts[0][0] * parts[0][1].mid)
    radius = sum((w * e.radius for w, e in parts[1:]), parts[0][0] * parts[0][1].radius)
    return Enclosure(mid, radius)
