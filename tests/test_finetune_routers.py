"""The routers' auxiliary losses in training, and tuning of encoder-decoders."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.training import Recipe, Windows
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.trainer import fit
from tests import tiny

LOSSES = {"mixtral": losses.next_token, "switch": losses.sequence_to_sequence}
families = pytest.mark.parametrize("family", sorted(LOSSES))


def mixture(family, folder):
    head = dict(tiny.GENERATIVE)[family]
    return fj.load(tiny.checkpoint(folder, family, head), head=head)


def training_batch(family, padded=True):
    """Three texts, of which the last only fills up."""
    made = tiny.batch(family)
    made.pop("decoder_input_ids", None)
    if not padded:
        made["input_ids"] = np.random.RandomState(1).randint(5, 61, (3, 9)).astype(np.int32)
        made["attention_mask"] = np.ones((3, 9), np.int32)
    if family == "switch":
        labels = np.random.RandomState(2).randint(5, 61, (3, 7)).astype(np.int32)
        lengths = np.array([[7], [4], [6]]) if padded else np.array([[7]] * 3)
        made["labels"] = np.where(np.arange(7)[None] < lengths, labels, -100).astype(np.int32)
    weights = np.array([1, 1, 0 if padded else 1], np.float32)
    return {**made, "weights": weights}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def by_hand(logits, real, top_k, per_sequence):
    """transformers' formulas, over a list of real positions."""
    rows = range(len(real)) if per_sequence else [slice(None)]
    balances, squares = [], []
    for row in rows:
        x = np.concatenate([np.asarray(layer, np.float64)[row][real[row]] for layer in logits])
        if not len(x):
            continue
        p = softmax(x)
        used = np.zeros(x.shape)
        np.put_along_axis(used, np.argsort(-p, -1)[:, :top_k], 1, -1)
        balances.append(x.shape[-1] * (used.mean(0) * p.mean(0)).sum())
        squares += (np.log(np.exp(x).sum(-1)) ** 2).tolist()
    return np.mean(balances), np.mean(squares)


@families
@pytest.mark.full(quick=1)
def test_equal_formulas_by_hand(family, tmp_path):
    model, batch = mixture(family, tmp_path / "m"), training_batch(family)
    arguments = {k: x for k, x in batch.items() if k not in ("labels", "weights")}
    real = batch["attention_mask"].astype(bool) & (batch["weights"][:, None] > 0)
    if family == "switch":
        before = np.pad(np.maximum(batch["labels"], 0)[:, :-1], ((0, 0), (1, 0)))
        out = model(**arguments, decoder_input_ids=before)
        targets = (batch["labels"] != -100) & (batch["weights"][:, None] > 0)
        parts = [by_hand(out.encoder.router_logits, real, 1, True)]
        parts += [by_hand(out.router_logits, targets, 1, True)]
    else:
        parts = [by_hand(model(**arguments).router_logits, real, 2, False)]
    balance, z = np.sum(parts, 0)
    run = jax.jit(LOSSES[family])
    plain = run(model, batch, None)
    for weights in ((0.01, 0.0), (0.0, 0.001), (0.2, 0.1)):
        got = run(model, batch, None, balance=weights[0], router_z=weights[1])
        assert got.count == plain.count
        have = (got.total - plain.total) / got.count
        np.testing.assert_allclose(have, weights[0] * balance + weights[1] * z, rtol=2e-3)


@pytest.mark.torch
@families
def test_equal_the_loss_of_transformers(family, tmp_path):
    """Switch's counts padding there, so that there is none here."""
    import torch

    folder, head = tmp_path / "m", dict(tiny.GENERATIVE)[family]
    model, batch = mixture(family, folder), training_batch(family, padded=False)
    theirs = tiny.hugging_face(folder, family, head)
    coefficients = {"balance": 0.3}
    theirs.config.router_aux_loss_coef = theirs.router_aux_loss_coef = 0.3
    if family == "switch":
        theirs.config.router_z_loss_coef = theirs.router_z_loss_coef = 0.2
        coefficients["router_z"] = 0.2
    inputs = {k: torch.tensor(x).long() for k, x in batch.items() if k != "weights"}
    inputs.setdefault("labels", inputs["input_ids"])
    with torch.no_grad():
        want = theirs(**inputs, output_router_logits=True).loss
    total, count = LOSSES[family](model, batch, None, **coefficients)
    np.testing.assert_allclose(total / count, float(want), rtol=1e-5)


