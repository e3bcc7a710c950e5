"""Fine-tuning with chains: over-parameterisation, its selection, and squeezing bonds."""

import collections
import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax import mpo
from fusion_jax.compression.matrices import weight_matrices
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.surgery import at
from fusion_jax.training import (
    Chains,
    Recipe,
    fit,
    importance_by_gradient,
    importance_by_removal,
    lightweight,
    lottery,
    mean_gradients,
    mean_loss,
    overparameterize,
    squeeze,
    top_of_each_type,
)
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.partition import Partition
from fusion_jax.training.methods.importance import type_of
from fusion_jax.training.methods.squeezing import Cut, chains, cheapest_cut, cut
from tests import glue, tiny
from tests.helpers import TRAIN_CONFIG as CONFIG
from tests.helpers import OneBatch, flat, moved, run, unchecked

LAYERS = r"layers\..*"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = glue.checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    return fj.load(folder, head="classification", num_labels=2, key=jax.random.key(5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fj.load_task("sst2", glue.sst2(tmp_path_factory.mktemp("data") / "SST-2"))


@pytest.fixture(scope="module")
def source(model, data):
    return batches_and_loss(model, data, jax.random.key(1))


def batches_and_loss(model, data, key):
    batches, loss, *_ = data.prepare(model, CONFIG, key=key)
    return batches, loss


def finetune(model, data, config, *, key, folder=None, **recipe):
    return fj.finetune(model, data, config, key=key, folder=folder, recipe=Recipe(**recipe))


def logits(model):
    return run(model, **tiny.batch("bert")).logits


def test_chains_are_exact_both_ways(model):
    paths = [path for path in weight_matrices(model) if path.startswith("layers.")]
    chained = overparameterize(model, paths, cores=6)
    assert sorted(find_forms(chained)) == sorted(paths)
    for path in paths:
        before, after = at(model, path).kernel[...], at(chained, path).matrix()
        np.testing.assert_allclose(after, before, atol=1e-5)
        for core in list(at(chained, path).cores)[1:-1]:
            np.testing.assert_allclose(core[:, 0, 0], np.eye(core.shape[0]), atol=1e-6)
    np.testing.assert_allclose(logits(chained), logits(model), atol=1e-5)
    back = fj.plain(chained)
    assert not find_forms(back)
    np.testing.assert_allclose(logits(back), logits(chained), atol=1e-5)
    # Inference costs what it did.
    assert {p: x[1].shape for p, x in flat(back).items()} == {
        p: x[1].shape for p, x in flat(model).items()
    }


@pytest.mark.full
def test_every_core_trains(model, data, key):
    chained = overparameterize(model, ["layers.0.mlp.up", "layers.1.attention.value"], cores=4)
    fit = fj.finetune(chained, data, dataclasses.replace(CONFIG, warmup=0.0), key=key)
    cores = {p for p, (kind, _) in flat(chained).items() if ".cores." in p and kind is nnx.Param}
    assert len(cores) == 8 and cores <= moved(chained, fit.model)
    plain = fj.plain(fit.model)
    np.testing.assert_allclose(logits(plain), logits(fit.model), atol=1e-5)


def test_a_chain_that_is_not_its_matrix_is_refused(model, monkeypatch):
    right = mpo.decompose

    def wrong(matrix, layout):
        train = right(matrix, layout)
        return train._replace(cores=(train.cores[0] * 1.01, *train.cores[1:]))

    monkeypatch.setattr(mpo, "decompose", wrong)
    with pytest.raises(ArithmeticError, match="above its bound"):
        overparameterize(model, ["layers.0.mlp.up"], cores=7)


@pytest.mark.parametrize("path", ["layers.0.mlp", "layers.7.mlp.up", "embeddings.word"])
def test_only_linear_layers_become_chains(path, model):
    with pytest.raises(fj.InputError, match=f"{path} is not a linear layer"):
        overparameterize(model, [path])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A model of three layers."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("three") / "model")
    options = {"head": "classification", "num_labels": 2, "key": jax.random.key(5)}
    return fj.load(glue.vocabulary(folder), **options)


def brute_force(model, source, count):
    """The mean loss in float64, as a function of a factor on one matrix."""
    batches, loss = source
    wide = nnx.clone(model)
    nnx.update(wide, jax.tree.map(lambda x: np.float64(x), nnx.state(wide, nnx.Param)))
    for _, module in nnx.iter_modules(wide):
        if isinstance(module, nnx.Embed):
            module.dtype = jnp.dtype(np.float64)

    @jax.jit
    def total(model, batch):
        return loss(model, batch, None)

    def mean(path, factor):
        new = nnx.clone(wide)
        kernel = at(new, path).kernel
        kernel.set_value(np.float64(factor) * kernel.get_value())
        with jax.enable_x64(True):
            batch = [batches(i) for i in range(count)]
            totals = [total(new, {**b, "weights": np.float64(b["weights"])}) for b in batch]
        return sum(float(t.total) for t in totals) / sum(float(t.count) for t in totals)

    return mean


def slopes(model, source, count, paths, h=1e-4):
    mean = brute_force(model, source, count)
    return {path: abs(mean(path, 1 + h) - mean(path, 1 - h)) / (2 * h) for path in paths}


def ranked(scores):
    """The paths of each type, the most important first."""
    types = collections.defaultdict(list)
    for path in sorted(scores, key=scores.get, reverse=True):
        types[path.partition(".")[2].partition(".")[2]].append(path)
    return types


@pytest.mark.full
def test_importance_equals_brute_force(three, data):
    source = batches_and_loss(three, data, jax.random.key(1))
    paths = [path for path in weight_matrices(three) if path.startswith("layers.")]
    mean = brute_force(three, source, 3)
    whole = mean(paths[0], 1.0)
    assert abs(mean_loss(three, *source, batches=3) - whole) < 1e-6
    options = {"matrices": LAYERS, "batches": 3}
    found = {
        "removal": importance_by_removal(three, *source, **options),
        "gradient": importance_by_gradient(three, *source, **options),
    }
    expected = {
        "removal": {path: abs(mean(path, 0.0) - whole) for path in paths},
        "gradient": slopes(three, source, 3, paths),
    }
    for name, want in expected.items():
        assert list(found[name]) == paths and len(paths) == 18
        for path in paths:
            np.testing.assert_allclose(found[name][path], want[path], rtol=1e-3, atol=5e-7)
        order = ranked(want)
        assert ranked(found[name]) == order
        for count in (1, 2):
            top = {path for each in order.values() for path in each[:count]}
            assert set(top_of_each_type(found[name], count)) == top
    # The two are not the same.
    assert ranked(expected["removal"]) != ranked(expected["gradient"])
    grads = mean_gradients(three, *source, batches=3)
    assert all(grads[f"{path}.kernel"].shape == at(three, path).kernel.shape for path in paths)


def test_importance_is_of_plain_layers(model, source):
    made, _ = fj.compress_matrices(model, fj.Svd(rank=4), matrices=r"layers\.0\.mlp\.up")
    for measure in (importance_by_removal, importance_by_gradient):
        with pytest.raises(fj.InputError, match=r"layers\.0\.mlp\.up is low-rank already"):
            measure(made, *source, matrices=LAYERS, batches=1)
    batches, loss = source
    for matrices_, message in ((LAYERS, "is low-rank already"), (r".*word", "is an embedding")):
        growth = Chains(source=batches, loss=loss, every=1, matrices=matrices_)
        with pytest.raises(fj.InputError, match=message):
            growth.replaceable(made)


class Stopped(Exception):
    pass


def growing(source, **options):
    batches, loss = source
    return Chains(source=batches, loss=loss, every=2, per_round=1, total=2, cores=3, batches=2,
                  matrices=r"layers\.\d\.(mlp\.up|attention\.query)", **options)  # fmt: skip


@pytest.mark.full
def test_dynamic_chains_grow_train_and_resume(model, data, source, key, tmp_path):
    config = dataclasses.replace(CONFIG, warmup=0.0, eval_every=100)
    growth, seen = growing(source), {}

    def watch(step, state):
        seen[step] = sorted(p for p in state.params if ".cores." in p)

    whole = finetune(model, data, config, key=key, growth=growth, on_step=watch)
    assert [len(seen[i]) for i in (1, 2, 3, 4, 5, 6)] == [0, 0, 6, 6, 12, 12]
    # The first round takes the most important of each type, by a fresh measurement.
    assert len(growth.scores) == 2 and len(growth.scores[0]) == 4 and len(growth.scores[1]) == 2
    chosen = {p.partition(".cores.")[0] for p in seen[3]}
    assert chosen == set(top_of_each_type(growth.scores[0], 1))
    assert len(find_forms(whole.model)) == 4
    for form in find_forms(whole.model).values():
        for core in list(form.cores)[1:-1]:
            assert not np.allclose(core[:, 0, 0], np.eye(core.shape[0]), atol=1e-6)

    def stop(step, state):
        if step == 5:
            raise Stopped

    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        finetune(model, data, config, key=key, growth=growing(source), folder=folder, on_step=stop)
    for name in ("every", "per_round", "total", "cores"):
        other = dataclasses.replace(growing(source), **{name: 4})
        message = rf"other settings \(growth's {name} [123], now 4\); give those, or another folder"
        with pytest.raises(fj.InputError, match=message):
            finetune(model, data, config, key=key, growth=other, folder=folder)
    with pytest.raises(fj.InputError, match="growth 'Chains', now None"):
        fj.finetune(model, data, config, key=key, folder=folder)
    again = finetune(model, data, config, key=key, growth=growing(source), folder=folder)
    assert again.step == 6
    for path, (_, x) in flat(whole.model).items():
        np.testing.assert_array_equal(x, flat(again.model)[path][1], err_msg=path)
    loaded = fj.load(folder / "last")
    np.testing.assert_array_equal(logits(loaded), logits(again.model))


@pytest.mark.parametrize(
    "train", ["all", "mlp", "head", r"layers\.\d\.mlp\.up\.kernel|head\..*", r".*\.cores\..*"]
)
@pytest.mark.full
def test_cores_train_if_their_matrix_did(train, model, data, source, key):
    config = dataclasses.replace(CONFIG, warmup=0.0, train=train)
    if "cores" in train:
        with pytest.raises(fj.InputError, match="matches no parameter"):
            finetune(model, data, config, key=key, growth=growing(source))
        return
    seen, trains = {}, Partition(model, train).training
    fit = finetune(
        model,
        data,
        config,
        key=key,
        growth=growing(source),
        on_step=lambda step, state: seen.update({step: set(state.params)}),
    )
    assert len(find_forms(fit.model)) == 4 and set(trains) == seen[2]
    for path, form in find_forms(fit.model).items():
        cores = {f"{path}.cores.{i}" for i in range(3)}
        did = f"{path}.kernel" in trains
        assert did == (cores <= seen[6]) == (not cores.isdisjoint(seen[6]))
        if not did:
            np.testing.assert_allclose(form.matrix(), at(model, path).kernel, atol=1e-5)


@pytest.mark.full
def test_cores_have_the_multiplier_of_their_matrix(model, data, source, key):
    batches, loss = batches_and_loss(model, data, key)
    config = dataclasses.replace(
        CONFIG,
        max_steps=3,
        warmup=0.0,
        optimizer="sgd",
        clip_norm=None,
        weight_decay=0.0,
        schedule="constant",
        learning_rate=0.1,
        multipliers=((r"layers\.\d\.mlp\.up\.kernel", 0.5), (r"layers\..*", 3.0)),
    )
    seen = {}
    fit = finetune(
        model,
        data,
        config,
        key=key,
        growth=growing(source),
        multipliers={f"layers.{i}.mlp.up.kernel": 0.25 for i in range(2)},
        on_step=lambda step, state: seen.update({step: jax.tree.map(jnp.array, state)}),
    )
    paths = sorted(find_forms(fit.model))
    assert sorted(path.rpartition(".")[2] for path in paths) == ["query", "up"]
    before = overparameterize(Partition(model).merge(seen[2].params, seen[2].rest), paths, cores=3)
    grads = mean_gradients(before, OneBatch(batches(2)), loss)
    for path in paths:
        rate = 0.1 * (0.5 * 0.25 if path.endswith("up") else 3.0)
        for i, core in enumerate(at(before, path).cores):
            moved_by = at(fit.model, path).cores[i][...] - core[...]
            want = -rate * grads[f"{path}.cores.{i}"]
            np.testing.assert_allclose(moved_by, want, atol=1e-7, rtol=1e-3)
            assert np.abs(want).max() > 1e-5


@pytest.mark.full
def test_arrays_of_multipliers_are_for_what_does_not_grow(model, data, source, key):
    rows = {
        f"layers.0.mlp.{name}.kernel": np.ones((n, 1)) for name, n in (("up", 32), ("down", 48))
    }
    config = dataclasses.replace(CONFIG, max_steps=3)
    options = {"key": key, "growth": growing(source)}
    with pytest.raises(fj.InputError, match=r"layers\.0\.mlp\.up\.kernel has an array"):
        finetune(model, data, config, multipliers=rows, **options)
    del rows["layers.0.mlp.up.kernel"]
    rows["layers.0.mlp.up.bias"] = np.ones(48)
    assert find_forms(finetune(model, data, config, multipliers=rows, **options).model)


@pytest.mark.full
def test_each_round_takes_the_most_important_of_its_step(three, data, key):
    source = batches_and_loss(three, data, jax.random.key(1))
    config = dataclasses.replace(CONFIG, max_steps=5, warmup=0.0, learning_rate=5e-3)
    seen = {}
    finetune(
        three,
        data,
        config,
        key=key,
        growth=growing(source),
        on_step=lambda step, state: seen.update({step: jax.tree.map(jnp.array, state)}),
    )
    made, grown = three, set()
    for step in (2, 4):
        now = Partition(made).merge(seen[step].params, seen[step].rest)
        left = [path.removesuffix(".kernel") for path in growing(source).replaceable(made)]
        order = ranked(slopes(now, source, 2, left))
        assert [len(each) for each in order.values()] == [3 - len(grown) // 2] * 2
        grown |= {each[0] for each in order.values()}
        assert grown == {p.partition(".cores.")[0] for p in seen[step + 1].params if ".cores." in p}
        made = overparameterize(now, [each[0] for each in order.values()], cores=3)


def test_the_last_of_a_type_to_grow_is_the_most_important(three, data):
    batches, loss = batches_and_loss(three, data, jax.random.key(1))
    growth = Chains(source=batches, loss=loss, every=1, per_round=2, total=2, cores=3, batches=3,
                    matrices=r"layers\.\d\.mlp\.up")  # fmt: skip
    assert growth.choose(three, 1) == ["layers.0.mlp.up", "layers.1.mlp.up"]
    one = overparameterize(three, ["layers.2.mlp.up"], cores=3)
    assert growth.choose(one, 1) == ["layers.1.mlp.up"]
    assert growth.scores[-1]["layers.1.mlp.up"] > growth.scores[-1]["layers.0.mlp.up"]
    assert growth.choose(overparameterize(one, ["layers.1.mlp.up"], cores=3), 2) is None


@pytest.mark.parametrize("family", ["t5", "switch", "qwen2-moe"])
@pytest.mark.full
def test_chains_grow_in_all_layers_but_no_routers(family, tmp_path):
    head = "causal-lm" if "moe" in family else "seq2seq-lm"
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, head), head=head)
    rows = tiny.batch(family)
    batch = {**rows, "weights": np.ones(3, np.float32)}
    batch["labels"] = batch.pop("decoder_input_ids", rows["input_ids"])
    loss = losses.next_token if head == "causal-lm" else losses.sequence_to_sequence
    growth = Chains(source=OneBatch(batch), loss=loss, every=1, per_round=1, total=1, cores=3)
    chosen = growth.choose(model, 1)
    types = [type_of(path) for path in chosen]
    every = {type_of(path) for path in weight_matrices(model) if "layers." in path}
    routers = {kind for kind in every if kind.endswith((".router", ".shared_gate"))}
    assert sorted(types) == sorted(every - routers)
    assert len(routers) == {"t5": 0, "switch": 2, "qwen2-moe": 2}[family]
    if family == "t5":
        names = (
            "encoder.layers.#.attention",
            "decoder.layers.#.attention",
            "decoder.layers.#.cross",
        )
        assert {f"{name}.query" for name in names} <= set(types)
    grown = growth.apply(model, chosen)
    assert sorted(find_forms(grown)) == sorted(chosen)
    for after in (grown, fj.plain(grown)):
        np.testing.assert_allclose(after(**rows).logits, model(**rows).logits, atol=1e-5)


@dataclasses.dataclass
class Unchanged:
    """A growth that changes nothing now and then."""

    every: int

    def replaceable(self, model):
        return []

    def choose(self, model, step):
        return []

    def apply(self, model, change):
        return model

    def to_json(self):
        return {}


@pytest.mark.full
def test_growing_keeps_the_moments_of_what_trained_before(model, data, source, key):
    config = dataclasses.replace(CONFIG, warmup=0.0)
    with_a_change = flat(finetune(model, data, config, key=key, growth=Unchanged(3)).model)
    for path, (_, x) in flat(fj.finetune(model, data, config, key=key).model).items():
        np.testing.assert_allclose(with_a_change[path][1], x, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def all_trains(model):
    method = fj.MPO(bond=None, cores=3)
    return fj.compress_matrices(model, method, matrices=r"layers\.\d\.mlp\..*")[0]


@pytest.fixture(scope="module")
def chained(all_trains):
    return lightweight(all_trains)


@pytest.mark.full(quick=1)
def test_only_auxiliary_tensors_train(chained, all_trains, data, key):
    fit = fj.finetune(chained, data, dataclasses.replace(CONFIG, warmup=0.0), key=key)
    paths = moved(chained, fit.model)
    assert not [p for p in paths if p.endswith("cores.1")]
    assert len([p for p in paths if ".cores." in p]) == 8
    fit = fj.finetune(all_trains, data, dataclasses.replace(CONFIG, warmup=0.0), key=key)
    assert len([p for p in moved(all_trains, fit.model) if ".cores." in p]) == 12


@pytest.mark.full
def test_the_cheapest_cut_is_the_cheapest(chained):
    chosen = cheapest_cut(chained, step=3)
    losses_of = {}
    for path, form in chains(chained).items():
        before = np.asarray(form.matrix())
        for bond, size in enumerate(form.layout.bonds):
            after = cut(chained, Cut(path, bond, size - 3, 0.0))
            losses_of[path, bond] = np.linalg.norm(at(after, path).matrix() - before)
            assert at(after, path).layout.bonds[bond] == size - 3
            assert at(after, path).frozen == (1,)
    best = min(losses_of, key=losses_of.get)
    assert (chosen.path, chosen.bond) == best
    np.testing.assert_allclose(chosen.estimate, losses_of[best], rtol=1e-3)


@pytest.mark.full
def test_squeezing_stops_at_the_tolerance_and_resumes(chained, all_trains, tmp_path):
    """With a measure that only looks at sizes, and training that does nothing."""

    def measure(model):
        return 0.01 * (start - sum(sum(f.layout.bonds) for f in chains(model).values()))

    start = sum(sum(f.layout.bonds) for f in chains(chained).values())
    calls = []

    def train(model, folder):
        calls.append(folder)
        return model

    whole = squeeze(chained, train, measure, tolerance=0.075, step=2, rounds=9)
    assert [round(loss, 2) for _, loss in whole.cuts] == [0.02, 0.04, 0.06]
    assert whole.stopped and whole.loss == whole.cuts[-1][1] and measure(whole.model) == whole.loss
    assert calls == [None] * 4

    def fails(model, folder):
        if folder.name == "round-2":
            raise Stopped
        return model

    run = tmp_path / "run"
    with pytest.raises(Stopped):
        squeeze(chained, fails, measure, tolerance=0.075, step=2, folder=run)
    assert len(json.loads((run / "squeezed.json").read_text())["cuts"]) == 2
    bond = r"bonds of layers\.1\.mlp\.up"
    fewer = cut(chained, Cut("layers.1.mlp.up", 0, 3, 0.0))
    for begun, changed, message in (
        (chained, {"tolerance": 0.08}, r"\(tolerance 0.075, now 0.08\); give those, or another"),
        (chained, {"step": 3}, r"\(step 2, now 3\)"),
        (chained, {"rounds": 1}, "holds 2 cuts, more than rounds=1; give at least as many"),
        (fewer, {}, rf"\({bond} .*, now \[3, "),
        (all_trains, {}, r"Frozen cores of layers\..* \[1\], now \[\]"),
    ):
        options = {"tolerance": 0.075, "step": 2, **changed}
        with pytest.raises(fj.InputError, match=message):
            squeeze(begun, train, measure, folder=run, **options)
    again = squeeze(chained, train, measure, tolerance=0.075, step=2, folder=run)
    assert again.cuts == whole.cuts and again.stopped
    assert sorted(p.name for p in run.iterdir()) == [".lock", "squeezed-3", "squeezed.json"]
    np.testing.assert_array_equal(logits(again.model), logits(whole.model))
    more = squeeze(chained, train, measure, tolerance=0.075, step=2, rounds=2)
    assert len(more.cuts) == 2 and not more.stopped


@pytest.mark.full
def test_a_better_loss_ends_squeezing_only_if_asked_for(chained):
    falling, options = iter([1.0, 0.5, 0.4, float("nan")]), {"tolerance": 0.03, "rounds": 3}
    found = squeeze(chained, lambda m, f: m, lambda m: next(falling), **options)
    assert [loss for _, loss in found.cuts] == [0.5, 0.4] and found.stopped
    falling = iter([1.0, 0.5])
    found = squeeze(chained, lambda m, f: m, lambda m: next(falling), two_sided=True, **options)
    assert not found.cuts and found.stopped and found.loss == 1.0


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"rounds": 0}, {"step": 0}])
def test_squeezing_with_wrong_numbers(options, chained):
    with pytest.raises(fj.InputError, match=f"{next(iter(options))} must be"):
        squeeze(chained, lambda m, f: m, lambda m: 0.0, **options)


