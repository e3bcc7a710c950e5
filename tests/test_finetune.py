"""The trainer: what a step does, what trains, and runs that resume after they were stopped."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.training import Prepared, Recipe, Task, Texts, fit, measure, predict
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples
from fusion_jax.training.engine.optimizer import make_optimizer
from fusion_jax.training.engine.partition import Partition
from fusion_jax.training.tasks import classification as classify
from tests import glue
from tests.helpers import TRAIN_CONFIG as CONFIG
from tests.helpers import flat, moved, unchecked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return glue.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fj.load_task("sst2", glue.sst2(tmp_path_factory.mktemp("data") / "SST-2"))


@pytest.fixture(scope="module")
def model(folder):
    return fj.load(folder, head="classification", num_labels=2, key=jax.random.key(5))


@pytest.fixture(scope="module")
def fused(model):
    method = fj.Fusion(width=12)
    return fj.compress(model, method, layers=-1, key=jax.random.key(0))[0]


def assert_close(a, b, tolerance):
    for path, (_, x) in flat(a).items():
        if path.endswith("attention.key.bias"):
            # Softmax ignores it: its gradient is rounding, which AdamW makes as large as others.
            continue
        np.testing.assert_allclose(x, flat(b)[path][1], atol=tolerance, rtol=0, err_msg=path)


@pytest.mark.full(quick=1)
def test_finetune_learns(fused, data, key):
    before = flat(fused)
    config = dataclasses.replace(CONFIG, max_steps=60, learning_rate=5e-3, eval_every=30)
    result = fj.finetune(fused, data, config, key=key)
    assert (result.step, result.finished, [h["step"] for h in result.history]) == (
        60,
        True,
        [30, 60],
    )
    train = measure(data.spec, predict(result.model, data.train), data.train)
    assert train["accuracy"] > 0.9
    dev = measure(data.spec, predict(result.model, data.dev["dev"]), data.dev["dev"])
    assert dev["accuracy"] == result.history[-1]["accuracy"]
    for path, (kind, x) in flat(fused).items():
        np.testing.assert_array_equal(x, before[path][1])  # the caller's model is as it was
        if kind is Frozen:
            np.testing.assert_array_equal(x, flat(result.model)[path][1])


@pytest.mark.parametrize("train", ["mlp", "head", r"layers\.1\.mlp\.up\..*"])
def test_what_trains(train, fused, data, key):
    config = dataclasses.replace(CONFIG, max_steps=1, warmup=0.0, train=train)
    paths = moved(fused, fj.finetune(fused, data, config, key=key).model)
    starts = {"mlp": "layers.", "head": ("head.", "pooler.")}.get(train, "layers.1.mlp.up.")
    assert paths
    assert all(path.startswith(starts) and (train == "head" or ".mlp." in path) for path in paths)


def batches_of(n, size, length=8):
    tokens = np.random.RandomState(1).randint(5, 99, (n, length)).astype(np.int32)
    labels = np.arange(n, dtype=np.int32) % 2
    names = [f"e{i}" for i in range(n)]
    return Batches(Examples(list(tokens), None, labels, names), size, pad_id=0, shapes=1, seed=3)


def one_epoch(model, config, key, batches=None, loss=losses.classification, folder=None, **more):
    batches = batches_of(16, config.batch_size) if batches is None else batches
    return fit(model, batches, loss, config, key=key, folder=folder, recipe=Recipe(**more))


@pytest.mark.full
def test_accumulation_equals_one_big_batch(fused, key):
    config = dataclasses.replace(CONFIG, max_steps=3, batch_size=16)
    # 13 examples: the parts hold different numbers of real ones.
    whole = one_epoch(fused, config, key, batches_of(13, 16)).model
    parts = dataclasses.replace(config, accumulate=4)
    assert_close(whole, one_epoch(fused, parts, key, batches_of(13, 16)).model, 2e-6)


def test_step_equals_optax_by_hand(fused, key):
    """Loss, clipping, decay mask and schedule against a plain loop over optax's own AdamW."""
    import optax

    config = dataclasses.replace(CONFIG, max_steps=4, epochs=9, warmup=0.25)
    batches = batches_of(16, 8)
    ours = one_epoch(fused, config, key, batches).model
    graph, params, rest = nnx.split(fused, nnx.Param, ...)
    decays = nnx.to_flat_state(params)
    mask = nnx.from_flat_state([(p, v.replace(p[-1] not in ("bias", "scale"))) for p, v in decays])
    rate = [0.0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda i: jnp.array(rate)[i], 0.9, 0.98, 1e-6, weight_decay=0.1, mask=mask),
    )
    opt = tx.init(params)

    @jax.jit
    def step(params, opt, batch):
        def loss(params):
            logits = nnx.merge(graph, params, rest)(
                batch["input_ids"], batch["attention_mask"]
            ).logits
            chosen = jax.nn.log_softmax(logits)[jnp.arange(8), batch["labels"]]
            return -chosen.mean()

        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return optax.apply_updates(params, updates), opt

    for i in range(4):
        params, opt = step(params, opt, batches(i))
    assert_close(ours, nnx.merge(graph, params, rest), 2e-6)


