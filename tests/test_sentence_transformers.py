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