def test_squeezing_without_chains(model):
    with pytest.raises(fj.InputError, match=r"see fusion_jax\.MPO"):
        lightweight(model)


@pytest.mark.full
def test_squeezing_with_the_trainer(chained, data, source, key, tmp_path):
    batches, loss = source
    config = dataclasses.replace(CONFIG, max_steps=2)

    def train(model, folder):
        return fj.finetune(model, data, config, key=key, folder=folder, progress=False)

    def measure(model):
        return mean_loss(model, batches, loss, batches=2)

    found = squeeze(chained, train, measure, tolerance=10.0, rounds=2, step=2, folder=tmp_path)
    assert len(found.cuts) == 2 and abs(found.loss - measure(found.model)) < 1e-6
    for path, form in chains(found.model).items():
        if path not in {c.path for c, _ in found.cuts}:
            np.testing.assert_array_equal(form.cores[1], at(chained, path).cores[1])


def told_to_stop(data, key, round_, calls):
    """Training of two steps, which is told to stop after one in a round, the first time."""
    config = dataclasses.replace(CONFIG, max_steps=2, warmup=0.0)

    def train(model, folder):
        calls.append(folder and folder.name)

        def tell(step, state):
            if step == 1 and calls == [f"round-{k}" for k in range(round_ + 1)]:
                os.kill(os.getpid(), signal.SIGTERM)

        return finetune(model, data, config, key=key, folder=folder, on_step=tell)

    return train


