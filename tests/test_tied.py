"""Tied tensors that differ in the files, and tied tensors of which the files have only one."""

import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from tests import tiny
from tests.helpers import run

WORDS = "embeddings.word_embeddings.weight"
# Family, head, tensor that is tied to the token embeddings, and these.
CASES = [
    ("llama", "causal-lm", "lm_head.weight", "model.embed_tokens.weight"),
    ("qwen2-moe", "causal-lm", "lm_head.weight", "model.embed_tokens.weight"),
    ("gpt2", "causal-lm", "lm_head.weight", "transformer.wte.weight"),
    ("bert", "masked-lm", "cls.predictions.decoder.weight", f"bert.{WORDS}"),
    ("roberta", "masked-lm", "lm_head.decoder.weight", f"roberta.{WORDS}"),
    ("t5-v1.1", "seq2seq-lm", "lm_head.weight", "shared.weight"),
    ("t5-v1.1", "seq2seq-lm", "encoder.embed_tokens.weight", "shared.weight"),
    ("switch", "seq2seq-lm", "decoder.embed_tokens.weight", "shared.weight"),
]  # fmt: skip
cases = pytest.mark.parametrize(
    ("family", "head", "twin", "original"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES]
)


def files(family, head):
    """The config and tensors of a model that is tied, by its config and in its files."""
    config = {**tiny.CONFIGS[family], "tie_word_embeddings": True}
    if family.startswith("t5"):
        # As transformers 5 saves version 1.1.
        config["scale_decoder_outputs"] = False
    tensors = tiny.weights(family, head)
    tensors.pop("lm_head.weight", None)
    return config, tensors


def logits(model, family):
    return np.asarray(run(model, **tiny.batch(family)).logits)


@pytest.mark.full(quick=4)
@cases
def test_tensors_that_differ_are_not_tied(family, head, twin, original, tmp_path):
    config, tensors = files(family, head)
    tied = fj.load(tiny.write_folder(tmp_path / "tied", config, tensors), head=head)
    other = tiny.weight("another", tensors[original].shape)
    model = fj.load(tiny.write_folder(tmp_path / "m", config, {**tensors, twin: other}), head=head)
    before, after = logits(tied, family), logits(model, family)
    assert np.abs(before - after).max() > 0.1
    # The same arrays by hand: only the named place has the other tensor.
    by_hand = fj.load(tmp_path / "tied", head=head)
    if "embed_tokens" in twin:
        place = twin.partition(".")[0] + "_word"
        assert getattr(tied, place) is None
        getattr(model, place).embedding[...] = jnp.asarray(tensors[original])
        np.testing.assert_allclose(logits(model, family), before, atol=1e-5)
        model = fj.load(tmp_path / "m", head=head)
    else:
        # Logits are linear in the output weights.
        word = getattr(by_hand, "word", None) or by_hand.embeddings.word
        half = (other + tensors[original]) / 2
        mean = tiny.write_folder(tmp_path / "mean", config, {**tensors, twin: half})
        mean = logits(fj.load(mean, head=head), family)
        np.testing.assert_allclose(mean, (before + after) / 2, atol=1e-4)
        assert word.embedding[...].shape == other.shape
    again = fj.load(fj.save(model, tmp_path / "artefact"))
    assert bit_equal(model, again)
    exported = fj.load(fj.export_hf(again, tmp_path / "hf"), head=head)
    np.testing.assert_allclose(logits(exported, family), after, atol=1e-6)
    same = {**tensors, twin: tensors[original].copy()}
    equal = fj.load(tiny.write_folder(tmp_path / "same", config, same), head=head)
    np.testing.assert_array_equal(logits(equal, family), before)


@pytest.mark.torch
@cases
def test_logits_equal_those_of_transformers(family, head, twin, original, tmp_path):
    import torch

    config, tensors = files(family, head)
    tensors[twin] = tiny.weight("another", tensors[original].shape)
    bias = {"bert": "cls.predictions.decoder.bias", "roberta": "lm_head.decoder.bias"}.get(family)
    if bias is not None:
        tensors[bias] = tiny.weight("bias", tensors[original].shape[:1])
    folder = tiny.write_folder(tmp_path / "m", config, tensors)
    model = fj.load(folder, head=head)
    for each in (folder, fj.export_hf(model, tmp_path / "hf")):
        theirs = tiny.hugging_face(each, family, head)
        first = {k: torch.tensor(v[:1]).long() for k, v in tiny.batch(family).items()}  # unpadded
        with torch.no_grad():
            want = theirs(**first).logits.numpy()
        np.testing.assert_allclose(logits(model, family)[:1], want, atol=1e-4)


@cases
def test_either_name_fills_both(family, head, twin, original, tmp_path):
    config, tensors = files(family, head)
    tied = fj.load(tiny.write_folder(tmp_path / "tied", config, tensors), head=head)
    tensors[twin] = tensors.pop(original)
    renamed = fj.load(tiny.write_folder(tmp_path / "renamed", config, tensors), head=head)
    np.testing.assert_array_equal(logits(renamed, family), logits(tied, family))


def test_the_bias_of_the_decoder_counts(tmp_path):
    tensors = tiny.weights("bert", "masked-lm")
    other = tiny.weight("bias", tensors["cls.predictions.bias"].shape)
    model = fj.load(tiny.checkpoint(tmp_path / "model", "bert", "masked-lm"), head="masked-lm")
    tensors["cls.predictions.decoder.bias"] = other
    got = fj.load(tiny.write_folder(tmp_path / "own", tiny.BERT, tensors), head="masked-lm")
    want = logits(model, "bert") + other - tiny.weight("cls.predictions.bias", other.shape)
    np.testing.assert_allclose(logits(got, "bert"), want, atol=1e-5)
    del tensors["cls.predictions.bias"]
    got = fj.load(tiny.write_folder(tmp_path / "only", tiny.BERT, tensors), head="masked-lm")
    np.testing.assert_allclose(logits(got, "bert"), want, atol=1e-5)
