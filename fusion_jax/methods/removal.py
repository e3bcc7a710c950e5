"""Removes hidden units one after the other, by Optimal Brain Surgeon.

Axis letters in shapes: p width, c units left, o outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusion_jax.methods.gram import inverse_of, level_of, product
from fusion_jax.nn.dtypes import wide

CANDIDATES = 128
"""Units among which these scores look for the next ones to remove, half of them at a time."""
_Small = tuple[Array, Array, Array]
"""(G + l I)^-1, output weights, and which units are left."""


class Removal(NamedTuple):
    """The units that go, one after the other.

    Args:
        units: (n,) the units, the first one to go first.
        costs: (n,) the loss of each removal, given those before it.
    """

    units: Int[Array, " n"]
    costs: Float[Array, " n"]


def units_left(removal: Removal, width: int) -> Int[Array, " c"]:
    """Returns the units that are not removed, in their order."""
    count = width - len(removal.units)
    return jnp.flatnonzero(jnp.ones(width, bool).at[removal.units].set(False), size=count)


def removal(
    down: Float[Array, "p o"], gram: Float[Array, "p p"], count: int, ridge: float
) -> Removal:
    """Returns the order in which Optimal Brain Surgeon removes units, and what each removal costs.

    It removes the unit whose loss ``|v_i|^2 / [(G + l I)^-1]_ii`` is smallest, changes the output
    weights of the others to make up for it, and repeats. Here the next units are looked for among
    the `CANDIDATES` that are cheapest now, and the matrices are updated for half as many at once.

    Args:
        down: Output weights.
        gram: G, the mean of h h^T.
        count: The number c of units to leave.
        ridge: The strength l, relative to the mean of G's diagonal.

    References:
        Hassibi and Stork (NIPS 1992).
    """
    return removed_in_order(wide(down), regular_inverse(gram, ridge), count)


def first_losses(inverse: Array, down: Array) -> Array:
    """Returns the loss of removing each unit first."""
    return jnp.square(down).sum(-1) / jnp.diagonal(inverse)


def removed_in_order(down: Array, inverse: Array, count: int) -> Removal:
    """Returns the order of removal, given (G + l I)^-1.

    What removals change in the inverse is kept as ``F^T F``, one row of F for each unit that went:
    only the diagonal and the rows of the next units are ever needed.
    """
    left = len(down) - count
    size = max(1, min(CANDIDATES // 2, left))
    groups, rest = divmod(left, size)
    state = _Removing(
        down=down,
        diagonal=jnp.diagonal(inverse),
        alive=jnp.ones(len(down), bool),
        removed=jnp.zeros((max(1, left), len(down)), inverse.dtype),
        number=jnp.int32(0),
    )
    state, found = lax.scan(lambda s, _: _without(inverse, s, size), state, None, length=groups)
    found = jax.tree.map(lambda x: x.reshape(-1), found)
    if rest:
        _, last = _without(inverse, state, rest)
        found = jax.tree.map(lambda *x: jnp.concatenate(x), found, last)
    return found


class _Removing(NamedTuple):
    """The state of `removed_in_order`."""

    down: Array
    diagonal: Array  # of the inverse
    alive: Array
    removed: Array  # F, filled from the top
    number: Array  # of rows of F


def _without(inverse: Array, s: _Removing, count: int) -> tuple[_Removing, Removal]:
    """Removes some units one at a time, and then changes the state for all of them at once."""
    losses = jnp.where(s.alive, jnp.square(s.down).sum(-1) / s.diagonal, jnp.inf)
    candidates = lax.top_k(-losses, min(2 * count, len(s.down)))[1]

    def remove(carry: _Small, _: None) -> tuple[_Small, tuple[Array, Array]]:
        small, weights, there = carry
        costs = jnp.where(there, first_losses(small, weights), jnp.inf)
        j = jnp.argmin(costs)
        share = small[:, j] / small[j, j]
        weights = weights - share[:, None] * weights[j][None]
        small = small - share[:, None] * small[j][None]
        return (small, weights, there.at[j].set(False)), (j, costs[j])

    changed = s.removed[:, candidates]
    small = inverse[candidates][:, candidates] - product(changed.T, changed)
    start = (small, s.down[candidates], s.alive[candidates])
    order, costs = lax.scan(remove, start, None, length=count)[1]
    gone = candidates[order]
    rows = inverse[gone] - product(s.removed[:, gone].T, s.removed)
    root = jnp.linalg.cholesky(rows[:, gone])
    both = jnp.concatenate([rows, s.down[gone]], axis=1)
    both = jax.scipy.linalg.solve_triangular(root, both, lower=True)
    rows, weights = both[:, : len(s.down)], both[:, len(s.down) :]
    least = jnp.finfo(rows.dtype).tiny  # of a unit that the others explain in all digits
    state = _Removing(
        down=s.down - product(rows.T, weights),
        diagonal=jnp.maximum(s.diagonal - jnp.square(rows).sum(0), least),
        alive=s.alive.at[gone].set(False),
        removed=lax.dynamic_update_slice(s.removed, rows, (s.number, jnp.int32(0))),
        number=s.number + count,
    )
    return state, Removal(gone, costs)


def regular_inverse(gram: Array, ridge: float) -> Array:
    """Returns ``(gram + l I)^-1`` with l = ridge times the mean of gram's diagonal."""
    return inverse_of(gram + level_of(gram, ridge) * jnp.eye(len(gram), dtype=gram.dtype))