@pytest.mark.full
def test_squeezing_that_is_told_to_stop_resumes_in_its_round(chained, data, source, key, tmp_path):
    batches, loss = source
    options = {"tolerance": 10.0, "rounds": 3, "step": 2}

    def measure(model):
        return mean_loss(model, batches, loss, batches=2)

    whole = squeeze(chained, told_to_stop(data, key, 9, []), measure, **options)
    calls = []
    train = told_to_stop(data, key, 1, calls)
    part = squeeze(chained, train, measure, folder=tmp_path, **options)
    assert not part.finished and not part.stopped
    assert part.cuts == whole.cuts[:1] and whole.finished
    assert (tmp_path / "round-1" / "checkpoints" / "1").is_dir()
    assert part.loss == part.cuts[-1][1]
    again = squeeze(chained, train, measure, folder=tmp_path, **options)
    assert calls == ["round-0", "round-1", "round-1", "round-2"]
    assert again.finished and again.cuts == whole.cuts
    np.testing.assert_array_equal(logits(again.model), logits(whole.model))


@pytest.mark.full
def test_a_lottery_that_is_told_to_stop_resumes_in_its_round(model, data, key, tmp_path):
    options = {"keep": 0.25, "rounds": 3, "layers": -1}
    whole = lottery(model, told_to_stop(data, key, 9, []), **options)
    calls = []
    train = told_to_stop(data, key, 1, calls)
    part = lottery(model, train, folder=tmp_path, **options)
    assert not part.finished and part.rounds == 1 and whole.finished and whole.rounds == 3
    again = lottery(model, train, folder=tmp_path, **options)
    assert calls == ["round-0", "round-1", "round-1", "round-2"]
    assert again.finished and sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "ticket-3",
        "ticket.json",
    ]
    for path, (_, x) in flat(whole.model).items():
        np.testing.assert_array_equal(x, flat(again.model)[path][1], err_msg=path)
    with pytest.raises(fj.InputError, match=r"\(keep 0.25, now 0.5\)"):
        lottery(model, train, folder=tmp_path, **{**options, "keep": 0.5})


