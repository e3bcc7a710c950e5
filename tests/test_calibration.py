"""Fusing with calibration: geometries, refitted weights, matched kernels, budgets."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.calibration import sample as calibration
from fusion_jax.calibration.calibrator import Calibrator
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.calibration.upstream import drawn_loss, output_gradients
from fusion_jax.cli.demo import bit_equal
from fusion_jax.compression import allocation, width_scores
from fusion_jax.methods.geometry import points
from fusion_jax.methods.least_squares import (
    FACTOR_RANGE,
    RIDGE_OF_FACTORS,
    _bounded_ridge,
    matched,
    refitted,
)
from fusion_jax.models.moe import Moe
from fusion_jax.models.tokens import TokenBatch
from fusion_jax.nn.fused import Factors
from fusion_jax.nn.mlp import experts
from fusion_jax.nn.submlps import responses
from ntk.mlp import mlp_weights, traced_kernel, upstream_kernel
from tests import glue, tiny
from tests.helpers import unchecked
from tests.tiny import checkpoint

D, P, C, T = 6, 32, 8, 200
KEY = jax.random.key(0)
kinds = pytest.mark.parametrize("kind", [fj.Mlp, fj.GatedMlp])
scalings = pytest.mark.parametrize("scaling", ["adam", "sgd"])


def make(kind, dtype=jnp.float64, noise=0.2):
    """An MLP whose sub-MLPs come in C noisy groups."""
    mlp = kind(D, P, 5, act="gelu", param_dtype=dtype, rngs=nnx.Rngs(0))
    rows = mlp.sub_mlps().rows()
    rows = jnp.tile(rows[:C], (P // C, 1)) + noise * jax.random.normal(KEY, rows.shape, dtype)
    mlp.load_sub_mlps(mlp.sub_mlps().with_rows(rows), mlp.out_bias())
    return mlp


def inputs(seed=1, dtype=jnp.float64):
    """Inputs with directions that matter much more than others."""
    spread = jnp.sqrt(jnp.arange(1, D + 1, dtype=dtype))[None]
    return spread * jax.random.normal(jax.random.key(seed), (T, D), dtype)


def fuse(mlp, x, **options):
    method = fj.Fusion(width=C, **options)
    return fj.compress(mlp, method, key=KEY, calibration={"": x})[0]


def relative(a, b):
    return float(jnp.linalg.norm(b - a) / jnp.linalg.norm(a))


@kinds
def test_refit_is_ridge_regression(kind, x64):
    mlp, x = make(kind), inputs()
    subs = mlp.sub_mlps()
    few = jax.tree.map(lambda a: a[:C], subs)
    weights = jnp.linspace(0.0, 2.0, T)
    seen = fj.Calibration(x, weights=weights)
    result = refitted(few, subs, seen, "gelu", 0.05)
    h, target = (np.asarray(responses(s, x, "gelu").hidden) for s in (few, subs))
    w = np.sqrt(np.asarray(weights) / np.asarray(weights).sum())[:, None]
    h, target = w * h, w * (target @ np.asarray(subs.down))
    level = 0.05 * np.trace(h.T @ h) / C
    rows = np.concatenate([h, np.sqrt(level) * np.eye(C)])
    right = np.concatenate([target, np.sqrt(level) * np.asarray(few.down)])
    np.testing.assert_allclose(result.down, np.linalg.lstsq(rows, right, rcond=None)[0], atol=1e-10)
    assert (result.up == few.up).all()


def test_refit_in_blocks_and_to_given_outputs(x64, monkeypatch):
    mlp, x = make(fj.Mlp), inputs()
    subs = mlp.sub_mlps()
    few = jax.tree.map(lambda a: a[:C], subs)
    whole = refitted(few, subs, fj.Calibration(x), "gelu", 0.01).down
    monkeypatch.setattr("fusion_jax.methods.gram.BLOCK", 64)
    given = fj.Calibration(x, outputs=mlp(x) - mlp.out_bias()[None])
    np.testing.assert_allclose(refitted(few, subs, given, "gelu", 0.01).down, whole, atol=1e-10)


@kinds
@scalings
@pytest.mark.full(quick=1)
def test_matching_brings_the_kernel_nearer_and_keeps_the_function(kind, scaling, x64):
    mlp, x, new = make(kind), inputs(), inputs(2)
    plain = fuse(mlp, x, scaling=scaling, match=False)
    fitted = fuse(mlp, x, scaling=scaling)
    np.testing.assert_allclose(plain(new), fitted(new), atol=1e-10)
    np.testing.assert_allclose(fitted.plain()(new), fitted(new), atol=1e-10)
    up = jax.random.normal(KEY, (T, 5), jnp.float64)

    def kernel(module):
        weights = mlp_weights(module)
        if scaling == "sgd":
            return traced_kernel(weights, new)
        return upstream_kernel(weights, new, up, kind="adam")

    errors = [relative(kernel(mlp), kernel(m)) for m in (plain, fitted)]
    assert errors[1] < 0.95 * errors[0], errors


@kinds
@scalings
def test_matching_gives_the_best_coefficients(kind, scaling, x64):
    mlp, x = make(kind), inputs()
    subs, sizes = mlp.sub_mlps(), jnp.full(C, P / C)
    labels = jnp.tile(jnp.arange(C, dtype=jnp.int32), P // C)
    few = jax.tree.map(lambda a: a[:C], subs)
    got = matched(few, subs, labels, sizes, fj.Calibration(x), "gelu", scaling)
    old, new = responses(subs, x, "gelu").hidden, responses(few, x, "gelu").hidden
    second = jnp.sign if scaling == "adam" else jnp.asarray
    power = 1 if scaling == "adam" else 2

    def error(outer):
        return relative(old @ second(old).T, (new * outer[None] ** power) @ second(new).T)

    # A small ridge keeps it from the exact minimum.
    least = error(got.outer) - 1e-2
    assert least < error(jnp.sqrt(sizes) if scaling == "sgd" else sizes)
    for i in range(C):
        assert least < error(got.outer.at[i].multiply(1.5))
        assert least < error(got.outer.at[i].multiply(0.5))
    assert isinstance(got, Factors)
    assert all((f > 0).all() for f in got)


@kinds
def test_second_factors_for_adam_are_the_best_at_their_pairs(kind, x64):
    """Against a ridge regression of every pair of positions, written out."""
    mlp, x = make(kind), inputs()[:40]
    subs, labels = mlp.sub_mlps(), jnp.tile(jnp.arange(C, dtype=jnp.int32), P // C)
    few = jax.tree.map(lambda a: a[:C] + 0.1, subs)
    got = matched(few, subs, labels, jnp.full(C, P / C), fj.Calibration(x), "gelu", "adam")
    above = np.asarray(jax.random.normal(jax.random.key(0), (40, subs.down.shape[1]), x.dtype))
    slopes = zip(responses(subs, x, "gelu").slopes, responses(few, x, "gelu").slopes, strict=True)
    for (s, z), inner in zip(slopes, got[1:], strict=False):
        a, b = (np.asarray(u) * (above @ np.asarray(m.down).T) for u, m in ((s, subs), (z, few)))
        pair = (np.asarray(x) @ np.sign(x).T + 1)[..., None]
        terms = (pair * b[:, None] * np.sign(b)[None]).reshape(-1, C)
        want = (pair * a[:, None] * np.sign(a)[None]).sum(-1).reshape(-1)
        sizes = (np.abs(u) * np.linalg.norm(m.down, axis=1) for u, m in ((s, subs), (z, few)))
        old, new = (each.sum(0) for each in sizes)
        start = old.reshape(-1, C).sum(0) / new
        levels = RIDGE_OF_FACTORS * np.square(terms).sum(0)
        rows = np.concatenate([terms, np.diag(np.sqrt(levels))])
        right = np.concatenate([want - terms @ start, np.zeros(C)])
        best = start + np.linalg.lstsq(rows, right, rcond=None)[0]
        assert (best > 0.02 * start).all()
        np.testing.assert_allclose(inner, best, rtol=1e-5)


def rarely_active(kind=fj.Mlp, bias=-3.5, act="gelu", seed=0):
    """64 units that few inputs activate."""
    mlp = kind(8, 64, 8, act=act, rngs=nnx.Rngs(seed))
    (mlp.gate if kind is fj.GatedMlp else mlp.up).bias.set_value(jnp.full(64, bias))
    return mlp


def fused_with_and_without(mlp, x, scaling, width=12):
    """The fused MLP with matched factors, the one with standard factors, and the ratios."""
    fused = [
        fj.compress(
            mlp,
            fj.Fusion(width=width, scaling=scaling, match=match),
            key=KEY,
            calibration={"": x},
        )[0]
        for match in (True, False)
    ]
    pairs = zip(*(m.factors() for m in fused), strict=True)
    used = 3 if isinstance(mlp, fj.GatedMlp) else 2  # a plain MLP has no middle
    return *fused, np.stack([a / b for a, b in pairs])[:used]


def after_a_step(module, x):
    """How much a first step of Adam at a rate of 1e-3 changes the outputs, relative to them."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    above = jax.random.normal(KEY, (len(x), 8))

    def loss(params):
        return (nnx.merge(graph, params, rest)(x) * above).sum()

    gradients = jax.grad(loss)(params)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, gradients)
    return relative(module(x), nnx.merge(graph, moved, rest)(x))


