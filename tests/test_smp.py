"""Static pruning: scores and their gradients, schedules, runs, masks in files, label words."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fusion_jax as fj
from fusion_jax.checkpoint import dtype_name, files
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.models.bert import Bert, BertConfig
from fusion_jax.nn.linear_forms import Frozen, Masked, Scored, find_forms
from fusion_jax.nn.mlp import Mlp, experts
from fusion_jax.training import GLUE, LABEL_WORDS, Recipe, measure, predict, with_masks, with_scores
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.partition import Partition
from fusion_jax.training.methods.scores import penalized
from tests import glue, tiny
from tests.helpers import PRUNING_CONFIG as CONFIG
from tests.helpers import with_words


def layer(dtype=jnp.float32, seed=0, d=6, o=5, keep=0.5, bias=True):
    keys = jax.random.split(jax.random.key(seed), 3)
    form = Scored(d, o, use_bias=bias, param_dtype=dtype)
    kernel, scores = (jax.random.normal(k, (d, o), jnp.float32) for k in keys[:2])
    b = jax.random.normal(keys[2], (o,), jnp.float32) if bias else None
    form.load([kernel, scores, jnp.float32(keep), jnp.float32(0)], b)
    return form


@pytest.mark.parametrize("keep", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_the_largest_scores_count(keep):
    form = layer(keep=keep)
    scores = np.asarray(form.scores[...])
    count = int(np.floor(keep * scores.size + 1e-6))
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[:count]] = True
    np.testing.assert_array_equal(form.mask(), mask.reshape(scores.shape))
    np.testing.assert_array_equal(form.matrix(), np.where(form.mask(), form.kernel[...], 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_go_straight_through(dtype):
    """dL/dS is dL/dW' * K with the whole kernel, and the pruned weights' too."""
    form = layer(dtype)
    x = jax.random.normal(jax.random.key(1), (7, 6), jnp.float32).astype(dtype)

    def loss_of_scores(scores):
        other = nnx.clone(form)
        other.scores.set_value(scores)
        return jnp.square(other(x).astype(jnp.float32)).sum()

    def loss_of_matrix(matrix):
        y = x @ matrix + form.bias[...][None]
        return jnp.square(y.astype(jnp.float32)).sum()

    by_matrix = jax.grad(loss_of_matrix)(form.matrix())
    want = by_matrix.astype(jnp.float32) * form.kernel[...].astype(jnp.float32)
    got = jax.jit(jax.grad(loss_of_scores))(form.scores[...])
    assert got.dtype == jnp.float32
    assert form(x).dtype == dtype
    assert (np.asarray(got)[~np.asarray(form.mask())] != 0).all()
    np.testing.assert_allclose(got, want, atol=0 if dtype == jnp.float32 else 0.5, rtol=1e-5)


def test_keep_changes_without_compiling_again():
    form = layer()
    graph = nnx.graphdef(form)
    traces = []

    @jax.jit
    def kept(state):
        traces.append(1)
        return nnx.merge(graph, state).mask().sum()

    for keep in (0.1, 0.5, 0.9):
        form.keep.set_value(jnp.float32(keep))
        assert kept(nnx.state(form)) == int(keep * 30)
    assert len(traces) == 1


@pytest.mark.full
def test_experts_under_vmap():
    plain = experts(lambda **kw: Mlp(4, 6, act="relu", **kw), 3, rngs=nnx.Rngs(0))
    alone = [layer(seed=i, d=4, o=6, keep=0.25 * (i + 1)) for i in range(3)]
    stacked = Scored.abstract(plain.up)
    arrays = [jnp.stack([form.arrays()[k][...] for form in alone]) for k in range(4)]
    stacked.load(arrays, jnp.stack([form.bias[...] for form in alone]))
    assert stacked.stack == (3,)
    x = jax.random.normal(jax.random.key(1), (3, 5, 4), jnp.float32)
    out = jax.vmap(lambda form, x: form(x))(stacked, x)
    for i, form in enumerate(alone):
        np.testing.assert_array_equal(stacked.mask()[i], form.mask())
        np.testing.assert_array_equal(stacked.matrix()[i], form.matrix())
        np.testing.assert_allclose(out[i], form(x[i]), atol=1e-5)
        np.testing.assert_array_equal(stacked.plain().kernel[i], form.plain().kernel[...])
    assert not hasattr(stacked.plain(), "scores")


HEAD = {"head.out.kernel", "head.out.bias", "pooler.kernel", "pooler.bias"}
LINEARS = r"layers\..*"


def arrays(model):
    return {
        ".".join(map(str, path)): np.asarray(v.get_value())
        for path, v in nnx.to_flat_state(nnx.state(model))
    }


def masked(model, keep=0.3):
    smaller, _ = fj.compress_matrices(model, fj.MaskPrune(keep=keep), matrices=LINEARS)
    return smaller


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smp")
    return with_words(folder / "bert"), glue.sst2(folder / "SST-2")


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_masks_in_a_file(dtype, places, tmp_path, key):
    model = fj.load(places[0], head="classification", num_labels=2, key=key, dtype=dtype)
    pruned = masked(model)
    folder = fj.save_masks(pruned, tmp_path / "masks")
    again = fj.load(folder)
    assert bit_equal(pruned, again)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    # Nothing but bits, and the head, which the base does not have.
    weights = sum(form.mask[...].size for form in find_forms(pruned).values())
    bits = {name: x for name, x in stored.items() if name.endswith(".mask")}
    assert sum(x.nbytes for x in bits.values()) == weights / 8
    assert set(stored) - set(bits) == HEAD
    with pytest.raises(fj.InputError, match="not an empty folder"):
        fj.save_masks(pruned, folder)
    # And from there again, changed at one more place.
    again.layers[0].mlp.up.bias.set_value(again.layers[0].mlp.up.bias[...] + 1)
    other = fj.load(fj.save_masks(again, tmp_path / "other"))
    assert bit_equal(again, other)
    assert "layers.0.mlp.up.bias" in safetensors.numpy.load_file(
        tmp_path / "other" / "model.safetensors"
    )


PRUNING = fj.StaticPruning(keep=0.4, ramp=7)


@pytest.fixture(scope="module")
def data(places):
    return fj.load_task("sst2", places[1])


@pytest.fixture(scope="module")
def model(places):
    return fj.load(places[0], head="classification", label_words=("w3", "w50"))


def run(model, data, key, folder=None, pruning=PRUNING, config=CONFIG, teacher=None, **more):
    return fj.static_prune(
        model, data, config, pruning, key=key, folder=folder, teacher=teacher, recipe=Recipe(**more)
    )


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that was not stopped, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run(model, data, jax.random.key(0), folder), folder


@pytest.mark.full
def test_a_run_ends_as_it_should(model, whole):
    before = arrays(model)
    result, folder = whole
    assert [h["step"] for h in result.history] == [2, 4, 6, 8]
    found = arrays(result.model)
    shares = {}
    for path, form in find_forms(result.model).items():
        assert type(form) is Masked
        mask = found.pop(f"{path}.mask")
        np.testing.assert_array_equal(
            found.pop(f"{path}.kernel"), np.where(mask, before.pop(f"{path}.kernel"), 0)
        )
        kind = path.split(".", 2)[2]
        shares.setdefault(kind, []).append(mask.mean())
    assert sorted(shares) == sorted(
        [
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.out",
            "mlp.up",
            "mlp.down",
        ]
    )
    for kind, each in shares.items():
        assert len(each) == 2
        assert abs(np.mean(each) - 0.4) < 2e-3, kind  # each is rounded down to whole weights
    assert any(len(set(each)) > 1 for each in shares.values())
    assert found.keys() == before.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    assert bit_equal(result.model, fj.load(folder / "last"))
    # Before the end more is kept, so that the last evaluation alone counts for the best.
    assert bit_equal(result.model, fj.load(folder / "best"))


@pytest.mark.full
def test_stopping_and_resuming_changes_no_bit(model, data, key, whole, tmp_path):
    result, folder = whole

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 5:
            raise Killed

    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        run(model, data, key, parts, on_step=kill)
    ended = run(model, data, key, parts)
    assert bit_equal(result.model, ended.model)
    assert result.history == ended.history
    for name in ("best", "last"):
        assert bit_equal(fj.load(folder / name), fj.load(parts / name))
    with pytest.raises(fj.InputError, match=r"keep 0\.4, now 0\.3"):
        run(model, data, key, parts, pruning=dataclasses.replace(PRUNING, keep=0.3))
    # What was measured at the end is what was saved.
    dev = data.dev["dev"]
    assert (
        measure(data.spec, predict(ended.model, dev), dev)["accuracy"]
        == (ended.history[-1]["accuracy"])
    )


@pytest.mark.full
def test_masks_alone_learn_a_task(model, data, key):
    """With six tenths of random weights, none of which changes, and a head that does not train."""
    config = dataclasses.replace(
        CONFIG, max_steps=120, epochs=99, batch_size=16, learning_rate=5e-2, eval_every=120,
        dropout=False, clip_norm=None,
    )  # fmt: skip
    pruning = fj.StaticPruning(keep=0.6, penalty=40.0)
    before = measure(data.spec, predict(model, data.train), data.train)["accuracy"]
    after = run(model, data, key, pruning=pruning, config=config).model
    assert before < 0.75
    assert measure(data.spec, predict(after, data.train), data.train)["accuracy"] > 0.9


@pytest.mark.full
def test_on_a_mesh(model, data, key, whole):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"))
    with jax.set_mesh(mesh):
        result = run(model, data, key)
    same = []
    for path, form in find_forms(whole[0].model).items():
        other = find_forms(result.model)[path].mask[...]
        assert abs(int(other.sum()) - int(form.mask[...].sum())) <= 2
        same.append(float((other == form.mask[...]).mean()))
    # Scores differ by rounding, which may swap weights at the limit.
    assert np.mean(same) > 0.99


def rule_of(pruning, model, steps):
    """The rule with scores drawn at random, as one function of the step."""
    flat = arrays(model)
    rng = np.random.RandomState(3)
    params = {
        path: jnp.asarray(rng.normal(size=x.shape) + rng.normal(), jnp.float32)
        for path, x in flat.items()
        if path.endswith(".scores")
    }
    rule = jax.jit(pruning.variable_update(model, steps))
    return params, lambda t: rule(params, flat, jnp.int32(t))


def test_schedules(model):
    """Steps 0 to 19: the shares and factors of the published code, in numpy."""
    pruning = fj.StaticPruning(keep=0.3, allocation="L", ramp=10, penalty=7.0)
    _, rule = rule_of(pruning, with_scores(model), 20)
    for t in range(20):
        found = rule(t)
        keep = 0.3 + 0.7 * (1 - min(t, 10) / 10) ** 3
        penalty = 7 * (1 - (1 - t / 20) ** 3)
        assert {round(float(x), 5) for p, x in found.items() if p.endswith("keep")} == {
            round(keep, 5)
        }
        np.testing.assert_allclose(found["layers.1.mlp.up.penalty"], penalty, rtol=1e-5, atol=1e-6)
    assert np.float32(0.3) == rule(10)["layers.0.attention.key.keep"]
    literal = dataclasses.replace(pruning, penalty_steps=10)
    assert rule_of(literal, with_scores(model), 20)[1](10)["layers.1.mlp.up.penalty"] == 7


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_shares_are_balanced_over_the_layers_of_a_type(model, temperature):
    pruning = fj.StaticPruning(keep=0.35, ramp=10, temperature=temperature)
    params, rule = rule_of(pruning, with_scores(model), 20)
    found = rule(15)
    for kind in ("attention.query", "attention.out", "mlp.up", "mlp.down"):
        names = [f"layers.{i}.{kind}" for i in range(2)]
        large = [(1 / (1 + np.exp(-np.float64(params[f"{n}.scores"]) / temperature))).mean()
                 for n in names]  # fmt: skip
        want = [0.35 * 2 * r / sum(large) for r in large]
        shares = [float(found[f"{n}.keep"]) for n in names]
        np.testing.assert_allclose(shares, want, rtol=1e-5)
        np.testing.assert_allclose(np.mean(shares), 0.35, rtol=1e-6)


def test_shares_stop_at_one(model):
    new = with_scores(model, matrices=r"layers\.\d\.mlp\.up")
    pruning = fj.StaticPruning(keep=0.9, ramp=1)
    scores = {f"layers.{i}.mlp.up.scores": jnp.full((32, 48), 3.0 * i) for i in range(2)}
    found = pruning.variable_update(new, 9)(scores, arrays(new), jnp.int32(5))
    low, high = (float(found[f"layers.{i}.mlp.up.keep"]) for i in range(2))
    assert high == 1
    sigmoid = 1 / (1 + np.exp(-3.0))
    assert abs(low - 0.9 * 2 * 0.5 / (0.5 + sigmoid)) < 1e-5


@pytest.mark.full
def test_shares_of_experts_and_of_matrices_of_other_sizes():
    mlps = [
        experts(lambda width=width, **kw: Mlp(4, width, act="relu", **kw), 3, rngs=nnx.Rngs(0))
        for width in (6, 10)
    ]
    new = with_scores(nnx.List(mlps), matrices=r"\d\.up")
    params, rule = rule_of(fj.StaticPruning(keep=0.3, ramp=1, temperature=3.0), new, 9)
    found = rule(5)
    shares = [found[f"{i}.up.keep"] for i in range(2)]
    assert [x.shape for x in shares] == [(3,), (3,)]
    kept = 4 * 6 * shares[0].sum() + 4 * 10 * shares[1].sum()
    np.testing.assert_allclose(kept, 0.3 * 3 * 4 * 16, rtol=1e-5)
    large = jax.nn.sigmoid(params["1.up.scores"] / 3).mean((1, 2))
    np.testing.assert_allclose(shares[1] / shares[1][0], large / large[0], rtol=1e-5)


def batch_of(model, labels=(0, 1, 1)):
    inputs = {k: jnp.asarray(v) for k, v in tiny.batch("bert").items()}
    return {**inputs, "labels": jnp.array(labels), "weights": jnp.array([1.0, 1.0, 0.0])}


@pytest.mark.full
def test_the_penalty_in_the_loss(model):
    new = with_scores(model)
    rng = np.random.RandomState(0)
    means = []
    for form in find_forms(new).values():
        form.scores.set_value(jnp.asarray(rng.normal(size=form.scores[...].shape), jnp.float32))
        form.penalty.set_value(jnp.float32(11))
        means.append((1 / (1 + np.exp(-np.float64(form.scores[...])))).mean())
    batch = batch_of(new)
    own = losses.classification(new, batch, None)
    total = penalized(losses.classification)(new, batch, None)
    assert float(total.count) == 2
    np.testing.assert_allclose(
        total.total / 2, float(own.total) / 2 + 11 * np.mean(means), rtol=1e-5
    )
    sizes = [form.scores[...].size for form in find_forms(new).values()]
    total = penalized(losses.classification, of="sum")(new, batch, None)
    np.testing.assert_allclose(
        total.total / 2, float(own.total) / 2 + 11 * np.dot(means, sizes), rtol=1e-5
    )


def test_learning_from_a_teacher(model, places):
    """Cross-entropy and KL(teacher || student) at temperature 3, by hand."""
    other = fj.load(places[0], head="classification", label_words=("w7", "w8"))
    batch = batch_of(model)
    share = losses.distilled(other, losses.classification, 0.3, 3.0)
    found = jax.jit(lambda loss, m: loss(m, batch, None))(share, model)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "weights")}
    ours, theirs = (np.float64(m(**inputs).logits)[:2] for m in (model, other))

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    ce = -np.log(softmax(ours))[[0, 1], [0, 1]]
    p, q = softmax(theirs / 3), softmax(ours / 3)
    kl = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(found.total, (0.7 * ce + 0.3 * 9 * kl).sum(), rtol=1e-4)
    assert found.count == 2
    reverse = losses.distilled(other, losses.classification, 0.3, 3.0, reverse=True)
    found = jax.jit(lambda loss, m: loss(m, batch, None))(reverse, model)
    kl = (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(found.total, (0.7 * ce + 0.3 * 9 * kl).sum(), rtol=1e-4)
    with pytest.raises(fj.InputError, match=r"weight of a teacher must be in \[0, 1\]; got 2"):
        losses.distilled(other, losses.classification, 2.0)
    with pytest.raises(fj.InputError, match="temperature must be above 0"):
        losses.distilled(other, losses.classification, temperature=0.0)
    three = fj.load(places[0], head="classification", num_labels=3, key=jax.random.key(0))
    with pytest.raises(fj.InputError, match=r"same two or more classes.*\(3, 3\) and \(3, 2\)"):
        losses.distilled(three, losses.classification)(model, batch, None)


@pytest.mark.full
def test_scores_learn_from_a_teacher_in_either_way(model, places, data, key):
    teacher = fj.load(places[0], head="classification", label_words=("w7", "w8"))
    config = dataclasses.replace(CONFIG, max_steps=2, eval_every=9)
    options = {"pruning": dataclasses.replace(PRUNING, ramp=1), "config": config}

    def given(**more):
        seen = []
        run(
            model,
            data,
            key,
            on_step=lambda step, state: seen.append(jax.tree.map(np.asarray, state.params)),
            **options,
            **more,
        )
        return seen[0]

    plain = given(teacher=teacher)
    same = given(loss=partial(losses.distilled, teacher))
    other = given(loss=partial(losses.distilled, teacher, reverse=True))
    for path, x in plain.items():
        np.testing.assert_array_equal(x, same[path], err_msg=path)
    assert any((x != other[path]).any() for path, x in plain.items())
    with pytest.raises(fj.InputError, match="give a teacher, or a loss that has one; not both"):
        run(model, data, key, teacher=teacher, loss=partial(losses.distilled, teacher))


@pytest.mark.full
def test_a_taught_student_agrees_with_its_teacher(places, data, key):
    """Plain fine-tuning with the teacher's share at 1: labels do not matter."""
    teacher = fj.load(places[0], head="classification", label_words=("w7", "w8"))
    student = fj.load(places[0], head="classification", label_words=("w3", "w50"))
    config = fj.TrainConfig(max_steps=40, epochs=99, batch_size=16, learning_rate=2e-3,
                            shapes=1, dropout=False, weight_decay=0.0)  # fmt: skip
    teach = Recipe(loss=partial(losses.distilled, teacher, weight=1.0))
    after = fj.finetune(student, data, config, key=key, recipe=teach).model
    want, before, ended = (predict(m, data.train) @ [1, -1] for m in (teacher, student, after))
    assert np.abs(ended - want).mean() < 0.2 * np.abs(before - want).mean()