def test_rounds_are_for_one_model(chained, model, data, key, tmp_path):
    other = cut(chained, Cut("layers.1.mlp.up", 0, 31, 0.0))
    other = fj.compress_matrices(
        fj.plain(other), fj.MPO(bond=None, cores=3), matrices=r"layers\.\d\.mlp\..*"
    )[0]
    options = {"tolerance": 10.0, "rounds": 1}

    def train(model, folder):
        return model

    squeeze(chained, train, lambda m: 0.0, folder=tmp_path / "a", **options)
    with pytest.raises(fj.InputError, match=r"other settings \(model '\w+', now '\w+'\)"):
        squeeze(lightweight(other), train, lambda m: 0.0, folder=tmp_path / "a", **options)
    lottery(model, train, rounds=1, folder=tmp_path / "b")
    with pytest.raises(fj.InputError, match=r"other settings \(model '\w+', now '\w+'\)"):
        lottery(fj.plain(other), train, rounds=1, folder=tmp_path / "b")

    def never(model, folder):
        raise AssertionError

    with pytest.raises(fj.InputError, match="kept in a folder; leave folder out"):
        lottery(model.layers[0].mlp, never, rounds=1, folder=tmp_path / "c")


@pytest.mark.full(quick=1)
def test_lottery_prunes_what_training_leaves_small(model, data, key):
    config = dataclasses.replace(CONFIG, max_steps=2, warmup=0.0)
    trained = []

    def train(ticket, folder):
        trained.append(fj.finetune(ticket, data, config, key=key, progress=False).model)
        return trained[-1]

    ticket = lottery(model, train, keep=0.25, rounds=2, layers=-1).model
    about = {"lottery": {"keep": 0.25, "rounds": 2}, "sites": ["layers.1.mlp"]}
    assert [json.loads(step) for step in ticket.provenance.history] == [about]
    assert not [p for p in find_forms(ticket) if not p.startswith("layers.1.mlp")]
    kept = np.ones(2 * 32 * 48, bool)
    for round_, model_after in enumerate(trained):
        kernels = [at(model_after, f"layers.1.mlp.{n}").kernel[...] for n in ("down", "up")]
        flat_weights = np.abs(np.concatenate([np.asarray(k).reshape(-1) for k in kernels])) * kept
        left = int(0.25 ** ((round_ + 1) / 2) * kept.size)
        kept = np.zeros_like(kept)
        kept[np.argsort(-flat_weights, kind="stable")[:left]] = True
    masks = [at(ticket, f"layers.1.mlp.{n}").mask[...] for n in ("down", "up")]
    np.testing.assert_array_equal(np.concatenate([np.asarray(m).reshape(-1) for m in masks]), kept)
    for name in ("down", "up"):
        np.testing.assert_array_equal(
            at(ticket, f"layers.1.mlp.{name}").kernel, at(model, f"layers.1.mlp.{name}").kernel
        )


