"""Laws of the clustering engine."""

import inspect
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.cluster.hierarchy
import sklearn.cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fusion_jax import InputError, kmeans
from fusion_jax.clustering import points as point_space
from fusion_jax.clustering.gram import ward_start

engine = sys.modules["fusion_jax.clustering.engine"]


INITS = ["ward", "k-means++", "random"]
REFINES = ["lloyd", "hartigan"]


def every(test):
    """Runs a test with every start and refinement."""
    test = pytest.mark.parametrize("init", INITS)(test)
    return pytest.mark.parametrize("refine", REFINES)(test)


# Most tests share one shape, because each shape compiles anew.
N, D, K = 96, 6, 12


def cloud(n=N, d=D, seed=0, dtype=np.float32):
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


@pytest.mark.full(quick=1)
@every
def test_result_is_consistent(key, init, refine):
    x = cloud()
    r = kmeans(x, K, key=key, init=init, refine=refine)
    labels = np.asarray(r.labels)
    np.testing.assert_allclose(r.inertia, inertia(x, labels), rtol=1e-5)
    total = np.square(np.asarray(x) - np.asarray(x).mean(0)).sum()
    np.testing.assert_allclose(r.inertia_fraction, inertia(x, labels) / total, rtol=1e-5)
    assert r.sizes.tolist() == np.bincount(labels).tolist()
    for c in range(K):
        np.testing.assert_allclose(r.centroids[c], np.asarray(x)[labels == c].mean(0), atol=1e-6)
    first = [np.flatnonzero(labels == c)[0] for c in range(K)]
    assert first == sorted(first)
    assert r.converged


def squared_distances(x, centroids):
    return np.square(np.asarray(x)[:, None] - np.asarray(centroids)[None]).sum(-1)


@pytest.mark.full(quick=2)
@every
def test_labels_are_nearest_after_convergence(key, init, refine):
    x = cloud()
    r = kmeans(x, K, key=key, init=init, refine=refine)
    distances = squared_distances(x, r.centroids)
    own = distances[np.arange(N), np.asarray(r.labels)]
    assert r.converged
    assert (own <= distances.min(1) + 1e-5).all()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_single_move_improves_after_hartigan(key, init, weighted):
    x = cloud()
    w = np.random.RandomState(0).uniform(0.1, 2, N) if weighted else np.ones(N)
    r = kmeans(x, K, key=key, init=init, weights=jnp.asarray(w, jnp.float32), refine="hartigan")
    labels, mass = np.asarray(r.labels), np.asarray(r.sizes)
    distances = squared_distances(x, r.centroids)
    for i in range(N):
        a = labels[i]
        if np.isclose(mass[a], w[i]):
            continue
        leave = mass[a] * w[i] / (mass[a] - w[i]) * distances[i, a]
        join = mass * w[i] / (mass + w[i]) * distances[i]
        join[a] = np.inf
        assert leave - join.min() <= 1e-5


@pytest.mark.parametrize("init", INITS)
def test_moves_lower_the_inertia(key, init):
    x = cloud()
    lloyd, moved = (kmeans(x, K, key=key, init=init, refine=r) for r in REFINES)
    assert moved.inertia < lloyd.inertia
    assert moved.moves > 0
    assert lloyd.moves == 0


@pytest.mark.full(quick=1)
@every
def test_inertia_never_rises_over_iterations_and_moves(key, init, refine):
    x = cloud(n=400, d=20)
    options = {"key": key, "init": init, "refine": refine}
    values = [float(kmeans(x, 100, max_iters=t, **options).inertia) for t in range(1, 9)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert values[-1] < values[0] or init == "ward"


def test_stops_at_the_limit_and_says_so(key):
    r = kmeans(cloud(), K, key=key, init="random", refine="lloyd", max_iters=1)
    assert (int(r.iterations), bool(r.converged)) == (1, False)
    r = kmeans(cloud(n=400, d=20), 100, key=key, max_iters=1)
    assert (int(r.iterations), bool(r.converged)) == (0, False)
    assert 0 < r.moves <= 128


def test_tolerance_stops_early(key):
    x, options = cloud(), {"key": key, "init": "random", "refine": "lloyd"}
    loose, tight = kmeans(x, K, tol=0.5, **options), kmeans(x, K, **options)
    assert loose.iterations < tight.iterations
    assert loose.converged


@pytest.mark.full
def test_more_starts_are_no_worse(key):
    x, options = cloud(), {"key": key, "init": "k-means++", "refine": "lloyd"}
    assert kmeans(x, K, n_init=20, **options).inertia <= kmeans(x, K, **options).inertia


@every
def test_same_key_same_bits(key, init, refine):
    x, options = cloud(), {"key": key, "init": init, "refine": refine}
    a, b = kmeans(x, K, **options), kmeans(x, K, **options)
    assert all((p == q).all() for p, q in zip(a, b, strict=True))


@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("n", "k", "d"), [(200, 50, 30), (200, 3, 2), (30, 29, 4), (9, 1, 2)])
def test_ward_equals_scipy(n, k, d, key):
    x = cloud(n=n, d=d)
    r = kmeans(x, k, key=key, init="ward", refine="lloyd", max_iters=1, tol=np.inf)
    tree = scipy.cluster.hierarchy.ward(np.asarray(x, np.float64))
    labels = scipy.cluster.hierarchy.fcluster(tree, k, "maxclust")
    # One Lloyd iteration follows the start; it may only lower what Ward gives.
    ours = ward_start(jnp.asarray(np.asarray(x) @ np.asarray(x).T), jnp.ones(n), k)
    pairs = set(zip(labels.tolist(), ours.tolist(), strict=True))
    assert len(pairs) == k
    assert r.inertia <= inertia(x, labels) * (1 + 1e-5)