@pytest.mark.full
def test_dropout_differs_between_steps_and_follows_its_key(fused, key, tmp_path):
    """The same batch at each step, and weights that hardly move: only dropout differs."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-12, max_steps=3, dropout=True)
    keys = {"a": key, "b": key, "c": jax.random.key(1)}
    found = {}
    for name, k in keys.items():
        one_epoch(fused, config, k, batches_of(8, 8), folder=tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines]
    assert len(set(found["a"])) == 3
    assert found["a"] == found["b"]
    assert not set(found["a"]) & set(found["c"])


@pytest.mark.full
def test_remat_changes_nothing(fused, key):
    config = dataclasses.replace(CONFIG, max_steps=2)
    plain = one_epoch(fused, config, key).model
    assert_close(plain, one_epoch(fused, dataclasses.replace(config, remat=True), key).model, 1e-5)


@pytest.mark.full
def test_bfloat16_computes_with_float32_weights(fused, key):
    parts = Partition(fused, compute_dtype=jnp.bfloat16)
    params, rest = parts.split(fused)
    out = parts.compute(params, rest)(jnp.array([[2, 7, 3]]), output_hidden_states=True)
    assert {x.dtype.name for x in jax.tree.leaves(out)} == {"bfloat16"}
    config = dataclasses.replace(CONFIG, max_steps=2)
    exact = one_epoch(fused, config, key).model
    low = one_epoch(fused, dataclasses.replace(config, compute_dtype="bfloat16"), key).model
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(low, nnx.Param))} == {"float32"}
    assert not bit_equal(exact, low)
    assert_close(exact, low, 5e-3)


def test_multipliers(fused, key):
    config = dataclasses.replace(CONFIG, max_steps=1, optimizer="sgd", warmup=0.0)
    config = dataclasses.replace(config, weight_decay=0.0, clip_norm=None)
    plain, path = one_epoch(fused, config, key).model, "layers.1.mlp.down.kernel"
    rows = jnp.arange(12.0)[:, None]
    slow = dataclasses.replace(config, multipliers=((r"head\..*", 0.5), (r".*", 1.0)))
    ours = one_epoch(fused, slow, key, multipliers={path: rows}).model
    start, a, b = flat(fused), flat(plain), flat(ours)
    step = {p: (a[p][1] - start[p][1], b[p][1] - start[p][1]) for p in start}
    np.testing.assert_allclose(step[path][1], step[path][0] * rows, atol=1e-6)
    name = "head.out.kernel"
    np.testing.assert_allclose(step[name][1], step[name][0] * 0.5, atol=1e-6)
    name = "layers.0.mlp.up.kernel"
    np.testing.assert_allclose(step[name][1], step[name][0], atol=1e-7)


def test_sgd_by_cluster_sizes_equals_sgd_on_the_wide_copy(model, fused, key):
    """Design: with learning rates divided by n_c, SGD moves centroids as their copies move."""
    from fusion_jax.compression.mlps import replaced

    config = dataclasses.replace(
        CONFIG, max_steps=3, optimizer="sgd", weight_decay=0.0, clip_norm=None
    )
    wide, multipliers = nnx.clone(fused), {}
    for site in fj.sites(fused):
        if isinstance(site.mlp, fj.FusedMlp):
            wide = replaced(wide, site.path, site.mlp.wide_copy())
            inverse = 1 / site.mlp.sizes[...]
            multipliers |= {
                f"{site.path}.up.kernel": inverse[None],
                f"{site.path}.up.bias": inverse,
                f"{site.path}.down.kernel": inverse[:, None],
            }
    ours = one_epoch(fused, config, key, multipliers=multipliers).model
    theirs = one_epoch(wide, config, key).model
    for site in fj.sites(ours):
        if isinstance(site.mlp, fj.FusedMlp):
            site_of = {s.path: s.mlp for s in fj.sites(theirs)}
            assert_close(site.mlp.wide_copy(), site_of[site.path], 1e-5)


def run(model, data, folder, key, config=CONFIG, **more):
    return fj.finetune(model, data, config, key=key, folder=folder, recipe=Recipe(**more))


def test_stopping_and_resuming_changes_no_bit(fused, data, key, tmp_path):
    config = dataclasses.replace(CONFIG, dropout=True)
    whole = run(fused, data, tmp_path / "whole", key, config)

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 3:
            raise Killed

    def terminate(step, state):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    with pytest.raises(Killed):
        run(fused, data, folder, key, config, on_step=kill)
    stopped = run(fused, data, folder, key, config, on_step=terminate)
    assert (stopped.step, stopped.finished) == (5, False)
    assert not (folder / "last").exists()
    ended = run(fused, data, folder, key, config)
    assert ended.finished
    assert bit_equal(whole.model, ended.model)
    assert whole.history == ended.history
    assert bit_equal(whole.model, fj.load(folder / "last"))
    best = fj.load(folder / "best")
    assert measure(data.spec, predict(best, data.dev["dev"]), data.dev["dev"])["accuracy"] == max(
        h["accuracy"] for h in whole.history
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    again = run(fused, data, folder, key, config)  # nothing is left to do
    assert bit_equal(whole.model, again.model)


def test_another_run_in_the_folder(fused, data, key, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=2)
    run(fused, data, tmp_path, key, config)
    other = dataclasses.replace(config, learning_rate=1e-4)
    with pytest.raises(fj.InputError, match=r"learning_rate 0\.001, now 0\.0001"):
        run(fused, data, tmp_path, key, other)
    with pytest.raises(fj.InputError, match="key"):
        run(fused, data, tmp_path, jax.random.key(9), config)


@pytest.mark.full
def test_other_data_model_or_tokenizer_in_the_folder(fused, data, folder, key, tmp_path):
    """Each would else give the old model back, as if the run had been done again."""
    config = dataclasses.replace(CONFIG, max_steps=1, eval_every=9)
    place = tmp_path / "run"
    run(fused, data, place, key, config)

    def refused(what, model=fused, data=data):
        with pytest.raises(fj.InputError, match=rf"other settings \({what} "):
            run(model, data, place, key, config)

    train, dev = data.train, data.dev["dev"]
    labels = train.labels.copy()
    labels[-1] = 1 - labels[-1]
    refused("training data", data=dataclasses.replace(data, train=train._replace(labels=labels)))
    texts = [*train.texts[:-1], ("w1 w2 w3",)]
    refused("training data", data=dataclasses.replace(data, train=train._replace(texts=texts)))
    labels = dev.labels.copy()
    labels[0] = 1 - labels[0]
    refused("dev data", data=dataclasses.replace(data, dev={"dev": dev._replace(labels=labels)}))
    refused("dev data", data=dataclasses.replace(data, dev={}))
    spec = dataclasses.replace(data.spec, labels=data.spec.labels[::-1])
    refused("classes", data=dataclasses.replace(data, spec=spec))
    other = nnx.clone(fused)
    bias = other.layers[0].mlp.up.bias
    bias.set_value(bias[...].at[-1].add(1e-6))  # one number of one variable
    refused("starting model", model=other)
    other = nnx.clone(fused)
    words = shutil.copytree(folder, tmp_path / "words") / "vocab.txt"
    words.write_text(words.read_text().replace("x3", "y3"))  # a word that no text has
    other.provenance = dataclasses.replace(fused.provenance, folder=str(words.parent))
    refused("tokenizer", model=other)
    moved = {"dev": dev._replace(names=[f"elsewhere/{name}" for name in dev.names])}
    assert run(fused, dataclasses.replace(data, dev=moved), place, key, config).finished


def test_tuning_with_another_teacher(model, fused, data, key, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=1)
    fj.tune(fused, model, data, config, key=key, folder=tmp_path)
    other = nnx.clone(model)
    bias = other.layers[1].mlp.up.bias
    # Not among the numbers that the fingerprint of a large model samples.
    bias.set_value(bias[...].at[1].add(1e-6))
    with pytest.raises(fj.InputError, match=r"weights of the teacher '\w+', now '\w+'"):
        fj.tune(fused, other, data, config, key=key, folder=tmp_path)


@pytest.mark.full
def test_a_finished_run_is_extended_only_on_purpose(fused, data, key, tmp_path):
    short = dataclasses.replace(CONFIG, max_steps=2, schedule="constant", warmup=0.0)
    longer = dataclasses.replace(short, max_steps=4)
    whole = run(fused, data, None, key, longer)
    run(fused, data, tmp_path, key, short)
    with pytest.raises(
        fj.InputError, match=r"max_steps 2, now 4; steps 2, now 4\).* --resume-with max_steps$"
    ):
        run(fused, data, tmp_path, key, longer)
    on_purpose = dataclasses.replace(longer, resume_with=("max_steps",))
    fast = dataclasses.replace(on_purpose, learning_rate=1.0)
    with pytest.raises(fj.InputError, match=r"settings \(learning_rate 0.001, now 1.0\)"):
        run(fused, data, tmp_path, key, fast)
    extended = run(fused, data, tmp_path, key, on_purpose)
    assert (extended.step, extended.finished) == (4, True)
    # The rate is constant: the same steps as of a run that was longer from the start.
    assert bit_equal(extended.model, whole.model)
    assert run(fused, data, tmp_path, key, longer).finished  # the settings of the folder now
    shorter = dataclasses.replace(short, resume_with=("max_steps",))
    with pytest.raises(fj.InputError, match="a run of 4 steps, more than the 2 of this call"):
        run(fused, data, tmp_path, key, shorter)


def test_runs_of_earlier_versions_have_other_names(fused, data, key, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=2)
    ended = run(fused, data, tmp_path, key, config)
    (meta,) = tmp_path.glob("checkpoints/2/meta/metadata")
    fields = json.loads(meta.read_text().replace('"optimizer"', '"optimiser"'))
    # They had no checksums, and of the data they recorded only the number of batches.
    del fields["checksum"], fields["bit sums"]
    for name in ("starting model", "training data", "dev data", "classes", "tokenizer"):
        del fields["run"][name]
    meta.write_text(json.dumps(fields))
    assert bit_equal(run(fused, data, tmp_path, key, config).model, ended.model)
    with pytest.raises(fj.InputError, match=r"optimizer 'adamw', now 'sgd'"):
        run(fused, data, tmp_path, key, dataclasses.replace(config, optimizer="sgd"))


class Parity:
    """A task of one's own: whether the first token is even."""

    def prepare(self, model, config, *, key):
        def evaluate(model):
            return {"error": float(losses.classification(model, self.batch(), None).total)}

        return Prepared(self.inputs(model, config, key=key), losses.classification, evaluate, True)

    def inputs(self, model, config, *, key):
        return batches_of(16, config.batch_size)

    def batch(self):
        return {name: jnp.asarray(x) for name, x in batches_of(16, 16)(0).items()}