@pytest.mark.full(quick=1)
@scalings
def test_factors_stay_near_the_standard_ones(scaling):
    mlp, x = rarely_active(), jax.random.normal(jax.random.key(0), (64, 8))
    new = jax.random.normal(jax.random.key(99), (64, 8))
    fitted, plain, ratios = fused_with_and_without(mlp, x, scaling)
    assert (np.abs(np.log(ratios)) <= np.log(FACTOR_RANGE) + 1e-5).all()
    assert after_a_step(fitted, new) < 1.3 * after_a_step(plain, new)


@pytest.mark.full(quick=1)
@kinds
@scalings
def test_two_positions_hardly_move_factors(kind, scaling):
    mlp, x = rarely_active(kind, bias=-0.5), jax.random.normal(jax.random.key(3), (2, 8))
    new = jax.random.normal(jax.random.key(99), (64, 8))
    fitted, plain, ratios = fused_with_and_without(mlp, x, scaling)
    # Three pairs of positions, for 12 factors.
    assert (np.abs(np.log(ratios)) <= np.log(FACTOR_RANGE) * 3 / (4 * 12) + 1e-5).all()
    assert not (ratios == 1).all()
    want = traced_kernel(mlp_weights(mlp), new, kind=scaling)
    errors = [
        relative(want, traced_kernel(mlp_weights(m), new, kind=scaling)) for m in (fitted, plain)
    ]
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.full(quick=2)
@scalings
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_units_dead_on_the_text_keep_their_standard_factors(act, scaling):
    mlp = rarely_active(act=act, bias=0.0)
    dead = jnp.arange(64) % 2 == 0
    mlp.up.bias.set_value(jnp.where(dead, -12.0, 0.0))
    x = jax.random.normal(KEY, (128, 8))
    fitted, _, ratios = fused_with_and_without(mlp, x, scaling, width=40)
    labels = np.asarray(fitted.labels[...])
    alive = np.zeros(40, bool)
    alive[labels[~np.asarray(dead)]] = True
    assert not alive.all()
    assert (ratios[:, ~alive] == 1).all()
    assert (ratios[:, alive] != 1).any()