def test_ward_with_weights_is_ward_of_copies():
    x, times = cloud(n=40, d=6), np.random.RandomState(0).randint(1, 5, 40)
    copies = np.repeat(np.arange(40), times)
    gram = np.asarray(x) @ np.asarray(x).T
    weighted = ward_start(jnp.asarray(gram), jnp.asarray(times / 5, jnp.float32), 12)
    tree = scipy.cluster.hierarchy.ward(np.asarray(x, np.float64)[copies])
    labels = scipy.cluster.hierarchy.fcluster(tree, 12, "maxclust")
    assert len(set(zip(labels, np.asarray(weighted)[copies], strict=True))) == 12


def test_lloyd_equals_scikit_learn_from_the_same_centroids(key):
    x = cloud(n=500, d=8)
    start = x[:25]
    theirs = sklearn.cluster.KMeans(25, init=np.asarray(start), n_init=1, tol=0, algorithm="lloyd")
    theirs.fit(np.asarray(x))
    ours = kmeans(x, 25, key=key, init=start, refine="lloyd")
    np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-5)
    assert len(set(zip(theirs.labels_.tolist(), ours.labels.tolist(), strict=True))) == 25


@pytest.mark.full
@pytest.mark.parametrize("init", ["k-means++", "random", "centroids"])
def test_many_points_without_a_gram_matrix(init, key, monkeypatch):
    x = cloud(n=700, d=6)
    init = x[:20] if init == "centroids" else init
    options = {"key": key, "init": init, "refine": "lloyd", "n_init": 2}
    want = kmeans(x, 20, **options)
    monkeypatch.setattr(engine, "GRAM_BYTES", 1000)
    monkeypatch.setattr(point_space, "_BLOCK_BYTES", 100 * 20 * 4)
    got = kmeans(x, 20, **options)
    np.testing.assert_allclose(got.inertia, want.inertia, rtol=1e-3)
    assert got.converged
    assert (got.sizes > 0).all()
    for options in ({"init": "ward"}, {"init": "random", "refine": "hartigan"}):
        with pytest.raises(InputError, match="needs the Gram matrix, which for 700 points"):
            kmeans(x, 20, key=key, **options)


@pytest.mark.full(quick=1)
@every
def test_every_point_alone(key, init, refine):
    x = cloud(n=20)
    r = kmeans(x, 20, key=key, init=init, refine=refine)
    assert r.labels.tolist() == list(range(20))
    assert (r.centroids == x).all()
    assert r.inertia == 0


@pytest.mark.full
def test_one_cluster(key):
    x = cloud()
    r = kmeans(x, 1, key=key)
    np.testing.assert_allclose(r.centroids[0], x.mean(0), atol=1e-6)
    np.testing.assert_allclose(r.inertia_fraction, 1, rtol=1e-5)


@pytest.mark.full(quick=1)
@every
@pytest.mark.parametrize(("n", "k"), [(N, K), (20, 20)])
def test_equal_points(n, k, key, init, refine):
    r = kmeans(jnp.full((n, D), 2.5), k, key=key, init=init, refine=refine)
    np.testing.assert_allclose(r.inertia, 0, atol=1e-9)
    assert r.inertia_fraction <= 1
    assert (r.sizes >= 1).all()
    np.testing.assert_allclose(r.centroids, 2.5)


