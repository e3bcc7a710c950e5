"""`Fusion(represent="member")`: whole units stand for clusters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.methods.scores import loss_of_removal
from tests.helpers import inputs, make, unchecked

P, KEPT, D, T = 24, 9, 30, 60
KEY = jax.random.key(0)


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaling", ["adam", "sgd", "folded"])
def test_the_function_is_that_of_pruning_with_refit(gated, scaling):
    mlp, x = make(fj.GatedMlp if gated else fj.Mlp, width=P, d_in=D), inputs(D, T)
    method = fj.Fusion(width=KEPT, represent="member", scaling=scaling)
    fused, report = fj.compress(mlp, method, key=KEY, calibration={"": x})
    pruned = fj.Prune(width=KEPT, score="relative", refit=True)
    pruned, _ = fj.compress(mlp, pruned, key=KEY, calibration={"": x})
    np.testing.assert_allclose(fused(x), pruned(x), atol=2e-5)
    assert 0 < report.rows[0].facts["inertia"] < 1


def test_others_join_the_unit_that_explains_most_of_them():
    mlp, x = make(fj.Mlp, width=P, d_in=D), inputs(D, T)
    method = fj.Fusion(width=KEPT, represent="member", match=False)
    found = fj.compress_mlp(mlp.sub_mlps(), method, key=KEY, act=mlp.act, calibration=x)
    up = np.asarray(mlp.sub_mlps().up)
    rows = np.asarray(found.parts.rows.up * found.parts.factors.inner[:, None])
    chosen = [int(np.abs(up - row[None]).sum(1).argmin()) for row in rows]
    assert sorted(chosen) == chosen and len(set(chosen)) == KEPT
    hidden = np.asarray(mlp.hidden(x), np.float64)
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    gram = hidden.T @ hidden
    explained = gram[:, chosen] ** 2 / np.diag(gram)[chosen]
    want = explained.argmax(1)
    want[chosen] = np.arange(KEPT)
    np.testing.assert_array_equal(found.parts.labels, want)
    np.testing.assert_array_equal(found.parts.sizes, np.bincount(want))
    missed = np.trace(gram) - explained[np.arange(P), want].sum()
    np.testing.assert_allclose(found.facts.inertia, missed / np.trace(gram), rtol=1e-4)


def test_units_that_differ_by_a_sign_are_one():
    """A gated unit with negated ``up`` and ``down`` is the same unit."""
    half = make(fj.GatedMlp, width=P // 2, d_in=D, bias=False).sub_mlps()
    signs = jnp.asarray(np.repeat([1.0, -1.0], P // 2), jnp.float32)[:, None]
    rows = jax.tree.map(lambda a: jnp.concatenate([a, a]), half)
    subs = rows._replace(up=rows.up * signs, down=rows.down * signs)
    # A trace of noise, so that the choice within a pair does not hang on a tie.
    subs = subs._replace(down=subs.down * (1 + 1e-3 * jax.random.normal(KEY, subs.down.shape)))
    x = inputs(D, T)
    method = fj.Fusion(width=P // 2, represent="member", scaling="folded", ridge=1e-6)
    found = fj.compress_mlp(subs, method, key=KEY, act="silu", calibration=x)
    np.testing.assert_array_equal(found.parts.sizes, 2)
    labels = np.asarray(found.parts.labels)
    np.testing.assert_array_equal(labels[: P // 2], labels[P // 2 :])
    outputs = [
        jnp.matmul(jax.nn.silu(x @ m.gate.T) * (x @ m.up.T), m.down, precision="highest")
        for m in (subs, found.parts.rows)
    ]
    np.testing.assert_allclose(*outputs, atol=2e-3 * float(jnp.abs(outputs[0]).max()))


@pytest.mark.parametrize("scaling", ["adam", "sgd"])
def test_a_large_unit_stands_for_little_more_than_itself(scaling):
    """Factors count the activity of a cluster, and not its units: a step moves no more."""
    mlp, x = make(fj.Mlp, width=P, d_in=D, act="relu"), inputs(D, T)
    up = mlp.up.kernel[...].at[:, KEPT:].multiply(1e-3)
    mlp.up.kernel.set_value(up)
    mlp.up.bias.set_value(mlp.up.bias[...].at[KEPT:].multiply(1e-3))
    method = fj.Fusion(width=KEPT, scaling=scaling, match=False)
    fused, _ = fj.compress(mlp, method, key=KEY, calibration={"": x})
    assert fused.sizes[...].max() > 1
    np.testing.assert_allclose(fused.outer[...], 1, atol=0.1)


def test_members_of_experts():
    many = fj.experts(partial(fj.Mlp, D, P, act="relu"), 2, rngs=nnx.Rngs(0))
    seen = jnp.stack([inputs(D, T), inputs(D, T) * 2])
    method = fj.Fusion(width=KEPT, represent="member")
    fused, _ = fj.compress(many, method, key=KEY, calibration={"": seen})
    assert fused(seen).shape == (2, T, D)
    assert fused.sizes[...].sum(-1).tolist() == [P, P]


def test_what_members_need_is_said():
    mlp = make(fj.Mlp, width=P, d_in=D)
    with pytest.raises(fj.InputError, match="represent 'member' needs calibration"):
        fj.compress(mlp, fj.Fusion(represent="member"), key=KEY)
    with pytest.raises(fj.InputError, match="metric are for represent='mean'"):
        fj.Fusion(represent="member", metric="raw")
    with (
        unchecked(),
        pytest.raises(fj.InputError, match="represent must be one of auto, mean, member"),
    ):
        fj.Fusion(represent="middle")


def calibration(seed, scale=1.0):
    """Returns inputs of a site with upstream gradients of a scale."""
    upstream = scale * jax.random.normal(jax.random.key(seed), (T, D))
    return fj.Calibration(inputs(D, T), upstream=upstream)


def test_widths_by_loss_follow_the_gradients():
    mlps = nnx.List([make(fj.Mlp, width=P, d_in=D, d_out=D, seed=i) for i in range(3)])
    seen = {"0": calibration(0), "1": calibration(1, 4.0), "2": calibration(2, 0.0)}
    method = fj.Fusion(represent="member")
    plan = fj.allocate(mlps, method, total_width=0.5, calibration=seen, key=KEY, by="loss")
    widths = [plan[path].width for path in ("0", "1", "2")]
    assert sum(widths) == 36 and widths[1] > widths[0] > widths[2] == 1
    smaller, _ = fj.compress(mlps, plan, key=KEY, calibration=seen)
    assert [site.mlp.width for site in fj.sites(smaller)] == widths
    steps = fj.Prune(score="relative", round_to=8)
    plan = fj.allocate(mlps, steps, total_width=40, calibration=seen, key=KEY, by="loss")
    assert all(method.width % 8 == 0 for method in plan.values())


def test_the_loss_of_removal_is_its_formula():
    """Against the plain loop in float64."""
    mlp, seen = make(fj.GatedMlp, width=P, d_in=D, d_out=D), calibration(3)
    found = loss_of_removal(mlp.sub_mlps(), seen, mlp.act, KEPT, 0.05)
    h, v = np.asarray(mlp.hidden(seen.inputs), np.float64), np.asarray(mlp.sub_mlps().down)
    g, size = np.asarray(seen.upstream, np.float64), np.linalg.norm(h, axis=1)
    strength = size * np.linalg.norm(g, axis=1)
    rows = g * (size * np.minimum(1, np.quantile(strength, 0.99) / strength))[:, None]
    metric = rows.T @ rows / T / 2
    gram = (h / size[:, None]).T @ (h / size[:, None]) / T
    inverse = np.linalg.inv(gram + 0.05 * np.trace(gram) / P * np.eye(P))
    alive, costs = np.ones(P, bool), []
    for _ in range(P - KEPT):
        cost = np.einsum("po,oq,pq->p", v, metric, v) / np.diag(inverse)
        j = np.where(alive, cost, np.inf).argmin()
        costs.append(cost[j])
        share = inverse[:, j] / inverse[j, j]
        v, inverse = v - share[:, None] * v[j], inverse - np.outer(share, inverse[j])
        alive[j], inverse[j, j] = False, 1
    np.testing.assert_allclose(found, costs, rtol=2e-3)


def test_what_widths_by_loss_need_is_said():
    mlps = nnx.List([make(fj.Mlp, width=P, d_in=D, d_out=D)])
    allocate = partial(fj.allocate, mlps, total_width=0.5, key=KEY, by="loss")
    with pytest.raises(fj.InputError, match="by loss are for Fusion"):
        allocate(fj.Fusion(represent="mean"), calibration={"0": calibration(0)})
    with pytest.raises(fj.InputError, match=r"0: widths by loss need .* upstream=True"):
        allocate(fj.Prune(score="relative"), calibration={"0": inputs(D, T)})
    many = nnx.List([fj.experts(partial(fj.Mlp, D, P, act="relu"), 2, rngs=nnx.Rngs(0))])
    two = jnp.stack([inputs(D, T)] * 2)
    with pytest.raises(fj.InputError, match="0: widths by loss are not for experts"):
        fj.allocate(
            many,
            fj.Fusion(represent="member"),
            total_width=0.5,
            calibration={"0": fj.Calibration(two, upstream=two)},
            key=KEY,
            by="loss",
        )
