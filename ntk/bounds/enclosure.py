r"""Encloses the change of a kernel from sketches of each input's features: the data grade.

Every kernel of an MLP is a sum of inner products over hidden units, ``phi(x) . psi(z)``, times
known numbers. Fusing turns it into ``F(x) . Psi(z)`` over clusters (F and Psi are the fused MLP's
own features; for SGD phi = psi and F = Psi, for Adam psi and Psi are signs). With
B_c = sum_{i in c} phi_i / sqrt(n_c), likewise B' from psi, and q_i = phi_i - B_c / sqrt(n_c), what
is left of phi within its cluster,

    phi . psi - F . Psi  =  1/2 [(B - F) . (B' + Psi) + (B + F) . (B' - Psi)]  +  q . q'.     (1)

*Proof.* phi is B spread evenly over each cluster plus q, which are orthogonal, so that
phi . psi = B . B' + q . q'; and B . B' - F . Psi is the bracket, multiplied out.

For centroids that are means and smooth activations, B - F and q . q' are both of second order in
the distance of the rows from their centroids: the change has no first-order part (`ntk.apriori`).

Each of the three inner products in (1) is enclosed from numbers that are taken of each input alone:
its products with k fixed orthonormal directions E, and the norm of the rest. With a = E^T alpha,

    | alpha . beta - a . b |  <=  |alpha - E a| |beta - E b|.                                (2)

*Proof.* alpha . beta = a . b + (alpha - E a) . (beta - E b), as the rests are orthogonal to E;
Cauchy-Schwarz. The bound holds whatever E is; good directions make it tight.

So an input is seen through 2 (3 k + 3) numbers or so, and a pair of inputs never through an inner
product over units: for n inputs the cost is n forward passes and n^2 k, not n^2 p, operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntk.bounds.balls import gamma, norms
from ntk.bounds.features import Feature
from ntk.units import product


class Piece(NamedTuple):
    """Vectors of n inputs and bounds on the norms of their errors."""

    vector: Float[Array, "n k"]
    error: Float[Array, " n"]


class Pieces(NamedTuple):
    """A feature taken apart as in (1): B - F and B + F between clusters, q within."""

    change: Piece
    total: Piece
    within: Piece


class Directions(NamedTuple):
    """Orthonormal directions.

    Args:
        basis: (m, k).
        defect: How far ``basis.T @ basis`` is from the identity, at most, in the spectral norm.
    """

    basis: Float[Array, "m k"]
    defect: Float[Array, ""]


class Enclosure(NamedTuple):
    """An interval for each pair: the exact value is within ``radius`` of ``mid``."""

    mid: Float[Array, "n m"]
    radius: Float[Array, "n m"]


def take_apart(feature: Feature, labels: Int[Array, " p"], sizes: Float[Array, " c"]) -> Pieces:
    """The pieces of (1), with error bounds.

    A cluster's sum of at most p terms is off by gamma_p times its sum of absolute values, which is
    at most sqrt(n_c) times its norm.
    """
    phi, fused = feature.unit, feature.fused
    root = jnp.sqrt(sizes)[None]
    between = jax.ops.segment_sum(phi.T, labels, sizes.shape[0]).T / root
    within = phi - (between / root)[:, labels]
    eps = jnp.finfo(phi.dtype).eps
    size = norms(phi)
    rounding = gamma(phi.shape[1] + 8, phi.dtype) * size
    error = feature.unit_error + feature.fused_error + rounding + 2 * eps * norms(fused)
    return Pieces(
        Piece(between - fused, error),
        Piece(between + fused, error),
        Piece(within, feature.unit_error + 2 * rounding),
    )


def fit(pieces: list[Pieces], directions: int, rows: int = 256) -> tuple[Directions, Directions]:
    """Chooses directions between and within clusters: the principal ones of given pieces.

    In float64 on the host, so that they are orthonormal to the rounding of their dtype.

    Args:
        pieces: Of left and right features at some inputs.
        directions: How many, at most.
        rows: Inputs to use, evenly spaced.

    Returns:
        Directions for change and total, and for within.
    """

    def principal(parts: list[Array]) -> Directions:
        some = []
        for part in parts:
            a = np.asarray(part[:: max(1, part.shape[0] // rows)], np.float64)
            size = np.linalg.norm(a)
            # Each part counts alike: a bound is a product of one part's rest and another's.
            some.append(a / size if size > 0 else a)
        stack = np.concatenate(some)
        k = min(directions, stack.shape[1])
        _, vectors = np.linalg.eigh(stack @ stack.T)
        basis = np.linalg.qr(stack.T @ vectors[:, ::-1][:, :k])[0]
        rounded = jnp.asarray(basis, parts[0].dtype)
        exact = np.asarray(rounded, np.float64)
        defect = np.linalg.norm(exact.T @ exact - np.eye(exact.shape[1]))
        return Directions(rounded, jnp.asarray(defect * 1.01 + 1e-12, rounded.dtype))

    between = [piece.vector for p in pieces for piece in (p.change, p.total)]
    return principal(between), principal([p.within.vector for p in pieces])


def _enclose(left: Piece, right: Piece, directions: Directions) -> Enclosure:
    """(2) with rounding.

    The computed a is off by gamma sqrt(k) |alpha|, so that the rest is orthogonal to E only to
    within that and the defect of E; E a, the rest and the final products round again.
    """
    basis = directions.basis
    m, k = basis.shape
    a, b = (jnp.matmul(s.vector, basis, precision="highest") for s in (left, right))
    rest = [
        norms(s.vector - jnp.matmul(t, basis.T, precision="highest"))
        for s, t in ((left, a), (right, b))
    ]
    size, size2 = norms(left.vector), norms(right.vector)
    slack = (4 * math.sqrt(k) + 8) * gamma(m + k + 8, basis.dtype) + 4 * directions.defect
    noise = jnp.outer(left.error, size2 + right.error) + jnp.outer(size, right.error)
    radius = jnp.outer(rest[0], rest[1]) + noise + slack * jnp.outer(size, size2)
    return Enclosure(product(a, b), radius)


def enclose(left: Pieces, right: Pieces, directions: tuple[Directions, Directions]) -> Enclosure:
    """Encloses phi . psi - F . Psi by (1) and (2)."""
    between, within = directions
    parts = [
        (0.5, _enclose(left.change, right.total, between)),
        (0.5, _enclose(left.total, right.change, between)),
        (1.0, _enclose(left.within, right.within, within)),
    ]
    mid = sum((w * e.mid for w, e in parts[1:]), parts[0][0] * parts[0][1].mid)
    radius = sum((w * e.radius for w, e in parts[1:]), parts[0][0] * parts[0][1].radius)
    return Enclosure(mid, radius)