@pytest.mark.full
def test_growing_keeps_float32_weights_of_a_bfloat16_model(tmp_path, data, key):
    folder = glue.checkpoint(tmp_path / "model")
    options = {"head": "classification", "num_labels": 2, "key": jax.random.key(5)}
    model = fj.load(folder, dtype=jnp.bfloat16, **options)
    config = dataclasses.replace(CONFIG, max_steps=3, warmup=0.0, learning_rate=1e-5)
    seen = {}

    def watch(name):
        return lambda step, state: seen.update({(name, step): jax.tree.map(np.asarray, state)})

    finetune(model, data, config, key=key, on_step=watch("plain"))
    finetune(model, data, config, key=key, on_step=watch("grown"), growth=Unchanged(2))
    for path, x in seen["plain", 3].params.items():
        np.testing.assert_allclose(seen["grown", 3].params[path], x, rtol=1e-6, atol=1e-9)


@pytest.mark.full
def test_chains_grow_from_float32_weights_of_a_bfloat16_model(tmp_path, data, key):
    folder = glue.checkpoint(tmp_path / "model")
    options = {"head": "classification", "num_labels": 2, "key": jax.random.key(5)}
    model = fj.load(folder, dtype=jnp.bfloat16, **options)
    batches, loss = batches_and_loss(model, data, jax.random.key(1))
    config = dataclasses.replace(CONFIG, max_steps=3, warmup=0.0, learning_rate=1e-6)
    seen = {}

    def watch(step, state):
        seen[step] = jax.tree.map(np.asarray, state.params)

    growth = growing((batches, loss))
    fit = finetune(model, data, config, key=key, on_step=watch, growth=growth)
    assert len(find_forms(fit.model)) == 2
    for path, form in find_forms(fit.model).items():
        assert {core.dtype.name for core in form.cores} == {"bfloat16"}
        master = seen[2][f"{path}.kernel"]
        cores = [jnp.asarray(seen[3][f"{path}.cores.{k}"]) for k in range(3)]
        error = np.linalg.norm(mpo.contract(cores, master.shape) - master)
        # Rounding would change it by 2e-3.
        assert error < 1e-4 * np.linalg.norm(master)


