"""Inner products of per-example gradients that are given as factors, X^T D, or in full.

Axis letters: n, m examples; r outputs that stay; s outputs that are summed over; e, t, a, b as in
`ntk.engines.structure`. Each function adds to a ``total``, so that one kernel is accumulated over
many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

KernelArray = Float[Array, "n r m r"]

_einsum = partial(jnp.einsum, precision="highest")

_ROW_BLOCKS = 16
"""Blocks of rows of a symmetric product, of whose two halves one is computed."""
_FEWEST_ROWS = 64
"""Rows in a block from which on a matrix product is fast."""


class GradientFactors(NamedTuple):
    """Gradients X^T D of one parameter, for a block of examples and all outputs.

    Args:
        inputs: Inputs X (n, e, t, a); for look-ups row numbers (n, t), which stand for one-hot X.
        cotangents: D (n, r, s, e, t, b).
    """

    inputs: Shaped[Array, "n ..."]
    cotangents: Float[Array, "n r s e t b"]


@dataclass(frozen=True)
class Contraction:
    """How to contract gradients that are given as factors.

    Args:
        sign: Whether the second gradient is replaced by its sign.
        grams: Whether to multiply Gram matrices of positions instead of forming gradients.
        table_rows: For look-ups, the number of rows of the table, beyond which row numbers are
            ignored; None for products.
        piece_bytes: Bytes of one intermediate result.
    """

    sign: bool
    grams: bool
    table_rows: int | None
    piece_bytes: int


@partial(jax.jit, static_argnums=0)
def add_full(
    sign: bool, total: KernelArray, first: Array, second: Array | None = None
) -> KernelArray:
    """Returns a total plus the inner products of gradients that are given in full.

    Args:
        sign: Whether the second gradient is replaced by its sign.
        total: What the products are added to, (n, r, m, r).
        first: The first gradients, (n, r, ...).
        second: The second gradients, (m, r, ...); None if they are the first.

    Example:
        >>> g = jnp.array([[[1.0, -2.0]]])
        >>> add_full(True, jnp.zeros((1, 1, 1, 1)), g).ravel().tolist()
        [3.0]
    """
    first = first.reshape(*first.shape[:2], math.prod(first.shape[2:]))
    if second is None and not sign:
        return total + _products_of_pairs(first)
    second = first if second is None else second.reshape(*second.shape[:2], first.shape[2])
    return total + _einsum("irk,jqk->irjq", first, jnp.sign(second) if sign else second)


def _products_of_pairs(x: Float[Array, "n r k"]) -> KernelArray:
    """Returns the inner products of all pairs of rows, each of which is computed once."""
    n, r, k = x.shape
    rows = x.reshape(n * r, k)
    size = -(-n * r // _ROW_BLOCKS)
    if size < _FEWEST_ROWS:
        return _einsum("irk,jqk->irjq", x, x)
    found = jnp.zeros((n * r, n * r), x.dtype)
    for i in range(0, n * r, size):
        part = jnp.matmul(rows[i : i + size], rows[i:].T, precision="highest")
        found = found.at[i : i + size, i:].set(part)
        found = found.at[i + size :, i : i + size].set(part[:, size:].T)
    return found.reshape(n, r, n, r)


@partial(jax.jit, static_argnums=0)
def add_factored(
    how: Contraction,
    total: KernelArray,
    first: GradientFactors,
    second: GradientFactors | None = None,
) -> KernelArray:
    """Returns a total plus the inner products of gradients that are given as factors.

    Args:
        how: How to contract them.
        total: What the products are added to, (n, r, m, r).
        first: The first gradients.
        second: The second gradients; None if they are the first.

    Example:
        >>> ones = GradientFactors(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 1, 1, 2, 4)))
        >>> for grams in (False, True):  # the gradient is (3, 4), with all entries 2
        ...     how = Contraction(sign=False, grams=grams, table_rows=None, piece_bytes=1024)
        ...     print(add_factored(how, jnp.zeros((1, 1, 1, 1)), ones).ravel())
        [48.]
        [48.]
    """
    contract = _by_grams if how.grams else _by_forming

    def add_expert(k: Array, total: KernelArray) -> KernelArray:
        other = None if second is None else _expert(second, k)
        return contract(how, total, _expert(first, k), other)

    return lax.fori_loop(0, first.cotangents.shape[3], add_expert, total)


def _expert(factors: GradientFactors, k: Array) -> GradientFactors:
    inputs, cotangents = factors
    if inputs.ndim == 4:
        inputs = lax.dynamic_index_in_dim(inputs, k, 1, keepdims=False)
    return GradientFactors(inputs, lax.dynamic_index_in_dim(cotangents, k, 3, keepdims=False))


def _by_grams(
    how: Contraction, total: KernelArray, first: GradientFactors, second: GradientFactors | None
) -> KernelArray:
    """Sums <X X'^T, D D'^T> over tiles of pairs of positions."""
    same = second is None
    second = first if second is None else second
    t = first.cotangents.shape[3]
    # With the same examples on both sides a tile below the diagonal mirrors one above, so that
    # several tiles save up to half of the work.
    room = math.isqrt(how.piece_bytes // (total.size * total.dtype.itemsize))
    width = _largest_divisor(t, min(room, t // 4) if same else room)
    tiles = [(i, j) for i in range(t // width) for j in range(i if same else 0, t // width)]
    rows, columns = (jnp.array(side) * width for side in zip(*tiles, strict=True))

    def add_tile(k: Array, total: KernelArray) -> KernelArray:
        x1, d1 = _positions(first, rows[k], width)
        x2, d2 = _positions(second, columns[k], width)
        if how.table_rows is None:
            inner = _einsum("nta,mua->ntmu", x1, x2)
        else:
            x1, x2 = x1[:, :, None, None], x2[None, None]
            inner = ((x1 == x2) & (x1 < how.table_rows)).astype(total.dtype)
        if same and t == 1:  # both sides are the same positions
            pairs = _products_of_pairs(d1.reshape(*d1.shape[:2], math.prod(d1.shape[2:])))
            return total + inner[:, :, :, 0][:, :, :, None] * pairs
        part = (inner[:, None, :, :, None] * _einsum("nrstb,mqsub->nrtmqu", d1, d2)).sum((2, 5))
        if same:
            mirrored = jnp.where(rows[k] < columns[k], 1, 0).astype(total.dtype)
            part = part + mirrored * part.transpose(2, 3, 0, 1)
        return total + part

    return lax.fori_loop(0, len(tiles), add_tile, total)


def _positions(factors: GradientFactors, start: Array, width: int) -> GradientFactors:
    return GradientFactors(
        lax.dynamic_slice_in_dim(factors.inputs, start, width, 1),
        lax.dynamic_slice_in_dim(factors.cotangents, start, width, 3),
    )


def _largest_divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of n up to a limit, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))


def _by_forming(
    how: Contraction, total: KernelArray, first: GradientFactors, second: GradientFactors | None
) -> KernelArray:
    """Forms the gradients in slices and multiplies them."""
    sides = [first] if second is None else [first, second]
    inputs = [_like_cotangents(side.inputs) for side in sides]
    cotangents = [side.cotangents for side in sides]
    # Slices of the longer side, so that the rows of a slice are short and many.
    if how.table_rows is None and cotangents[0].shape[-1] > inputs[0].shape[-1]:
        inputs, cotangents = cotangents, inputs
    number = math.prod(first.cotangents.shape[1:3]) * cotangents[0].shape[-1]
    largest = max(side.cotangents.shape[0] for side in sides)
    width = max(1, how.piece_bytes // (largest * number * total.dtype.itemsize))
    if how.table_rows is None:
        count, take = _column_slices(inputs, width)
    else:
        ids = [side.inputs for side in sides]
        count, take = _row_slices(ids, how.table_rows, width, total.dtype)

    def formed(side: int, k: Array) -> Float[Array, "n r sab"]:
        x, d = take(side, k), cotangents[side]
        # Only one of the two has axes of outputs. With both batched over them, the result comes in
        # the order that is needed.
        batch = sides[side].cotangents.shape[:3]
        x, d = (jnp.broadcast_to(y, (*batch, *y.shape[3:])) for y in (x, d))
        g = jnp.matmul(x.swapaxes(-1, -2), d, precision="highest")
        return g.reshape(*g.shape[:2], -1)

    def add_slice(k: Array, total: KernelArray) -> KernelArray:
        left = formed(0, k)
        right = left if second is None else formed(1, k)
        return add_full(how.sign, total, left, right)

    return lax.fori_loop(0, count, add_slice, total)


def _like_cotangents(x: Array) -> Array:
    return x[:, None, None]


TakeSlice = Callable[[int, Array], Float[Array, " n #r #s t w"]]
"""A function of a side, 0 or 1, and k that returns the k-th slice of that side."""


def _column_slices(xs: list[Array], width: int) -> tuple[int, TakeSlice]:
    """Returns the number of slices of the last axis, and a function that takes one."""
    size = xs[0].shape[-1]
    width = min(width, size)
    padded = [jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -size % width))) for x in xs]

    def take(side: int, k: Array) -> Array:
        return lax.dynamic_slice_in_dim(padded[side], k * width, width, -1)

    return -(-size // width), take


def _row_slices(
    ids: list[Array], table_rows: int, width: int, dtype: np.dtype
) -> tuple[Array, TakeSlice]:
    """Returns slices of one-hot inputs (n, t, a), of only those rows that an example looks up."""
    every = jnp.concatenate([x.ravel() for x in ids])
    size = min(every.size, table_rows + 1)
    width = min(width, size)
    rows = jnp.unique(every, size=size, fill_value=table_rows)
    count = (rows < table_rows).sum(dtype=jnp.int32)
    rows = jnp.pad(rows, (0, -size % width), constant_values=table_rows)

    def take(side: int, k: Array) -> Array:
        some = lax.dynamic_slice_in_dim(rows, k * width, width)
        hit = (ids[side][:, :, None] == some[None, None]) & (some < table_rows)[None, None]
        return _like_cotangents(hit.astype(dtype))

    return -(-count // width), take
