"""Heads for tokens and answers, and those of decoders, against Hugging Face's."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.models.gpt2 import Gpt2Config
from fusion_jax.training import Classification, TaskSpec, Texts, losses, nats_per_token
from tests import nlg, tiny
from tests.helpers import run

TOLERANCE = 1e-4
DECODER_CASES = [(family, head) for family, head in tiny.HEAD_GOLDENS if family in tiny.DECODERS]
LOSSES = {
    "classification": losses.classification,
    "token-classification": losses.token_classification,
    "question-answering": losses.question_answering,
}


@pytest.fixture(scope="module")
def goldens():
    return tiny.head_goldens()


def checkpoint(folder, golden, **config):
    tensors = {name: tiny.weight(name, shape) for name, shape in golden.shapes.items()}
    return tiny.write_folder(folder, {**golden.config, **config}, tensors)


@pytest.fixture
def load(goldens, tmp_path):
    def load(family, head, **config):
        return fj.load(checkpoint(tmp_path / "hf", goldens[family, head], **config), head=head)

    return load


def logits(model, batch):
    return np.asarray(run(model, **batch).logits)


def trained_batch(family, head, rows=1):
    """The first texts of a batch, which have no padding where it is one, with its labels."""
    batch = {name: x[:rows] for name, x in tiny.batch(family, head).items()}
    labels = np.repeat(tiny.head_labels(head), rows, axis=0)
    return {**batch, "labels": labels, "weights": np.ones(rows, np.float32)}


@pytest.mark.full(quick=8)
@pytest.mark.parametrize(("family", "head"), tiny.HEAD_GOLDENS, ids=str)
def test_equals_hugging_face(family, head, goldens, load):
    """Logits, with padding on the right for encoders and on the left for decoders; and the loss."""
    model, batch, golden = load(family, head), tiny.batch(family, head), goldens[family, head]
    have, want = logits(model, batch), golden.outputs["logits"]
    if have.ndim == 3:
        real = batch["attention_mask"].astype(bool)
        have, want = have[real], want[real]
    np.testing.assert_allclose(have, want, atol=TOLERANCE, rtol=0)
    assert np.abs(want).max() > 0.1
    total, count = jax.jit(LOSSES[head])(model, trained_batch(family, head), None)
    np.testing.assert_allclose(total / count, golden.outputs["loss"], rtol=1e-4)


def test_logits_of_a_text_are_those_of_its_last_token(load):
    """On either side of padding, with the id of padding in the text, and without any padding."""
    model = load("llama", "classification")
    text = [7, 9, 0, 8]
    alone = logits(model, {"input_ids": np.array([text])})[0]
    ids = np.array([[*text, 0, 0], [0, 0, *text]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    both = logits(model, {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(both, np.stack([alone] * 2), atol=1e-5)
    # As in transformers, without a mask padding is found by its id.
    assert model._last(ids, None).tolist() == [3, 5]
    # A text of padding alone has its first token.
    assert model._last(np.zeros((1, 3), int), None).tolist() == [0]


def test_without_an_id_of_padding_the_mask_says_what_is_last(load):
    model = load("gpt2", "classification", pad_token_id=None)
    ids, mask = np.array([[7, 9, 4, 4], [5, 6, 7, 8]]), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert model._last(ids, mask).tolist() == [1, 3]
    assert model._last(ids, None).tolist() == [3, 3]
    have = logits(model, {"input_ids": ids, "attention_mask": mask})
    alone = logits(model, {"input_ids": ids[:1, :2]})
    np.testing.assert_allclose(have[:1], alone, atol=1e-5)


def test_padding_does_not_change_the_loss_of_answers(load):
    model = load("bert", "question-answering")
    batch = trained_batch("bert", "question-answering")
    wide = {name: np.pad(x, ((0, 0), (0, 5))) for name, x in batch.items() if x.shape[1:] == (9,)}
    wide = {**batch, **wide}
    assert wide["input_ids"].shape == (1, 14)
    a, b = (losses.question_answering(model, x, None).total for x in (batch, wide))
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("head", "config", "rate"),
    [
        ("token-classification", {}, 0.1),
        ("token-classification", {"hidden_dropout": 0.3}, 0.3),
        ("token-classification", {"hidden_dropout": 0.3, "classifier_dropout": 0.2}, 0.2),
        ("classification", {"classifier_dropout": 0.2}, 0.0),
        ("question-answering", {"classifier_dropout": 0.2}, 0.0),
    ],
)
def test_dropout_of_the_heads_of_decoders(head, config, rate, load):
    assert load("llama", head, **config).head_dropout.rate == rate


@pytest.mark.parametrize(
    ("family", "config", "rates"),
    [
        ("bert", {"hidden_dropout_prob": 0.3}, (0.3, 0.0)),
        ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}, (0.2, 0.0)),
        ("distilbert", {"dropout": 0.3, "seq_classif_dropout": 0.4}, (0.3, 0.1)),
        ("distilbert", {"dropout": 0.3, "qa_dropout": 0.5}, (0.3, 0.5)),
        ("mpnet", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}, (0.3, 0.0)),
    ],
)
def test_dropout_of_the_heads_of_encoders(family, config, rates, load):
    heads = ("token-classification", "question-answering")
    assert tuple(load(family, head, **config).head.dropout.rate for head in heads) == rates


def test_the_number_of_classes():
    """As transformers reads it: the names count where there is no number."""
    names = {"0": "a", "1": "b", "2": "c"}
    for config in ({"id2label": names}, {"id2label": names, "num_labels": None}):
        assert Gpt2Config.from_json({"model_type": "gpt2", **config}).num_labels == 3
    assert Gpt2Config.from_json({"id2label": names, "num_labels": 5}).num_labels == 5
    assert Gpt2Config.from_json({"id2label": {}}).num_labels == 2
    with pytest.raises(fj.InputError, match="id2label is not a JSON object with the keys 0, 1"):
        Gpt2Config.from_json({"id2label": {"1": "a"}})


def test_artefacts_keep_head_and_classes(load, tmp_path):
    for family, head in (("bert", "token-classification"), ("llama", "question-answering")):
        model = load(family, head)
        again = fj.load(fj.save(model, tmp_path / family))
        folder = again.provenance.folder
        assert again.provenance == dataclasses.replace(model.provenance, folder=folder)
        assert again.provenance.head == head
        names = ("no", "maybe", "yes") if head == "token-classification" else None
        assert again.provenance.labels == names
        batch = tiny.batch(family)
        np.testing.assert_array_equal(logits(again, batch), logits(model, batch))


def test_new_heads(tmp_path, key, caplog):
    """On other models: a language model, and one whose head has tensors of the same names."""
    folder = tiny.checkpoint(tmp_path / "llama", "llama", "causal-lm")
    with pytest.raises(fj.InputError, match=r"the files have no question-answering head"):
        fj.load(folder, head="question-answering")
    model = fj.load(folder, head="question-answering", key=key)
    assert model.provenance.new_head and model.head.kernel.shape == (16, 2)
    model = fj.load(folder, head="token-classification", num_labels=5, key=key)
    assert model.provenance.new_head and model.head.bias.shape == (5,)

    sequences = tiny.checkpoint(
        tmp_path / "bert",
        "bert",
        "classification",
        architectures=["BertForSequenceClassification"],
    )
    with pytest.raises(
        fj.InputError, match=r"has a classification head, not a token-classification head"
    ):
        fj.load(sequences, head="token-classification")
    model = fj.load(sequences, head="token-classification", key=key)
    assert "the head classification is left out" in caplog.text
    assert model.provenance.new_head and model.provenance.labels is None
    assert model.pooler is None
    fj.save(fj.load(sequences, head="classification"), tmp_path / "saved")
    with pytest.raises(fj.InputError, match=r"has a classification head, not a question-answering"):
        fj.load(tmp_path / "saved", head="question-answering")
    model = fj.load(tmp_path / "saved", head="question-answering", key=key)
    assert model.provenance.new_head and model.head.out.kernel.shape == (32, 2)


def test_an_artefact_without_a_head_gets_one(tmp_path, key):
    """The pooler of a RoBERTa is no part of its heads."""
    folder = fj.save(fj.load(tiny.checkpoint(tmp_path / "hf", "roberta")), tmp_path / "saved")
    for head in ("classification", "token-classification"):
        assert fj.load(folder, head=head, key=key).pooler is None


def test_base_models_of_answers_are_found_under_both_names(goldens, tmp_path):
    """The question-answering class of Llama calls the base model transformer, others model."""
    golden = goldens["llama", "question-answering"]
    names = {name.partition(".")[0] for name in golden.shapes}
    assert names == {"transformer", "qa_outputs"}
    folder = checkpoint(tmp_path / "hf", golden)
    base = fj.load(folder)
    model = fj.load(folder, head="question-answering")
    batch = tiny.batch("llama")
    hidden = [m(**batch).last_hidden_state for m in (base, model)]
    np.testing.assert_array_equal(*hidden)
    tensors = {
        name.replace("transformer.", "model."): tiny.weight(name, shape)
        for name, shape in golden.shapes.items()
    }
    other = tiny.write_folder(tmp_path / "other", golden.config, tensors)
    again = fj.load(other, head="question-answering")
    np.testing.assert_array_equal(logits(again, batch), logits(model, batch))


def test_a_head_that_a_family_lacks(tmp_path):
    folder = tiny.checkpoint(tmp_path / "switch", "switch", "seq2seq-lm")
    with pytest.raises(fj.InputError, match="unknown head 'token-classification'; known: None, "):
        fj.load(folder, head="token-classification")
    folder = tiny.checkpoint(tmp_path / "bert", "bert")
    with pytest.raises(fj.InputError, match="num_labels is for head='classification' or "):
        fj.load(folder, head="question-answering", num_labels=2)


@pytest.mark.parametrize("head", ["classification", "token-classification"])
def test_other_heads_are_no_language_models(head, load):
    model = load("gpt2", head)
    assert not model.has_logits
    with pytest.raises(fj.InputError, match="no language-model head"):
        nats_per_token(model, np.arange(5, 14), 4)
    with pytest.raises(fj.InputError, match="language-model head"):
        fj.generate(model, np.array([[5, 6]]), max_new_tokens=2)


@pytest.mark.full
@pytest.mark.parametrize(("family", "head"), DECODER_CASES[:2], ids=str)
def test_jit_and_dropout(family, head, load, key):
    model, batch = load(family, head), tiny.batch(family)
    run = jax.jit(lambda model, batch, key: model(**batch, key=key).logits)
    np.testing.assert_allclose(run(model, batch, None), logits(model, batch), atol=1e-5)
    assert not (run(model, batch, key) == run(model, batch, jax.random.key(1))).all()


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_learn_labels(family, key, tmp_path):
    """The label is whether the last letter is an a, with texts of several lengths."""
    folder = nlg.checkpoint(tmp_path / family, family)
    rng = np.random.RandomState(0)
    texts = ["".join(rng.choice(list("abc"), rng.randint(1, 9))) for _ in range(96)]
    labels = np.array([text[-1] == "a" for text in texts], np.int32)
    data = Texts([(text,) for text in texts], labels, texts)
    spec = TaskSpec(name="a", labels=("no", "yes"), metrics=("accuracy",))
    task = Classification(spec, data, {"dev": data})
    model = task.load(str(folder), key=key)
    config = fj.TrainConfig(
        max_steps=45, batch_size=32, learning_rate=3e-3, shapes=1, dropout=False, eval_every=45
    )
    fit = fj.finetune(model, task, config, key=key)
    assert fit.history[-1]["accuracy"] > 0.9
    assert fit.model.provenance.labels == ("no", "yes")


@pytest.mark.torch
@pytest.mark.full(quick=4)
@pytest.mark.parametrize(("family", "head"), tiny.HEADS, ids=str)
def test_export_equals_ours_in_transformers(family, head, tmp_path):
    import torch
    import transformers

    from tests.make_goldens import inputs, logits_of

    config = tiny.config_of(family, head)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    cls = getattr(transformers, tiny.architecture(family, head))
    made = cls(transformers.AutoConfig.for_model(config["model_type"], **fields))
    made.save_pretrained(tmp_path / "made")
    tensors = {n: tiny.weight(n, tuple(x.shape)) for n, x in _stored(tmp_path / "made").items()}
    fields = json.loads((tmp_path / "made" / "config.json").read_text())
    model = fj.load(tiny.write_folder(tmp_path / "hf", fields, tensors), head=head)
    smaller, _ = fj.compress(model, fj.Fusion(width=12), layers=0, key=jax.random.key(0))
    folder = fj.export_hf(smaller, tmp_path / "exported")
    batch = tiny.batch(family, head)
    with torch.no_grad():
        theirs = logits_of(tiny.hugging_face(folder, family, head)(**inputs(batch)))
    ours = logits(smaller, batch)
    if ours.ndim == 3:
        real = batch["attention_mask"].astype(bool)
        ours, theirs = ours[real], theirs[real]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    stated = json.loads((folder / "config.json").read_text())
    assert stated["architectures"] == [tiny.architecture(family, head)]
    labels = 2 if head == "question-answering" else 3
    assert len(stated["id2label"]) == labels


def _stored(folder):
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.torch
def test_padding_without_an_id_is_an_error_in_transformers(load, tmp_path):
    """So that nothing is silently different there."""
    import torch

    model = load("gpt2", "classification", pad_token_id=None)
    theirs = tiny.hugging_face(fj.export_hf(model, tmp_path / "out"), "gpt2", "classification")
    one = np.array([[7, 9, 4]])
    with torch.no_grad():
        want = theirs(torch.tensor(one)).logits.numpy()
        with pytest.raises(ValueError, match=re.escape("batch sizes > 1")):
            theirs(torch.tensor(np.repeat(one, 2, axis=0)))
    np.testing.assert_allclose(logits(model, {"input_ids": jnp.array(one)}), want, atol=TOLERANCE)
