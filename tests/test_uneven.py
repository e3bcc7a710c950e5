"""Experts of different widths: how the widths are chosen, and that nothing else changes."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.nn.uneven_experts import UnevenExperts, widths_by_use
from fusion_jax.training.engine.losses import next_token
from fusion_jax.training.engine.partition import Partition
from tests import tiny

METHOD = fj.Fusion(width=12, by_use=1.0)


def mixture(family, folder):
    head = dict(tiny.GENERATIVE)[family]
    return fj.load(tiny.checkpoint(folder, family, head), head=head)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return mixture("mixtral", tmp_path_factory.mktemp("mixtral") / "m")


@pytest.fixture(scope="module")
def compressed(mixtral):
    key = jax.random.key(0)
    batch = tiny.batch("mixtral")
    return fj.compress(mixtral, METHOD, key=key, layers=[0, 1], calibration=[batch])


def uneven(model):
    return [site for site in fj.sites(model) if isinstance(site.mlp, UnevenExperts)]


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("count", [2, 7, 60])
@pytest.mark.parametrize("round_to", [1, 16])
def test_widths_follow_use_within_the_budget(power, count, round_to):
    use = np.random.default_rng(count).dirichlet(np.ones(count))
    plan = widths_by_use(use.tolist(), 64, power, original=200, round_to=round_to)
    widths = np.zeros(count, int)
    for width, members in plan.items():
        assert (widths[members] == 0).all()
        widths[members] = width
    assert len(plan) <= 4
    assert 64 * count - count * round_to < widths.sum() <= 64 * count
    assert widths.min() >= 16 and widths.max() <= 200
    assert all(w % round_to == 0 or w == 200 for w in widths)
    assert (np.diff(widths[np.argsort(-use, kind="stable")]) <= 0).all()


def test_widths_of_equal_use_are_equal():
    assert widths_by_use([0.25] * 4, 8, 1.0, original=32) == {8: [0, 1, 2, 3]}
    assert widths_by_use([0.7, 0.1, 0.1, 0.1], 8, 0.0, original=32) == {8: [0, 1, 2, 3]}


def test_power_is_the_best_one_where_errors_fall_as_the_width_does():
    """At 1 / (1 + a), no move of units between experts lowers ``sum use width^-a``."""
    use, a = np.array([0.55, 0.3, 0.1, 0.05]), 1.0
    plan = widths_by_use(use.tolist(), 400, 1 / (1 + a), original=4000)
    widths = np.zeros(4)
    for width, members in plan.items():
        widths[members] = width

    def loss(widths):
        return (use * widths**-a).sum()

    for i, j in itertools.permutations(range(4), 2):
        moved = widths.copy()
        moved[[i, j]] += [8, -8]
        assert loss(moved) > loss(widths)


def test_experts_that_are_used_more_are_wider(compressed):
    smaller, report = compressed
    for site, row in zip(uneven(smaller), report.rows, strict=True):
        assert row.widths == list(site.mlp.widths)
        assert sum(row.widths) <= 4 * 12
        order = np.argsort(row.use)
        assert (np.diff(np.array(row.widths)[order]) >= 0).all()
        np.testing.assert_allclose(sum(row.use), 1, rtol=1e-6)
    assert len(report.rows) == 2
    gone = 3 * 16 * sum(4 * 24 - sum(row.widths) for row in report.rows)
    assert report.before.mlp_params - report.after.mlp_params == gone
    assert report.before.mlp_flops - report.after.mlp_flops == 2 * 2 * gone // 4
    text = str(report)
    assert f"24 -> {min(report.rows[0].widths)}-{max(report.rows[0].widths)}" in text
    assert " ".join(f"{share:.1%}" for share in report.rows[0].use) in text
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


@pytest.mark.full
def test_each_expert_is_what_fusing_it_alone_gives(mixtral, compressed):
    smaller, key = compressed[0], jax.random.key(0)
    seen = fj.calibrate(mixtral, [tiny.batch("mixtral")], key=jax.random.fold_in(key, 2**31 - 1))
    site, original = uneven(smaller)[0], fj.sites(mixtral)[0].mlp
    x = jax.random.normal(key, (4, 5, 16))
    keys = jax.random.split(jax.random.fold_in(key, 0), 4)
    together = site.mlp(x)
    for e, width in enumerate(site.mlp.widths):
        subs = jax.tree.map(lambda a, e=e: a[e], original.sub_mlps())
        inputs = jnp.asarray(seen[site.path][e])
        calibration = fj.Calibration(inputs, weights=(inputs != 0).any(-1).astype(jnp.float32))
        alone = fj.Fusion(width=width).solve(subs, key=keys[e], act="silu", calibration=calibration)
        one = fj.GatedMlp(16, 24, act="silu", use_bias=False, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(
            together[e], fj.Fusion(width=width).build(one, alone)(x[e]), atol=1e-5
        )
    np.testing.assert_allclose(site.mlp.plain()(x), together, atol=1e-5)
    np.testing.assert_allclose(site.mlp.padded(24)(x), together, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "switch"])
@pytest.mark.full(quick=1)
def test_artefact_and_export(family, tmp_path, key):
    model = mixture(family, tmp_path / "m")
    made = [tiny.batch(family)]
    site = "encoder.*experts" if family == "switch" else 0
    smaller, report = fj.compress(model, METHOD, key=key, layers=site, calibration=made)
    assert uneven(smaller)
    again = fj.load(fj.save(smaller, tmp_path / "artefact", report=report))
    assert bit_equal(smaller, again)
    head = dict(tiny.GENERATIVE)[family]
    exported = fj.load(fj.export_hf(smaller, tmp_path / "hf"), head=head)
    assert not uneven(exported)
    batch = tiny.batch(family)
    want, saved, theirs = (
        jax.jit(lambda m, x: m(**x).logits)(m, batch) for m in (smaller, again, exported)
    )
    assert (want == saved).all()
    np.testing.assert_allclose(theirs, want, atol=1e-4)


@pytest.mark.full
def test_all_groups_train(compressed):
    smaller, _ = compressed
    parts = Partition(smaller, "mlp", remat=True)
    assert sum("groups" in path for path in parts.training) >= 2 * 3 * 2
    assert all(parts.widths[p] in (-1, -2) for p in parts.training if "experts" in p)
    params, rest = parts.split(smaller)
    batch = tiny.batch("mixtral") | {"weights": np.ones(3, np.float32)}

    @partial(jax.jit, static_argnums=0)
    def gradient(parts, params):
        return jax.grad(lambda p: next_token(parts.compute(p, rest), batch, None).total)(params)

    grads, plain = gradient(parts, params), gradient(Partition(smaller, "mlp"), params)
    for path, g in grads.items():
        np.testing.assert_allclose(g, plain[path], atol=1e-4)
        assert (g != 0).any()


@pytest.mark.full
def test_what_is_and_is_not_done_with_them(mixtral, compressed, key):
    with pytest.raises(fj.InputError, match="by_use needs calibration"):
        fj.compress(mixtral, METHOD, key=key)
    seen = fj.calibrate(mixtral, [tiny.batch("mixtral")], key=key)
    with pytest.raises(fj.InputError, match=r"layers\.0\.mlp\.experts: by_use needs"):
        fj.compress(mixtral, METHOD, key=key, calibration=seen)
    with pytest.raises(fj.InputError, match="by_use must be at least 0"):
        fj.Fusion(by_use=-1.0)
    smaller, _ = compressed
    messages = "is a UnevenExperts already", "fusion_jax.compress_matrices takes their matrices"
    for method, message in zip((fj.Fusion(width=4), fj.Svd()), messages, strict=True):
        with pytest.raises(fj.InputError, match=message):
            fj.compress(smaller, method, key=key)
    plain = fj.plain(smaller)
    assert {type(site.mlp) for site in fj.sites(plain)} == {fj.GatedMlp}
    batch = tiny.batch("mixtral")
    logits = [jax.jit(lambda m: m(**batch).logits)(m) for m in (plain, smaller)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_rounded_widths_are_multiples():
    plan = widths_by_use([0.97, 0.01, 0.01, 0.01], 96, 1.0, original=384, round_to=16)
    assert all(width % 16 == 0 for width in plan) and sum(map(len, plan.values())) == 4