@pytest.mark.full
def test_what_grows_begins_at_the_full_rate(model, data, source, key):
    """The first step of Adam is the learning rate in every direction."""
    options = {"warmup": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1e-3}
    config = dataclasses.replace(CONFIG, max_steps=3, clip_norm=None, epsilon=1e-12, **options)
    seen = {}
    fit = finetune(
        model,
        data,
        config,
        key=key,
        growth=growing(source),
        on_step=lambda step, state: seen.update({step: jax.tree.map(jnp.array, state)}),
    )
    paths = sorted(find_forms(fit.model))
    before = overparameterize(Partition(model).merge(seen[2].params, seen[2].rest), paths, cores=3)
    for path in paths:
        moves = [np.abs(a[...] - b[...]) for a, b in
                 zip(at(fit.model, path).cores, at(before, path).cores, strict=True)]  # fmt: skip
        for move in moves:
            np.testing.assert_allclose(np.median(move), 1e-3, rtol=1e-2)


def test_matrices_that_were_chains_before_are_not_counted_as_grown(model, source):
    made, _ = fj.compress_matrices(
        model, fj.MPO(bond=None, cores=3), matrices=r"layers\.0\.mlp\.up"
    )
    batches, loss = source
    growth = Chains(source=batches, loss=loss, every=2, total=1, cores=3, batches=1,
                    matrices=r"layers\.\d\.mlp\.up")  # fmt: skip
    assert growth.choose(made, 2) == ["layers.1.mlp.up"]
    assert growth.choose(growth.apply(made, ["layers.1.mlp.up"]), 4) is None


