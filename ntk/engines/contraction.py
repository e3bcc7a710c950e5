"""Inner products of per-example gradients that are given as factors, X^T D, or in full.

Axis letters: n, m examples; r outputs that stay; s outputs that are summed over; e, t, a, b as in
`structure`. A sum starts from ``total``, so that one kernel is accumulated over many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

Kernel = Float[Array, "n r m r"]

_einsum = partial(jnp.einsum, precision="highest")


class Factors(NamedTuple):
    """Gradients X^T D of one parameter, for a block of examples and all outputs.

    Args:
        inputs: Inputs X (n, e, t, a); or (n, t) numbers of rows, where one-hot X are meant.
        cotangents: D (n, r, s, e, t, b).
    """

    inputs: Shaped[Array, "n ..."]
    cotangents: Float[Array, "n r s e t b"]


@dataclass(frozen=True)
class How:
    """What is computed, and in what pieces.

    Args:
        sign: Whether the second gradient is replaced by its sign.
        grams: Whether to multiply products of positions, instead of forming gradients.
        height: The rows of a table, beyond which numbers of rows are ignored; None for products.
        piece: Bytes of one intermediate result.
    """

    sign: bool
    grams: bool
    height: int | None
    piece: int


@partial(jax.jit, static_argnums=0)
def add_full(sign: bool, total: Kernel, one: Array, two: Array) -> Kernel:
    """Adds inner products of gradients in full.

    Args:
        sign: Whether the second gradient is replaced by its sign.
        total: What they are added to, (n, r, m, r).
        one: The first gradients, (n, r, ...).
        two: The second, (m, r, ...).

    Returns:
        The sum, (n, r, m, r).

    Example:
        >>> g = jnp.array([[[1.0, -2.0]]])
        >>> add_full(True, jnp.zeros((1, 1, 1, 1)), g, g).ravel().tolist()
        [3.0]
    """
    two = jnp.sign(two) if sign else two
    one, two = (g.reshape(*g.shape[:2], math.prod(g.shape[2:])) for g in (one, two))
    return total + _einsum("irk,jqk->irjq", one, two)


@partial(jax.jit, static_argnums=0)
def add_factored(how: How, total: Kernel, one: Factors, two: Factors | None = None) -> Kernel:
    """Adds inner products of gradients that are given as factors.

    Args:
        how: What to compute.
        total: What they are added to, (n, r, m, r).
        one: The first gradients.
        two: The second; None if they are the first.

    Returns:
        The sum, (n, r, m, r).

    Example:
        >>> one = Factors(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 1, 1, 2, 4)))  # all 2, (3, 4)
        >>> for grams in (False, True):
        ...     how = How(sign=False, grams=grams, height=None, piece=1024)
        ...     print(add_factored(how, jnp.zeros((1, 1, 1, 1)), one).ravel())
        [48.]
        [48.]
    """
    contract = _by_grams if how.grams else _by_forming

    def expert(k: Any, total: Kernel) -> Kernel:
        other = None if two is None else _expert(two, k)
        return contract(how, total, _expert(one, k), other)

    return lax.fori_loop(0, one.cotangents.shape[3], expert, total)


def _expert(factors: Factors, k: Any) -> Factors:
    inputs, cotangents = factors
    if inputs.ndim == 4:
        inputs = lax.dynamic_index_in_dim(inputs, k, 1, keepdims=False)
    return Factors(inputs, lax.dynamic_index_in_dim(cotangents, k, 3, keepdims=False))


def _by_grams(how: How, total: Kernel, one: Factors, two: Factors | None) -> Kernel:
    """Sums <X X'^T, D D'^T> over tiles of pairs of positions."""
    same = two is None
    two = one if two is None else two
    t = one.cotangents.shape[3]
    # With the same examples on both sides a tile below the diagonal mirrors one above, so that
    # several tiles save up to half of the work.
    room = math.isqrt(how.piece // (total.size * total.dtype.itemsize))
    width = _divisor(t, min(room, t // 4) if same else room)
    tiles = [(i, j) for i in range(t // width) for j in range(i if same else 0, t // width)]
    firsts, seconds = (jnp.array(side) * width for side in zip(*tiles, strict=True))

    def add(k: Array, total: Kernel) -> Kernel:
        x1, d1 = _positions(one, firsts[k], width)
        x2, d2 = _positions(two, seconds[k], width)
        if how.height is None:
            inner = _einsum("nta,mua->ntmu", x1, x2)
        else:
            x1, x2 = x1[:, :, None, None], x2[None, None]
            inner = ((x1 == x2) & (x1 < how.height)).astype(total.dtype)
        part = (inner[:, None, :, :, None] * _einsum("nrstb,mqsub->nrtmqu", d1, d2)).sum((2, 5))
        if same:
            mirrored = jnp.where(firsts[k] < seconds[k], 1, 0).astype(total.dtype)
            part = part + mirrored * part.transpose(2, 3, 0, 1)
        return total + part

    return lax.fori_loop(0, len(tiles), add, total)


def _positions(factors: Factors, start: Array, width: int) -> Factors:
    return Factors(
        lax.dynamic_slice_in_dim(factors.inputs, start, width, 1),
        lax.dynamic_slice_in_dim(factors.cotangents, start, width, 3),
    )


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to a number; at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, most))


def _by_forming(how: How, total: Kernel, one: Factors, two: Factors | None) -> Kernel:
    """Forms the gradients in slices and multiplies them."""
    sides = [one] if two is None else [one, two]
    inputs = [_like_cotangents(side.inputs) for side in sides]
    cotangents = [side.cotangents for side in sides]
    # Slices of the longer side, so that the rows of a slice are short and many.
    if how.height is None and cotangents[0].shape[-1] > inputs[0].shape[-1]:
        inputs, cotangents = cotangents, inputs
    number = math.prod(one.cotangents.shape[1:3]) * cotangents[0].shape[-1]
    largest = max(side.cotangents.shape[0] for side in sides)
    width = max(1, how.piece // (largest * number * total.dtype.itemsize))
    if how.height is None:
        steps, take = _columns(inputs, width)
    else:
        steps, take = _looked_up([side.inputs for side in sides], how.height, width, total.dtype)

    def formed(side: int, k: Array) -> Float[Array, "n r sab"]:
        x, d = take(side, k), cotangents[side]
        # Both batched over outputs, though only one of them has any: it leaves the result in the
        # order in which it is needed.
        batch = sides[side].cotangents.shape[:3]
        x, d = (jnp.broadcast_to(y, (*batch, *y.shape[3:])) for y in (x, d))
        g = jnp.matmul(x.swapaxes(-1, -2), d, precision="highest")
        return g.reshape(*g.shape[:2], -1)

    def add(k: Array, total: Kernel) -> Kernel:
        first = formed(0, k)
        second = first if two is None else formed(1, k)
        return add_full(how.sign, total, first, second)

    return lax.fori_loop(0, steps, add, total)


def _like_cotangents(x: Array) -> Array:
    return x[:, None, None]


Take = Callable[[int, Array], Float[Array, " n #r #s t w"]]


def _columns(xs: list[Array], width: int) -> tuple[int, Take]:
    """Slices of the last axis: how many, and a function that takes the k-th of a side."""
    size = xs[0].shape[-1]
    width = min(width, size)
    padded = [jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -size % width))) for x in xs]

    def take(side: int, k: Array) -> Array:
        return lax.dynamic_slice_in_dim(padded[side], k * width, width, -1)

    return -(-size // width), take


def _looked_up(ids: list[Array], height: int, width: int, dtype: Any) -> tuple[Array, Take]:
    """Slices of one-hot inputs (n, t, a), of only those rows that an example looks up."""
    every = jnp.concatenate([x.ravel() for x in ids])
    size = min(every.size, height + 1)
    width = min(width, size)
    rows = jnp.unique(every, size=size, fill_value=height)
    count = (rows < height).sum(dtype=jnp.int32)
    rows = jnp.pad(rows, (0, -size % width), constant_values=height)

    def take(side: int, k: Array) -> Array:
        some = lax.dynamic_slice_in_dim(rows, k * width, width)
        hit = (ids[side][:, :, None] == some[None, None]) & (some < height)[None, None]
        return _like_cotangents(hit.astype(dtype))

    return -(-count // width), take