@pytest.mark.full
def test_scores_stay_precise_where_the_model_computes_in_bfloat16(model):
    parts = Partition(with_scores(model), r".*\.scores", compute_dtype=jnp.bfloat16)
    computed = parts.compute(*parts.split(with_scores(model)))
    dtypes = {path: x.dtype.name for path, x in arrays(computed).items()}
    assert dtypes["layers.0.mlp.up.scores"] == dtypes["layers.0.mlp.up.kernel"] == "float32"
    assert dtypes["layers.0.mlp.up.bias"] == "bfloat16"
    assert computed(**tiny.batch("bert")).logits.dtype == jnp.bfloat16
    small = fj.load(model.provenance.folder, dtype="bfloat16")
    dtypes = {path: x.dtype.name for path, x in arrays(with_scores(small)).items()}
    assert dtypes["layers.0.mlp.up.scores"] == "float32"
    assert dtypes["layers.0.mlp.up.kernel"] == "bfloat16"
    assert dtype_name(with_scores(small)) == "bfloat16"


@pytest.mark.full
def test_scores_in_an_artefact(model, tmp_path, key):
    new = with_scores(model)
    for form in find_forms(new).values():
        key, own = jax.random.split(key)
        form.scores.set_value(jax.random.normal(own, form.scores[...].shape, jnp.float32))
        form.keep.set_value(jnp.float32(0.7))
    again = fj.load(fj.save(new, tmp_path / "scored"))
    assert bit_equal(new, again)
    assert type(again.layers[1].attention.out) is Scored
    assert type(again.layers[1].attention.out.kernel) is Frozen
    x = tiny.batch("bert")
    np.testing.assert_array_equal(new(**x).logits, again(**x).logits)
    np.testing.assert_array_equal(new(**x).logits, with_masks(new)(**x).logits)
    exported = fj.load(fj.export_hf(new, tmp_path / "hf"), head="masked-lm")
    kernel = exported.layers[1].attention.out.kernel[...]
    np.testing.assert_array_equal(kernel, with_masks(new).layers[1].attention.out.kernel[...])
    assert 0.25 < float((kernel == 0).mean()) < 0.35


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"ramp": 0}, r"ramp must be steps or a part in \(0, 1\]"),
        ({"penalty_steps": 1.5}, "penalty_steps must be steps or a part"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(fj.InputError, match=message):
        fj.StaticPruning(**fields)


def test_errors(model, data, key, places, tmp_path):
    with pytest.raises(fj.InputError, match=r"reached after 8 steps .*, but the run has 8"):
        run(model, data, key, pruning=dataclasses.replace(PRUNING, ramp=8))
    with pytest.raises(fj.InputError, match="train does not apply"):
        run(model, data, key, config=dataclasses.replace(CONFIG, train="head"))
    with pytest.raises(fj.InputError, match=r"layers\.0\.mlp\.up is scored already"):
        with_scores(with_scores(model), matrices=r"layers\.0\.mlp\.up")
    with pytest.raises(fj.InputError, match=r"embeddings\.word is an embedding"):
        with_scores(model, matrices=r"embeddings\.word")
    with pytest.raises(fj.InputError, match="no scores"):
        with_masks(model)
    with pytest.raises(fj.InputError, match="no scores"):
        PRUNING.variable_update(model, 9)
    three = fj.load(places[0], head="classification", num_labels=3, key=key)
    with pytest.raises(fj.InputError, match="3 outputs, sst2 needs 2"):
        run(model, data, key, teacher=three)


@pytest.mark.full
def test_a_head_that_trains(places, data, key, tmp_path):
    model = fj.load(places[0], head="classification", num_labels=2, key=key)
    pruning = dataclasses.replace(PRUNING, train_head=True)
    result = run(model, data, key, tmp_path / "run", pruning)
    before, after = arrays(model), arrays(result.model)
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    assert {p for p in moved if not p.startswith("layers.")} == HEAD
    stored = safetensors.numpy.load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert {name for name in stored if not name.endswith(".mask")} == HEAD
    assert bit_equal(result.model, fj.load(tmp_path / "run" / "last"))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_label_words_are_those_of_the_masked_lm_head(family, tmp_path):
    """Against the logits of Hugging Face's model, at the first position."""
    folder = tiny.checkpoint(tmp_path / "model", family, "masked-lm")
    golden = tiny.read_golden(family, "masked-lm").outputs["logits"]
    model = fj.load(folder, head="classification", label_words=(17, 4, 88))
    out = jax.jit(lambda m: m(**tiny.batch(family)))(model)
    np.testing.assert_allclose(out.logits, golden[:, 0, [17, 4, 88]], atol=1e-4)
    assert out.pooler_output is None
    again = fj.load(fj.save(model, tmp_path / "artefact"))
    assert bit_equal(model, again)
    assert again.config == model.config
    np.testing.assert_array_equal(again(**tiny.batch(family)).logits,
                                  model(**tiny.batch(family)).logits)  # fmt: skip
    assert bit_equal(model, fj.load(tmp_path / "artefact", head="classification", num_labels=3))
    # Exported, it is the whole head again, from which the words are read.
    hf = fj.export_hf(model, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == [tiny.architecture(family, "masked-lm")]
    assert config["label_ids"] == [17, 4, 88]
    for exported in (fj.load(hf, head="masked-lm"), fj.load(hf, head="classification")):
        logits = exported(**tiny.batch(family)).logits
        logits = logits[:, 0, jnp.array([17, 4, 88])] if logits.ndim == 3 else logits
        np.testing.assert_allclose(logits, out.logits, atol=1e-5)


@pytest.mark.torch
def test_exported_label_words_equal_hugging_face(tmp_path):
    import torch

    folder = tiny.checkpoint(tmp_path / "model", "bert", "masked-lm")
    pruned = masked(fj.load(folder, head="classification", label_words=(17, 4)))
    batch = tiny.batch("bert")
    theirs = tiny.hugging_face(fj.export_hf(pruned, tmp_path / "hf"), "bert", "masked-lm")
    with torch.no_grad():
        out = theirs(**{name: torch.as_tensor(x).long() for name, x in batch.items()})
    logits = out.logits[:, 0, theirs.config.label_ids].numpy()
    np.testing.assert_allclose(pruned(**batch).logits, logits, atol=1e-4)


def test_label_words_without_a_masked_lm_head(tmp_path):
    """As in all-MiniLM: the first hidden state times the words' embeddings."""
    folder = tiny.checkpoint(tmp_path / "model")
    model = fj.load(folder, head="classification", label_words=(17, 4))
    states = np.asarray(model(**tiny.batch("bert")).last_hidden_state)
    words = tiny.weights("bert", None)["embeddings.word_embeddings.weight"][[17, 4]]
    np.testing.assert_allclose(
        model(**tiny.batch("bert")).logits, states[:, 0] @ words.T, atol=1e-4
    )
    again = fj.load(fj.save(model, tmp_path / "artefact"))
    assert bit_equal(model, again)
    assert not again.config.label_transform
    with pytest.raises(fj.InputError, match="transformers has no head that multiplies"):
        fj.export_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_words_become_tokens(places, tmp_path):
    model = fj.load(places[0], head="classification", label_words=("w7", "w0"))
    assert model.config.label_ids == (12, 5)
    assert model.config.num_labels == 2
    # A head of words can be put on what was fine-tuned with another.
    other = tiny.checkpoint(tmp_path / "tuned", "bert", "classification")
    assert fj.load(other, head="classification", label_words=(3, 4)).config.num_labels == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_words": ("w1", "nothing")}, r"label word 'nothing' is not one token"),
        ({"label_words": ("w1", "w2 w3")}, r"label word 'w2 w3' is not one token"),
        ({"label_words": ("w1", "w1")}, "different from each other"),
        ({"label_words": ("w1", "w2"), "num_labels": 3}, "num_labels is 3, but label_words has 2"),
        ({"label_words": (1, 99)}, "not all below vocab_size 99"),
        ({"label_words": (1, 2), "head": "masked-lm"}, "is for head='classification'"),
    ],
)
def test_label_words_that_cannot_be(arguments, message, places):
    with pytest.raises(fj.InputError, match=message):
        fj.load(places[0], **{"head": "classification", **arguments})