@pytest.mark.full
def test_chains_under_remat(model, data, key):
    chained = overparameterize(model, ["layers.0.mlp.up"], cores=3)
    config = dataclasses.replace(CONFIG, max_steps=1, warmup=0.0)
    plain = fj.finetune(chained, data, config, key=key).model
    remat = fj.finetune(chained, data, dataclasses.replace(config, remat=True), key=key).model
    for path, (_, x) in flat(plain).items():
        if not path.endswith("attention.key.bias"):
            np.testing.assert_allclose(x, flat(remat)[path][1], atol=1e-5)


def test_factored_students_are_tuned(model, data, key):
    smaller, _ = fj.compress(model, fj.Svd(rank=6), layers=-1, key=key)
    config = dataclasses.replace(CONFIG, max_steps=1, warmup=0.0, epochs=1)
    fit = fj.tune(smaller, model, data.train, config, key=key)
    paths = moved(smaller, fit.model)
    assert paths and all(path.startswith("layers.1.mlp.") for path in paths)


@pytest.mark.full
def test_what_squeezing_is_given(tmp_path):
    light = lightweight(tiny_chains(tmp_path))
    same = lambda model, folder: model  # noqa: E731
    found = squeeze(light, same, lambda m: jnp.float32(1), rounds=1, folder=tmp_path / "run")
    assert found.first_loss == 1.0 and len(found.cuts) == 1
    with pytest.raises(FloatingPointError, match="before the first cut is nan"):
        squeeze(light, same, lambda m: float("nan"))
    for wrong in (None, (light, 1)):
        with pytest.raises(fj.InputError, match="train must return its Fit, or the model"):
            squeeze(light, lambda m, folder, wrong=wrong: wrong, lambda m: 1.0)
        with pytest.raises(fj.InputError, match="train must return its Fit, or the model"):
            lottery(fj.plain(light), lambda m, folder, wrong=wrong: wrong)
    with pytest.raises(fj.InputError, match="masks are gone"):
        lottery(fj.plain(light), lambda m, folder: fj.plain(light))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "squeezed.json").write_text("")
    with pytest.raises(fj.InputError, match="was not written by fusion_jax"):
        squeeze(light, same, lambda m: 1.0, folder=tmp_path / "other")
    with pytest.raises(fj.InputError, match="is a file"):
        squeeze(light, same, lambda m: 1.0, folder=tmp_path / "other" / "squeezed.json")


