"""Cores of matrix product operators: from a matrix, and with smaller bonds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.mpo.layouts import Layout
from fusion_jax.nn.dtypes import wide


class Train(NamedTuple):
    """A matrix as a chain of cores.

    Args:
        cores: T_1 ... T_m, (b_{k-1}, i_k, j_k, b_k); every bond's singular values are half in the
            core before it and half in the one after it.
        spectra: The singular values of the matrix at each bond, before truncation.
        bound: sqrt(sum_k eps_k^2), eps_k^2 the sum of squares of the values cut off at bond k: what
            the Frobenius norm of the error is at most.
    """

    cores: tuple[Float[Array, "_ _ _ _"], ...]
    spectra: tuple[Float[Array, " _"], ...]
    bound: Float[Array, ""]


def decompose(matrix: Float[Array, "d o"], layout: Layout) -> Train:
    """Decomposes a matrix by singular value decompositions, one bond after the other.

    Exact at full bonds. At smaller ones, what is cut off at each bond is the least that can be,
    given what was cut off at those after it. For use under ``jit``: the bound on the error comes
    with the cores, and is for the caller to check (`excess`, `check_bound`).

    Args:
        matrix: The matrix.
        layout: The factors and bonds.

    Returns:
        The cores, in float32 or float64.

    References:
        MPOP (Liu et al., ACL 2021), section 3 and theorem 1 of the supplement, with the squares
        that its equation 3 leaves out.

    Example:
        >>> matrix = jnp.arange(24.0).reshape(4, 6)
        >>> train = decompose(matrix, Layout((2, 2), (2, 3), (4,)))
        >>> [core.shape for core in train.cores]
        [(1, 2, 2, 4), (4, 2, 3, 1)]
    """
    inputs, outputs, bonds = layout
    m = len(inputs)
    rest = _split(wide(matrix), layout)
    cores: list[Array] = []
    spectra: list[Array] = []
    before = 1
    for k in range(m - 1):
        inside = inputs[k] * outputs[k]
        if inside == 1 and k:
            # What is left is diag(values) V already, of which the left factor is the identity.
            cores.append(jnp.eye(before, dtype=rest.dtype).reshape(before, 1, 1, before))
            spectra.append(spectra[-1])
            continue
        left, values, right = signed_svd(rest.reshape(before * inside, -1))
        cores.append(left.reshape(before, inputs[k], outputs[k], -1))
        spectra.append(values)
        rest, before = values[:, None] * right, len(values)
    cores.append(rest.reshape(before, inputs[-1], outputs[-1], 1))
    return _cut(cores, spectra, bonds)


def _split(matrix: Array, layout: Layout) -> Array:
    """The matrix filled up with zeros, with axes i_1, j_1, ..., i_m, j_m."""
    inputs, outputs, _ = layout
    d, o = matrix.shape
    matrix = jnp.pad(matrix, ((0, math.prod(inputs) - d), (0, math.prod(outputs) - o)))
    m = len(inputs)
    order = [axis for k in range(m) for axis in (k, m + k)]
    return matrix.reshape(*inputs, *outputs).transpose(order)


def signed_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """An economical decomposition whose signs do not depend on the backend."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    largest = jnp.take_along_axis(left, jnp.abs(left).argmax(0)[None], axis=0)
    sign = jnp.where(largest < 0, -1, 1).astype(left.dtype)
    return left * sign, values, right * sign.T


