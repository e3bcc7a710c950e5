"""Ward's merges and Hartigan's moves in rounds, as on accelerators, against one by one."""

import re
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax import kmeans
from fusion_jax.clustering import gram as one_by_one
from fusion_jax.clustering import rounds

engine = sys.modules["fusion_jax.clustering.engine"]

N, D, K = 96, 8, 24  # one shape, because each shape compiles anew


def case(kind):
    """Returns points and weights in float64."""
    rng = np.random.RandomState(3)
    x, w = rng.standard_normal((N, D)), np.ones(N)
    if kind == "weighted":
        w = rng.uniform(0.05, 1, N)
    elif kind == "weights of all sizes":
        w = np.exp(2 * rng.standard_normal(N))
    elif kind == "zero weights":
        w[rng.permutation(N)[: N // 3]] = 0
        w[:5] = 0
    elif kind == "clustered":
        x = 0.3 * x + 4 * rng.standard_normal((K, D))[rng.randint(0, K, N)]
    elif kind == "duplicates":
        x = x[np.tile(np.arange(K), N // K)]
    elif kind == "heavy tails":
        x *= np.exp(rng.standard_normal((N, 1)))
    elif kind == "spectrum of weights":
        x = x * np.arange(1, D + 1) ** -0.42 * np.exp(0.14 * rng.standard_normal((N, 1)))
    elif kind == "outlier":
        x[17] += 50
    elif kind == "line":
        x[:, 1:] = 0
    return x, w / w.max()


KINDS = [
    "normal",
    "weighted",
    "weights of all sizes",
    "zero weights",
    "clustered",
    "duplicates",
    "heavy tails",
    "spectrum of weights",
    "outlier",
    "line",
]


def gram_of(x, *, distances=False, dtype=jnp.float32):
    if distances:
        return jnp.asarray(-np.square(x[:, None] - x[None]).sum(-1) / 2, dtype)
    x = x - x.mean(0)
    return jnp.asarray(x @ x.T, dtype)


@cache
def ward(start, k, distances=False):
    return jax.jit(partial(start, k=k, distances=distances))


@cache
def hartigan(distances=False):
    return jax.jit(partial(rounds.hartigan, k=K, distances=distances))


CHAIN, ROUNDS = one_by_one.ward_start, rounds.ward_start


def same_partition(a, b, k):
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == k == len(set(a.tolist()))


@pytest.mark.parametrize("k", [5, K, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_merge_what_the_chain_merges(kind, k):
    x, w = case(kind)
    if kind == "duplicates" and k > K:
        pytest.skip("which of equal points merge is open")
    if kind == "zero weights":  # they merge with any other
        k = min(k, 30)
    a, b = (ward(f, k)(gram_of(x), jnp.asarray(w, jnp.float32)) for f in (CHAIN, ROUNDS))
    real = w > 0
    assert same_partition(a[real], b[real], k)
    assert len(set(b.tolist())) == k


@pytest.mark.parametrize("kind", ["weighted", "outlier"])
def test_rounds_merge_by_distances_too(kind):
    x, w = case(kind)
    gram, w = gram_of(x, distances=True), jnp.asarray(w, jnp.float32)
    a, b = (ward(f, K, True)(gram, w) for f in (CHAIN, ROUNDS))
    assert same_partition(a, b, K)


def test_rounds_merge_in_float64(x64):
    x, w = case("weighted")
    gram, w = gram_of(x, dtype=jnp.float64), jnp.asarray(w)
    a, b = (ward(f, K)(gram, w) for f in (CHAIN, ROUNDS))
    assert same_partition(a, b, K)


merges = jax.jit(partial(rounds.ward_merges, k=K))


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_equal_points_merge_in_few_rounds(noise):
    rng = np.random.RandomState(0)
    x = rng.standard_normal((1, D)) + noise * rng.standard_normal((N, D))
    # Without centering, all costs are errors of rounding.
    gram = jnp.asarray(np.asarray(x, np.float32) @ np.asarray(x, np.float32).T)
    found = merges(gram, jnp.ones(N))
    done = np.isfinite(found.heights)
    assert N - K <= done.sum() < N
    assert (np.asarray(found.into)[~done] == np.arange(N)[~done]).all()
    assert found.rounds <= (7 if noise == 0 else 48)
    assert sorted(set(ward(ROUNDS, K)(gram, jnp.ones(N)).tolist())) == list(range(K))


def test_points_that_are_no_numbers_end_the_rounds():
    found = merges(jnp.full((N, N), jnp.nan), jnp.ones(N))
    assert found.rounds <= N


def test_large_rounds_are_split(monkeypatch):
    x, w = case("clustered")
    gram, w = gram_of(x), jnp.asarray(w, jnp.float32)
    few, all_ = (jax.jit(partial(rounds.ward_merges, k=K)) for _ in range(2))
    want = all_(gram, w)
    monkeypatch.setattr(rounds, "BLOCK", 4)
    got = few(gram, w)
    assert got.rounds > want.rounds
    a, b = (one_by_one.cut(m.into, jnp.arange(N), m.heights, K) for m in (want, got))
    assert same_partition(a, b, K)


def objective(x, w, labels):
    total = 0.0
    for c in np.unique(labels):
        members = labels == c
        mean = np.average(x[members], axis=0, weights=w[members])
        total += (w[members] * np.square(x[members] - mean).sum(1)).sum()
    return total


def best_gain(x, w, labels):
    """Returns how much the best single move lowers the objective."""
    one_hot = np.eye(K)[labels] * w[:, None]
    mass = one_hot.sum(0)
    distance = np.square(x[:, None] - (one_hot.T @ x / mass[:, None])[None]).sum(-1)
    points = np.arange(len(x))
    rest = mass[labels] - w
    alone = rest < 1e-9
    leave = mass[labels] * w / np.where(alone, 1, rest) * distance[points, labels]
    join = mass * w[:, None] / (mass + w[:, None]) * distance
    join[points, labels] = np.inf
    return np.where(alone, -np.inf, leave - join.min(1)).max()


@pytest.mark.parametrize("start", ["ward", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_of_moves_end_where_no_move_improves(kind, start):
    x, w = case(kind)
    gram, weights = gram_of(x), jnp.asarray(w, jnp.float32)
    labels = ward(CHAIN, K)(gram, weights)
    if start == "random":
        labels = np.random.RandomState(0).permutation(N) % K
        labels[np.flatnonzero(w > 0)[:K]] = np.arange(K)  # no cluster without weight
        labels = jnp.asarray(labels, jnp.int32)
    got = hartigan()(gram, weights, labels, max_rounds=jnp.int32(300))
    found = np.asarray(got.labels)
    before, after = (objective(x, w, np.asarray(c)) for c in (labels, found))
    total = objective(x, w, np.zeros(N, int))
    np.testing.assert_allclose(got.objective, after, rtol=1e-5, atol=1e-5 * total)
    assert after <= before + 1e-6 * total
    assert best_gain(x, w, found) <= 2e-5 * total / N
    assert got.converged
    if start == "random":
        assert after < before
        assert got.steps > 10


def test_rounds_of_moves_by_distances():
    x, w = case("weighted")
    labels = jnp.arange(N, dtype=jnp.int32) % K
    gram, weights = gram_of(x, distances=True), jnp.asarray(w, jnp.float32)
    got = hartigan(True)(gram, weights, labels, max_rounds=jnp.int32(300))
    assert best_gain(x, w, np.asarray(got.labels)) <= 1e-4
    assert got.converged


def test_rounds_of_moves_stop_at_the_limit():
    x, w = case("normal")
    labels = jnp.arange(N, dtype=jnp.int32) % K
    args = gram_of(x), jnp.asarray(w, jnp.float32), labels
    values = [hartigan()(*args, max_rounds=jnp.int32(limit)).objective for limit in (0, 1, 2, 300)]
    assert (np.diff(values) < 0).all()
    assert not hartigan()(*args, max_rounds=jnp.int32(1)).converged


@pytest.fixture
def in_rounds(monkeypatch):
    monkeypatch.setattr(engine, "_IN_ROUNDS", True)


def test_kmeans_in_rounds_is_as_good(key, monkeypatch):
    ratios = []
    for kind in KINDS:
        x, w = case(kind)
        x, w = x.astype(np.float32), w.astype(np.float32)
        found = []
        for choice in (True, False):
            monkeypatch.setattr(engine, "_IN_ROUNDS", choice)
            found.append(kmeans(x, K, key=key, weights=w))
        assert all(r.converged for r in found)
        assert all(sorted(set(r.labels.tolist())) == list(range(K)) for r in found)
        if kind != "duplicates":
            ratios.append(float(found[0].inertia / found[1].inertia))
        else:
            np.testing.assert_allclose([r.inertia_fraction for r in found], 0, atol=1e-9)
    assert abs(np.mean(ratios) - 1) < 0.01


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("init", ["ward", "k-means++"])
def test_vmap_equals_loop_in_rounds(init, key, in_rounds):
    kinds = ["normal", "clustered", "heavy tails", "line"]
    x = jnp.asarray(np.stack([case(kind)[0] for kind in kinds]), jnp.float32)
    solve = partial(kmeans, k=K, key=key, init=init)
    batched = jax.vmap(solve)(x)
    assert len(set(batched.moves.tolist())) > 1
    for i in range(len(kinds)):
        one = solve(x[i])
        assert (batched.labels[i] == one.labels).all()
        assert batched.moves[i] == one.moves
        np.testing.assert_allclose(batched.inertia[i], one.inertia, rtol=1e-5)


def test_problems_of_a_batch_do_not_wait_for_each_other_by_copies():
    """A loop with one condition for all problems needs no selection of what each has so far."""
    text = jax.jit(jax.vmap(merges)).lower(jnp.ones((4, N, N)), jnp.ones((4, N))).as_text()
    selects = re.findall(rf"stablehlo.select .*tensor<4x{N}x{N}xf32>", text)
    assert len(selects) == 1  # of the pairs that may merge


def test_the_device_decides(key):
    """Programs for GPUs are in rounds, and have few products, each of which takes long to tune."""
    x = jnp.zeros((N, D))
    options = engine._Options(K, "ward", "hartigan", 1, True, True, None, False)
    arguments = x, jnp.ones(N), None, key, jnp.int32(300), jnp.float32(0)

    def counts(in_rounds, platform):
        solve = partial(engine._kmeans, options._replace(in_rounds=in_rounds), None)
        text = jax.jit(solve).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        return [text.count(f"stablehlo.{op}") for op in ("dot_general", "while", "scatter", "xor")]

    assert counts(None, "cpu") == counts(False, "cpu")
    assert counts(None, "cuda") == counts(True, "cuda") != counts(False, "cuda")
    assert counts(None, "cuda")[0] == 4


def test_best_and_first_least():
    rng = np.random.RandomState(0)
    cost, valid = rng.randint(0, 9, N).astype(np.float32), rng.rand(N) < 0.2
    order = [i for i in np.lexsort((np.arange(N), cost)) if valid[i]]
    chosen, among = rounds.best(jnp.asarray(cost), jnp.asarray(valid), 8)
    assert chosen.tolist() == order[:8]
    assert np.flatnonzero(among).tolist() == sorted(order[:8])
    chosen, _ = rounds.best(jnp.asarray(cost), jnp.asarray(valid), 40)
    assert chosen[: len(order)].tolist() == order
    assert (chosen[len(order) :] >= N).all()

    x = rng.randint(0, 3, (5, 7)).astype(np.float32)
    for axis in (0, 1):
        index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        least, first = rounds.first_least(jnp.asarray(x), index, axis)
        assert (least == x.min(axis)).all()
        assert (first == x.argmin(axis)).all()
