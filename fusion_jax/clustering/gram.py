"""Starts and refinements of a clustering that need only the Gram matrix of the points.

With G = X X^T and weights w, a cluster c is described by S_c = sum_{i in c} w_i G_i (a row of n
numbers), its mass m_c = sum w_i and Q_c = sum_{j in c} w_j S_cj; then |x_j - mean_c|^2 = G_jj - 2
S_cj / m_c + Q_c / m_c^2. These formulas do not change if numbers a_i + a_j are added to G_ij, so
that minus half the squared distances may stand for G (``distances=True``), which keeps small
distances beside large ones. Every step costs n^2 operations or less, whatever the dimension of the
points. All functions are pure, and run under ``jit`` and ``vmap``; weights are positive or zero,
and scaled to at most 1.

What was tried for the two sequential parts, at n = 3,072 and k = 768 on two cores:

- Ward: a nearest-neighbor chain, 0.12 s (used); a list of nearest neighbors with lazy updates stops
  at k clusters but refreshes 7 times per merge, 0.30 s; merging all reciprocal pairs at once needs
  40 to 120 rounds of n^2, 1 s here.
- Hartigan: one point after another over all points, 0.8 to 1.8 s; batches of moves between disjoint
  clusters, accepted when the objective falls, 0.2 to 0.5 s; blocks of the most promising points,
  moved exactly one after another and applied to S together, 0.07 to 0.09 s (used).

That is for CPUs. Where few large steps are better than many small ones, see `clustering.rounds`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusion_jax.clustering.labels import (
    ClusterLabels,
    Refinement,
    Weights,
    first_min,
    indices,
    lloyd_iterations,
    refilled,
    sum_by_label,
)

Gram = Float[Array, "n n"]

_BLOCK = 128


class Statistics(NamedTuple):
    """S, m and Q of the module's docstring, for labels with k clusters.

    Args:
        sums: (k, n).
        mass: (k,).
        inner: (k,).
    """

    sums: Float[Array, "k n"]
    mass: Float[Array, " k"]
    inner: Float[Array, " k"]


def statistics(gram: Gram, weights: Weights, labels: ClusterLabels, k: int) -> Statistics:
    """Returns S, m and Q of labels with k clusters."""
    sums = sum_by_label(weights[:, None] * gram, labels, k)
    own = sums[labels, indices(gram.shape[0])]
    return Statistics(
        sums, sum_by_label(weights, labels, k), sum_by_label(own * weights, labels, k)
    )


def objective(gram: Gram, weights: Weights, s: Statistics) -> Float[Array, ""]:
    """Returns the weighted sum of squared distances from the points to their clusters' means."""
    return (jnp.diagonal(gram) * weights).sum() - (s.inner / s.mass).sum()


def distances_from(gram: Gram, chosen: Int[Array, " c"]) -> Float[Array, "c n"]:
    """Returns squared distances from some of the points to all; exactly 0 for duplicates."""
    square = jnp.diagonal(gram)
    norms = square[chosen][:, None] + square[None]
    d = norms - 2 * gram[chosen]
    # Cancellation leaves a small distance between duplicates, which must not count.
    return jnp.where(d > 32 * jnp.finfo(gram.dtype).eps * norms, d, 0)