def test_label_words_of_glue():
    """One word a class, in the order of the classes; WNLI has none."""
    assert LABEL_WORDS.keys() == GLUE.keys() - {"wnli"}
    for name, words in LABEL_WORDS.items():
        assert len(words) == GLUE[name].num_labels
    mnli = dict(zip(GLUE["mnli"].labels or (), LABEL_WORDS["mnli"], strict=True))
    assert mnli == {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}


@pytest.fixture
def artefact(places, tmp_path):
    """Masks of a model in a folder of its own."""
    base = shutil.copytree(places[0], tmp_path / "base")
    model = masked(fj.load(base, head="classification", label_words=("w1", "w2")))
    return base, model, fj.save_masks(model, tmp_path / "masks")


def test_a_base_that_was_moved(artefact, tmp_path, capsys):
    base, model, folder = artefact
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(fj.InputError, match=r"holds masks for .*base, which cannot be read \(no"):
        fj.load(folder)
    assert bit_equal(model, fj.load(folder, base=moved))
    assert main(["rebase", str(folder), str(moved)]) == 0
    assert "takes its weights from" in capsys.readouterr().out
    assert bit_equal(model, fj.load(folder))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "fusion.json", "model.safetensors", "vocab.txt"
    ]  # fmt: skip
    # It does not become the base of what is made of it.
    again = json.loads((fj.save_masks(fj.load(folder), tmp_path / "b") / "fusion.json").read_text())
    assert again["masks"]["base"] == {"name": str(moved), "revision": None}