def _truncated(cores: list[Array], bonds: Sequence[int]) -> tuple[list[Array], list[Array]]:
    """Cuts bonds from the last to the first, then makes the cores orthonormal from the left."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        b, i, j, c = cores[k].shape
        left, values, right = signed_svd(cores[k].reshape(b, i * j * c))
        keep = min(bonds[k - 1], len(values))
        cores[k] = right[:keep].reshape(keep, i, j, c)
        carried = left[:, :keep] * values[None, :keep]
        cores[k - 1] = jnp.tensordot(cores[k - 1], carried, 1, precision="highest")
    found = []
    for k in range(len(cores) - 1):
        b, i, j, c = cores[k].shape
        left, values, right = signed_svd(cores[k].reshape(b * i * j, c))
        cores[k] = left.reshape(b, i, j, -1)
        found.append(values)
        carried = values[:, None] * right
        cores[k + 1] = jnp.tensordot(carried, cores[k + 1], 1, precision="highest")
    return cores, found


def recompressed(cores: Sequence[Array], bonds: Sequence[int]) -> Train:
    """The cores of the nearest matrix with smaller bonds, found without making the matrix.

    Args:
        cores: T_1 ... T_m, in any gauge.
        bonds: The new bonds, none above the old.

    Returns:
        The cores, the spectra before truncation, and the bound on what truncation changes.

    Example:
        >>> layout = Layout((2, 3), (2, 2), (4,))
        >>> cores = decompose(jnp.arange(24.0).reshape(6, 4), layout).cores
        >>> recompressed(cores, (2,)).cores[0].shape
        (1, 2, 2, 2)
    """
    left = _left_orthonormal(cores)
    whole, spectra = _truncated(left, [core.shape[-1] for core in left[:-1]])
    return _cut(whole, spectra, bonds)


def spectra_of(cores: Sequence[Array]) -> list[Float[Array, " _"]]:
    """The singular values at each bond of the matrix that cores make, without making it.

    Args:
        cores: T_1 ... T_m, in any gauge.

    Returns:
        As in `Train`. At each bond they are those of a triangular matrix of the bond's size, what
        is left of the cores after it where those before it are orthonormal.

    Example:
        >>> cores = [jnp.ones((1, 2, 3, 4)), jnp.ones((4, 3, 2, 1))]
        >>> [values.shape for values in spectra_of(cores)]
        [(4,)]
    """
    left, found = _left_orthonormal(cores), []
    for k in range(len(left) - 1, 0, -1):
        r = jnp.linalg.qr(left[k].reshape(left[k].shape[0], -1).T, mode="r")
        found.append(jnp.linalg.svd(r, compute_uv=False))
        left[k - 1] = jnp.tensordot(left[k - 1], r.T, 1, precision="highest")
    return found[::-1]


def _left_orthonormal(cores: Sequence[Array]) -> list[Array]:
    left = [wide(core) for core in cores]
    for k in range(len(left) - 1):
        b, i, j, c = left[k].shape
        q, r = jnp.linalg.qr(left[k].reshape(b * i * j, c))
        left[k] = q.reshape(b, i, j, -1)
        left[k + 1] = jnp.tensordot(r, left[k + 1], 1, precision="highest")
    return left


def _cut(cores: list[Array], spectra: Sequence[Array], bonds: Sequence[int]) -> Train:
    """Cores whose bonds have these singular values, cut to bonds."""
    bound = jnp.zeros((), cores[0].dtype)
    for values, bond in zip(spectra, bonds, strict=True):
        bound += jnp.square(values[bond:]).sum()
    kept = spectra
    if any(b < len(s) for b, s in zip(bonds, spectra, strict=True)):
        cores, kept = _truncated(cores, bonds)
    return Train(_balanced_gauge(cores, kept), tuple(spectra), jnp.sqrt(bound))


def _balanced_gauge(cores: list[Array], spectra: Sequence[Array]) -> tuple[Array, ...]:
    """The same matrix with the square roots of a bond's values on both of its sides."""
    result = list(cores)
    for k, values in enumerate(spectra):
        # A value of 0 has zeros on its right, which nothing scales.
        safe = values > jnp.finfo(values.dtype).eps * values.max()
        root = jnp.sqrt(jnp.where(safe, values, 1))
        result[k] = result[k] * root[None, None, None]
        result[k + 1] = result[k + 1] / root[:, None, None, None]
    return tuple(result)


def entropies(spectra: Sequence[Float[Array, " _"]]) -> Float[Array, " _"]:
    """The entanglement entropy of each bond, in nats.

    Args:
        spectra: Its singular values, see `Train`.

    Returns:
        ``- sum_j v_j ln v_j`` with v the values divided by their sum; 0 if all are 0.

    References:
        MPOP (Liu et al., ACL 2021), section 3.2.

    Example:
        >>> bool(jnp.isclose(entropies([jnp.ones(8)])[0], math.log(8)))
        True
    """
    sums = [values.sum() for values in spectra]
    shares = [v / jnp.where(total > 0, total, 1) for v, total in zip(spectra, sums, strict=True)]
    return jnp.stack([-(v * jnp.log(jnp.where(v > 0, v, 1))).sum() for v in shares])