def ward_start(gram: Gram, weights: Weights, k: int, *, distances: bool = False) -> ClusterLabels:
    """Returns the labels of Ward's agglomeration, cut at k clusters.

    A nearest-neighbor chain: each link leads to the cluster that is cheapest to merge with, until
    two clusters are each other's nearest and merge. The chain finds all n - 1 merges in at most
    3 n steps of n operations; the n - k cheapest merges are carried out.

    References:
        Murtagh, A survey of recent advances in hierarchical clustering (1983), for the chain.
    """
    n = gram.shape[0]
    points = indices(n)
    least_square = -jnp.inf if distances else 0.0  # rounding must not make a square negative

    def step(_: Array, s: _Chain) -> _Chain:
        # The row of the last step is written before any row is read, so that S is not copied.
        sums = lax.dynamic_update_slice(s.sums, s.row[None], (s.at, jnp.int32(0)))
        running = s.merges < n - 1
        empty = s.length == 0
        last = jnp.where(empty, jnp.argmax(s.alive).astype(jnp.int32), s.chain[s.length - 1])
        chain = s.chain.at[0].set(jnp.where(empty, last, s.chain[0]))
        length = jnp.maximum(s.length, 1)
        in_chain = s.in_chain | (points == last)

        row = lax.dynamic_slice(sums, (last, jnp.int32(0)), (1, n))[0]
        inner = jnp.zeros(n, row.dtype).at[s.labels].add(row * weights)
        mass = s.mass[last]
        both = jnp.maximum(s.mass + mass, jnp.finfo(row.dtype).tiny)
        # m m' / (m + m') |mean - mean'|^2, with means' squares q = Q / m^2 and products t / (m m').
        cost = (s.mass * mass * (s.square[last] + s.square) - 2 * inner) / both
        # In exact arithmetic the links of a chain get cheaper and lead back into it only at the
        # previous cluster. With duplicates, rounding can break both facts; enforced as rules, they
        # make the loop end whatever the rounding.
        before = jnp.where(length > 1, s.chain[length - 2], last)
        least, best = first_min(jnp.where(s.alive & ~in_chain, cost, jnp.inf))
        back = (length > 1) & (cost[before] <= least)
        back |= (length > 1) & (s.links[length - 1] <= least)
        merge = running & back
        push = running & ~back

        a, b = jnp.minimum(last, before), jnp.maximum(last, before)
        other = lax.dynamic_slice(sums, (before, jnp.int32(0)), (1, n))[0]
        merged = s.mass[a] + s.mass[b]
        joint = (
            s.square[a] * s.mass[a] ** 2 + s.square[b] * s.mass[b] ** 2 + 2 * inner[before]
        ) / jnp.maximum(merged**2, jnp.finfo(row.dtype).tiny)
        is_a, is_b = points == a, points == b
        number = jnp.where(merge, s.merges, n)  # out of range: dropped
        next_link = jnp.where(push, length, n)
        return _Chain(
            sums=sums,
            row=jnp.where(merge, row + other, row),
            at=jnp.where(merge, a, last),
            mass=jnp.where(merge & is_a, merged, s.mass),
            square=jnp.where(merge & is_a, jnp.maximum(joint, least_square), s.square),
            alive=s.alive & ~(merge & is_b),
            labels=jnp.where(merge & (s.labels == b), a, s.labels),
            chain=chain.at[next_link].set(best, mode="drop"),
            links=s.links.at[next_link].set(least, mode="drop"),
            length=jnp.where(merge, length - 2, jnp.where(push, length + 1, length)),
            in_chain=jnp.where(
                merge, in_chain & ~is_a & ~is_b, in_chain | (push & (points == best))
            ),
            keeps=s.keeps.at[number].set(a, mode="drop"),
            loses=s.loses.at[number].set(b, mode="drop"),
            heights=s.heights.at[number].set(cost[before], mode="drop"),
            merges=s.merges + merge.astype(jnp.int32),
        )

    none = jnp.zeros(n, jnp.int32)
    rows = weights[:, None] * gram
    start = _Chain(
        sums=rows,
        row=rows[0],
        at=jnp.int32(0),
        mass=weights,
        square=jnp.diagonal(gram),
        alive=jnp.ones(n, bool),
        labels=points,
        chain=none,
        links=jnp.full(n, jnp.inf, gram.dtype),
        length=jnp.int32(0),
        in_chain=jnp.zeros(n, bool),
        keeps=none,
        loses=none,
        heights=jnp.full(n, jnp.inf, gram.dtype),
        merges=jnp.int32(0),
    )
    # A fixed number of steps: under vmap, a stopping condition for each problem would copy S in
    # every step.
    end = lax.fori_loop(0, 3 * n, step, start)
    return cut(end.keeps, end.loses, end.heights, k)


