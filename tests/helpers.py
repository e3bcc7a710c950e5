"""Helpers and small settings that several test modules share."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.methods.registry import METHODS
from fusion_jax.training import SCORE_CONFIG
from tests import glue, tiny

# The options that the tests run each method with. A new method adds a line.
OPTIONS = {
    "clustering": {"width": 12},
    "drop-experts": {"keep": 0.5},
    "mask-prune": {"keep": 0.25},
    "mmd": {"width": 12, "steps": 2},
    "mpo": {"bond": 6, "cores": 3},
    "prune": {"width": 12},
    "sketch": {"width": 12, "keep": 0.25},
    "svd": {"rank": 3},
    "fusion": {"width": 12},
}
# Those of single MLPs; tests/test_experts.py has the one that changes routers.
methods = pytest.mark.parametrize(
    "name", sorted(name for name, cls in METHODS.items() if cls().model_needs.router is None)
)
TRAIN_CONFIG = fj.TrainConfig(
    max_steps=6,
    batch_size=8,
    learning_rate=1e-3,
    shapes=1,
    log_every=1,
    checkpoint_every=2,
    dropout=False,
)
PRUNING_CONFIG = dataclasses.replace(
    SCORE_CONFIG,
    max_steps=8,
    batch_size=8,
    shapes=1,
    log_every=1,
    checkpoint_every=2,
    eval_every=2,
)


@contextlib.contextmanager
def unchecked():
    """What users get for arguments of a wrong type, where no types are checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@jax.jit
def run(model, *args, **batch):
    """Runs a model as one program; a program for each of its operations would take longer."""
    return model(*args, **batch)


def method(name):
    return METHODS[name](**OPTIONS[name])


def make(kind, width=24, d_in=5, d_out=3, act="gelu", dtype=jnp.float32, bias=True, seed=0):
    mlp = kind(d_in, width, d_out, act=act, use_bias=bias, param_dtype=dtype, rngs=nnx.Rngs(seed))
    # Biases start at zero; make them matter.
    for linear in (mlp.up, mlp.down, *([mlp.gate] if kind is fj.GatedMlp else [])):
        if bias:
            values = jax.random.normal(jax.random.key(seed + 1), linear.bias.shape, dtype)
            linear.bias.set_value(values)
    return mlp


def inputs(d=5, n=11, dtype=jnp.float32):
    return 2 * jax.random.normal(jax.random.key(9), (n, d), dtype)


def flat(model):
    return {
        ".".join(map(str, path)): (type(v), np.asarray(v.get_value()))
        for path, v in nnx.to_flat_state(nnx.state(model))
    }


def moved(before, after):
    a, b = flat(before), flat(after)
    return {path for path in a if not np.array_equal(a[path][1], b[path][1])}


def with_words(folder, family="bert"):
    """A tiny checkpoint of two layers with a masked-LM head and a tokenizer."""
    tensors = {n: x for n, x in tiny.weights(family, "masked-lm").items() if ".layer.2." not in n}
    config = {**tiny.CONFIGS[family], "num_hidden_layers": 2}
    return glue.vocabulary(tiny.write_folder(folder, config, tensors))


class OneBatch:
    """A source of one batch, again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def __call__(self, step):
        return self.batch

    def names(self, step):
        return ["batch"]