@pytest.mark.parametrize("init", ["ward", "k-means++"])
def test_duplicates_are_found(key, init):
    few = cloud(n=K)
    order = np.random.RandomState(1).permutation(np.repeat(np.arange(K), N // K))
    r = kmeans(few[order], K, key=key, init=init)
    assert r.sizes.tolist() == [N // K] * K
    np.testing.assert_allclose(r.inertia_fraction, 0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.full(quick=1)
def test_scale_changes_nothing(scale, init, key):
    x = cloud()
    a, b = (kmeans(x * s, K, key=key, init=init) for s in (1.0, scale))
    assert (a.labels == b.labels).all()
    np.testing.assert_allclose(a.inertia_fraction, b.inertia_fraction, rtol=1e-5)
    np.testing.assert_allclose(b.centroids / scale, a.centroids, atol=1e-5)
    assert not any(np.isnan(np.asarray(v)).any() for v in b)


@pytest.mark.parametrize("init", INITS)
def test_far_outlier_gets_its_own_cluster(init, key):
    x = cloud().at[17].set(1e6)
    r = kmeans(x, K, key=key, init=init)
    assert (np.asarray(r.labels) == int(r.labels[17])).sum() == 1
    assert not any(np.isnan(np.asarray(v)).any() for v in r)


@every
@pytest.mark.full(quick=1)
def test_weights_equal_repeated_points(key, init, refine):
    # Groups far apart: the solution is unique.
    x = cloud(n=N // 3, seed=3).at[:, 0].add(100.0 * (np.arange(N // 3) % K))
    times = jnp.ones(N // 3).at[::2].set(5.0).astype(int)
    options = {"key": key, "init": init, "refine": refine}
    weighted = kmeans(x, K, weights=times.astype(jnp.float32), **options)
    repeated = kmeans(x[np.repeat(np.arange(N // 3), times)], K, **options)
    if init != "random":
        np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-3)
    np.testing.assert_allclose(weighted.inertia, inertia(x, weighted.labels, times), rtol=1e-5)
    assert float(weighted.sizes.sum()) == float(times.sum())


@every
@pytest.mark.full(quick=2)
def test_points_of_weight_zero_do_not_count(key, init, refine):
    x, w = cloud(), jnp.ones(N).at[::4].set(0)
    r = kmeans(x, K, key=key, weights=w, init=init, refine=refine)
    distances = squared_distances(x, r.centroids)
    assert (distances[np.arange(N), np.asarray(r.labels)] <= distances.min(1) + 1e-5).all()
    assert r.sizes.sum() == N * 3 // 4
    assert (r.sizes > 0).all()
    # They have no influence, wherever they are.
    moved = kmeans(x.at[::4].add(50.0), K, key=key, weights=w, init=init, refine=refine)
    np.testing.assert_allclose(r.inertia, moved.inertia, rtol=0.1)
    np.testing.assert_allclose(r.inertia, inertia(x, r.labels, w), rtol=1e-5)


@pytest.mark.parametrize("count", [K + 1, N // 2])
def test_most_points_may_have_weight_zero(count, key):
    x, w = cloud(), jnp.zeros(N).at[:count].set(1)
    r = kmeans(x, K, key=key, weights=w)
    assert sorted(set(r.labels.tolist())) == list(range(K))
    assert (r.sizes > 0).all()
    alone = kmeans(x[:count], K, key=key)
    np.testing.assert_allclose(r.inertia, alone.inertia, rtol=0.05)


@pytest.mark.parametrize("weight", [1e37, 1e-37])
def test_equal_weights_of_any_size_change_nothing(weight, key):
    x = 100 * cloud()
    a, b = kmeans(x, K, key=key), kmeans(x, K, key=key, weights=jnp.full(N, weight))
    assert (a.labels == b.labels).all()
    np.testing.assert_allclose(a.centroids, b.centroids, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(a.inertia_fraction, b.inertia_fraction, rtol=1e-5)


def partitions(n, k):
    """All labels of n points with at most k clusters, up to the numbers of the clusters."""
    if n == 0:
        yield ()
        return
    for rest in partitions(n - 1, k):
        yield from ((*rest, c) for c in range(min(k, max(rest, default=-1) + 2)))


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_different_sizes(seed, key):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((7, 2)).astype(np.float32) * [1, 100, 1e-3, 1][seed]
    if seed == 3:  # only points of small weight differ
        x[:4] = x[0]
    heavy = np.arange(7) < 4 if seed == 3 else rng.rand(7) < 0.5
    w = (np.where(heavy, 1e30, 1e-10) * rng.uniform(0.5, 1, 7)).astype(np.float32)
    r = kmeans(x, 3, key=key, weights=w)
    labels = np.asarray(r.labels)
    best = min(inertia(x, c, w) for c in map(np.array, partitions(7, 3)) if c.max() == 2)
    np.testing.assert_allclose(inertia(x, labels, w), best, rtol=1e-4)
    np.testing.assert_allclose(float(r.inertia), best, rtol=1e-4)
    wide = x.astype(np.float64), w.astype(np.float64)
    for c in range(3):
        mean = np.average(wide[0][labels == c], axis=0, weights=wide[1][labels == c])
        np.testing.assert_allclose(r.centroids[c], mean, rtol=1e-4)


def far_apart(kind):
    """Points in float32 whose small distances inner products do not hold."""
    x = np.random.RandomState(1).standard_normal((N, D))
    if kind == "outlier":
        x[17] += 1e6
    else:
        x += 1000.0 * (np.arange(N) % 3)[:, None]
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "init", "refine"),
    [("outlier", "ward", "hartigan"), ("groups", "ward", "hartigan"), ("outlier", None, "lloyd")],
)
def test_small_distances_beside_large_ones(kind, init, refine, key):
    x = far_apart(kind)
    init = x[:K] + np.float32(0.1) if init is None else init
    r = kmeans(x, K, key=key, init=init, refine=refine)
    with jax.enable_x64(True):
        exact = jnp.asarray(init, jnp.float64) if refine == "lloyd" else init
        want = kmeans(x.astype(np.float64), K, key=key, init=exact, refine=refine)
    assert (np.asarray(r.labels) == np.asarray(want.labels)).all()
    np.testing.assert_allclose(r.inertia, want.inertia, rtol=1e-5)
    np.testing.assert_allclose(r.centroids, want.centroids, rtol=1e-6, atol=1e-5)
    assert r.converged


def test_what_float32_cannot_tell_under_jit_is_not_converged(key):
    cluster = jax.jit(lambda x: kmeans(x, K, key=key))
    assert not cluster(jnp.asarray(far_apart("outlier"))).converged
    assert cluster(cloud()).converged


@pytest.mark.full
def test_small_distances_of_many_points(key, monkeypatch):
    x = far_apart("outlier")
    options = {"key": key, "init": "k-means++", "refine": "lloyd"}
    want = kmeans(x, K, **options)
    monkeypatch.setattr(engine, "GRAM_BYTES", 1000)
    monkeypatch.setattr(point_space, "_BLOCK_BYTES", 50 * K * D * 4)
    got = kmeans(x, K, **options)
    np.testing.assert_allclose(got.inertia, want.inertia, rtol=1e-5)


def test_numpy_arrays_and_lists_are_points(key):
    x, w = np.asarray(cloud()), np.random.RandomState(0).uniform(0.5, 2, N)
    want = kmeans(jnp.asarray(x), K, key=key, weights=jnp.asarray(w, jnp.float32), init=x[:K])
    for convert in (np.asarray, np.ndarray.tolist, np.float64):
        got = kmeans(convert(x), K, key=key, weights=convert(w), init=convert(x[:K]))
        assert all((a == b).all() for a, b in zip(got, want, strict=True))
    whole = np.arange(N * D).reshape(N, D) % 17
    got, want = (kmeans(a, K, key=key) for a in (whole, jnp.asarray(whole, jnp.float32)))
    assert (got.labels == want.labels).all()


@pytest.mark.parametrize("init", INITS)
def test_order_of_points_changes_nothing(init, key):
    x = cloud()
    want = kmeans(x, K, key=key, init=init)
    for seed in range(5):
        order = np.random.RandomState(seed).permutation(N)
        got = kmeans(x[order], K, key=key, init=init)
        assert got.inertia == want.inertia
        same = np.asarray(want.labels)[order]
        pairs = set(zip(same.tolist(), got.labels.tolist(), strict=True))
        assert len(pairs) == K


@pytest.mark.parametrize("init", INITS)
@pytest.mark.full(quick=1)
def test_vmap_equals_loop(init, key):
    x = jnp.stack([cloud(seed=s) for s in range(4)])
    keys = jax.random.split(key, 4)
    batched = jax.vmap(lambda x, key: kmeans(x, K, key=key, init=init))(x, keys)
    for i in range(4):
        one = kmeans(x[i], K, key=keys[i], init=init)
        assert (batched.labels[i] == one.labels).all()
        np.testing.assert_allclose(batched.inertia[i], one.inertia, rtol=1e-5)


def test_jit_equals_eager(key):
    x = cloud()
    a = kmeans(x, K, key=key)
    b = jax.jit(lambda x: kmeans(x, K, key=key))(x)
    assert (a.labels == b.labels).all()


@pytest.mark.full
def test_bfloat16_is_computed_in_float32(key):
    x = cloud().astype(jnp.bfloat16)
    a, b = kmeans(x, K, key=key), kmeans(x.astype(jnp.float32), K, key=key)
    assert a.centroids.dtype == a.inertia.dtype == jnp.float32
    assert (a.labels == b.labels).all()


def test_float64_stays(x64, key):
    x = cloud(dtype=np.float64)
    r = kmeans(x, K, key=key)
    assert r.centroids.dtype == jnp.float64
    np.testing.assert_allclose(r.inertia, inertia(x, r.labels), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be 1 to the number of points, 96; got 0"),
        ({"k": 97}, "k must be 1 to"),
        ({"n_init": 0}, "n_init"),
        ({"max_iters": 0}, "max_iters"),
        ({"tol": -1.0}, "tol"),
        ({"init": "wart"}, "unknown init 'wart'; did you mean 'ward'"),
        ({"init": jnp.zeros((4, 5))}, "init must have shape"),
        ({"refine": "hartigon"}, "did you mean 'hartigan'"),
        ({"points": jnp.zeros((0, 3))}, "points must be"),
        ({"points": jnp.full((96, 2), jnp.nan)}, "NaN"),
        ({"weights": jnp.ones(95)}, r"weights must have shape \(96,\)"),
        ({"weights": -jnp.ones(96)}, "not negative"),
        ({"weights": jnp.zeros(96)}, "at least k = 5 of them positive"),
        ({"weights": [1e-50] * 96}, "weights hold 1e-50, which float32 cannot; scale them, or use"),
        ({"weights": "heavy"}, "weights must be an array of real numbers"),
        ({"init": np.full((5, 6), np.inf)}, "init holds NaN or infinite values"),
        ({"points": [[1.0, 2.0], [3.0]]}, "points must be an array of real numbers, or lists of"),
        ({"points": jnp.zeros((96, 2), complex)}, "points must be real numbers; got complex64"),
        ({"points": np.full((96, 2), 1e300)}, r"points hold 1e\+300, which float32 cannot"),
        ({"points": [1.0, 2.0]}, r"points must be \(n, d\) and not empty; got shape \(2,\)"),
    ],
)
def test_bad_input(arguments, message, key):
    arguments = {"points": cloud(), "k": 5, **arguments}
    with pytest.raises(InputError, match=message):
        # Without the type checks of the tests, which would raise first.
        inspect.unwrap(kmeans)(arguments.pop("points"), arguments.pop("k"), key=key, **arguments)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.sampled_from([(12, 5), (7, 7)]),  # each compiles anew
    distinct=st.integers(1, 12),
    seed=st.integers(0, 999),
    weighted=st.booleans(),
    init=st.sampled_from(INITS),
)
@pytest.mark.full
def test_no_cluster_is_ever_empty(shape, distinct, seed, weighted, init):
    n, k = shape
    rng = np.random.RandomState(seed)
    x = jnp.asarray(rng.standard_normal((distinct, 2))[rng.randint(0, distinct, n)], jnp.float32)
    w = jnp.asarray(rng.randint(1, 4, n), jnp.float32) if weighted else None
    r = kmeans(x, k, key=jax.random.key(seed), weights=w, init=init)
    assert (r.sizes > 0).all()
    assert sorted(set(r.labels.tolist())) == list(range(k))
    assert not any(np.isnan(np.asarray(v)).any() for v in r)
    assert r.inertia <= inertia(x, np.zeros(n, int), w) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
@pytest.mark.full
def test_sharded_points_equal_unsharded(axis_type, spec, key):
    x = cloud(d=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    a, b = kmeans(x, K, key=key), kmeans(sharded, K, key=key)
    assert (np.asarray(a.labels) == np.asarray(b.labels)).all()
    np.testing.assert_allclose(a.centroids, b.centroids, atol=1e-5)
    np.testing.assert_allclose(a.inertia, b.inertia, rtol=1e-5)
    assert b.labels.sharding.mesh == mesh


def test_near_duplicates_end(key):
    """All distances are rounding errors: a nearest-neighbor chain must not run in circles."""
    rng = np.random.RandomState(0)
    base = rng.standard_normal((1, 50)).astype(np.float32)
    x = jnp.asarray(base + 1e-7 * rng.standard_normal((N, 50)).astype(np.float32))
    r = kmeans(x, K, key=key)
    assert (r.sizes > 0).all()
    assert sorted(set(r.labels.tolist())) == list(range(K))
