"""Checks decompositions against the bound on their error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.mpo.cores import TensorTrain
from fusion_jax.mpo.products import contract
from fusion_jax.nn.dtypes import wide


def excess(matrix: Float[Array, "d o"], train: TensorTrain) -> Float[Array, ""]:
    """Returns by how much the error of a decomposition exceeds its bound; works under ``jit``.

    Returns:
        The excess of the error's Frobenius norm over 1.001 times the bound, divided by the norm of
        the matrix. It is 0 up to rounding; see `check_bound`.

    Example:
        >>> from fusion_jax.mpo import Layout, decompose
        >>> matrix = jnp.arange(24.0).reshape(6, 4) ** 2
        >>> train = decompose(matrix, Layout((2, 3), (2, 2), (1,)))
        >>> wrong = train._replace(bound=jnp.zeros(()))
        >>> float(excess(matrix, train)), float(excess(matrix, wrong)) > 0.05
        (0.0, True)
    """
    matrix = wide(matrix)
    d, o = matrix.shape
    norm, error = (jnp.linalg.norm(x) for x in (matrix, contract(train.cores, (d, o)) - matrix))
    return jnp.maximum(error - 1.001 * train.bound, 0) / jnp.where(norm > 0, norm, 1)


def check_bound(found: Float[Array, "*s"]) -> None:
    """Raises `ArithmeticError` if an `excess` is larger than rounding errors, or NaN."""
    if not (found <= 1e-5).all():
        largest = jax.device_get(found).max()
        raise ArithmeticError(
            f"the error of a decomposition is above its bound, by {largest:.2g} times the norm of "
            "its matrix"
        )