def test_a_task_of_ones_own(model, fused, key, tmp_path):
    task = Parity()
    assert isinstance(task, Task)
    config = dataclasses.replace(CONFIG, eval_every=2)
    result = fj.finetune(fused, task, config, key=key, folder=tmp_path)
    errors = [each["error"] for each in result.history]
    best = fj.load(tmp_path / "best")
    found = float(losses.classification(best, task.batch(), None).total)
    assert found == pytest.approx(min(errors))
    tuned = [fj.tune(fused, model, x, CONFIG, key=key).model for x in (task, batches_of(16, 8))]
    assert bit_equal(*tuned)


def test_recipes_and_tasks_that_do_not_fit(fused, data, key):
    with unchecked(), pytest.raises(fj.InputError, match=r"data must be a task, .* got Texts"):
        fj.finetune(fused, data.train, CONFIG, key=key)
    for recipe in (Recipe(save=fj.save), Recipe(best_from=3)):
        with pytest.raises(fj.InputError, match="for runs with a folder"):
            fj.finetune(fused, data, CONFIG, key=key, recipe=recipe)
    with pytest.raises(fj.InputError, match=r"recipe\.trains does not apply to static_prune"):
        fj.static_prune(fused, data, key=key, recipe=Recipe(trains="head"))


def test_on_step_may_change_the_state(fused, key):
    """A schedule of a method's own: here, what is Frozen follows the steps."""

    def count(step, state):
        path = "layers.1.mlp.sizes"
        return state._replace(rest={**state.rest, path: state.rest[path] * 0 + step})

    result = one_epoch(fused, dataclasses.replace(CONFIG, max_steps=3), key, on_step=count)
    assert set(flat(result.model)["layers.1.mlp.sizes"][1]) == {3.0}