def test_bounded_regression(x64):
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, y = rng.normal(size=(40, 6)), rng.normal(size=40)
        start = rng.uniform(1, 2, 6)
        levels = RIDGE_OF_FACTORS * np.square(a).sum(0)
        rows = np.concatenate([a, np.diag(np.sqrt(levels))])
        right = np.concatenate([y, np.sqrt(levels) * start])
        gram = jnp.asarray(a.T @ a)
        known = jnp.diagonal(gram), jnp.asarray(a.T @ (y - a @ start)), jnp.asarray(start)
        args = partial(jnp.matmul, gram), *known
        low, high = np.full(6, -0.05), np.full(6, 0.1)
        high[2] = low[2]
        free = _bounded_ridge(*args, jnp.full(6, -9.0), jnp.full(6, 9.0))
        np.testing.assert_allclose(free, np.linalg.lstsq(rows, right, rcond=None)[0], rtol=1e-5)
        got = np.asarray(_bounded_ridge(*args, jnp.asarray(low), jnp.asarray(high)))
        assert ((low <= got) & (got <= high)).all()
        inside = (low < got) & (got < high)
        # What is inside is the best, given the others.
        np.testing.assert_allclose((rows.T @ (rows @ got - right))[inside], 0, atol=1e-5)


@kinds
@scalings
@pytest.mark.full(quick=2)
def test_full_width_is_the_same_function_and_kernel(kind, scaling, x64):
    mlp, x = make(kind), inputs()
    method = fj.Fusion(width=P, scaling=scaling)
    fused, _ = fj.compress(mlp, method, key=KEY, calibration={"": x})
    np.testing.assert_allclose(fused(x), mlp(x), atol=1e-8)
    for factor in fused.factors():
        np.testing.assert_allclose(factor, 1, atol=1e-8)


@pytest.mark.full
def test_folded_has_no_factors():
    fused = fuse(make(fj.Mlp, jnp.float32), inputs(dtype=jnp.float32), scaling="folded")
    assert all((f == 1).all() for f in fused.factors())


