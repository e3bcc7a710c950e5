"""Healing: the loss against numpy, stored logits, every head, resuming, and the command."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.training import Batches, Examples, Healing, PairBatches, heal_config
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.divergence import (
    healing,
    output_of,
    top_classes,
    top_divergence,
)
from fusion_jax.training.methods.stored_logits import StoredLogits, row_names
from fusion_jax.training.tasks.unlabeled import read_files, unlabeled
from tests import glue, nlg, tiny
from tests.helpers import TRAIN_CONFIG, OneBatch, flat, moved

CONFIG = dataclasses.replace(TRAIN_CONFIG, batch_size=4)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - logsumexp(x, axis=-1, keepdims=True)


def joined(teacher, student, k):
    """The divergence in float64, with all classes but the teacher's k most probable as one."""
    p, q = log_softmax(teacher), log_softmax(student)
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    if k < p.shape[-1]:
        p, q = (
            np.concatenate([x[..., :k], logsumexp(x[..., k:], axis=-1, keepdims=True)], axis=-1)
            for x in (p, q)
        )
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("k", [1, 4, 11, 64])
def test_divergence_equals_numpy(k):
    rng = np.random.default_rng(0)
    teacher, student = (3 * rng.standard_normal((2, 5, 11)).astype(np.float32) for _ in range(2))
    teacher[0, 0, 3:] = -60  # hardly anything is left for the others
    teacher, student = jnp.asarray(teacher), jnp.asarray(student)
    got = np.asarray(top_divergence(top_classes(teacher, k), student))
    np.testing.assert_allclose(got, joined(teacher, student, k), rtol=1e-5)
    whole = joined(teacher, student, 11)
    assert (got <= whole * (1 + 1e-5)).all()
    assert k >= 11 or (got[1] < 0.999 * whole[1]).all()
    gradient = jax.grad(lambda x: top_divergence(top_classes(teacher, k), x).sum())(student)
    assert np.isfinite(gradient).all()
    if k >= 11:
        want = np.exp(log_softmax(student)) - np.exp(log_softmax(teacher))
        np.testing.assert_allclose(gradient, want, atol=1e-5)


def rows(lengths=(9, 6, 3, 5), vocab=50, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(5, vocab, n).astype(np.int32) for n in lengths]


def data_of(family, head, size=4, lengths=(9, 6, 3, 5), seed=None, pad=0):
    examples = Examples(rows(lengths), None, None, [f"text {i}" for i in range(len(lengths))])
    if head == "seq2seq-lm":
        targets = rows(lengths[::-1], seed=1)
        return PairBatches(examples, targets, size, pad_id=pad, shapes=1, seed=seed)
    return Batches(examples, size, pad_id=pad, shapes=1, seed=seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Teachers by head, made when they are needed."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(family, head):
        if (family, head) not in made:
            if family in ("gpt2", "t5"):
                place = nlg.checkpoint(folder / f"{family}{head}", family)
            elif head == "masked-lm":
                place = tiny.checkpoint(folder / "masked", "bert", head)
            else:
                place = glue.checkpoint(folder / f"bert{head}")
            more = {"num_labels": 3} if head in ("classification", "token-classification") else {}
            if head == "number":
                head_, more = "classification", {"num_labels": 1}
            else:
                head_ = head
            teacher = fj.load(place, head=head_, key=jax.random.key(5), **more)
            student = fj.compress(teacher, fj.Fusion(width=8), key=jax.random.key(0))[0]
            made[family, head] = teacher, student
        return made[family, head]

    return get


HEADS = [
    ("gpt2", "causal-lm"),
    ("bert", "classification"),
    ("bert", None),
    ("bert", "masked-lm"),
    ("t5", "seq2seq-lm"),
    ("bert", "token-classification"),
    ("bert", "question-answering"),
    ("bert", "number"),
]
STORABLE = [case for case in HEADS if case[1] not in (None, "number")]


def loss_of(teacher, student, batch, top_k=64, **more):
    """The mean loss of a batch."""
    output = output_of(student, batch)
    weights = {"states": 0.0, "labels": 0.0, **more}
    total, count = healing(
        teacher, None, student, batch, None, kind=output.kind, top_k=top_k, **weights
    )
    return float(total) / float(count)


@pytest.mark.parametrize(("family", "head"), HEADS)
@pytest.mark.full(quick=3)
def test_healing_reduces_the_loss_of_every_head(family, head, models, key):
    teacher, student = models(family, head)
    data = data_of(family, head)
    config = dataclasses.replace(CONFIG, warmup=0.0, learning_rate=1e-4)
    fit = fj.heal(student, teacher, data, config, steps=3, key=key)
    before, after = (loss_of(teacher, model, data(0)) for model in (student, fit.model))
    assert after < before
    assert loss_of(teacher, teacher, data(0)) == pytest.approx(0, abs=1e-6)
    frozen = [path for path, (kind, _) in flat(student).items() if kind is fj.Frozen]
    assert frozen and not set(frozen) & moved(student, fit.model)


@pytest.mark.parametrize(("family", "head"), STORABLE)
@pytest.mark.full(quick=1)
def test_stored_logits_equal_the_teacher_in_memory(family, head, models, key, tmp_path):
    teacher, student = models(family, head)
    folder = fj.store_logits(teacher, data_of(family, head), tmp_path / "logits", top_k=7)
    # Other batches of the same texts, in another order, padded to other lengths.
    data = data_of(family, head, size=2, seed=3)
    config = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=0.5, warmup=0.0)
    ours, theirs = (
        fj.heal(student, each, data, config, steps=3, key=key, healing=h).model
        for each, h in ((folder, Healing()), (teacher, Healing(top_k=7)))
    )
    before = flat(student)
    far = {path: x - before[path][1] for path, (_, x) in flat(theirs).items()}
    assert max(np.abs(x).max() for x in far.values()) > 1e-4
    # Student and teacher are so near here that rounding to float16 is a few percent of the way.
    for path, (_, x) in flat(ours).items():
        atol = 0.1 * np.abs(far[path]).max() + 1e-6
        np.testing.assert_allclose(x - before[path][1], far[path], rtol=0, atol=atol, err_msg=path)