def cut(
    keeps: Int[Array, " n"], loses: Int[Array, " n"], heights: Float[Array, " n"], k: int
) -> ClusterLabels:
    """Returns the labels after the n - k cheapest merges.

    Args:
        keeps: The cluster that each merge makes larger, by the number of one of its points.
        loses: The cluster that becomes part of it; each does so at most once.
        heights: The costs of the merges; infinite for none.
        k: The number of clusters.

    Returns:
        The labels.
    """
    n = heights.shape[0]
    points = indices(n)
    cheapest = jnp.argsort(heights)[: n - k]
    parent = points.at[loses[cheapest]].set(keeps[cheapest])
    parent = lax.fori_loop(0, n.bit_length(), lambda _, p: p[p], parent)
    number = jnp.cumsum(parent == points, dtype=jnp.int32) - 1
    return number[parent]


class _Chain(NamedTuple):
    """The state of `ward_start`; a cluster is numbered by one of its points."""

    sums: Array  # S, one row per point; `row` is still to be written at `at`
    row: Array
    at: Array
    mass: Array
    square: Array  # of the clusters' means
    alive: Array
    labels: Array
    chain: Array
    links: Array  # cost of the link that led to each member of the chain
    length: Array
    in_chain: Array
    keeps: Array  # the merges so far: `loses` becomes part of `keeps`
    loses: Array
    heights: Array
    merges: Array


def lloyd(
    gram: Gram,
    weights: Weights,
    labels: ClusterLabels,
    k: int,
    max_iters: Int[Array, ""],
    tol: Float[Array, ""],
) -> Refinement:
    """Runs Lloyd's iterations in Gram space; for the arguments see `lloyd_iterations`."""
    points, square = indices(gram.shape[0]), jnp.diagonal(gram)

    def assign(labels: Array, s: Statistics) -> Array:
        # Squared distances without the term |x_j|^2, which is the same for all clusters.
        relative = (s.inner / s.mass**2)[:, None] - s.sums * (2 / s.mass)[:, None]
        least, nearest = first_min(relative)
        new = jnp.where(relative[labels, points] <= least, labels, nearest)
        return refilled(new, weights, square + least, k)

    def evaluate(labels: Array) -> tuple[Statistics, Array]:
        s = statistics(gram, weights, labels, k)
        return s, objective(gram, weights, s)

    labels = refilled(labels, weights, jnp.zeros_like(square), k)
    return lloyd_iterations(assign, evaluate, labels, max_iters, tol)


def distance_error(square: Array, product: Array, *, distances: bool) -> Array:
    """Returns the rounding error of a distance, given a product with a mean.

    Gains below it do not count: they would move points forever.
    """
    return 16 * jnp.finfo(square.dtype).eps * (-2 * product if distances else square)


def removal_gain(mass: Array, w: Array, distance: Array) -> Array:
    """Returns the gain of leaving a cluster; a cluster's last point may not leave."""
    left = mass - w
    alone = left <= 1e-6 * w
    return jnp.where(alone, -jnp.inf, mass * w / jnp.where(alone, 1, left) * distance)


def move_costs(
    gram: Gram, weights: Weights, labels: ClusterLabels, s: Statistics, *, distances: bool
) -> tuple[Float[Array, " n"], Float[Array, "k n"], Float[Array, " n"]]:
    """Returns what each move of one point changes.

    Args:
        gram: The Gram matrix.
        weights: The weights.
        labels: The labels.
        s: Their statistics.
        distances: Whether ``gram`` is minus half the squared distances.

    Returns:
        What each point gains by leaving its cluster, what it costs in each cluster (infinite in its
        own), and what the difference of the two must exceed, which is its rounding error.
    """
    square, points, clusters = jnp.diagonal(gram), indices(gram.shape[0]), indices(len(s.mass))
    own_mass = s.mass[labels]
    own = s.sums[labels, points] / own_mass
    leave = removal_gain(own_mass, weights, square - 2 * own + s.inner[labels] / own_mass**2)
    to_means = (s.inner / s.mass**2)[:, None] - s.sums * (2 / s.mass)[:, None] + square[None]
    if distances:
        to_means += distance_error(square[None], s.sums / s.mass[:, None], distances=True)
    cost = to_means * (s.mass[:, None] / (s.mass[:, None] + weights[None])) * weights[None]
    cost = jnp.where(clusters[:, None] == labels[None], jnp.inf, cost)
    return leave, cost, distance_error(square, own, distances=distances) * weights