@kinds
def test_geometries(kind, x64):
    mlp, x = make(kind), inputs()
    subs, seen = mlp.sub_mlps(), fj.Calibration(x)
    unit = responses(subs, x, "gelu")
    gated = kind is fj.GatedMlp
    hat = np.concatenate([x, np.ones((T, 1))], 1)
    size = np.linalg.norm(subs.down, axis=1)

    function = np.asarray(points("function", subs, seen, "gelu"))
    blocks = [np.sqrt((unit.hidden**2).mean(0))[:, None] * subs.down]
    blocks += [
        (np.linalg.norm(hat, axis=1)[:, None] * s * size[None]).T / np.sqrt(T) for s in unit.slopes
    ]
    blocks += [np.asarray(unit.hidden).T / np.sqrt(T)]
    blocks = [b - b.mean(0) for b in map(np.asarray, blocks)]
    blocks = np.concatenate([b / np.linalg.norm(b) for b in blocks], 1)
    np.testing.assert_allclose(function @ function.T, blocks @ blocks.T, atol=1e-12)

    sensitivity = np.asarray(points("sensitivity", subs, seen, "gelu"))
    moment = hat.T @ hat / T
    pairs = [(subs.up, subs.up_bias)]
    if gated:
        pairs.insert(0, (subs.gate, subs.gate_bias))
    gram = (unit.hidden**2).mean(0) ** 0.5
    gram = gram[:, None] * (subs.down @ subs.down.T) * gram[None]
    for (w, b), slope in zip(pairs, unit.slopes, strict=True):
        rows = np.concatenate([w, b[:, None]], 1) * (size * np.sqrt((slope**2).mean(0)))[:, None]
        gram = gram + rows @ moment @ rows.T
    np.testing.assert_allclose(sensitivity @ sensitivity.T, gram, atol=1e-10)


@pytest.mark.full
def test_weights_are_repeated_positions(x64):
    mlp, x = make(fj.Mlp), inputs()
    subs = mlp.sub_mlps()
    twice = fj.Calibration(jnp.concatenate([x[:9], x[:4], jnp.zeros((2, D))]), None, None)
    twice = twice._replace(weights=jnp.array([1.0] * 13 + [0.0] * 2))
    once = fj.Calibration(x[:9], weights=jnp.array([2.0] * 4 + [1.0] * 5))
    # Adam's second factors are fitted with other random numbers for each position.
    # How far the factors of members may go depends on the number of positions.
    for method in (
        fj.Fusion(width=C, scaling="sgd", represent="mean"),
        fj.Fusion(width=C, scaling="sgd", match=False),
    ):
        a, b = (
            fj.compress_mlp(subs, method, key=KEY, act="gelu", calibration=seen)
            for seen in (twice, once)
        )
        assert (a.parts.labels == b.parts.labels).all()
        for p, q in zip(jax.tree.leaves(a.parts), jax.tree.leaves(b.parts), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-8)


def test_paper_takes_no_notice_of_calibration():
    mlp, x = make(fj.Mlp, jnp.float32), inputs(dtype=jnp.float32)
    method = fj.Fusion.paper(width=C)
    with_text, _ = fj.compress(mlp, method, key=KEY, calibration={"": x})
    without, report = fj.compress(mlp, method, key=KEY)
    assert (with_text(x) == without(x)).all()
    assert report.calibration is None


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return fj.load(checkpoint(tmp_path_factory.mktemp("bert") / "m"))


def token_batches(padding=3):
    ids = np.random.RandomState(0).randint(5, 40, (4, 12)).astype(np.int32)
    mask = np.ones((4, 12), bool)
    mask[:, 12 - padding :] = False
    whole = {"input_ids": ids, "attention_mask": mask}
    return [{name: x[:2] for name, x in whole.items()}, whole]


def test_an_mlp_that_the_model_does_not_call_is_one_error(tmp_path):
    model = fj.load(checkpoint(tmp_path / "model"))
    model.schedule = (0,)
    with pytest.raises(fj.InputError, match="does not call one of its MLPs"):
        mlp_inputs(model, **tiny.batch("bert"))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_text_needs_a_tokenizer(family, tmp_path):
    """Without files, transformers makes a tokenizer without words for some families."""
    model = fj.load(checkpoint(tmp_path / "m", family))
    for source in (["some text"], "random"):
        with pytest.raises(fj.InputError, match="has no tokenizer"):
            fj.compress(model, fj.Fusion(width=8), key=KEY, calibration=source)


def test_positions_are_those_of_text(bert):
    batch = token_batches()[1]
    seen = fj.calibrate(bert, [batch], key=KEY)
    inside = mlp_inputs(bert, **batch)
    for path, x in seen.items():
        want = np.asarray(inside[path])[batch["attention_mask"]]
        assert x.shape == want.shape
        np.testing.assert_allclose(np.sort(x, 0), np.sort(want, 0), atol=1e-5)
    few = fj.calibrate(bert, [batch], key=KEY, max_positions=7)
    assert all(x.shape[0] == 7 for x in few.values())