def test_what_is_stored(models, tmp_path):
    """The classes and probabilities of each token, whatever the batch it comes in."""
    teacher, _ = models("gpt2", "causal-lm")
    folder = fj.store_logits(teacher, data_of("gpt2", "causal-lm"), tmp_path / "logits", top_k=5)
    batch = data_of("gpt2", "causal-lm", size=3, lengths=(9, 6))(0)
    top = StoredLogits(folder).top(batch)
    want = log_softmax(teacher(batch["input_ids"], batch["attention_mask"]).logits)
    order = np.argsort(-want, axis=-1)
    for row, length in enumerate((9, 6)):
        here = row, slice(length)
        np.testing.assert_array_equal(top.indices[here], order[here][..., :5])
        sorted_ = np.take_along_axis(want[here], order[here], -1)
        np.testing.assert_allclose(top.log_probs[here], sorted_[..., :5], rtol=2**-10)
        np.testing.assert_allclose(top.others[here], logsumexp(sorted_[..., 5:], -1), atol=1e-5)
    assert (top.log_probs[2] == -100).all()  # a padded row
    assert not list(tmp_path.glob(".*"))


def test_names_of_texts():
    """They depend on what the model reads of a row, and not on what is around it."""
    one = {"input_ids": [[5, 6, 0, 0]], "attention_mask": [[1, 1, 0, 0]], "weights": [1.0]}
    one = {name: np.array(x) for name, x in one.items()}
    shorter = {name: x[:, :3] if x.ndim > 1 else x for name, x in one.items()}
    assert row_names(shorter, "tokens") == row_names(one, "tokens")
    targets = {**one, "decoder_input_ids": np.array([[0, 1, 2, 3]])}
    others = {**one, "decoder_input_ids": np.array([[0, 1, 2, 4]])}
    labeled = {**one, "labels": np.array([[1, 2, -100]])}
    named = [row_names(batch, "targets")[0] for batch in (targets, others, labeled)]
    assert len({*named, row_names(one, "tokens")[0]}) == 4
    assert row_names({**labeled, "labels": np.array([[1, 2]])}, "targets")[0] == named[2]
    assert row_names({**one, "weights": np.zeros(1)}, "tokens") == [None]


