"""Experts compute on as few slots as their use allows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fusion_jax.models import moe
from fusion_jax.models.decoder import Decoder
from fusion_jax.nn.mlp import GatedMlp
from tests import tiny

EXPERTS, TOP_K, D = 8, 2, 6


def layer(**options):
    rngs = nnx.Rngs(0)
    make = partial(GatedMlp, D, 5, D, act="silu", use_bias=False)
    init = nnx.initializers.normal(1.0)
    return moe.Moe(
        make, D, EXPERTS, top_k=TOP_K, normalized=True, kernel_init=init,
        param_dtype=jnp.float32, rngs=rngs, rule=moe.RouterRule(bias=True), **options,
    )  # fmt: skip


def by_hand(made, x):
    """Every expert at every position, weighted."""
    weights, _ = made.routes(made.router_logits(x, None))
    rows = jnp.broadcast_to(x.reshape(-1, D), (EXPERTS, x.size // D, D))
    return jnp.einsum("end,ne->nd", made.experts(rows), weights.reshape(-1, EXPERTS))


@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("favored", "slots"), [(0.0, 32), (2.0, 64)])
def test_equals_all_experts_everywhere_however_they_are_used(favored, slots, key, monkeypatch):
    monkeypatch.setattr(moe, "MANY_POSITIONS", 16)
    made, x = layer(), jax.random.normal(key, (2, 32, D))
    made.router.bias[...] = jnp.zeros(EXPERTS).at[3].set(favored * 10)
    assert made.slot_counts(2, 32) == [32, 64]
    _, chosen = made.routes(made.router_logits(x, None))
    most = int(chosen.sum((0, 1)).max())
    assert slots / 2 < most <= slots

    def total(run, made):
        return jnp.square(run(made, x)).sum()

    runs = (lambda made, x: made(x, None)[0].reshape(-1, D)), by_hand
    for ours, want in zip(*(jax.tree.leaves(run(made, x)) for run in runs), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-5)
    found = [jax.jit(jax.grad(partial(total, run), allow_int=True))(made) for run in runs]
    for ours, want in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-4)


def test_few_positions_or_a_capacity_have_one_program():
    assert layer().slot_counts(1, 1) == [1]
    assert layer().slot_counts(1, moe.MANY_POSITIONS - 1) == [moe.MANY_POSITIONS - 1]
    assert layer().slot_counts(4, moe.MANY_POSITIONS) == [
        2 * moe.MANY_POSITIONS,
        4 * moe.MANY_POSITIONS,
    ]
    assert layer(capacity=7).slot_counts(4, moe.MANY_POSITIONS) == [28]


def test_one_program_keeps_what_its_backward_pass_needs(key):
    grad = jax.grad(lambda made, x: made(x, None)[0].sum(), allow_int=True)
    for made, again in ((layer(), True), (layer(capacity=7), False)):
        x = jax.random.normal(key, (4, moe.MANY_POSITIONS, D))
        assert ("remat" in str(jax.make_jaxpr(grad)(made, x))) == again


def test_a_batch_over_devices(key, monkeypatch):
    monkeypatch.setattr(moe, "MANY_POSITIONS", 16)
    made, x = layer(), jax.random.normal(key, (8, 8, D))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(jax.grad(lambda made, x: jnp.square(made(x, None)[0]).sum(), allow_int=True))
    for ours, want in zip(*(jax.tree.leaves(run(made, y)) for y in (spread, x)), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-4)


@pytest.mark.full
def test_padding_crowds_no_expert(key, monkeypatch):
    monkeypatch.setattr(moe, "MANY_POSITIONS", 16)
    used, switch = [], jax.lax.switch
    monkeypatch.setattr(jax.lax, "switch", lambda i, *rest: used.append(int(i)) or switch(i, *rest))
    made, real = layer(), jnp.tile(jnp.arange(32)[None] < 12, (2, 1))
    x = jnp.where(real[..., None], jax.random.normal(key, (2, 32, D)), 1.0)
    y, logits = made(x, None, real)
    np.testing.assert_allclose(y[real], by_hand(made, x).reshape(x.shape)[real], atol=1e-5)
    assert not y[~real].any()
    assert logits.shape == (2, 32, EXPERTS)
    made(x, None)
    assert used == [0, 1]
    config = tiny.decoder_config(
        {"model_type": "qwen3_moe", "vocab_size": 50, "hidden_size": 8, "num_attention_heads": 4,
         "moe_intermediate_size": 5, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
         "num_hidden_layers": 2}
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    model(jnp.where(real, jax.random.randint(key, (2, 32), 1, 50), 0), real)
    assert used[2:] == [0, 0]