@pytest.mark.full
def test_sequential_calibration_sees_the_fused_sites_below(bert):
    method = fj.Fusion(width=4, sequential=True)
    chosen = fj.sites(bert)
    source = Calibrator(bert, chosen, token_batches(), sequential=True, key=KEY)
    source.capture()
    first = source.of(chosen[0])
    assert first.outputs is None
    fused, _ = fj.compress(bert, method, key=KEY, layers=[0], calibration=token_batches())
    source.compressed(chosen[0], fj.sites(fused)[0].mlp)
    assert source.of(chosen[1]).outputs is None
    second = source.of(chosen[1], sequential=True)
    now = fj.calibrate(fused, token_batches(), key=KEY)[chosen[1].path]
    np.testing.assert_allclose(second.inputs, now, atol=1e-5)
    before = fj.calibrate(bert, token_batches(), key=KEY)[chosen[1].path]
    old = chosen[1].mlp
    want = old(jnp.asarray(before)) - old.out_bias()[None]
    np.testing.assert_allclose(second.outputs, want, atol=1e-5)
    assert relative(before, now) > 1e-3
    both, report = fj.compress(bert, method, key=KEY, calibration=token_batches())
    assert report.calibration == "54 positions of text"
    assert [site.mlp.width for site in fj.sites(both)] == [4] * len(chosen)


def test_sequential_is_each_method_s_own(bert):
    """A site that is not sequential is calibrated in the original model, also beside others."""
    paths = [site.path for site in fj.sites(bert)]
    apart, follows = fj.Fusion(width=4), fj.Fusion(width=4, sequential=True)
    plan = {paths[0]: apart, paths[1]: apart, paths[2]: follows}
    mixed, alone, both = (
        fj.compress(bert, method, key=KEY, calibration=token_batches())[0]
        for method in (plan, apart, follows)
    )
    assert bit_equal(mixed.layers[1].mlp, alone.layers[1].mlp)
    assert not bit_equal(mixed.layers[1].mlp, both.layers[1].mlp)
    assert not bit_equal(mixed.layers[2].mlp, alone.layers[2].mlp)


def test_options_that_would_do_nothing(bert):
    follows, mlp = fj.Fusion(width=4, sequential=True), make(fj.Mlp, jnp.float32)
    seen = {"": inputs(dtype=jnp.float32)}
    with pytest.raises(fj.InputError, match="sequential needs calibration"):
        fj.compress(mlp, follows, key=KEY)
    with pytest.raises(fj.InputError, match="sequential needs calibration text or tokens; inputs"):
        fj.compress(mlp, follows, key=KEY, calibration=seen)
    with pytest.raises(fj.InputError, match="for the sites of a model"):
        fj.compress_mlp(mlp.sub_mlps(), follows, key=KEY, act="gelu", calibration=seen[""])
    with pytest.raises(fj.InputError, match="no chosen site has any"):
        fj.compress(bert, fj.Fusion(by_use=0.5), key=KEY, calibration=token_batches())


def test_saved_inputs_and_text_files(bert, tmp_path):
    import safetensors.numpy

    seen = fj.calibrate(bert, token_batches(), key=KEY)
    file = tmp_path / "seen.safetensors"
    safetensors.numpy.save_file(seen, file)
    with pytest.raises(fj.InputError, match="these are inputs by site already"):
        fj.calibrate(bert, file, key=KEY)
    method = fj.Fusion(width=4)
    a, _ = fj.compress(bert, method, key=KEY, calibration=file)
    b, _ = fj.compress(bert, method, key=KEY, calibration=seen)
    leaves = (jax.tree.leaves(nnx.state(m)) for m in (a, b))
    assert all((p == q).all() for p, q in zip(*leaves, strict=True))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no text"),
        (["  "], "no text"),
        (["a sentence"], "tokenizer"),
        ("/nowhere.txt", "cannot read"),
        ("/nowhere.safetensors", "cannot read"),
        ({"x": np.ones((3, 4))}, "no inputs for"),
    ],
)
def test_bad_calibration(bert, source, message):
    model = bert if message != "tokenizer" else nnx.List([make(fj.Mlp, jnp.float32)])
    with pytest.raises(fj.InputError, match=message):
        fj.compress(model, fj.Fusion(width=4), key=KEY, calibration=source)


def test_calibration_that_does_not_fit():
    mlp, x = make(fj.Mlp, jnp.float32), inputs(dtype=jnp.float32)
    with pytest.raises(fj.InputError, match=r"must be \(t, 6\)"):
        fj.compress(mlp, fj.Fusion(width=4), key=KEY, calibration={"": x[:, :3]})
    with pytest.raises(fj.InputError, match="needs calibration"):
        fj.compress(mlp, fj.Fusion(width=4, metric="function"), key=KEY)
    with pytest.raises(fj.InputError, match="takes no calibration"):
        fj.compress(mlp, fj.METHODS["clustering"](width=4), key=KEY, calibration={"": x})
    with pytest.raises(fj.InputError, match="unknown activation"):
        fj.compress_mlp(mlp.sub_mlps(), fj.Fusion(width=4), key=KEY, calibration=x)


