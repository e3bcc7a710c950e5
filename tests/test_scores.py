"""Scores of hidden units against their formulas in float64, and upstream gradients."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.calibration.upstream import drawn_loss
from fusion_jax.methods import gram
from fusion_jax.methods.gram import GRAM_BLOCKS, gram_of
from fusion_jax.methods.least_squares import refitted
from fusion_jax.methods.removal import removal
from fusion_jax.methods.scores import ON_INPUTS, ONE_AT_A_TIME, unit_scores
from tests.helpers import inputs, make
from tests.tiny import checkpoint

P, KEPT, D, OUT, T = 32, 12, 40, 6, 50
RIDGE = 0.02


def an_mlp(gated=False):
    return make(fj.GatedMlp if gated else fj.Mlp, width=P, d_in=D, d_out=OUT)


def expected(score, mlp, x, weights, upstream):
    """The formulas of `unit_scores`."""
    h, v = np.asarray(mlp.hidden(x), np.float64), np.asarray(mlp.sub_mlps().down, np.float64)
    w = np.asarray(weights, np.float64) / np.sum(weights)
    gram = np.einsum("t,ti,tj->ij", w, h, h)
    rms, norms = np.sqrt(w @ h**2), np.linalg.norm(v, axis=1)
    regular = gram + RIDGE * np.trace(gram) / P * np.eye(P)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    of_lengths = np.einsum("t,ti,tj->ij", w, unit, unit)
    of_lengths += RIDGE * np.trace(of_lengths) / P * np.eye(P)
    return {
        "hidden": lambda: w @ np.abs(h),
        "activation": lambda: rms * norms,
        "wanda": lambda: rms * np.abs(v).sum(1),
        "fluctuation": lambda: (w @ h**2 - (w @ h) ** 2) * norms**2,
        "leverage": lambda: np.diag(gram @ np.linalg.inv(regular)),
        "obs": lambda: norms**2 / np.diag(np.linalg.inv(regular)),
        "relative": lambda: norms**2 / np.diag(np.linalg.inv(of_lengths)),
        "fisher": lambda: w @ (h * (np.asarray(upstream, np.float64) @ v.T)) ** 2,
    }[score]()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", ON_INPUTS)
def test_scores_are_their_formulas(score, gated):
    mlp, x = an_mlp(gated), inputs(D, T)
    weights = jnp.asarray(np.arange(T) % 3, jnp.float32)  # some positions do not count
    upstream = jax.random.normal(jax.random.key(4), (T, OUT))
    seen = fj.Calibration(x, weights=weights, upstream=upstream)
    found = unit_scores(score, mlp.sub_mlps(), act=mlp.act, calibration=seen, ridge=RIDGE)
    want = expected(score, mlp, x, weights, upstream)
    np.testing.assert_allclose(found, want, rtol=2e-3 if score == "leverage" else 2e-4)


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("score", [s for s in ON_INPUTS if s not in ONE_AT_A_TIME])
def test_prune_keeps_the_largest_scores_and_refits(score):
    mlp, x = an_mlp(), inputs(D, T)
    upstream = jax.random.normal(jax.random.key(4), (T, OUT))
    seen = fj.Calibration(x, upstream=upstream)
    subs, key = mlp.sub_mlps(), jax.random.key(0)
    solve = lambda **more: fj.compress_mlp(  # noqa: E731
        subs, fj.Prune(width=KEPT, score=score, **more), key=key, act=mlp.act, calibration=seen
    )
    scores = unit_scores(score, subs, act=mlp.act, calibration=seen)
    chosen = np.sort(np.argsort(-np.asarray(scores))[:KEPT])
    left = jax.tree.map(lambda a: a[chosen], subs)
    plain = solve()
    np.testing.assert_array_equal(plain.parts.rows(), left.rows())
    share = scores[chosen].sum() / scores.sum()
    np.testing.assert_allclose(plain.facts.kept_importance, share, rtol=1e-5)
    again = refitted(left, subs, fj.Calibration(x), mlp.act, 0.01)
    np.testing.assert_allclose(solve(refit=True).parts.rows(), again.rows(), atol=1e-6)


def test_saliency_is_the_sum_of_what_each_weight_changes(key):
    mlp, x = an_mlp(gated=True), inputs(D, T)

    def loss(subs):
        made = mlp.abstract(type(mlp), P)
        made.load_sub_mlps(subs, mlp.out_bias())
        return jnp.square(made(x)).sum()

    subs = mlp.sub_mlps()
    slopes = jax.grad(loss)(subs)
    parts = [np.abs(np.asarray(a) * np.asarray(b)) for a, b in zip(subs, slopes, strict=True)]
    scores = sum(part.reshape(P, -1).sum(1) for part in parts)
    made = fj.compress_mlp(subs, fj.Prune(width=KEPT, score="saliency"), key=key, gradients=slopes)
    np.testing.assert_array_equal(made.parts.up, subs.up[np.sort(np.argsort(-scores)[:KEPT])])


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("count", [200, 137, 1, 255, 256])
def test_obs_removes_one_unit_after_the_other(count):
    """Against the plain loop, in float64; the candidates are searched in blocks."""
    rng = np.random.default_rng(0)
    width = 256
    h = rng.normal(size=(400, 40)) @ rng.normal(size=(40, width)) + rng.normal(size=(400, width))
    v = rng.normal(size=(width, 5)) * rng.exponential(size=(width, 1))
    gram = h.T @ h / 400
    inverse, weights = np.linalg.inv(gram + 0.1 * np.trace(gram) / width * np.eye(width)), v.copy()
    alive = np.ones(width, bool)
    for _ in range(width - count):
        cost = np.square(weights).sum(1) / np.diag(inverse)
        j = np.where(alive, cost, np.inf).argmin()
        column = inverse[:, j] / inverse[j, j]
        weights, inverse = (
            weights - column[:, None] * weights[j],
            inverse - np.outer(column, inverse[j]),
        )
        alive[j] = False
        inverse[j, j] = 1
    gone = removal(jnp.asarray(v), jnp.asarray(gram), count, 0.1).units
    same = 1 - np.isin(np.flatnonzero(alive), np.asarray(gone)).mean()
    # Where a cheap unit outside the candidates becomes the cheapest, the order differs.
    assert same > 0.98, same


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
def test_upstream_gradients_are_those_of_the_loss(tmp_path, family):
    """The products of gradients with a change of outputs are the change of the drawn loss."""
    heads = {"gpt2": "causal-lm", "llama": "causal-lm", "bert": None, "t5": "seq2seq-lm"}
    head = heads[family]
    model = fj.load(checkpoint(tmp_path / "m", family, head), head=head)
    ids = np.random.default_rng(0).integers(3, 50, (3, 7)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        batch |= {"decoder_input_ids": ids[:, ::-1], "decoder_attention_mask": mask}
    from fusion_jax.calibration.upstream import output_gradients

    paths = [site.path for site in fj.sites(model)]
    key = jax.random.key(3)
    found = output_gradients(model, paths, key, jnp.asarray(mask), **batch)
    path = paths[1]
    step = jax.random.normal(jax.random.key(5), found[path].shape) * 1e-3

    def moved(scale):
        made = nnx.clone(model)
        site = next(s for s in fj.sites(made) if s.path == path)
        owner, name = path.rpartition(".")[0], path.rpartition(".")[2]
        holder = made
        for part in owner.split("."):
            holder = holder[int(part)] if part.isdigit() else getattr(holder, part)

        class Moved(nnx.Module):
            def __init__(self, mlp):
                self.mlp = mlp

            def __call__(self, x):
                return self.mlp(x) + scale * step

        setattr(holder, name, Moved(site.mlp))
        return made(**batch)

    before, after = (
        drawn_loss_with_labels_of(model(**batch), moved(s), key, mask) for s in (-1, 1)
    )
    want = (after - before) / 2
    np.testing.assert_allclose((found[path] * step).sum(), want, rtol=2e-2, atol=1e-5)


def drawn_loss_with_labels_of(first, output, key, mask):
    """Returns the loss of one output for the labels that another one draws."""
    if getattr(first, "logits", None) is None:
        return drawn_loss(output, key, jnp.asarray(mask))
    labels = jax.random.categorical(jax.random.fold_in(key, 0), first.logits.astype(jnp.float32))
    logs = jax.nn.log_softmax(output.logits.astype(jnp.float32))
    return -(
        jnp.take_along_axis(logs, labels[..., None], -1)[..., 0] * jnp.asarray(mask, logs.dtype)
    ).sum()


def test_fisher_of_a_model_is_that_of_its_positions(tmp_path):
    """Through `compress`, in pieces of rows and in the order of the inputs."""
    model = fj.load(checkpoint(tmp_path / "m", "gpt2", "causal-lm"), head="causal-lm")
    ids = np.random.default_rng(0).integers(3, 50, (4, 9)).astype(np.int32)
    text = [{"input_ids": ids}]
    key = jax.random.key(0)
    method = fj.Prune(width=5, score="fisher", refit=True)
    smaller, report = fj.compress(model, method, key=key, calibration=text)
    assert report.rows[0].width_after == 5
    seen_at = fj.calibrate(model, text, key=jax.random.fold_in(key, 2**31 - 1), upstream=True)
    again, _ = fj.compress(model, method, key=key, calibration=seen_at)
    for site, new in zip(fj.sites(model), fj.sites(smaller), strict=True):
        seen = seen_at[site.path]
        assert seen.upstream is not None and seen.upstream.shape == (36, 16)
        hidden = site.mlp.hidden(seen.inputs)
        terms = (hidden * (seen.upstream @ site.mlp.sub_mlps().down.T)) ** 2
        chosen = np.sort(np.argsort(-np.asarray(terms.mean(0)))[:5])
        np.testing.assert_array_equal(new.mlp.sub_mlps().up, site.mlp.sub_mlps().up[chosen])
    for a, b in zip(jax.tree.leaves(smaller), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_is_for_positions_and_not_for_classes():
    """As many classes as positions: the mask does not hide classes."""
    logits = jax.random.normal(jax.random.key(0), (2, 3))
    output = SimpleNamespace(logits=logits)
    key, mask = jax.random.key(1), jnp.ones((2, 3), jnp.int32)
    np.testing.assert_array_equal(drawn_loss(output, key, mask), drawn_loss(output, key))


def test_labels_of_answers_are_positions():
    """Start and end are drawn from all positions that are not padding."""
    logits = jax.random.normal(jax.random.key(0), (3, 5, 2))
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])

    def loss(logits):
        return drawn_loss(SimpleNamespace(logits=logits), jax.random.key(2), mask, answers=True)

    slopes = np.asarray(jax.grad(loss)(logits))
    # The gradient is softmax minus one-hot, over positions.
    np.testing.assert_allclose(slopes.sum(1), 0, atol=1e-6)
    assert (slopes[1, 3:] == 0).all() and (slopes[2] == 0).all() and (slopes[0] != 0).all()
    one = np.asarray(jax.nn.softmax(jnp.where(mask[..., None] == 1, logits, -jnp.inf), axis=1))
    labels = one - slopes
    np.testing.assert_allclose(np.sort(labels, axis=1)[:, -1], 1, atol=1e-6)


def test_upstream_gradients_of_experts_are_used(key):
    """Those that are given: each expert by its own."""
    many = fj.experts(partial(fj.Mlp, D, P, OUT, act="relu"), 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, T, D))
    upstream = jax.random.normal(jax.random.key(2), (2, T, OUT))
    seen = {"": fj.Calibration(x, upstream=upstream)}
    made, _ = fj.compress(many, fj.Prune(width=KEPT, score="fisher"), key=key, calibration=seen)
    subs = many.sub_mlps()
    for e in range(2):
        hidden = np.maximum(x[e] @ subs.up[e].T + subs.up_bias[e][None], 0)
        scores = np.square(hidden * (upstream[e] @ subs.down[e].T)).mean(0)
        chosen = np.sort(np.argsort(-scores)[:KEPT])
        np.testing.assert_array_equal(made.sub_mlps().up[e], subs.up[e][chosen])


def test_what_the_scores_need_is_said(key, tmp_path):
    mlp = an_mlp()
    with pytest.raises(fj.InputError, match="score 'wanda' needs calibration"):
        fj.compress(mlp, fj.Prune(score="wanda"), key=key)
    with pytest.raises(fj.InputError, match="refit needs calibration"):
        fj.compress(mlp, fj.Prune(refit=True), key=key)
    with pytest.raises(fj.InputError, match="'fisher' needs calibration text or tokens"):
        fj.compress(mlp, fj.Prune(score="fisher"), key=key, calibration={"": inputs(D)})
    with pytest.raises(fj.InputError, match="Prune needs a Calibration with upstream"):
        fj.compress_mlp(
            mlp.sub_mlps(), fj.Prune(score="fisher"), key=key, act="gelu", calibration=inputs(D)
        )
    weighted = fj.Calibration(inputs(D), weights=jnp.ones(11))
    with pytest.raises(fj.InputError, match="outputs and weights are for compress_mlp"):
        fj.compress(mlp, fj.Prune(score="wanda"), key=key, calibration={"": weighted})
    with pytest.raises(fj.InputError, match="ridge must be above 0"):
        fj.Prune(ridge=0.0)
    model = fj.load(checkpoint(tmp_path / "m", "mixtral", "causal-lm"), head="causal-lm")
    text = [{"input_ids": np.ones((2, 5), np.int32)}]
    with pytest.raises(fj.InputError, match="upstream gradients is for single MLPs"):
        fj.compress(model, fj.Prune(score="fisher"), key=key, calibration=text)


@pytest.mark.parametrize("width", [7, GRAM_BLOCKS * 128, GRAM_BLOCKS * 128 + 13])
def test_one_half_of_a_gram_matrix_is_computed(width):
    x = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    np.testing.assert_allclose(gram_of(jnp.asarray(x)), x.T @ x, atol=1e-5)


def test_large_matrices_are_inverted_by_blocks(monkeypatch, x64):
    monkeypatch.setattr(gram, "LAPACK_SIZE", 16)
    x = np.random.default_rng(0).normal(size=(200, 71)) * np.logspace(0, 2, 71)
    matrix = x.T @ x
    got = gram.inverse_of(jnp.asarray(matrix))
    np.testing.assert_allclose(got @ matrix, np.eye(71), atol=1e-8)
    np.testing.assert_array_equal(got, got.T)