@families
@pytest.mark.full
def test_balance_trains_routers_to_use_all_experts(family, tmp_path, key):
    """With a large coefficient the loss falls towards that of equal use."""
    model, batch = mixture(family, tmp_path / "m"), training_batch(family)

    class Same:
        def __len__(self):
            return 1

        def __call__(self, step):
            return batch

        def names(self, step):
            return []

    config = fj.TrainConfig(
        epochs=30, batch_size=3, learning_rate=0.02, schedule="constant", warmup=0.0, dropout=False
    )

    def balance(model):
        with_it = LOSSES[family](model, batch, None, balance=1.0)
        return float((with_it.total - LOSSES[family](model, batch, None).total) / with_it.count)

    loss = jax.tree_util.Partial(LOSSES[family], balance=10.0)
    recipe = Recipe(trains=".*router.*")
    trained = fit(model, Same(), loss, config, key=key, recipe=recipe, progress=False).model
    stacks, least = (2, 2) if family == "switch" else (1, 2)
    # Not below what equal use gives: 1 for each stack and expert of a position.
    assert least * 0.9 < balance(trained) < balance(model) - 0.2 * stacks


@pytest.mark.full
def test_configurations_ask_for_them(tmp_path, key):
    """In `finetune`: as the loss with the same coefficients, and not without routers."""
    model = mixture("mixtral", tmp_path / "m")
    ids = np.random.RandomState(0).randint(5, 61, 100).astype(np.int32)
    options = {"max_steps": 2, "batch_size": 4, "dropout": False, "warmup": 0.0}
    asked = fj.TrainConfig(**options, router_balance=3.0, router_z=2.0)
    data = fj.PlainText(ids, context=9)
    trained = fj.finetune(model, data, asked, key=key).model
    order, dropout = jax.random.split(key)
    windows = Windows(ids, 9, 4, seed=int(jax.random.bits(order)))
    loss = jax.tree_util.Partial(losses.next_token, balance=3.0, router_z=2.0)
    want = fit(model, windows, loss, fj.TrainConfig(**options), key=dropout).model
    assert bit_equal(trained, want)
    plain = fj.finetune(model, data, fj.TrainConfig(**options), key=key).model
    assert not bit_equal(trained, plain)
    dense = fj.load(tiny.checkpoint(tmp_path / "d", "llama", "causal-lm"), head="causal-lm")
    with pytest.raises(fj.InputError, match="router_balance is for training language models with"):
        fj.finetune(dense, data, asked, key=key)


@pytest.mark.full
def test_hidden_states_of_encoder_decoders(tmp_path, key):
    """Both stacks count, over their own real positions."""
    model, batch = mixture("switch", tmp_path / "m"), training_batch("switch")
    smaller, _ = fj.compress(model, fj.Fusion(width=8), key=key)
    total, count = jax.jit(partial(losses.hidden_states, model))(smaller, batch, None)
    arguments = {k: x for k, x in batch.items() if k not in ("labels", "weights")}
    before = np.pad(np.maximum(batch["labels"], 0)[:, :-1], ((0, 0), (1, 0)))
    outs = [
        jax.jit(lambda m: m(**arguments, decoder_input_ids=before, output_hidden_states=True))(m)
        for m in (model, smaller)
    ]
    rows = batch["weights"][:, None] > 0
    masks = [batch["attention_mask"].astype(bool) & rows, (batch["labels"] != -100) & rows]
    assert float(count) == sum(mask.sum() for mask in masks)
    want = 0.0
    for mask, stacks in zip(masks, ([o.encoder for o in outs], outs), strict=True):
        for a, b in zip(*(out.hidden_states[1:] for out in stacks), strict=True):
            want += (np.square(np.asarray(a - b)).mean(-1) * mask).sum()
    np.testing.assert_allclose(total, want, rtol=1e-4)
    assert jnp.isfinite(total) and total > 0


def test_a_part_of_a_batch_that_only_fills_up_is_finite(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "m", "mixtral", "causal-lm"), head="causal-lm")
    batch = {**tiny.batch("mixtral"), "weights": np.zeros(3, np.float32)}
    total = losses.next_token(model, batch, None, balance=0.01, router_z=0.01)
    assert total.total == 0 and total.count == 0
