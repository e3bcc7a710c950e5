"""Fused models in int8, made by qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from tests import tiny
from tests.helpers import run

qwix = pytest.importorskip("qwix", reason="qwix is not installed")


def size(model):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", [fj.Fusion(width=0.5), fj.Svd(rank=0.5)])
@pytest.mark.filterwarnings("ignore")  # of qwix
@pytest.mark.full(quick=1)
def test_a_compressed_model_in_int8(family, method, key, tmp_path):
    head = {"bert": None, "llama": "causal-lm"}[family]
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, head), head=head)
    smaller, _ = fj.compress(model, method, key=key)
    plain, ids = fj.plain(smaller), tiny.batch(family)["input_ids"]
    rules = [qwix.QuantizationRule(module_path=r"layers/.*", weight_qtype=jnp.int8)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        small = qwix.quantize_model(plain, qwix.PtqProvider(rules), ids)
        out = small(ids).last_hidden_state
    assert size(small.layers) < 0.45 * size(plain.layers)
    expected = np.asarray(run(smaller, ids).last_hidden_state)
    assert np.linalg.norm(out - expected) < 0.05 * np.linalg.norm(expected)
