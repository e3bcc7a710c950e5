"""Gram matrices of hidden values, summed over blocks of positions, and their inverses.

Axis letters in shapes: p width, t positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

BLOCK = 1024
"""The number of positions whose activations are in memory at a time."""
GRAM_BLOCKS = 8
LAPACK_SIZE = 1024
"""The largest matrix that is inverted without dividing it into blocks."""
product = partial(jnp.matmul, precision="highest")
"""A product of matrices in all digits of its dtype."""


def in_blocks(x: Shaped[Array, "t ..."]) -> Shaped[Array, "b n ..."]:
    """Returns an array of positions in blocks of at most `BLOCK`, the last padded with zeros."""
    size = min(BLOCK, len(x))
    blocks = -(-len(x) // size)
    x = jnp.pad(x, [(0, blocks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return x.reshape(blocks, size, *x.shape[1:])


def sum_over_blocks(f: Callable[..., PyTree], *arrays: Array) -> PyTree:
    """Returns the sum of f over blocks of positions; the last block is padded with zero rows."""
    parts = jax.tree.map(in_blocks, arrays)
    first = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda p: f(*jax.tree.map(lambda x: x[0], p)), parts),
    )
    step = lambda total, block: (jax.tree.map(jnp.add, total, f(*block)), None)  # noqa: E731
    return lax.scan(step, first, parts)[0]


def gram_of(x: Float[Array, "t p"]) -> Float[Array, "p p"]:
    """Returns ``x^T x``; of its two equal halves one is computed, block by block."""
    return mirrored(upper_gram(x))


def upper_gram(x: Float[Array, "t p"]) -> Float[Array, "p p"]:
    """Returns a matrix whose upper triangle is that of ``x^T x``; see `mirrored`."""
    width = x.shape[1]
    size = -(-width // GRAM_BLOCKS)
    if width < GRAM_BLOCKS * 128:
        return product(x.T, x)
    rows = [
        jnp.pad(product(x[:, i : i + size].T, x[:, i:]), ((0, 0), (i, 0)))
        for i in range(0, width, size)
    ]
    return jnp.concatenate(rows)


def mirrored(upper: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Returns the symmetric matrix with the upper triangle of a given one."""
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def level_of(gram: Array, ridge: float | Float[Array, ""]) -> Array:
    """Returns ridge times the mean of a Gram matrix's diagonal, or 1 if that is 0."""
    level = ridge * jnp.trace(gram) / gram.shape[0]
    return jnp.where(level > 0, level, 1)


def inverse_of(positive: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Returns the inverse of a positive definite matrix.

    On CPUs large ones are divided into blocks, so that nearly all operations are those of products
    of matrices: LAPACK's own take four times as long, and far longer beside other work.
    """
    identity = jnp.eye(len(positive), dtype=positive.dtype)
    solved = partial(jax.scipy.linalg.solve, b=identity, assume_a="pos")
    if len(positive) <= LAPACK_SIZE:
        return solved(positive)
    return lax.platform_dependent(positive, cpu=_inverse_by_blocks, default=solved)


def _inverse_by_blocks(positive: Array) -> Array:
    root = _inverse_root(positive)
    width = len(positive)
    size = -(-width // GRAM_BLOCKS)
    # The upper triangle of root^T root; the rows of root above its diagonal blocks are zeros.
    columns = [
        jnp.pad(
            product(root[i:, : i + size].T, root[i:, i : i + size]),
            ((0, max(0, width - i - size)), (0, 0)),
        )
        for i in range(0, width, size)
    ]
    return mirrored(jnp.concatenate(columns, axis=1))


def _inverse_root(positive: Array) -> Array:
    """Returns the inverse of the lower Cholesky factor."""
    if len(positive) <= LAPACK_SIZE:
        root, identity = jnp.linalg.cholesky(positive), jnp.eye(len(positive), dtype=positive.dtype)
        return jax.scipy.linalg.solve_triangular(root, identity, lower=True)
    half = len(positive) // 2
    first = _inverse_root(positive[:half, :half])
    below = product(positive[half:, :half], first.T)
    last = _inverse_root(positive[half:, half:] - product(below, below.T))
    corner = -product(last, product(below, first))
    return jnp.block([[first, jnp.zeros((half, len(last)), first.dtype)], [corner, last]])
