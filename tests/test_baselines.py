"""The baselines against straightforward numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.methods.mmd import MMD
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.sketch import Sketch
from tests.test_mlp import inputs, make

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
@pytest.mark.parametrize("score", ["magnitude", "activation"])
def test_prune_keeps_the_largest_scores(score, gated):
    x = None if score == "magnitude" else inputs(D, 50)
    subs, rows, solution = solved(Prune(width=KEPT, score=score), gated, x)
    scores = magnitude(subs)
    if x is not None:
        hidden = np.asarray(an_mlp(gated).hidden(x))
        scores = np.sqrt(np.square(hidden).mean(0)) * np.linalg.norm(subs.down, axis=1)
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
