"""Decomposes matrices into cores, and reduces the bonds of cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.mpo.layouts import Layout
from fusion_jax.nn.dtypes import wide


class TensorTrain(NamedTuple):
    """A matrix as a chain of cores.

    Args:
        cores: T_1 ... T_m of shape (b_{k-1}, i_k, j_k, b_k). The square roots of a bond's singular
            values are in the core before it and in the core after it.
        spectra: The singular values of the matrix at each bond, before truncation.
        bound: An upper bound of the Frobenius norm of the error: sqrt(sum_k eps_k^2), where eps_k^2
            is the sum of the squared singular values cut off at bond k.
    """

    cores: tuple[Float[Array, "_ _ _ _"], ...]
    spectra: tuple[Float[Array, " _"], ...]
    bound: Float[Array, ""]


def decompose(matrix: Float[Array, "d o"], layout: Layout) -> TensorTrain:
    """Decomposes a matrix, in float32 or float64, by singular value decompositions bond by bond.

    The result is exact at full bonds. At smaller bonds, the cut at each bond is optimal, given the
    cuts at the bonds after it. The function works under ``jit``; the caller checks the bound on the
    error that it returns (`excess`, `check_bound`).

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
            # The rest is already diag(values) V, whose left factor is the identity.
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
    """Returns the matrix, padded with zeros, with axes i_1, j_1, ..., i_m, j_m."""
    inputs, outputs, _ = layout
    d, o = matrix.shape
    matrix = jnp.pad(matrix, ((0, math.prod(inputs) - d), (0, math.prod(outputs) - o)))
    m = len(inputs)
    order = [axis for k in range(m) for axis in (k, m + k)]
    return matrix.reshape(*inputs, *outputs).transpose(order)


def signed_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Returns a reduced singular value decomposition with the same signs on every backend."""
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


def recompressed(cores: Sequence[Array], bonds: Sequence[int]) -> TensorTrain:
    """Reduces the bonds of cores without computing their matrix.

    Args:
        cores: T_1 ... T_m, in any gauge.
        bonds: The new bonds, none above the old one.

    Returns:
        The new cores, the spectra before truncation, and a bound of the change.

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
    """Returns the singular values at each bond of a matrix, from its cores alone.

    With orthonormal cores before a bond, they are the singular values of a triangular matrix of the
    bond's size, the QR factor of the cores after it.

    Args:
        cores: T_1 ... T_m, in any gauge.

    Returns:
        For each bond the values in descending order; see `TensorTrain`.

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


def _cut(cores: list[Array], spectra: Sequence[Array], bonds: Sequence[int]) -> TensorTrain:
    """Returns cores with smaller bonds; ``spectra`` are the singular values of the given cores."""
    bound = jnp.zeros((), cores[0].dtype)
    for values, bond in zip(spectra, bonds, strict=True):
        bound += jnp.square(values[bond:]).sum()
    kept = spectra
    if any(b < len(s) for b, s in zip(bonds, spectra, strict=True)):
        cores, kept = _truncated(cores, bonds)
    return TensorTrain(_balanced_gauge(cores, kept), tuple(spectra), jnp.sqrt(bound))


def _balanced_gauge(cores: list[Array], spectra: Sequence[Array]) -> tuple[Array, ...]:
    """Moves the square root of each bond's singular values into the core before the bond."""
    result = list(cores)
    for k, values in enumerate(spectra):
        # After a singular value of 0 the next core is 0, which cannot be scaled.
        safe = values > jnp.finfo(values.dtype).eps * values.max()
        root = jnp.sqrt(jnp.where(safe, values, 1))
        result[k] = result[k] * root[None, None, None]
        result[k + 1] = result[k + 1] / root[:, None, None, None]
    return tuple(result)


def entropies(spectra: Sequence[Float[Array, " _"]]) -> Float[Array, " _"]:
    """Returns the entanglement entropy of each bond, in nats.

    Args:
        spectra: The singular values of each bond; see `TensorTrain`.

    Returns:
        ``- sum_j v_j ln v_j`` with v the singular values divided by their sum; 0 if all are 0.

    References:
        MPOP (Liu et al., ACL 2021), section 3.2.

    Example:
        >>> bool(jnp.isclose(entropies([jnp.ones(8)])[0], math.log(8)))
        True
    """
    sums = [values.sum() for values in spectra]
    shares = [v / jnp.where(total > 0, total, 1) for v, total in zip(spectra, sums, strict=True)]
    return jnp.stack([-(v * jnp.log(jnp.where(v > 0, v, 1))).sum() for v in shares])