@pytest.mark.full
def test_experts_are_calibrated_on_what_is_routed_to_them():
    both = experts(lambda **k: make(fj.GatedMlp, jnp.float32), 2, rngs=nnx.Rngs(0))
    x = inputs(dtype=jnp.float32)
    slots = jnp.stack([x, jnp.pad(x[:150], ((0, T - 150), (0, 0)))])
    fused, _ = fj.compress(both, fj.Fusion(width=C), key=KEY, calibration={"": slots})
    alone = fuse(make(fj.GatedMlp, jnp.float32), x[:150])
    second = jax.tree.map(lambda a: a[1], fused)
    assert (second.labels[...] == alone.labels[...]).all()
    np.testing.assert_allclose(second(x), alone(x), atol=1e-4)


def routed_by_hand(model, batch, monkeypatch):
    """Returns the real inputs of each expert within its capacity, found token by token."""
    seen, call = [], Moe.__call__
    monkeypatch.setattr(Moe, "__call__", lambda moe, *a: seen.append((moe, a[0])) or call(moe, *a))
    model(**batch)
    monkeypatch.undo()
    paths = {id(site.mlp): site.path for site in fj.sites(model)}
    found = {}
    for moe, x in seen:
        path = paths[id(moe.experts)]
        name = "decoder_attention_mask" if path.startswith("decoder.") else "attention_mask"
        mask = batch.get(name, np.ones(x.shape[:2], int))
        rows = [[] for _ in range(moe.router.out_features)]
        for text, real in zip(np.asarray(x), np.asarray(mask), strict=True):
            taken = np.zeros(len(rows), int)
            for position, counts in zip(text, real, strict=True):
                scores = position @ np.asarray(moe.router.kernel[...])
                for e in np.argsort(-scores)[: moe.top_k]:
                    taken[e] += 1
                    if counts and (moe.capacity is None or taken[e] <= moe.capacity):
                        rows[e].append(position)
        found[path] = rows
    return found


@pytest.mark.parametrize("family", ["switch", "mixtral"])
@pytest.mark.full
def test_experts_see_what_a_loop_over_tokens_routes_to_them(family, tmp_path, monkeypatch):
    head = dict(tiny.GENERATIVE)[family]
    model = fj.load(checkpoint(tmp_path / "m", family, head), head=head)
    made = tiny.batch(family)
    if "decoder_input_ids" in made:
        made["decoder_attention_mask"] = np.arange(7)[None] < np.array([[7], [2], [5]])
    both = [made, {name: x[:1] for name, x in made.items()}]
    want = [routed_by_hand(model, one, monkeypatch) for one in both]
    monkeypatch.setattr(calibration, "OWN_POSITIONS", 0)
    chosen = [site for site in fj.sites(model) if site.mlp.stack]
    source = Calibrator(model, chosen, both, sequential=False, key=KEY).capture()
    assert len(chosen) == len(want[0])
    for site in chosen:
        pairs = zip(*(one[site.path] for one in want), strict=True)
        rows = [np.array(a + b) for a, b in pairs]
        seen = source.of(site)
        counts = np.array([len(x) for x in rows])
        np.testing.assert_array_equal(seen.weights.sum(-1), counts)
        np.testing.assert_allclose(source.use(site), counts / counts.sum(), rtol=1e-6)
        for x, have, weights in zip(rows, seen.inputs, seen.weights, strict=True):
            have = np.asarray(have)[np.asarray(weights) == 1]
            assert len(have) == len(x)
            if len(x):
                order = [np.lexsort(a.T.round(3)) for a in (x, have)]
                np.testing.assert_allclose(have[order[1]], x[order[0]], atol=1e-4)


def test_experts_that_the_text_hardly_uses_see_others_positions(tmp_path, monkeypatch):
    model = fj.load(checkpoint(tmp_path / "m", "mixtral", "causal-lm"), head="causal-lm")
    monkeypatch.setattr(calibration, "OWN_POSITIONS", 15)
    seen = fj.calibrate(model, [tiny.batch("mixtral")], key=KEY, layers=0)
    counts = (seen["layers.0.mlp.experts"] != 0).any(-1).sum(1)
    monkeypatch.setattr(calibration, "OWN_POSITIONS", 0)
    alone = fj.calibrate(model, [tiny.batch("mixtral")], key=KEY, layers=0)
    own = (alone["layers.0.mlp.experts"] != 0).any(-1).sum(1)
    assert own.sum() == 2 * tiny.batch("mixtral")["attention_mask"].sum()
    assert own.min() < 15
    np.testing.assert_array_equal(counts, np.where(own < 15, own + 15, own))