def test_another_base_is_refused(artefact, tmp_path):
    _, _, folder = artefact
    name = "bert.encoder.layer.1.attention.output.dense.bias"
    tensors = tiny.weights("bert", "masked-lm")
    tensors = {n: x for n, x in tensors.items() if ".layer.2." not in n}
    tensors[name] = np.nextafter(tensors[name], np.float32(9))
    config = {**tiny.BERT, "num_hidden_layers": 2}
    near = tiny.write_folder(tmp_path / "near", config, tensors)
    message = r"near is not the model that the masks in .* layers\.1\.attention\.out\.bias differs"
    with pytest.raises(fj.InputError, match=message):
        fj.load(folder, base=near)
    with pytest.raises(fj.InputError, match=message):
        fj.rebase(folder, near)
    small = tiny.checkpoint(tmp_path / "base-only")
    with pytest.raises(fj.InputError, match="is not the model that the masks"):
        fj.load(folder, base=small)
    wide = tiny.write_folder(tmp_path / "wide", {**config, "intermediate_size": 50}, tensors)
    with pytest.raises(fj.InputError, match=r"is not the model.*layers\.0\.mlp\.\w+\.\w+ differs"):
        fj.load(folder, base=wide)
    with pytest.raises(fj.InputError, match=r"base is for artefacts of fusion_jax\.save_masks"):
        fj.load(near, base=near)