def test_stored_logits_that_do_not_fit(models, key, tmp_path):
    teacher, student = models("gpt2", "causal-lm")
    folder = fj.store_logits(teacher, data_of("gpt2", "causal-lm"), tmp_path / "logits", top_k=5)
    fits = data_of("gpt2", "causal-lm")

    def heal(data=fits, student=student, logits=folder, train="all", **more):
        config = dataclasses.replace(CONFIG, train=train)
        return fj.heal(student, logits, data, config, steps=1, key=key, **more)

    with pytest.raises(fj.InputError, match=r"lacks 2 of 4 texts of the data: .* of other data"):
        heal(data_of("gpt2", "causal-lm", lengths=(9, 6, 4, 5)))
    with pytest.raises(fj.InputError, match="and there is nothing to heal"):
        heal(student=teacher)
    with pytest.raises(fj.InputError, match="hidden states are not stored"):
        heal(healing=Healing(hidden_states=1.0))
    with pytest.raises(fj.InputError, match="has top_k 5, not 6"):
        heal(healing=Healing(top_k=6))
    with pytest.raises(fj.InputError, match="train 'compressed' compares the MLPs"):
        heal(train="compressed")
    with pytest.raises(fj.InputError, match="exists and is not an empty folder"):
        fj.store_logits(teacher, fits, folder)
    with pytest.raises(fj.InputError, match="does not hold stored logits"):
        heal(logits=tmp_path)
    part = folder / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(fj.InputError, match=r"the stored logits in .* are damaged"):
        heal()


def test_a_run_that_was_killed_resumes_with_the_same_bits(models, key, tmp_path):
    teacher, student = models("gpt2", "causal-lm")
    batch = data_of("gpt2", "causal-lm")(0)
    logits = fj.store_logits(teacher, OneBatch(batch), tmp_path / "logits")

    class Killed(Exception):
        pass

    class Killing(OneBatch):
        def __call__(self, step):
            if step == 4:
                raise Killed
            return self.batch

    def heal(source, **more):
        return fj.heal(student, logits, source, CONFIG, steps=6, key=key, **more)

    whole = heal(OneBatch(batch))
    with pytest.raises(Killed):
        heal(Killing(batch), folder=tmp_path / "run")
    ended = heal(OneBatch(batch), folder=tmp_path / "run")
    assert ended.finished
    assert bit_equal(whole.model, ended.model)
    with pytest.raises(fj.InputError, match=r"holds a run with other settings \(healing"):
        heal(OneBatch(batch), folder=tmp_path / "run", healing=Healing(labels=1.0))


def test_weights_of_the_loss(models):
    """The sum of divergence, errors of hidden states and true labels, against numpy."""
    teacher, student = models("gpt2", "causal-lm")
    batch = data_of("gpt2", "causal-lm")(0)
    real = batch["attention_mask"]
    theirs, ours = (
        m(batch["input_ids"], real, output_hidden_states=True) for m in (teacher, student)
    )
    want = joined(theirs.logits, ours.logits, 9)[real].mean()
    states = [np.array(out.hidden_states[1:], np.float64) for out in (ours, theirs)]
    errors = np.square(states[0] - states[1]).sum(-1) / np.square(states[1]).sum(-1)
    want += 0.5 * np.mean([each[real].mean() for each in errors])
    scores = np.take_along_axis(
        log_softmax(ours.logits)[:, :-1], batch["input_ids"][:, 1:, None], -1
    )
    want -= 0.25 * scores[..., 0][real[:, 1:]].mean()
    options = {"kind": "tokens", "top_k": 9, "states": 0.5, "labels": 0.25}
    got = healing(teacher, losses.next_token, student, batch, None, **options)
    np.testing.assert_allclose(got.total / got.count, want, rtol=1e-5)
    assert float(got.count) == real.sum()
    empty = {**batch, "weights": np.zeros(4, np.float32)}
    got = healing(teacher, losses.next_token, student, empty, None, **options)
    assert (float(got.total), float(got.count)) == (0, 0)


def test_what_trains(models, key):
    teacher, student = models("gpt2", "causal-lm")
    paths = {}
    for train in ("all", "compressed"):
        config = dataclasses.replace(CONFIG, train=train, warmup=0.0)
        paths[train] = moved(student, fj.heal(
            student, teacher, data_of("gpt2", "causal-lm"), config, steps=1, key=key
        ).model)  # fmt: skip
    assert {path.split(".mlp.")[0] for path in paths["compressed"]} == {"layers.0", "layers.1"}
    assert paths["all"] > paths["compressed"]


def test_the_learning_rate_depends_on_the_features(models):
    _, student = models("gpt2", "causal-lm")
    config = heal_config(student, batch_size=2)
    assert (config.learning_rate, config.batch_size) == (0.064 / 16, 2)
    assert heal_config(student, learning_rate=1.0).learning_rate == 1


