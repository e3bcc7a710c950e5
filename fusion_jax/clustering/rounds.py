"""Ward's start and Hartigan's moves in few steps, each of many operations: for accelerators.

`clustering.gram` merges two clusters, and moves one point, after another. That is the least work,
and best on a CPU; a GPU takes some 30 microseconds for each such step, whatever its size. Here one
round merges all pairs of clusters that are each other's nearest, or moves up to 128 points. A round
reads n^2 numbers once (Ward) or k n numbers (Hartigan), in some tens of kernels.

Rounds of merges and of moves, k = n / 4 (`python -m benchmarks.kmeans --case rounds`): 40 and 23
for n = 3,072 points with the spectrum of real weights; 191 and 64 without structure and with heavy
tails, where a few points near the mean are nearest to all others and merge one by one; for 11,008
of these 595 and 111. The chain takes 3 n steps, and up to 128 in each round of moves.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from fusion_jax.clustering.gram import (
    Gram,
    Statistics,
    cut,
    distance_error,
    move_costs,
    objective,
    removal_gain,
    statistics,
)
from fusion_jax.clustering.labels import ClusterLabels, Refinement, Weights, indices

BLOCK = 128
"""The largest number of merges, and of moves, in a round."""


class Merges(NamedTuple):
    """Ward's merges; a cluster is numbered by the first of its points.

    Args:
        into: (n,) the cluster that each cluster became part of, or its own number.
        heights: (n,) the costs of these merges; infinite where there was none.
        rounds: The number of rounds.
    """

    into: Int[Array, " n"]
    heights: Float[Array, " n"]
    rounds: Int[Array, ""]


def ward_start(gram: Gram, weights: Weights, k: int, *, distances: bool = False) -> ClusterLabels:
    """Returns what `gram.ward_start` returns, up to the order of equal costs."""
    merges = ward_merges(gram, weights, k, distances=distances)
    return cut(merges.into, indices(gram.shape[0]), merges.heights, k)


def ward_merges(gram: Gram, weights: Weights, k: int, *, distances: bool = False) -> Merges:
    """Merges all pairs of clusters that are each other's nearest, down to the cut at k clusters.

    A merge makes no other pair cheaper than the cheaper one of the pairs that it replaces
    (reducibility), so that such pairs may merge in any order, and later merges are not cheaper
    than the cheapest pair that is left: the loop ends when n - k merges are as cheap as that.

    Args:
        gram: The Gram matrix.
        weights: The weights.
        k: The number of clusters.
        distances: Whether ``gram`` is minus half the squared distances.

    Returns:
        The merges, among them the n - k cheapest.

    References:
        Murtagh, A survey of recent advances in hierarchical clustering (1983), for the algorithm
        by reciprocal nearest neighbors.
    """
    n, dtype = gram.shape[0], gram.dtype
    points, tiny = indices(n), jnp.finfo(gram.dtype).tiny
    block = min(BLOCK, n)

    def round_(s: _Round) -> _Round:
        alive = s.into == points
        square = jnp.diagonal(s.inner) / jnp.maximum(s.mass**2, tiny)
        square = square if distances else jnp.maximum(square, 0)
        # m m' / (m + m') |mean - mean'|^2, with means' squares q = Q / m^2 and products t / (m m').
        both = s.mass[:, None] + s.mass[None]
        cost = s.mass[:, None] * s.mass[None] * (square[:, None] + square[None]) - 2 * s.inner
        # Of the loop's state, or XLA would compute and keep n^2 numbers before the loop.
        number = jnp.where(alive, points, n)
        pairs = alive[:, None] & alive[None] & (number[:, None] != number[None])
        cost = jnp.where(pairs, cost / jnp.maximum(both, tiny), jnp.inf)
        # Among equal costs, i ^ j decides: equal points, which all have the same cost, then merge
        # two by two. By the smallest index, all would have the first point as nearest.
        least, key = first_least(cost, number[:, None] ^ number[None], 1)
        nearest = jnp.minimum(points ^ key, n - 1)

        lowest, at = first_least(least, points, 0)
        # The cheapest pair merges, whatever rounding does to the costs in its two rows.
        nearest = nearest.at[nearest[at]].set(at)
        enough = (s.heights <= lowest).sum() >= n - k
        running = s.running & ~enough & (s.rounds < n)  # n rounds are enough unless there are NaN
        keeps = running & alive & (nearest[nearest] == points) & (points < nearest)
        a, kept = best(least, keeps, block)
        lost = (nearest[nearest] == points) & kept[nearest] & (nearest < points)

        at_a = jnp.minimum(a, n - 1)
        at_b = nearest[at_a]
        rows = s.inner[at_a] + s.inner[at_b]
        # Both orders of a pair get the same bits, or near duplicates would be no pairs.
        crossed = s.inner[at_a[:, None], at_b[None]]
        among = s.inner[at_a[:, None], at_a[None]] + s.inner[at_b[:, None], at_b[None]]
        among += crossed + crossed.T
        once = {"mode": "drop", "unique_indices": True}
        rows = rows.at[indices(block)[:, None], a[None]].set(among, **once)
        # All that is read leads to what is written, so that XLA need not copy the matrix.
        inner = s.inner.at[a].set(rows, **once)
        inner = inner.at[points[:, None], a[None]].set(rows.T, **once)
        return _Round(
            inner=inner,
            mass=s.mass + jnp.where(kept, s.mass[nearest], 0),
            into=jnp.where(lost, nearest, s.into),
            heights=jnp.where(lost, least, s.heights),
            rounds=s.rounds + running.astype(jnp.int32),
            running=running,
        )

    inner = weights[:, None] * gram * weights[None]
    start = _Round(
        inner=(inner + inner.T) / 2,
        mass=weights,
        into=points,
        heights=jnp.full(n, jnp.inf, dtype),
        rounds=jnp.int32(0),
        running=jnp.array(n > k),
    )
    end = lax.while_loop(lambda s: any_of(s.running), round_, start)
    return Merges(end.into, end.heights, end.rounds)


class _Round(NamedTuple):
    """The state of `ward_merges`."""

    inner: Array  # (n, n) sums of weighted inner products between clusters
    mass: Array
    into: Array
    heights: Array
    rounds: Array
    running: Array


def hartigan(
    gram: Gram,
    weights: Weights,
    labels: ClusterLabels,
    k: int,
    max_rounds: Int[Array, ""],
    *,
    distances: bool = False,
) -> Refinement:
    """Moves single points as `gram.hartigan` does; the points of a round move together.

    A round takes the points with the best gains, each with the cluster that it gains most in, in
    the order of their gains. What each gains after all moves before it is computed for all at once;
    those that then gain nothing are left out, and the moves up to the first that gains nothing
    after those before it are made. So each move that is made lowers the objective, and the result
    is of the same kind: no single move lowers it further.

    Args:
        gram: The Gram matrix.
        weights: The weights; points of weight zero stay where they are.
        labels: The labels to start from; no cluster is empty.
        k: The number of clusters.
        max_rounds: The largest number of rounds.
        distances: Whether ``gram`` is minus half the squared distances.

    Returns:
        The refined labels.
    """
    return hartigan_rounds(gram, weights, labels, k, max_rounds, distances=distances)[0]


def hartigan_rounds(
    gram: Gram,
    weights: Weights,
    labels: ClusterLabels,
    k: int,
    max_rounds: Int[Array, ""],
    *,
    distances: bool = False,
) -> tuple[Refinement, Int[Array, ""]]:
    """Returns what `hartigan` returns, and the number of rounds."""
    n = gram.shape[0]
    block = min(BLOCK, n)
    clusters, slots, square = indices(k), indices(block), jnp.diagonal(gram)
    earlier = slots[:, None] < jnp.concatenate([slots, slots])[None]
    side = jnp.repeat(jnp.array([-1, 1], gram.dtype), block)

    def round_(state: _Moves) -> _Moves:
        s = state.statistics
        leave, cost, floor = move_costs(gram, weights, state.labels, s, distances=distances)
        join, target = first_least(cost, clusters[:, None], 0)
        gain = leave - join - floor
        running = state.running & (state.rounds < max_rounds)
        chosen, _ = best(-gain, (gain > 0) & running, block)
        valid = chosen < n
        at = jnp.minimum(chosen, n - 1)
        w, g, least_gain = weights[at], square[at], floor[at]
        a, b = state.labels[at], target[at]
        rows = w[:, None] * gram[at]
        # Of both clusters of each move: what the other moves add to its mass and sums.
        both, twice = jnp.concatenate([a, b]), jnp.concatenate([at, at])
        joining = earlier & (b[:, None] == both[None])
        leaving = earlier & (a[:, None] == both[None])
        sums, mass, inner = s.sums[both, twice], s.mass[both], s.inner[both]
        among = rows[:, twice]

        def evaluated(kept: Array) -> tuple[Array, Array]:
            """Returns whether moves gain after the kept ones before, and what both add to Q."""
            joins, leaves = joining & kept[:, None], leaving & kept[:, None]
            sign = joins.astype(w.dtype) - leaves.astype(w.dtype)
            now_sums = sums + (sign * among).sum(0)
            now_mass = mass + (sign * w[:, None]).sum(0)
            added = (weights * weights * square)[twice] + 2 * side * weights[twice] * now_sums
            by_leaving, by_joining = added[:block, None], added[block:, None]
            change = jnp.where(joins, by_joining, 0) + jnp.where(leaves, by_leaving, 0)
            mean = now_sums / now_mass
            distance = square[twice] - 2 * mean + (inner + change.sum(0)) / now_mass**2
            most = distance[block:]
            if distances:
                most += distance_error(g, mean[block:], distances=True)
            leave = removal_gain(now_mass[:block], w, distance[:block])
            join = now_mass[block:] * w / (now_mass[block:] + w) * most
            # The first move was found to gain by all of S.
            return (leave - join > least_gain) | (slots == 0), added

        kept = valid
        for _ in range(2):
            kept &= evaluated(kept)[0]
        better, added = evaluated(kept)
        kept &= slots < jnp.where(kept & ~better, slots, block).min()

        joins = (clusters[:, None] == b[None]) & kept[None]
        leaves = (clusters[:, None] == a[None]) & kept[None]
        sign = joins.astype(w.dtype) - leaves.astype(w.dtype)
        change = jnp.where(joins, added[None, block:], 0) + jnp.where(
            leaves, added[None, :block], 0
        )
        moved = Statistics(
            s.sums + jnp.matmul(sign, rows, precision="highest"),
            s.mass + (sign * w[None]).sum(1),
            s.inner + change.sum(1),
        )
        labels = state.labels.at[jnp.where(kept, at, n)].set(b, mode="drop")
        count = kept.sum(dtype=jnp.int32)
        return _Moves(
            labels, moved, state.rounds + running.astype(jnp.int32), state.moves + count, count > 0
        )

    start = _Moves(
        labels,
        statistics(gram, weights, labels, k),
        jnp.int32(0),
        jnp.int32(0),
        jnp.array(True),
    )
    end = lax.while_loop(
        lambda state: any_of(state.running & (state.rounds < max_rounds)), round_, start
    )
    value = objective(gram, weights, statistics(gram, weights, end.labels, k))
    return Refinement(end.labels, value, end.moves, ~end.running), end.rounds


class _Moves(NamedTuple):
    """The state of `hartigan_rounds`."""

    labels: Array
    statistics: Statistics
    rounds: Array
    moves: Array
    running: Array


def first_least(x: Float[Array, ...], key: Int[Array, ...], axis: int) -> tuple[Array, Array]:
    """Returns minima along an axis, and the smallest key that one of them has, in one pass."""

    def less(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        first = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    largest = jnp.array(jnp.iinfo(key.dtype).max, key.dtype)
    key = jnp.broadcast_to(key, x.shape)
    return tuple(lax.reduce((x, key), (jnp.array(jnp.inf, x.dtype), largest), less, (axis,)))


def best(
    cost: Float[Array, " n"], valid: Bool[Array, " n"], count: int
) -> tuple[Int[Array, " c"], Bool[Array, " n"]]:
    """Returns the valid elements with the least costs, in order.

    Counting the smaller ones is one kernel; to sort would be tens of them.

    Args:
        cost: The costs.
        valid: The elements that count.
        count: How many are returned.

    Returns:
        (count,) their indices, n or more where there are no more, and (n,) whether each is among
        them.
    """
    n = cost.shape[0]
    order = indices(n)
    number = jnp.where(valid, order, n)  # not a constant, n^2 of which XLA would keep for a loop
    before = cost[None] < cost[:, None]
    before |= (cost[None] == cost[:, None]) & (number[None] < number[:, None])
    rank = (before & valid[None]).sum(1, dtype=jnp.int32)
    chosen = valid & (rank < count)
    slot = jnp.where(chosen, rank, count)
    none = n + indices(count)  # all different
    return none.at[slot].set(order, mode="drop"), chosen


@custom_vmap
def any_of(running: Bool[Array, ""]) -> Bool[Array, ""]:
    """Returns its argument; under `jax.vmap`, whether any of the problems is running.

    A loop with a condition for each problem copies the state of those that are done in each step.
    """
    return running


@any_of.def_vmap
def _any_of(size: int, batched: list[bool], running: Array) -> tuple[Array, bool]:
    del size
    return any_of(running.any(0) if batched[0] else running), False