def hartigan(
    gram: Gram,
    weights: Weights,
    labels: ClusterLabels,
    k: int,
    max_rounds: Int[Array, ""],
    *,
    distances: bool = False,
) -> Refinement:
    """Moves single points, as Hartigan and Wong do, until no move lowers the objective.

    Moving x from cluster a to b changes the objective by m_b w / (m_b + w) |x - mean_b|^2 -
    m_a w / (m_a - w) |x - mean_a|^2. Each round ranks all points by their best change and moves the
    best points one after another. Each move is exact: the earlier moves of the round enter through
    the block of G between the round's points. S is updated once per round.

    Args:
        gram: The Gram matrix.
        weights: The weights; points of weight zero stay where they are.
        labels: The labels to start from; no cluster is empty.
        k: The number of clusters.
        max_rounds: The largest number of rounds.
        distances: Whether ``gram`` is minus half the squared distances.

    Returns:
        The refined labels.

    References:
        Hartigan and Wong, Algorithm AS 136 (1979); Telgarsky and Vattani, Hartigan's method:
        k-means clustering without Voronoi (AISTATS 2010), for why it finds better minima than
        Lloyd's.
    """
    n = gram.shape[0]
    block = min(_BLOCK, n)
    clusters, square = indices(k), jnp.diagonal(gram)

    def round_(state: tuple) -> tuple:
        labels, s, rounds, moves, _ = state
        leave, costs, floor = move_costs(gram, weights, labels, s, distances=distances)
        gain = leave - costs.min(0) - floor
        ranked, chosen = lax.top_k(gain, block)
        chosen = chosen.astype(jnp.int32)
        rows = weights[chosen][:, None] * gram[chosen]
        among = rows[:, chosen]
        sums = s.sums[:, chosen].T
        start = labels[chosen]
        w, g, least_gain = weights[chosen], square[chosen], floor[chosen]

        def move(t: Array, state: tuple) -> tuple:
            mass, inner, now = state
            a = start[t]
            change = jnp.where(now != start, among[:, t], 0)
            column = sums[t] + jnp.zeros(k, sums.dtype).at[now].add(change).at[start].add(-change)
            distance = g[t] - 2 * column / mass + inner / mass**2
            most = distance
            if distances:
                most += distance_error(g[t], column / mass, distances=True)
            cost = jnp.where(clusters == a, jnp.inf, mass * w[t] / (mass + w[t]) * most)
            join, b = first_min(cost)
            better = removal_gain(mass[a], w[t], distance[a]) - join > least_gain[t]
            step = better.astype(mass.dtype) * (
                (clusters == b).astype(mass.dtype) - (clusters == a).astype(mass.dtype)
            )
            inner += 2 * step * w[t] * column + jnp.abs(step) * w[t] ** 2 * g[t]
            return mass + step * w[t], inner, now.at[t].set(jnp.where(better, b, a))

        promising = (ranked > 0).sum()
        mass, inner, now = lax.fori_loop(0, promising, move, (s.mass, s.inner, start))
        moved = now != start
        rows = jnp.where(moved[:, None], rows, 0)
        new = s.sums.at[start].add(-rows).at[now].add(rows)
        count = moved.sum(dtype=jnp.int32)
        labels = labels.at[chosen].set(now)
        return labels, Statistics(new, mass, inner), rounds + 1, moves + count, count == 0

    s = statistics(gram, weights, labels, k)
    state = labels, s, jnp.int32(0), jnp.int32(0), jnp.array(False)
    labels, s, _, moves, converged = lax.while_loop(
        lambda state: ~state[4] & (state[2] < max_rounds), round_, state
    )
    value = objective(gram, weights, statistics(gram, weights, labels, k))
    return Refinement(labels, value, moves, converged)
