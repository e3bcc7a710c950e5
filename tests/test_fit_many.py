"""Many runs in one program: each is the run of `fit` alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.training import Examples, Prepared, Recipe, fit, fit_many, losses, tune_many
from fusion_jax.training.engine import trainer
from fusion_jax.training.engine.batches import Batches
from fusion_jax.training.engine.joint import check_alike, fit_jointly
from fusion_jax.training.tasks.classification import TextEncoder
from tests import glue
from tests.helpers import TRAIN_CONFIG, OneBatch, flat

CONFIG = dataclasses.replace(TRAIN_CONFIG, shapes=2, dropout=True, log_every=3, weight_decay=0.5)
KEYS = [jax.random.key(seed) for seed in (3, 4, 5)]


class Words(nnx.Module):
    """Classifies texts by the mean of their words, with dropout."""

    def __init__(self, width=6, rate=0.5, *, seed=0):
        rngs = nnx.Rngs(seed)
        self.words = nnx.Embed(20, width, rngs=rngs)
        self.head = nnx.Linear(width, 2, rngs=rngs)
        self.rate = rate

    def logits(self, batch, key=None):
        mask = jnp.asarray(batch["attention_mask"], jnp.float32)[..., None]
        x = (self.words(jnp.asarray(batch["input_ids"])) * mask).sum(1) / mask.sum(1)
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x, 0.0)
        return self.head(x)


def loss(model, batch, key):
    weights = jnp.asarray(batch["weights"])
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(model.logits(batch, key)), jnp.asarray(batch["labels"])[:, None], 1
    )
    return losses.Total(-(chosen[:, 0] * weights).sum(), weights.sum())


class Task:
    """A task whose order of the examples depends on the key."""

    def __init__(self, n=37):
        rng = np.random.RandomState(0)
        tokens = [rng.randint(1, 20, rng.randint(1, 30)).astype(np.int32) for _ in range(n)]
        labels = np.array([int(each[0] < 10) for each in tokens], np.int32)
        self.examples = Examples(tokens, None, labels, [f"example {i}" for i in range(n)])

    def batches(self, config, key):
        seed = int(jax.random.bits(jax.random.split(key)[0]))
        size, shapes = config.batch_size, config.shapes
        return Batches(self.examples, size, pad_id=0, shapes=shapes, seed=seed)

    def prepare(self, model, config, *, key):
        def evaluate(model):
            batch = Batches(self.examples, 37, pad_id=0, shapes=1)(0)
            return {"loss": float(loss(model, batch, None).total)}

        return Prepared(self.batches(config, key), loss, evaluate, lowest=True)

    def inputs(self, model, config, *, key):
        return self.batches(config, key)


def assert_same(one, many, tolerance=1e-6):
    assert [h["step"] for h in one.history] == [h["step"] for h in many.history]
    assert (one.step, one.finished) == (many.step, many.finished)
    for a, b in zip(one.history, many.history, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    for path, (_, x) in flat(one.model).items():
        if not path.endswith("attention.key.bias"):  # its gradient is rounding
            np.testing.assert_allclose(
                x, flat(many.model)[path][1], atol=tolerance, rtol=0, err_msg=path
            )


@pytest.mark.parametrize("shapes", [1, 3])
def test_each_run_is_that_of_fit(shapes):
    """Data order, dropout, schedule, decay and evaluations of each run are its own."""
    config = dataclasses.replace(CONFIG, max_steps=12, eval_every=5, shapes=shapes)
    models, task = [Words(seed=seed) for seed in range(3)], Task()
    before = [flat(model) for model in models]
    many = fit_many(models, task, config, keys=KEYS)
    for model, key, result, old in zip(models, KEYS, many, before, strict=True):
        order, dropout = task.batches(config, key).aligned(), jax.random.split(key)[1]
        evaluate = task.prepare(model, config, key=key).evaluate
        one = fit(model, order, loss, config, key=dropout, evaluate=evaluate)
        assert_same(one, result)
        if shapes == 1:
            assert_same(fj.finetune(model, task, config, key=key), result)
        for path, (_, x) in flat(model).items():
            np.testing.assert_array_equal(x, old[path][1])
    assert many[0].history != many[1].history


def test_aligned_batches_have_the_same_lengths_and_all_examples():
    config, task = dataclasses.replace(CONFIG, shapes=3), Task()
    sources = [task.batches(config, key).aligned() for key in KEYS]
    for epoch in range(2):
        steps = range(epoch * len(sources[0]), (epoch + 1) * len(sources[0]))
        widths = [[source(step)["input_ids"].shape for step in steps] for source in sources]
        assert widths[0] == widths[1] == widths[2] and len(set(widths[0])) == 3
        rows = [np.concatenate([source.rows(step) for step in steps]) for source in sources]
        assert all(sorted(each) == list(range(37)) for each in rows)
        assert not np.array_equal(rows[0], rows[1])
    assert widths[0] != [sources[0](step)["input_ids"].shape for step in range(len(sources[0]))]


def test_what_trains_and_multipliers():
    config = dataclasses.replace(CONFIG, train=r"head\..*", shapes=1)
    recipe = Recipe(multipliers={"head.bias": 0.0})
    models = [Words(seed=seed) for seed in range(2)]
    for model, result in zip(
        models, fit_many(models, Task(), config, keys=KEYS[:2], recipe=recipe), strict=True
    ):
        old, new = flat(model), flat(result.model)
        moved = {path for path in old if not np.array_equal(old[path][1], new[path][1])}
        assert moved == {"head.kernel"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Words(width=7), r"at head.kernel, one has Param float32\[6, 2\], the other .*\[7, 2\]"),
        (Words(rate=0.25), "at rate, one has 0.5, the other 0.25"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), r"at head.bias, .* the other nothing"),
    ],
)
def test_models_of_other_structures_are_refused(other, said):
    with pytest.raises(fj.InputError, match=f"model 0 and model 1 cannot train .*{said}"):
        fit_many([Words(), other], Task(), CONFIG, keys=KEYS[:2])


def test_where_models_come_from_may_differ():
    a, b = Words(), Words(seed=1)
    a.provenance, b.provenance = "one", "another"
    check_alike([a, b])


def test_runs_that_do_not_fit_together_are_refused():
    models, task = [Words(), Words(seed=1)], Task()
    with pytest.raises(fj.InputError, match="2 models and 3 keys"):
        fit_many(models, task, CONFIG, keys=KEYS)
    with pytest.raises(fj.InputError, match="no models"):
        fit_many([], task, CONFIG, keys=[])
    with pytest.raises(fj.InputError, match=r"recipe\.save does not apply"):
        fit_many(models, task, CONFIG, keys=KEYS[:2], recipe=Recipe(save=fj.save))
    with (
        jax.set_mesh(jax.make_mesh((1,), ("data",))),
        pytest.raises(fj.InputError, match="leave the mesh out"),
    ):
        fit_many(models, task, CONFIG, keys=KEYS[:2])
    sources = [OneBatch({"x": np.zeros((2, n))}) for n in (3, 4)]
    with pytest.raises(fj.InputError, match=r"at step 1, run 0 has .*\(2, 3\).* run 1 .*\(2, 4\)"):
        fit_jointly(models, sources, [loss, loss], CONFIG, keys=KEYS[:2])
    bound = [jax.tree_util.Partial(lambda x, *_: x, jnp.zeros(1)) for _ in models]
    with pytest.raises(fj.InputError, match="run 0 and run 1 hold different arrays"):
        fit_jointly(models, sources[:1] * 2, bound, CONFIG, keys=KEYS[:2])


def test_a_loss_that_is_not_finite_names_its_run():
    models = [Words(), Words(seed=1)]
    broken = models[1].head.kernel
    broken.set_value(broken.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(FloatingPointError, match=r"at step 1 of run 1; .* batch: example \d+"):
        fit_many(models, Task(), CONFIG, keys=KEYS[:2])


def test_fit_looks_at_losses_rarely_and_has_the_next_batch_then(monkeypatch):
    """The device never waits for the host to read a loss, and then to build a batch."""
    events, task = [], Task()
    source = task.batches(dataclasses.replace(CONFIG, shapes=1), KEYS[0])
    get = jax.device_get

    class Watched:
        def __len__(self):
            return len(source)

        def __call__(self, step):
            events.append(step)
            return source(step)

        names = source.names

    def looked(x):
        events.append("look")
        return get(x)

    monkeypatch.setattr(trainer.jax, "device_get", looked)
    config = dataclasses.replace(CONFIG, max_steps=9)
    fit(Words(), Watched(), loss, config, key=KEYS[0])
    assert events == [0, 1, 2, 3, "look", 4, 5, 6, "look", 7, 8, "look"]


def test_texts_are_tokenized_once_for_all_models(tmp_path, monkeypatch):
    folder = glue.checkpoint(tmp_path / "model")
    data = fj.load_task("sst2", glue.sst2(tmp_path / "SST-2"))
    model = fj.load(folder, head="classification", num_labels=2, key=KEYS[0])
    calls, encode = [], TextEncoder.__call__

    def counted(self, texts):
        calls.append(self.max_length)
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    config = dataclasses.replace(TRAIN_CONFIG, max_length=24)
    first, second = (data.prepare(model, config, key=key).batches for key in KEYS[:2])
    assert calls == [24, 24]  # train and dev
    assert not np.array_equal(first.rows(0), second.rows(0))
    inputs = data.inputs(model, config, key=KEYS[0])
    assert "labels" in first(0) and "labels" not in inputs(0) and len(calls) == 2
    data.prepare(model, dataclasses.replace(config, max_length=22), key=KEYS[0])
    assert calls == [24, 24, 22, 22]
    assert dataclasses.replace(data, dev={}).prepare(model, config, key=KEYS[0]).evaluate is None


@pytest.mark.full
def test_bert_runs_equal_finetune_and_tune(tmp_path):
    folder = glue.checkpoint(tmp_path / "model")
    data = fj.load_task("sst2", glue.sst2(tmp_path / "SST-2"))
    config = dataclasses.replace(TRAIN_CONFIG, dropout=True, max_steps=4)
    dense = [fj.load(folder, head="classification", num_labels=2, key=key) for key in KEYS[:2]]
    methods = [fj.Fusion.paper(width=12), fj.Fusion(width=12, represent="mean")]
    models = [
        fj.compress(model, method, key=key, progress=False)[0]
        for model, method, key in zip(dense, methods, KEYS, strict=False)
    ]
    tuned = tune_many(models, dense[0], data, config, keys=KEYS[:2])
    trained = fit_many([each.model for each in tuned], data, config, keys=KEYS[:2])
    for model, teacher, key, result, last in zip(models, dense, KEYS, tuned, trained, strict=False):
        one = fj.tune(model, teacher, data, config, key=key)
        assert_same(one, result)
        assert_same(fj.finetune(result.model, data, config, key=key), last, 2e-6)
        assert last.model.provenance.history == model.provenance.history
