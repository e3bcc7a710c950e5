"""Exports of sentence encoders give the same embeddings in sentence-transformers."""

import json
import shutil

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.demo import find_model
from fusion_jax.models.tokens import load_tokenizer, sentences, tokenize

pytestmark = pytest.mark.torch
sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_embeddings_are_equal(pooling, tmp_path):
    source = shutil.copytree(find_model(), tmp_path / "source")
    file = source / "1_Pooling" / "config.json"
    fields = json.loads(file.read_text())
    fields |= {name: False for name in fields if name.startswith("pooling_mode_")}
    file.write_text(json.dumps({**fields, f"pooling_mode_{pooling}": True}))
    model = fj.load(source)
    smaller, _ = fj.compress(model, fj.Prune(width=384), key=jax.random.key(0), layers=[4, 5])
    exported = fj.export_hf(smaller, tmp_path / "out")
    texts = sentences()[:8]
    batch = tokenize(load_tokenizer(str(source)), texts)
    hidden = np.asarray(smaller(*batch).last_hidden_state)
    real = np.asarray(batch.attention_mask)[..., None]
    vectors = (hidden * real).sum(1) if pooling == "mean_tokens" else hidden[:, 0]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    encoder = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
    np.testing.assert_allclose(encoder.encode(texts), vectors, atol=1e-5)


def test_evaluators_take_a_model_as_it_is(tmp_path):
    """All of sentence-transformers, with hidden states of JAX, equal to those of the export."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    from fusion_jax.integrations.sentence_encoders import sentence_transformer

    smaller, _ = fj.compress(
        fj.load(find_model()), fj.Prune(width=384), key=jax.random.key(0), layers=[4, 5]
    )
    fj.save(smaller, tmp_path / "artefact")
    exported = fj.export_hf(smaller, tmp_path / "out")
    theirs = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
    ours = sentence_transformer(str(tmp_path / "artefact"))
    texts = [*sentences()[:7], "word " * 400]
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    evaluate = EmbeddingSimilarityEvaluator(texts[:4], texts[4:], [0.1, 0.9, 0.4, 0.2])
    assert evaluate(ours) == pytest.approx(evaluate(theirs), abs=1e-6)
    with pytest.raises(fj.InputError, match="save the model itself"):
        ours.save(str(tmp_path / "again"))