def test_budget_is_met_and_best():
    rng = np.random.default_rng(0)
    widths = [np.arange(1, 6), np.arange(2, 11, 2), np.arange(1, 8)]
    errors = [np.sort(rng.random(len(w)))[::-1] for w in widths]
    for budget in (4, 9, 15, 22):
        chosen = width_scores._best_widths(errors, widths, budget)
        assert sum(w[i] for w, i in zip(widths, chosen, strict=True)) <= budget
        got = sum(e[i] for e, i in zip(errors, chosen, strict=True))
        all_choices = itertools.product(*(range(len(w)) for w in widths))
        best = min(
            sum(e[i] for e, i in zip(errors, c, strict=True))
            for c in all_choices
            if sum(w[i] for w, i in zip(widths, c, strict=True)) <= budget
        )
        assert got == pytest.approx(best)


@pytest.mark.full
def test_allocation_gives_more_to_the_harder_site(monkeypatch):
    monkeypatch.setattr(allocation, "TRIED", (1 / 8, 1 / 4, 1 / 2))
    easy, hard = make(fj.Mlp, jnp.float32), make(fj.Mlp, jnp.float32)
    rows = easy.sub_mlps().rows()
    easy.load_sub_mlps(easy.sub_mlps().with_rows(jnp.tile(rows[:4], (P // 4, 1))), easy.out_bias())
    model = nnx.List([easy, hard])
    seen = {path: inputs(dtype=jnp.float32) for path in ("0", "1")}
    plan = fj.allocate(
        model, fj.Fusion(round_to=4), total_width=36, calibration=seen, key=KEY, progress=False
    )
    assert plan["1"].width > plan["0"].width
    assert plan["0"].width + plan["1"].width <= 36
    fused, report = fj.compress(model, plan, key=KEY, calibration=seen)
    assert [m.width for m in fused] == [plan["0"].width, plan["1"].width]
    assert report.method["0"]["width"] == plan["0"].width
    with pytest.raises(fj.InputError, match="total_width must be 8 to 64"):
        fj.allocate(model, fj.Fusion(round_to=4), total_width=4, calibration=seen, key=KEY)
    with pytest.raises(fj.InputError, match="no site '2'"):
        fj.compress(model, {"2": fj.Fusion()}, key=KEY)


@pytest.mark.full
def test_allocation_leaves_an_easy_site_what_it_needs(monkeypatch):
    """Errors below the smallest tried share are measured, so that it gets more than one unit."""
    monkeypatch.setattr(allocation, "TRIED", (1 / 4, 1 / 2))
    easy, hard = make(fj.Mlp, jnp.float32, noise=0.02), make(fj.Mlp, jnp.float32, noise=1.0)
    seen = {path: inputs(dtype=jnp.float32) for path in ("0", "1")}
    plan = fj.allocate(
        nnx.List([easy, hard]), fj.Fusion(), total_width=P, calibration=seen, key=KEY
    )
    assert plan["0"].width + plan["1"].width == P
    assert C / 2 < plan["0"].width <= 2 * C


def test_curves_fall_all_the_way():
    widths, errors = allocation._curve([(1, 0.9), (8, 0.2), (16, 0.3), (64, 0.0)], 64, 1)
    assert (np.diff(errors) < 0).all() and widths[0] == 1
    assert errors[widths == 16] == pytest.approx(0.2, abs=1e-5)


def test_a_share_of_all_units_is_not_rounded_down():
    model = nnx.List([make(fj.Mlp, jnp.float32)])
    seen = {"0": inputs(dtype=jnp.float32)}
    share = 29 / 32 * (1 - 1e-16)
    assert int(share * 32) == 28
    plan = fj.allocate(model, fj.Fusion(round_to=29), total_width=share, calibration=seen, key=KEY)
    assert plan["0"].width == 29


@pytest.mark.parametrize("few", [9, 60])
@pytest.mark.full
def test_each_expert_is_measured_where_it_is_not_fitted(few, monkeypatch):
    monkeypatch.setattr(allocation, "TRIED", (1 / 2,))
    both = experts(lambda **k: make(fj.Mlp, jnp.float32), 2, rngs=nnx.Rngs(0))
    x = np.asarray(inputs(dtype=jnp.float32))
    slots = np.stack([x, np.where(np.arange(T)[:, None] < few, x, 0)])
    seen = fj.Calibration(jnp.asarray(slots), weights=jnp.asarray((slots != 0).any(-1), float))
    fitted, held_out = allocation._held_out_split(seen, "")
    for a, b, count in zip(fitted, held_out, (T, few), strict=True):
        a, b = (part[(part != 0).any(-1)] for part in (a, b))
        assert len(b) == count // 4
        np.testing.assert_array_equal(np.sort(np.concatenate([a, b]), 0), np.sort(x[:count], 0))
    # The padding behind an expert's positions has no influence on its error.
    one, other = (jax.tree.map(lambda a: a[:1], both) for _ in range(2))
    other.down.kernel.set_value(other.down.kernel[...] * 1.5)
    for scaling in ("adam", "sgd", "folded"):
        errors = [
            allocation._error(one, other, jnp.asarray(held_out[1:, :n]), scaling, KEY)
            for n in (few // 4, None)
        ]
        assert errors[0] > 0
        if scaling != "adam":  # whose upstream gradients are drawn for all rows at once
            assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    plan = fj.allocate(
        both, fj.Fusion(), total_width=10, calibration={"": slots}, key=KEY, progress=False
    )
    assert plan[""].width == 10


def test_too_few_positions_to_hold_some_out():
    both = experts(lambda **k: make(fj.Mlp, jnp.float32), 2, rngs=nnx.Rngs(0))
    model = nnx.List([both])
    x = np.asarray(inputs(dtype=jnp.float32))
    slots = np.stack([x, np.where(np.arange(T)[:, None] < 7, x, 0)])
    with pytest.raises(fj.InputError, match="an expert of 0 has 7 positions of calibration"):
        fj.allocate(model, fj.Fusion(), total_width=0.5, calibration={"0": slots}, key=KEY)


@pytest.mark.full
def test_texts_longer_than_the_model_are_cut_off(tmp_path):
    model = fj.load(glue.checkpoint(tmp_path / "m"))
    most = model.config.max_position_embeddings
    long = [" ".join(f"w{i % 90}" for i in range(k, k + most + 20)) for k in range(40)]
    for source in (long, "random"):
        seen = fj.calibrate(model, source, key=KEY) if source == long else None
        assert seen is None or all(np.isfinite(x).all() for x in seen.values())
        fj.compress(model, fj.Fusion(width=8), layers=0, key=KEY, calibration=source)
    batch = TokenBatch(jnp.ones((2, most + 1), jnp.int32), jnp.ones((2, most + 1), bool))
    with pytest.raises(fj.InputError, match=f"{most + 1} tokens a row; the model has {most}"):
        fj.compress(model, fj.Fusion(width=8), key=KEY, calibration=[batch])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (fj.Svd(), {}, "allocated for Fusion, not for Svd"),
        (fj.Fusion(), {"calibration": None}, "needs calibration"),
        (fj.Fusion(), {"total_width": float("nan")}, "fraction must be in"),
        (fj.Fusion(), {"total_width": 1.5}, "fraction must be in"),
    ],
)
def test_what_allocating_is_given(method, options, message):
    mlps = nnx.List([fj.Mlp(4, 16, act="relu", rngs=nnx.Rngs(i)) for i in range(2)])
    seen = {path: np.ones((64, 4), np.float32) for path in ("0", "1")}
    with unchecked(), pytest.raises(fj.InputError, match=message):
        fj.allocate(
            mlps, method, **{"total_width": 0.5, "calibration": seen, "key": KEY, **options}
        )


def test_allocated_widths_are_not_overwritten_by_a_budget():
    mlp = fj.Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
    with pytest.raises(fj.InputError, match="give a budget, or those"):
        fj.compress(mlp, {"": fj.Fusion(width=4)}, key=KEY, budget=0.25)


class Twice(nnx.Module):
    """Applies one MLP twice, as ALBERT does."""

    def __init__(self):
        self.mlp = fj.Mlp(3, 5, act="tanh", rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.mlp(self.mlp(x))


def test_an_mlp_that_is_applied_twice_gets_the_inputs_of_both_calls(key):
    """At each position those of one call, with the gradient at the output of the same call."""
    model, x = Twice(), jax.random.normal(key, (4, 6, 3))
    first = model.mlp(x)
    second = jax.grad(lambda y: drawn_loss(y, key))(model.mlp(first))
    (at_first,) = jax.vjp(model.mlp, first)[1](second)
    seen = mlp_inputs(model, x)["mlp"]
    gradients = output_gradients(model, ["mlp"], key, None, x)["mlp"]
    is_first = (seen == x).all(-1)
    assert 0 < is_first.sum() < is_first.size
    np.testing.assert_array_equal(seen, jnp.where(is_first[..., None], x, first))
    want = jnp.where(is_first[..., None], at_first, second)
    np.testing.assert_allclose(gradients, want, rtol=1e-5, atol=1e-6)