def test_models_that_do_not_fit(models, key):
    teacher, student = models("gpt2", "causal-lm")
    data = data_of("gpt2", "causal-lm")
    with pytest.raises(fj.InputError, match="student and teacher are the same model"):
        fj.heal(teacher, teacher, data, key=key)
    with pytest.raises(fj.InputError, match="same model"):
        fj.heal(nnx.clone(teacher), teacher, data, key=key)
    with pytest.raises(fj.InputError, match="has 61 tokens or classes and the teacher 99"):
        fj.heal(student, models("bert", "masked-lm")[0], data, key=key)
    with pytest.raises(fj.InputError, match="head is 'causal-lm' and the teacher's None"):
        fj.heal(student, models("bert", None)[0], data, key=key)
    with pytest.raises(fj.InputError, match="there is no text in the data"):
        fj.heal(student, teacher, [], key=key)
    bare = {name: x for name, x in data(0).items() if name == "input_ids"}
    with pytest.raises(fj.InputError, match="batches have no attention_mask and no weights"):
        fj.heal(student, teacher, OneBatch(bare), key=key)
    with pytest.raises(fj.InputError, match="steps must be at least 1"):
        fj.heal(student, teacher, data, steps=0, key=key)
    with pytest.raises(fj.InputError, match="router_z does not apply"):
        fj.heal(student, teacher, data, dataclasses.replace(CONFIG, router_z=1.0), key=key)
    with pytest.raises(fj.InputError, match="hidden_states must be at least 0; got nan"):
        Healing(hidden_states=float("nan"))
    classes = models("bert", "classification")
    with pytest.raises(fj.InputError, match="needs data with labels"):
        fj.heal(*classes[::-1], data_of("bert", None), key=key, healing=Healing(labels=1.0))
    with pytest.raises(fj.InputError, match="a head for a number, and no logits to store"):
        fj.store_logits(models("bert", "number")[0], data_of("bert", None), "never")


def test_text_is_read_as_the_model_reads_it(models, tmp_path):
    """A text file is one text for a language model, and a text on each line for others."""
    file = tmp_path / "text.txt"
    file.write_text("w1 w2\n\nw3\n")
    encoder, decoder = models("bert", "classification")[0], models("gpt2", "causal-lm")[0]
    config = dataclasses.replace(CONFIG, batch_size=2)
    lines = unlabeled(encoder, file, config, jax.random.key(0))
    assert sorted(lines.names(0)) == [f"{tmp_path.name}/text.txt:{i}" for i in (1, 3)]
    assert lines(0)["attention_mask"].sum() == 4 + 3  # with [CLS] and [SEP]
    windows = unlabeled(decoder, file, config, jax.random.key(0))
    assert windows(0)["input_ids"].shape == (2, len("w1 w2\n\nw3\n"))
    whole = read_files(decoder, [file, file], 6)
    assert len(whole.train) == 2 * len("w1 w2\n\nw3\n")
    with pytest.raises(fj.InputError, match="context is for decoder-only models"):
        read_files(encoder, [file], 6)


def test_the_commands(tmp_path, capsys):
    """Compress, store logits, heal: as a user types them."""
    text = tmp_path / "text.txt"
    text.write_text("abcab cabbc " * 10)
    model, small, logits, healed, other = (
        str(tmp_path / name) for name in ("model", "small", "logits", "healed", "other")
    )
    nlg.checkpoint(tmp_path / "model", "gpt2")
    head, context = ["--head", "causal-lm"], ["--context", "8"]
    assert main(["compress", model, small, "fusion", "--width", "8", *head]) == 0
    assert main(["store-logits", model, str(text), "-o", logits, *head, *context]) == 0
    options = ["--steps", "2", "--batch-size", "8", *context]
    assert main(["heal", small, logits, str(text), "-o", healed, *options]) == 0
    assert capsys.readouterr().out.endswith(f"Saved {logits}.\nSaved {healed}.\n")
    assert not (tmp_path / "healed.run").exists()
    assert moved(*(fj.load(name, head="causal-lm") for name in (small, healed)))
    for arguments, message in (
        ([small, model], "there is no text; give text files"),
        ([small, model, f"{text}.gone"], "there is no file"),
        ([small, model, str(text), "--task", "text"], "--task does not apply to text files"),
        ([model, model, str(text)], "student and teacher are the same model"),
        ([small, logits, str(text), "--context", "9"], "lacks .* or of windows of another length"),
    ):
        assert main(["heal", *arguments, "-o", other]) == 1
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "other").exists()
    assert main(["heal", small, model, str(text), "-o", healed]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
