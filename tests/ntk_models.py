"""Small models for the kernel tests, and their kernels by brute force."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ntk
from fusion_jax.models.bert import Bert, BertConfig


def jacobian(f, params, x):
    """The whole Jacobian, (n, *o, p), in float64 on the host."""
    j = jax.jit(jax.jacrev(f))(params, x)
    out = jax.eval_shape(f, params, x).shape
    flat = [np.asarray(leaf, np.float64).reshape(*out, -1) for leaf in jax.tree.leaves(j)]
    return np.concatenate(flat, -1)


def contracted(j1, j2, kind="sgd", trace_axes=()):
    """The kernel of two Jacobians."""
    j2 = np.sign(j2) if kind == "adam" else j2
    ndim = j1.ndim - 1
    traced = {axis % ndim for axis in trace_axes}
    axes1 = list(range(ndim + 1))
    axes2 = [i if i in traced or i == ndim else i + ndim + 1 for i in axes1]
    stay = [i for i in range(1, ndim) if i not in traced]
    return np.einsum(j1, axes1, j2, axes2, [0, axes2[0], *stay, *(axes2[i] for i in stay)])


def relative(got, want):
    """The largest error over the largest value."""
    assert got.shape == want.shape
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def mlp(dtype):
    """A plain function with a pytree of parameters."""
    k = jax.random.split(jax.random.key(1), 4)
    params = {
        "up": (jax.random.normal(k[0], (5, 7), dtype), jax.random.normal(k[1], (1, 7), dtype)),
        "down": (jax.random.normal(k[2], (7, 3), dtype), jax.random.normal(k[3], (1, 3), dtype)),
    }

    def f(p, x):
        return jnp.tanh(x @ p["up"][0] + p["up"][1]) @ p["down"][0] + p["down"][1]

    return f, params, lambda n, key: jax.random.normal(key, (n, 5), dtype)


def module(dtype):
    """A Flax MLP with a variable that is not a parameter, and an output of two axes."""

    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 6, param_dtype=dtype, rngs=rngs)
            self.down = nnx.LinearGeneral(6, (2, 3), param_dtype=dtype, rngs=rngs)
            self.size = nnx.Variable(jnp.full((1, 1), 2.0, dtype))

        def __call__(self, x):
            bias = self.up.bias[...][None]
            h = nnx.gelu(x @ self.up.kernel[...] + bias) * self.size[...]
            return jnp.einsum("nh,hab->nab", h, self.down.kernel[...])

    f, params = ntk.functional(Mlp(nnx.Rngs(0)))
    return f, params, lambda n, key: jax.random.normal(key, (n, 4), dtype)


def classifier(dtype):
    """A small encoder with attention, norms, look-ups and a head."""
    config = BertConfig.roberta(
        vocab_size=19,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=12,
        num_hidden_layers=2,
        pad_token_id=1,
        max_position_embeddings=12,
        type_vocab_size=1,
        initializer_range=0.4,
    )
    return Bert(config, head="classification", param_dtype=dtype, rngs=nnx.Rngs(0))


def tokens(n, key):
    """Sequences of different lengths, with padding."""
    ids = jax.random.randint(key, (n, 6), 2, 19)
    mask = jnp.arange(6)[None] < 2 + jnp.arange(n)[:, None] % 5
    return {"input_ids": jnp.where(mask, ids, 1), "attention_mask": mask}


def bert(dtype):
    """Inputs by name, vector outputs."""
    return *ntk.functional(classifier(dtype), outputs="logits"), tokens


def scalar(dtype):
    """The paper's scalar output, the probability of class 0, as a function of some parameters."""
    f, params = ntk.functional(
        classifier(dtype), wrt=r"layers\.\d\.mlp\..*", outputs=ntk.probability(0)
    )
    return f, params, tokens


def zoo(dtype):
    """Other uses of parameters, such as look-ups, scans and ties; inputs in a tuple."""
    k = jax.random.split(jax.random.key(2), 6)
    params = {
        "experts": jax.random.normal(k[0], (3, 4, 4), dtype),
        "shared": jax.random.normal(k[1], (4, 4), dtype),
        "tied": jax.random.normal(k[2], (9, 4), dtype),
        "stack": jax.random.normal(k[3], (2, 4, 4), dtype) / 2,
        "table": jax.random.normal(k[4], (30, 4), dtype),
        "scalar": jnp.asarray(0.7, dtype),
        "unused": jnp.ones(3, dtype),
    }

    def f(p, x, ids):
        x = x + p["tied"][ids % 9].mean(1) + jnp.take(p["table"], ids, axis=0, mode="clip").sum(1)
        x = jnp.tanh(x @ p["shared"]) @ p["shared"]
        x = jnp.tanh(jnp.einsum("nd,edh->neh", x, p["experts"])).sum(1)
        layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["stack"])
        return (p["scalar"] * x) @ p["tied"].T

    def inputs(n, key):
        return jax.random.normal(key, (n, 4), dtype), jax.random.randint(key, (n, 5), 0, 40)

    return *ntk.functional(f, params), inputs


MODELS = {"mlp": mlp, "module": module, "bert": bert, "scalar": scalar, "zoo": zoo}


@cache
def reference(name):
    """A model in float64 with two batches of inputs, and their Jacobians."""
    f, params, inputs = MODELS[name](jnp.float64)
    # Sequences take long to compile, and blocks of one size are compiled once.
    sizes = (4, 4) if "input_ids" in str(inputs(1, jax.random.key(0))) else (5, 3)
    xs = [inputs(n, jax.random.key(n + i)) for i, n in enumerate(sizes)]
    return f, params, xs, [jacobian(f, params, x) for x in xs]
