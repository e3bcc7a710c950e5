"""Language models on plain text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.surgery import at
from fusion_jax.training import Chains, Recipe, Windows, nats_per_token
from fusion_jax.training.engine import losses
from fusion_jax.training.methods.importance import type_of
from tests import tiny

CONFIG = fj.TrainConfig(
    max_steps=30, epochs=100, batch_size=4, learning_rate=1e-2, log_every=10, dropout=False
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("language") / "model", "gpt2", "causal-lm")
    return fj.load(folder, head="causal-lm")


@pytest.fixture(scope="module")
def text():
    """A pattern that can be learned."""
    return np.tile(np.array([5, 9, 7, 11, 6, 8, 13], np.int32), 30)


def finetune(model, ids, config, *, key, context, dev=None, folder=None, **recipe):
    data = fj.PlainText(ids, dev=dev, context=context)
    return fj.finetune(model, data, config, key=key, folder=folder, recipe=Recipe(**recipe))


def by_hand(model, ids, weights):
    """Minus the log-probabilities of all tokens but the first, in numpy."""
    logits = np.asarray(model(ids).logits, np.float64)[:, :-1]
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(scores, np.asarray(ids)[:, 1:, None], -1)[..., 0]
    return (each * weights).sum(), np.broadcast_to(weights, each.shape).sum()


@pytest.mark.full(quick=1)
def test_loss_equals_numpy(model, text):
    ids = text[: 3 * 8].reshape(3, 8)
    weights = np.array([1.0, 0.5, 0.0], np.float32)
    batch = {"input_ids": ids, "attention_mask": np.ones((3, 8), bool), "weights": weights}
    got = losses.next_token(model, batch, None)
    np.testing.assert_allclose(got, by_hand(model, ids, weights[:, None]), rtol=1e-5)
    # Only targets count: the first four tokens are a prompt, the last ones of a row padding.
    labels = ids.copy()
    labels[:, :4] = -100
    mask = np.ones((3, 8), bool)
    mask[1, 6:] = False
    counts = (labels != -100) & mask
    got = losses.next_token(model, {**batch, "labels": labels, "attention_mask": mask}, None)
    want = by_hand(model, ids, counts[:, 1:] * weights[:, None])
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "switch"])
@pytest.mark.full
def test_sequence_to_sequence_equals_numpy(family, tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, "seq2seq-lm"), head="seq2seq-lm")
    rng = np.random.default_rng(0)
    source, target = (rng.integers(5, 50, (3, n)).astype(np.int32) for n in (9, 6))
    mask = np.arange(9) < np.array([[9], [6], [4]])
    lengths = np.array([[6], [3], [5]])
    labels = np.where(np.arange(6) < lengths, target, -100).astype(np.int32)
    weights = np.array([1.0, 1.0, 0.0], np.float32)
    batch = {"input_ids": source, "attention_mask": mask, "labels": labels, "weights": weights}
    got = losses.sequence_to_sequence(model, batch, None)
    start = model.config.decoder_start_token_id
    # As Hugging Face does, 0 behind a target's end; a mixture's experts may be full of these.
    before = np.concatenate([np.full((3, 1), start), np.maximum(labels, 0)[:, :-1]], 1)
    out = model(source, mask, decoder_input_ids=before.astype(np.int32))
    logits = np.asarray(out.logits, np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(scores, target[..., None], -1)[..., 0]
    counts = (np.arange(6) < lengths) * weights[:, None]
    np.testing.assert_allclose(got, ((each * counts).sum(), counts.sum()), rtol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
def test_every_token_is_predicted_once(seed):
    ids = np.arange(100, dtype=np.int32)
    windows = Windows(ids, context=8, batch_size=3, seed=seed)
    for epoch in range(2):
        predicted = []
        for i in range(len(windows)):
            batch = windows(epoch * len(windows) + i)
            assert batch["input_ids"].shape == (3, 8)
            predicted += batch["input_ids"][batch["weights"] > 0][:, 1:].ravel().tolist()
            assert len(windows.names(i)) == (batch["weights"] > 0).sum() or epoch
        assert sorted(predicted) == list(range(1, 99))
        assert (predicted == sorted(predicted)) == (seed is None)


@pytest.mark.full
def test_nats_are_the_mean_over_all_windows(model, text):
    windows = np.stack([text[i : i + 8] for i in range(0, len(text) - 7, 7)])
    total, count = by_hand(model, windows, np.ones((len(windows), 1)))
    for size in (3, 32):
        got = nats_per_token(model, text, 8, batch_size=size)
        np.testing.assert_allclose(got, total / count, rtol=1e-5)
    # With a token that texts start with, all tokens are predicted, the first one too.
    windows = np.stack([[3, *text[i : i + 7]] for i in range(0, len(text) - 6, 7)])
    total, count = by_hand(model, windows, np.ones((len(windows), 1)))
    got = nats_per_token(model, text, 8, start=3)
    np.testing.assert_allclose(got, total / count, rtol=1e-5)


def test_learns_and_resumes(model, text, key, tmp_path):
    whole = finetune(model, text, CONFIG, key=key, context=8, dev=text)
    before = nats_per_token(model, text, 8)
    assert whole.history[-1]["nats"] < 0.6 < 2 < before
    half = dataclasses.replace(CONFIG, checkpoint_every=10)

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 17:
            raise Killed

    options = {"key": key, "context": 8, "folder": tmp_path / "run"}
    with pytest.raises(Killed):
        finetune(model, text, half, **options, on_step=kill)
    again = finetune(model, text, half, **options)
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "run" / "last" / "fusion.json").is_file()


@pytest.mark.full
def test_hooks_are_those_of_fit(model, text, key, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=5, warmup=0.0, eval_every=2)
    source = Windows(text, 8, 4, seed=1)
    growth = Chains(
        source=source, loss=losses.next_token, every=2, per_round=1, total=1, cores=3, batches=2
    )
    seen, saved = {}, []

    def twice(own):
        def loss(model, batch, key):
            total, count = own(model, batch, key)
            return losses.Total(2 * total, count)

        return loss

    def save(model, folder):
        saved.append(folder.name)
        fj.save(model, folder)

    result = finetune(
        model,
        text,
        config,
        key=key,
        context=8,
        dev=text,
        folder=tmp_path / "run",
        trains=r"layers\..*\.kernel",
        loss=twice,
        multipliers={f"layers.{i}.mlp.up.kernel": 0.0 for i in range(3)},
        on_step=lambda step, state: seen.update({step: state}),
        update=lambda params, rest, step: {"word.embedding": 2 * rest["word.embedding"]},
        growth=growth,
        save=save,
        best_from=4,
        about={"why": "a test"},
    )
    grown = find_forms(result.model)
    assert sorted(map(type_of, grown)) == [
        f"layers.#.{name}" for name in ("mlp.down", "mlp.up", "out", "qkv")
    ]
    moved = {
        path
        for path, form in grown.items()
        if not np.allclose(form.matrix(), at(model, path).kernel[...], atol=1e-4)
    }
    assert len(moved) == 3 and not [path for path in moved if path.endswith("up")]
    assert all(path.startswith("layers.") for path in seen[5].params)
    np.testing.assert_allclose(result.model.word.embedding, 32 * model.word.embedding[...])
    assert set(saved) == {"best.new", "last.new"}
    ids = jnp.asarray(text[:24].reshape(3, 8))
    plain = fj.plain(result.model)
    assert not find_forms(plain)
    np.testing.assert_allclose(plain(ids).logits, result.model(ids).logits, rtol=1e-5, atol=1e-5)
    options = {"trains": r"layers\..*\.kernel", "growth": growth, "about": {"why": "another"}}
    with pytest.raises(fj.InputError, match=r"other settings \(why 'a test', now 'another'"):
        finetune(model, text, config, key=key, context=8, folder=tmp_path / "run", **options)


@pytest.mark.full
def test_tuning_brings_hidden_states_nearer(model, text, key):
    smaller, _ = fj.compress(model, fj.Fusion(width=8), key=key)
    windows = Windows(text, 8, 4, seed=0)
    tuned = fj.tune(smaller, model, windows, CONFIG, key=key).model
    ids = jnp.asarray(text[:64].reshape(8, 8))

    def apart(other):
        states = [m(ids, output_hidden_states=True).hidden_states[1:] for m in (model, other)]
        return sum(float(jnp.square(a - b).sum()) for a, b in zip(*states, strict=True))

    assert apart(tuned) < 0.5 * apart(smaller)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (smaller, tuned))
    moved = [path for path in before if not np.array_equal(before[path][...], after[path][...])]
    assert moved
    assert all("mlp" in path for path in moved)


def test_bad_input(model, text, key, tmp_path):
    with pytest.raises(fj.InputError, match="a text of 5 tokens has no window of 8"):
        finetune(model, text[:5], CONFIG, key=key, context=8)
    with pytest.raises(fj.InputError, match="a text of 3 tokens has no window of 8"):
        finetune(model, text, CONFIG, key=key, context=8, dev=text[:3])
    with pytest.raises(fj.InputError, match="context 40 is above the model's 32 positions"):
        finetune(model, text, CONFIG, key=key, context=40)
    headless = fj.load(tiny.checkpoint(tmp_path / "bare", "gpt2"))
    with pytest.raises(fj.InputError, match="head='causal-lm'"):
        finetune(headless, text, CONFIG, key=key, context=8)
