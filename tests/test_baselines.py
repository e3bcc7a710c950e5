"""The baselines against straightforward numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.methods.mask_prune import MaskPrune, with_global_limit
from fusion_jax.methods.mmd import MMD
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.sketch import Sketch
from fusion_jax.methods.svd import Svd
from fusion_jax.nn.masking import top_mask, top_masks
from tests.helpers import inputs, make

P, KEPT, D = 32, 12, 40


def an_mlp(gated):
    return make(fj.GatedMlp if gated else fj.Mlp, width=P, d_in=D)


def solved(method, gated=False, calibration=None):
    mlp = an_mlp(gated)
    subs = mlp.sub_mlps()
    solution = fj.compress_mlp(
        subs, method, key=jax.random.key(3), act=mlp.act, calibration=calibration
    )
    return subs, np.asarray(subs.rows()), solution


def magnitude(subs):
    rows, o = np.asarray(subs.rows()), subs.down.shape[-1]
    return np.linalg.norm(rows[:, :-o], axis=1) * np.linalg.norm(rows[:, -o:], axis=1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_sketch_mixes_the_units_that_are_not_kept(keep, gated):
    subs, rows, solution = solved(Sketch(width=KEPT, keep=keep), gated)
    whole = int(keep * KEPT)
    order = np.argsort(-magnitude(subs), kind="stable")
    found = np.asarray(solution.parts.rows())
    np.testing.assert_array_equal(found[:whole], rows[order[:whole]])
    # The same S for every part of a row; rows are independent, so that it can be found again.
    mixture = np.linalg.lstsq(rows[order[whole:]].T, found[whole:].T, rcond=None)[0].T
    np.testing.assert_allclose(mixture @ rows[order[whole:]], found[whole:], atol=1e-4)
    assert 0.6 < np.square(mixture).mean() * (KEPT - whole) < 1.5


@pytest.mark.parametrize("gated", [False, True])
def test_clustering_puts_the_root_of_sizes_on_both_sides(gated):
    """On the clusters that the same key gives `Fusion`."""
    subs, _, solution = solved(fj.METHODS["clustering"](width=KEPT), gated)
    _, _, fused = solved(fj.Fusion(width=KEPT), gated)
    labels = np.asarray(fused.parts.labels)
    sizes = np.bincount(labels, minlength=KEPT)
    assert sizes.max() > 1
    for name in ("up", "up_bias", "down", "gate", "gate_bias"):
        rows, found = getattr(subs, name), getattr(solution.parts, name)
        if rows is None:
            assert found is None
            continue
        means = np.stack([np.asarray(rows)[labels == c].mean(0) for c in range(KEPT)])
        # Inside the activation of a gated MLP, a root would be no factor.
        roots = np.ones(KEPT) if name.startswith("gate") else sizes**0.5
        expected = means * roots.reshape(-1, *(1,) * (means.ndim - 1))
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def test_sketch_is_right_in_the_mean():
    subs = an_mlp(gated=False).sub_mlps()
    both = jnp.einsum("pd,po->do", subs.up, subs.down)
    many = jax.vmap(lambda key: Sketch(width=KEPT).solve(subs, key=key).parts)(
        jax.random.split(jax.random.key(0), 4000)
    )
    products = jnp.einsum("npd,npo->ndo", many.up, many.down)
    spread = products.std(0) / 4000**0.5
    assert float((jnp.abs(products.mean(0) - both) / spread).max()) < 6


@pytest.mark.parametrize("gated", [False, True])
def test_prune_keeps_the_largest_scores(gated):
    subs, rows, solution = solved(Prune(width=KEPT), gated)
    scores = magnitude(subs)
    chosen = np.sort(np.argsort(-scores)[:KEPT])
    np.testing.assert_array_equal(np.asarray(solution.parts.rows()), rows[chosen])
    share = scores[chosen].sum() / scores.sum()
    np.testing.assert_allclose(solution.facts.kept_importance, share, rtol=1e-5)


def discrepancy(points, rows):
    """By the sum of five Gaussian kernels, in float64."""

    def squares(a, b):
        return np.square(a[:, None] - b[None]).sum(-1)

    mean = squares(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    def kernel(a, b):
        return sum(np.exp(-squares(a, b) / (mean * 2.0**i)) for i in range(-2, 3)).mean()

    return kernel(points, points) - 2 * kernel(points, rows) + kernel(rows, rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outside", ["outputs", "everywhere"])
def test_mmd_matches_the_distribution(outside, gated):
    method = MMD(width=KEPT, outside=outside, steps=100)
    subs, rows, solution = solved(method, gated)
    o, found = subs.down.shape[-1], np.array(solution.parts.rows(), np.float64)
    root = (P / KEPT) ** 0.5
    if outside == "outputs":
        found[:, -o:] /= root**2
    else:
        found /= root
    facts = solution.facts
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(discrepancy(found, rows), facts.end, atol=1e-5)
    rng = np.random.default_rng(0)
    subsets = [rows[rng.choice(P, KEPT, replace=False)] for _ in range(100)]
    assert discrepancy(found, rows) < min(discrepancy(subset, rows) for subset in subsets)


@pytest.mark.parametrize(
    ("make_method", "message"),
    [
        (lambda: Sketch(keep=1.0), "keep must be"),
        (lambda: MMD(steps=0), "steps must be at least 1"),
        (lambda: MMD(round_to=0), "round_to must be at least 1"),
        (lambda: solved(Prune(score="activation")), "needs calibration"),
        (lambda: solved(Sketch(width=P + 1)), "above the MLP's own"),
    ],
)
def test_bad_options(make_method, message):
    with pytest.raises(fj.InputError, match=message):
        make_method()


@pytest.mark.parametrize("gated", [False, True])
def test_svd_is_the_nearest(gated):
    subs, _, solution = solved(Svd(rank=3), gated)
    names = ["gate", "up", "down"] if gated else ["up", "down"]
    assert sorted(solution.parts) == sorted(names)
    lost = whole = 0.0
    for name in names:
        matrix = np.asarray(getattr(subs, name))
        matrix = matrix if name == "down" else matrix.T
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        a, b = solution.parts[name]
        np.testing.assert_allclose(a @ b, (left[:, :3] * values[:3]) @ right[:3], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), values[:3] ** 0.5, rtol=1e-4)
        lost, whole = lost + np.square(values[3:]).sum(), whole + np.square(values).sum()
    np.testing.assert_allclose(solution.facts.error, (lost / whole) ** 0.5, rtol=1e-3)


def test_svd_of_the_paper_has_a_quarter_of_the_parameters():
    rank = Svd(rank=0.25).spec(768, 3072)["rank"]
    assert rank == Svd.paper().rank == 153
    assert 0.249 < rank * (768 + 3072) / (768 * 3072) < 0.25


def gradients(subs):
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), subs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_mask_prune_keeps_the_largest_scores(score, gated):
    mlp = an_mlp(gated)
    subs = mlp.sub_mlps()
    slopes = gradients(subs) if score == "gradient" else None
    method = MaskPrune(keep=0.3, score=score)
    solution = fj.compress_mlp(subs, method, key=jax.random.key(0), gradients=slopes)
    names = ["gate", "up", "down"] if gated else ["up", "down"]
    parts = {n: np.asarray(getattr(subs, n)) for n in names}
    scores = {
        n: np.abs(x * (1 if slopes is None else getattr(slopes, n))) for n, x in parts.items()
    }
    flat = np.sort(np.concatenate([x.reshape(-1) for x in scores.values()]))[::-1]
    limit = flat[int(0.3 * len(flat)) - 1]
    for name in names:
        kernel, mask = (x if name == "down" else x.T for x in solution.parts[name])
        np.testing.assert_array_equal(mask, scores[name] >= limit)
        np.testing.assert_array_equal(kernel, np.where(mask, parts[name], 0))


@pytest.mark.parametrize("gated", [False, True])
def test_prune_by_gradient_is_the_derivative_of_leaving_a_unit_out(gated, key):
    mlp, x = an_mlp(gated), inputs(D, 50)

    def loss(subs, share):
        made = mlp.abstract(type(mlp), P)
        made.load_sub_mlps(subs._replace(down=subs.down * share[:, None]), mlp.out_bias())
        return jnp.square(made(x)).sum()

    subs = mlp.sub_mlps()
    slopes = jax.grad(loss)(subs, jnp.ones(P))
    scores = np.abs(jax.grad(loss, argnums=1)(subs, jnp.ones(P)))
    solution = fj.compress_mlp(subs, Prune(width=KEPT, score="gradient"), key=key, gradients=slopes)
    chosen = np.sort(np.argsort(-scores)[:KEPT])
    np.testing.assert_array_equal(solution.parts.up, subs.up[chosen])


def test_one_limit_for_all_mlps(key):
    layers = nnx.List([an_mlp(False) for _ in range(3)])
    layers[1].up.kernel.set_value(layers[1].up.kernel[...] * 3)
    chosen = with_global_limit(layers, MaskPrune(keep=0.25))
    smaller, _ = fj.compress(layers, chosen, key=key)
    kernels = [
        np.abs(np.asarray(m.kernel)) for i in range(3) for m in (layers[i].up, layers[i].down)
    ]
    limit = np.sort(np.concatenate([k.reshape(-1) for k in kernels]))[::-1]
    limit = limit[int(0.25 * len(limit)) - 1]
    masks = [np.asarray(m.mask) for i in range(3) for m in (smaller[i].up, smaller[i].down)]
    for mask, kernel in zip(masks, kernels, strict=True):
        np.testing.assert_array_equal(mask, kernel >= limit)
    assert chosen["1"].keep > chosen["0"].keep


@pytest.mark.parametrize("method", [MaskPrune(score="gradient"), Prune(score="gradient")])
def test_gradients_are_asked_for_and_refused(method, key):
    mlp = an_mlp(False)
    with pytest.raises(fj.InputError, match="needs gradients"):
        fj.compress(mlp, method, key=key)
    with pytest.raises(fj.InputError, match="no gradient of down"):
        fj.compress(mlp, method, key=key, gradients={"up.bias": jnp.zeros(P)})
    with pytest.raises(fj.InputError, match="Svd takes no gradients"):
        fj.compress(mlp, Svd(rank=1), key=key, gradients={})
    with pytest.raises(fj.InputError, match="with score 'gradient' takes no calibration"):
        fj.compress(mlp, method, key=key, calibration={"": inputs(D)}, gradients={})


@pytest.mark.parametrize("method", [MaskPrune(), Prune(), Prune(score="activation")])
def test_what_a_score_does_not_look_at_is_refused(method, key):
    mlp, name = an_mlp(False), type(method).__name__
    subs, seen = mlp.sub_mlps(), inputs(D)
    known = seen if method.score == "activation" else None
    refused = f"{name} with score '{method.score}' takes no "
    with pytest.raises(fj.InputError, match=refused + "gradients"):
        fj.compress_mlp(
            subs, method, key=key, act="gelu", calibration=known, gradients=gradients(subs)
        )
    if known is None:
        with pytest.raises(fj.InputError, match=refused + "calibration"):
            fj.compress(mlp, method, key=key, calibration={"": seen})
        with pytest.raises(fj.InputError, match=refused + "calibration"):
            fj.compress_mlp(subs, method, key=key, act="gelu", calibration=seen)
    if isinstance(method, MaskPrune):
        with pytest.raises(fj.InputError, match=refused + "gradients"):
            with_global_limit(nnx.List([mlp]), method, gradients={})


def largest(scores, keep):
    """The mask by a stable sort."""
    flat = np.asarray(scores, np.float64).reshape(-1)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def numbers():
    """Arrays of many kinds: ties, signs, zeros, infinities, and numbers of very many sizes."""
    rng = np.random.default_rng(0)
    ends = np.array([0.0, -0.0, np.inf, -np.inf, 1e-30, -1e-30, 3e38, -3e38])
    yield from (np.array([1.5]), np.zeros(17), np.full((3, 2), -2.5), np.full(5, np.inf), ends)
    for size in (2, 7, 210):
        yield rng.normal(size=size)
        yield -np.abs(rng.normal(size=size))
        yield rng.integers(-2, 3, size=size)
        yield rng.choice(ends, size=size)
        yield np.sign(rng.normal(size=size)) * np.exp(20 * rng.normal(size=size).clip(-4, 4))
        yield np.where(rng.random(size) < 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_top_mask_equals_sorting(dtype, x64):
    found = jax.jit(top_mask)
    for scores in numbers():
        x = jnp.asarray(scores, dtype)
        for keep in {0, 1, x.size // 3, x.size - 1, x.size}:
            np.testing.assert_array_equal(found(x, jnp.int32(keep)), largest(x, keep))


def test_top_mask_under_transformations(key):
    x = jax.random.normal(key, (8, 40)).round(1)
    keep = jnp.arange(8, dtype=jnp.int32) * 5
    want = np.stack([largest(row, k) for row, k in zip(x, keep, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(top_mask))(x, keep), want)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_array_equal(jax.jit(top_mask)(sharded, jnp.int32(77)), largest(x, 77))
    slope = jax.grad(lambda x: jnp.where(top_mask(x, jnp.int32(77)), x, 0).sum())(x)
    np.testing.assert_array_equal(slope, largest(x, 77))


@pytest.mark.parametrize("share", [1e-9, 0.29, 0.5, 1.0])
def test_top_masks_of_several_arrays(share):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 9, size=s).astype(np.float32) for s in ((5, 8), (20,), (4, 10))]
    keep = {1e-9: 1, 0.29: 29, 0.5: 50, 1.0: 100}[share]
    want = largest(np.concatenate([x.reshape(-1) for x in arrays]), keep)
    got = top_masks(arrays, share)
    assert [mask.shape for mask in got] == [x.shape for x in arrays]
    np.testing.assert_array_equal(np.concatenate([mask.reshape(-1) for mask in got]), want)


def test_a_share_over_all_mlps_is_not_rounded_down(key):
    layers = nnx.List([make(fj.Mlp, width=5, d_in=5, d_out=5) for _ in range(2)])
    chosen = with_global_limit(layers, MaskPrune(keep=0.29))
    assert sum(round(method.keep * 50) for method in chosen.values()) == 29
    smaller, _ = fj.compress(layers, chosen, key=key)
    masks = [m.mask[...] for mlp in smaller for m in (mlp.up, mlp.down)]
    assert sum(int(mask.sum()) for mask in masks) == 29


@pytest.mark.parametrize(
    "method", [Prune(score="gradient", width=2), MaskPrune(score="gradient", keep=0.25)]
)
def test_experts_without_gradients_go_by_magnitude(method, key):
    """Batches may reach some experts only."""
    subs = jax.tree.map(
        lambda *x: jnp.stack(x), *(make(fj.Mlp, width=8, seed=s).sub_mlps() for s in range(2))
    )
    slopes = jax.tree.map(lambda x: x.at[1].set(0.0), subs)
    found = fj.compress_mlp(subs, method, key=key, gradients=slopes)
    plainly = fj.compress_mlp(subs, dataclasses.replace(method, score="magnitude"), key=key)
    second = [jax.tree.leaves(jax.tree.map(lambda x: x[1], s.parts)) for s in (found, plainly)]
    for a, b in zip(*second, strict=True):
        np.testing.assert_array_equal(a, b)
    squared = fj.compress_mlp(subs, method, key=key, gradients=subs)
    for a, b in zip(*(jax.tree.leaves(s.parts) for s in (found, squared)), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