def tiny_chains(folder):
    model = fj.load(tiny.checkpoint(folder / "model"))
    method = fj.MPO(bond=None, cores=3)
    return fj.compress_matrices(model, method, matrices=r"layers\.0\.mlp\..*")[0]


def test_what_over_parameterising_is_given():
    mlp = fj.Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
    for paths in ("up", []):
        with pytest.raises(fj.InputError, match="list of paths"):
            overparameterize(mlp, paths)
    growth = Chains(source=OneBatch({}), loss=losses.next_token, every=8)
    config, recipe = fj.TrainConfig(max_steps=8, epochs=99), Recipe(growth=growth)
    with pytest.raises(fj.InputError, match="every 8 steps does nothing in a run of 8"):
        fit(mlp, OneBatch({}), losses.next_token, config, key=jax.random.key(0), recipe=recipe)
    for options in ({"cores": 1}, {"batches": 0}):
        with pytest.raises(fj.InputError, match="must be at least"):
            Chains(source=OneBatch({}), loss=losses.next_token, every=1, **options)
    with pytest.raises(fj.InputError, match="count must be at least 1"):
        top_of_each_type({"up": 1.0}, 0)
    with pytest.raises(fj.InputError, match="chain of one core"):
        lightweight(fj.compress_matrices(mlp, fj.MPO(bond=None, cores=1), matrices="up")[0])
    with pytest.raises(fj.InputError, match="give batches and a loss"), unchecked():
        mean_loss(mlp, (1, 2), losses.next_token)
