"""Laws of the clustering engine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax import InputError, kmeans


def cloud(n=60, d=5, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.RandomState(seed).standard_normal((n, d)).astype(dtype))


def inertia(x, labels, weights=None):
    x, labels = np.asarray(x, np.float64), np.asarray(labels)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    total = 0.0
    for c in np.unique(labels):
        members = labels == c
        if w[members].sum() > 0:
            mean = np.average(x[members], axis=0, weights=w[members])
            total += (w[members] * np.square(x[members] - mean).sum(1)).sum()
    return total


def test_result_is_consistent(key):
    x = cloud()
    r = kmeans(x, 7, key=key, n_init=3)
    labels = np.asarray(r.labels)
    np.testing.assert_allclose(r.inertia, inertia(x, labels), rtol=1e-5)
    total = np.square(np.asarray(x) - np.asarray(x).mean(0)).sum()
    np.testing.assert_allclose(r.inertia_fraction, inertia(x, labels) / total, rtol=1e-5)
    assert r.sizes.tolist() == np.bincount(labels).tolist()
    for c in range(7):
        np.testing.assert_allclose(r.centroids[c], np.asarray(x)[labels == c].mean(0), atol=1e-6)
    first = [np.flatnonzero(labels == c)[0] for c in range(7)]
    assert first == sorted(first)
    assert r.converged


def test_labels_are_nearest_after_convergence(key):
    x = cloud(n=200)
    r = kmeans(x, 12, key=key)
    distances = np.square(np.asarray(x)[:, None] - np.asarray(r.centroids)[None]).sum(-1)
    own = distances[np.arange(200), np.asarray(r.labels)]
    assert r.converged
    assert (own <= distances.min(1) + 1e-5).all()


def test_inertia_never_rises_over_iterations(key):
    x = cloud(n=300)
    values = [float(kmeans(x, 20, key=key, max_iters=t).inertia) for t in range(1, 12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_stops_at_the_limit_and_says_so(key):
    r = kmeans(cloud(n=300), 20, key=key, max_iters=1)
    assert (int(r.iterations), bool(r.converged)) == (1, False)


def test_tolerance_stops_early(key):
    x = cloud(n=300)
    loose, tight = kmeans(x, 20, key=key, tol=0.5), kmeans(x, 20, key=key)
    assert loose.iterations < tight.iterations
    assert loose.converged


def test_more_starts_are_no_worse(key):
    x = cloud(n=300)
    assert kmeans(x, 20, key=key, n_init=20).inertia <= kmeans(x, 20, key=key, n_init=1).inertia


def test_same_key_same_bits(key):
    x = cloud(n=100)
    a, b = kmeans(x, 9, key=key), kmeans(x, 9, key=key)
    assert all((p == q).all() for p, q in zip(a, b, strict=True))


def test_every_point_alone(key):
    x = cloud(n=40)
    r = kmeans(x, 40, key=key)
    assert r.labels.tolist() == list(range(40))
    assert (r.centroids == x).all()
    assert r.inertia == 0


def test_one_cluster(key):
    x = cloud()
    r = kmeans(x, 1, key=key)
    np.testing.assert_allclose(r.centroids[0], x.mean(0), atol=1e-6)
    np.testing.assert_allclose(r.inertia_fraction, 1, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_points(k, key):
    r = kmeans(jnp.full((20, 3), 2.5), k, key=key)
    assert r.inertia == 0
    assert r.inertia_fraction == 0
    assert (r.sizes >= 1).all()
    np.testing.assert_allclose(r.centroids, 2.5)


def test_duplicates_are_found(key):
    few = cloud(n=15, d=40)
    order = np.random.RandomState(1).permutation(np.repeat(np.arange(15), 6))
    r = kmeans(few[order], 15, key=key)
    assert r.sizes.tolist() == [6] * 15
    np.testing.assert_allclose(r.inertia_fraction, 0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_scale_changes_nothing(scale, key):
    x = cloud(n=80)
    a, b = kmeans(x, 9, key=key), kmeans(x * scale, 9, key=key)
    assert (a.labels == b.labels).all()
    np.testing.assert_allclose(a.inertia_fraction, b.inertia_fraction, rtol=1e-5)
    np.testing.assert_allclose(b.centroids / scale, a.centroids, atol=1e-5)
    assert not any(np.isnan(np.asarray(v)).any() for v in b)


def test_far_outlier_gets_its_own_cluster(key):
    x = cloud(n=50).at[17].set(1e6)
    r = kmeans(x, 3, key=key)
    assert (np.asarray(r.labels) == int(r.labels[17])).sum() == 1
    assert not any(np.isnan(np.asarray(v)).any() for v in r)


def test_weights_equal_repeated_points(key):
    x, times = cloud(n=30, seed=3), np.random.RandomState(0).randint(1, 5, 30)
    weighted = kmeans(x, 6, key=key, weights=jnp.asarray(times, jnp.float32), n_init=20)
    repeated = kmeans(x[np.repeat(np.arange(30), times)], 6, key=key, n_init=20)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-3)
    np.testing.assert_allclose(weighted.inertia, inertia(x, weighted.labels, times), rtol=1e-5)
    assert float(weighted.sizes.sum()) == times.sum()


def test_points_of_weight_zero_do_not_count(key):
    x, w = cloud(n=40), jnp.ones(40).at[::4].set(0)
    r = kmeans(x, 5, key=key, weights=w)
    kept = np.asarray(w) > 0
    alone = kmeans(x[kept], 5, key=key)
    assert r.sizes.sum() == 30
    assert (r.sizes > 0).all()
    assert r.inertia <= 1.3 * alone.inertia
    np.testing.assert_allclose(r.inertia, inertia(x, r.labels, w), rtol=1e-5)


def test_order_of_points_changes_nothing(key):
    x = cloud(n=100)
    want = kmeans(x, 9, key=key)
    for seed in range(5):
        order = np.random.RandomState(seed).permutation(100)
        got = kmeans(x[order], 9, key=key)
        assert got.inertia == want.inertia
        same = np.asarray(want.labels)[order]
        pairs = set(zip(same.tolist(), got.labels.tolist(), strict=True))
        assert len(pairs) == 9


def test_vmap_equals_loop(key):
    x = jnp.stack([cloud(n=50, seed=s) for s in range(4)])
    keys = jax.random.split(key, 4)
    batched = jax.vmap(lambda x, key: kmeans(x, 6, key=key, n_init=2))(x, keys)
    for i in range(4):
        one = kmeans(x[i], 6, key=keys[i], n_init=2)
        assert (batched.labels[i] == one.labels).all()
        np.testing.assert_allclose(batched.inertia[i], one.inertia, rtol=1e-5)


def test_jit_equals_eager(key):
    x = cloud()
    a = kmeans(x, 6, key=key)
    b = jax.jit(lambda x: kmeans(x, 6, key=key))(x)
    assert (a.labels == b.labels).all()


def test_bfloat16_is_computed_in_float32(key):
    x = cloud().astype(jnp.bfloat16)
    a, b = kmeans(x, 6, key=key), kmeans(x.astype(jnp.float32), 6, key=key)
    assert a.centroids.dtype == a.inertia.dtype == jnp.float32
    assert (a.labels == b.labels).all()


def test_float64_stays(x64, key):
    x = cloud(dtype=np.float64)
    r = kmeans(x, 6, key=key)
    assert r.centroids.dtype == jnp.float64
    np.testing.assert_allclose(r.inertia, inertia(x, r.labels), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be 1 to the number of points, 60; got 0"),
        ({"k": 61}, "k must be 1 to"),
        ({"n_init": 0}, "n_init"),
        ({"max_iters": 0}, "max_iters"),
        ({"tol": -1.0}, "tol"),
        ({"points": jnp.zeros((0, 3))}, "points must be"),
        ({"points": jnp.full((60, 2), jnp.nan)}, "NaN"),
        ({"weights": jnp.ones(59)}, r"weights must have shape \(60,\)"),
        ({"weights": -jnp.ones(60)}, "not negative"),
        ({"weights": jnp.zeros(60)}, "at least k = 5 of them positive"),
    ],
)
def test_bad_input(arguments, message, key):
    arguments = {"points": cloud(), "k": 5, **arguments}
    with pytest.raises(InputError, match=message):
        kmeans(arguments.pop("points"), arguments.pop("k"), key=key, **arguments)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.sampled_from([(12, 5), (12, 11), (7, 7), (5, 1), (1, 1)]),  # each compiles anew
    distinct=st.integers(1, 12),
    seed=st.integers(0, 999),
    weighted=st.booleans(),
)
def test_no_cluster_is_ever_empty(shape, distinct, seed, weighted):
    n, k = shape
    rng = np.random.RandomState(seed)
    x = jnp.asarray(rng.standard_normal((distinct, 2))[rng.randint(0, distinct, n)], jnp.float32)
    w = jnp.asarray(rng.randint(1, 4, n), jnp.float32) if weighted else None
    r = kmeans(x, k, key=jax.random.key(seed), weights=w)
    assert (r.sizes > 0).all()
    assert sorted(set(r.labels.tolist())) == list(range(k))
    assert not any(np.isnan(np.asarray(v)).any() for v in r)
    assert r.inertia <= inertia(x, np.zeros(n, int), w) * (1 + 1e-5) + 1e-9