def test_nan_stops_with_step_batch_and_checkpoint(fused, key, tmp_path):
    def poison(step, state):
        if step == 3:
            params = {path: x * jnp.nan for path, x in state.params.items()}
            return state._replace(params=params)
        return None

    config = dataclasses.replace(CONFIG, log_every=5, batch_size=2)
    with pytest.raises(
        FloatingPointError,
        match=r"loss nan at step 4; step 2 is the last checkpoint; .* e\d+, e\d+$",
    ):
        one_epoch(fused, config, key, on_step=poison, folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_steps_do_not_wait_or_compile_again(fused, key):
    """One compilation per shape, however many steps."""
    compiled = []
    real = losses.classification

    def loss(model, batch, key):
        compiled.append(batch["input_ids"].shape)
        return real(model, batch, key)

    one_epoch(fused, dataclasses.replace(CONFIG, max_steps=5, epochs=9), key, loss=loss)
    assert compiled == [(8, 8)]


def test_tune_moves_only_the_fused_mlps_towards_the_teacher(model, fused, data, key):
    texts = [text for (text,) in data.train.texts]
    config = fj.TrainConfig(epochs=5, batch_size=8, learning_rate=2e-3, shapes=1, log_every=1)
    tuned = fj.tune(fused, model, texts, config, key=key).model
    paths = moved(fused, tuned)
    assert {path.split(".mlp.")[0] for path in paths} == {"layers.1"}
    assert len(paths) == 4
    batch = batches_of(16, 16)(0)

    def error(student):
        return float(losses.hidden_states(model, student, batch, None).total)

    assert error(tuned) < 0.5 * error(fused)
    assert error(model) == 0
    with pytest.raises(fj.InputError, match="the teacher is the model before"):
        fj.tune(fused, fused, texts, config, key=key)


@pytest.mark.full
def test_padding_is_left_out_of_tuning(model, fused):
    batch = batches_of(2, 2)(0)
    cut = {name: x[:, :5] if x.ndim == 2 else x for name, x in batch.items()}
    padded = {**batch, "attention_mask": np.arange(8)[None] < np.array([[5], [5]])}
    results = [losses.hidden_states(model, fused, b, None) for b in (cut, padded)]
    np.testing.assert_allclose(results[0].total, results[1].total, rtol=1e-5)
    assert float(results[1].count) == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "layers"}, "train 'layers' matches no parameter"),
        ({"train": "("}, "not a regular expression"),
        ({"multipliers": (("x", 1.0),)}, "matches no parameter that trains"),
        ({"max_length": 99}, "above the model's 40 positions"),
        ({"max_length": 5}, r"train\.tsv:\d+: \d+ tokens, above 5"),
        ({"tensorboard": True}, r"fusion-jax\[tensorboard\]"),
    ],
)
def test_errors(fields, message, fused, data, key, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(fj.InputError, match=message):
        run(fused, data, tmp_path, key, dataclasses.replace(CONFIG, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 is not a multiple of accumulate 4"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must be above 0, or None"),
        ({"resume_with": ("max_step",)}, "got 'max_step'; did you mean 'max_steps'"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(fj.InputError, match=message):
        fj.TrainConfig(**fields)


def test_heads_that_do_not_fit(folder, data, key):
    with pytest.raises(fj.InputError, match="head='classification', num_labels=2"):
        fj.finetune(fj.load(folder), data, CONFIG, key=key)
    three = fj.load(folder, head="classification", num_labels=3, key=key)
    with pytest.raises(fj.InputError, match="3 outputs, sst2 needs 2"):
        fj.finetune(three, data, CONFIG, key=key)


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine", "constant"])
def test_schedules(name):
    from fusion_jax.training.engine.optimizer import schedule

    config = fj.TrainConfig(schedule=name, power=2.0, learning_rate=1.0, warmup=0.1)
    rate = np.array([schedule(config, 100)(i) for i in range(101)])
    left = 1 - np.arange(91) / 90
    want = {
        "linear": left,
        "polynomial": left**2,
        "cosine": (1 - np.cos(np.pi * left)) / 2,
        "constant": np.ones(91),
    }
    np.testing.assert_allclose(rate[:10], np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(rate[10:], want[name], atol=1e-6)


def test_regression(folder, key, tmp_path):
    rows = [json.dumps({"a": text, "b": text, "y": label}) for text, label in glue.sentences(16)]
    path = Path(tmp_path / "data.jsonl")
    path.write_text("\n".join(rows))
    data = fj.read_task(path, path, text=("a", "b"), label="y", regression=True)
    model = fj.load(folder, head="classification", num_labels=1, key=key)
    config = dataclasses.replace(CONFIG, max_steps=2, truncate=True, max_length=16)
    history = fj.finetune(model, data, config, key=key).history
    assert set(history[-1]) == {"step", "pearson", "spearman"}


def test_weights_decay_by_name():
    config = dataclasses.replace(CONFIG, optimizer="sgd", clip_norm=None, schedule="constant")
    tx = make_optimizer(dataclasses.replace(config, warmup=0.0, learning_rate=1.0), 1)
    params = {name: jnp.ones((2, 3)) for name in ("up.kernel", "experts.bias", "norm.scale")}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert {name: float(u[0, 0]) for name, u in updates.items()} == pytest.approx(
        {"up.kernel": -0.1, "experts.bias": 0.0, "norm.scale": 0.0}
    )


class Mixed(nnx.Module):
    """Parameters of two dtypes."""

    def __init__(self):
        self.first = nnx.Param(jnp.ones(3, jnp.bfloat16))
        self.second = nnx.Param(jnp.ones(3, jnp.float32))


class Numbers:
    """Batches without tokens."""

    def __len__(self):
        return 2

    def __call__(self, step):
        return {"x": np.full((4, 3), step + 1, np.float32)}

    def names(self, step):
        return []


def test_parameters_keep_their_dtypes_and_batches_need_no_tokens(key):
    seen, model = set(), Mixed()

    def loss(model, batch, key):
        seen.add((model.first.dtype, model.second.dtype))
        y = batch["x"] * model.first[...].astype(jnp.float32)[None] - model.second[...][None]
        return losses.Total(jnp.square(y).sum(), jnp.asarray(12.0))

    config = dataclasses.replace(CONFIG, max_steps=2, batch_size=4, warmup=0.0)
    got = fit(model, Numbers(), loss, config, key=key).model
    assert seen == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))}
    assert (got.first.dtype, got.second.dtype) == (jnp.bfloat16, jnp.float32)
    # The caller's arrays are neither donated nor those of the result.
    assert not np.array_equal(got.second, model.second) and bool((model.first[...] == 1).all())


def test_no_texts_have_no_logits(model):
    assert predict(model, Texts([], None, [])).shape == (0, 2)


@pytest.mark.full
def test_evaluation_has_as_few_lengths_as_training(model, data, key, monkeypatch):
    lengths, run = set(), classify._forward

    def forward(model, batch):
        lengths.add(batch["input_ids"].shape[1])
        return run(model, batch)

    monkeypatch.setattr(classify, "_forward", forward)
    fj.finetune(model, data, dataclasses.replace(CONFIG, max_steps=1), key=key)
    assert len(lengths) == 1