def test_masks_for_a_model_of_the_hub(places, tmp_path, monkeypatch):
    """The commit is kept, so that a later one on the hub is not taken."""
    commit = "0123456789" * 4
    folder = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(places[0], folder)
    asked = []

    def find(name, revision=None):
        asked.append((str(name), revision))
        return folder if name == "someone/tiny" else files_folder(name, revision)

    files_folder = files.find_folder
    monkeypatch.setattr(files, "find_folder", find)
    model = masked(fj.load("someone/tiny", head="masked-lm"))
    masks = fj.save_masks(model, tmp_path / "masks")
    asked.clear()
    assert bit_equal(model, fj.load(masks))
    assert asked == [(str(masks), None), ("someone/tiny", commit)]


@pytest.mark.full
def test_masks_for_an_artefact(places, tmp_path, key):
    """The base may be compressed; what was done to it before it was saved stays there."""
    fused, _ = fj.compress(fj.load(places[0], head="masked-lm"), fj.Fusion(width=12), key=key)
    base = fj.load(fj.save(fused, tmp_path / "fused"))
    pruned = masked(base)
    folder = fj.save_masks(pruned, tmp_path / "masks")
    assert bit_equal(pruned, fj.load(folder))
    names = safetensors.numpy.load_file(folder / "model.safetensors")
    assert all(name.endswith(".mask") for name in names)
    assert len(fj.load(folder).provenance.history) == 2


def test_what_cannot_be_saved_as_masks(model, tmp_path):
    with pytest.raises(fj.InputError, match="has no masks"):
        fj.save_masks(model, tmp_path / "a")
    alone = masked(Bert(BertConfig.from_json(tiny.BERT), rngs=nnx.Rngs(0)))
    with pytest.raises(fj.InputError, match=r"came from fusion_jax\.load"):
        fj.save_masks(alone, tmp_path / "a")


def test_a_full_disk_leaves_nothing(artefact, tmp_path, monkeypatch):
    _, model, _ = artefact

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="nothing was left behind"):
        fj.save_masks(model, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


OPTIONS = ["--max-steps", "3", "--batch-size", "8", "--shapes", "1", "--ramp", "2"]


@pytest.mark.full
def test_command_line(places, tmp_path, capsys):
    model, data = (str(place) for place in places)
    task, out = ["--task", "sst2", "--data", data], str(tmp_path / "run")
    command = ["smp", model, "--out", out, *task, "--keep", "0.5", "--words", "w1", "w2", *OPTIONS]
    assert main(command) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 1
    assert "another seed" in capsys.readouterr().err
    pruned = fj.load(tmp_path / "run" / "best")
    total = {}
    for path, form in find_forms(pruned).items():
        total.setdefault(path.split(".", 2)[2], []).append(float(form.mask[...].mean()))
    assert all(abs(np.mean(shares) - 0.5) < 2e-3 for shares in total.values())
    assert main(["evaluate", out, *task]) == 0
    assert main([*command, "--max-length", "30"]) == 1
    assert "another max_length" in capsys.readouterr().err
    assert main(["export", f"{out}/best", str(tmp_path / "hf")]) == 0
    exported = fj.load(tmp_path / "hf", head="classification")
    x = tiny.batch("bert")
    np.testing.assert_allclose(exported(**x).logits, pruned(**x).logits, atol=1e-5)
    taught = ["smp", model, "--out", str(tmp_path / "b"), *task, "--train-head", *OPTIONS]
    assert main([*taught, "--teacher", out]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst2"], "give either --task and --data, or --train-file"),
        (["TASK"], "label word 'terrible' is not one token"),
        (["TASK", "--words", "w1", "w2", "--train-head"], "give either --words"),
        (["TASK", "--words", "w1"], "1 words for 2 classes: negative, positive"),
        (["--train-file", "FILE", "--text", "sentence"], "no label words; give --words, one for "),
        (["TASK", "--words", "w1", "w2", "--max-steps", "1"], "but the run has 1"),
    ],
)
def test_errors_of_the_command_line(arguments, message, places, tmp_path, capsys):
    names = {"TASK": ["--task", "sst2", "--data", str(places[1])]}
    names["FILE"] = [str(places[1] / "train.tsv")]
    given = [a for name in arguments for a in names.get(name, [name])]
    assert main(["smp", str(places[0]), "--out", str(tmp_path / "run"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_penalty_is_a_number():
    for penalty in (float("nan"), float("inf"), -1.0):
        with pytest.raises(fj.InputError, match="penalty must be at least 0, and finite"):
            fj.StaticPruning(penalty=penalty)
