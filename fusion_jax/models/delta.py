"""Linear attention by the gated delta rule, as in Qwen3-Next: a matrix is the memory of a head.

Axis letters in shapes: b examples, t positions, g key heads, h value heads, k features of a key, v
of a value, c channels of the convolution, n positions of its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from fusion_jax.models.cache import Cache, CacheUpdate
from fusion_jax.models.layers import RmsNorm
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, Leaf
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The sizes of layers with the gated delta rule.

    Args:
        key_heads: The number of key heads.
        value_heads: The number of value heads, a multiple of it.
        key_dim: The features of a query or key.
        value_dim: The features of a value.
        kernel: The number of positions that the convolution sees: its own and those before.
        joined: Whether one layer makes queries, keys, values and gates, key head by key head, and
            another one rates and decays; else there are four layers.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    joined: bool = True

    @property
    def channels(self) -> int:
        """The number of channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class DeltaNet(nnx.Module):
    """Linear attention by the gated delta rule.

    The memory S of a head begins at zero. A token with the key k of length 1, the value v, the
    decay a and the rate b changes it to ``a S + b k (v - a S^T k)^T``; its output is S^T q, with
    the new S. The state is in float32 or wider. The cache holds S, and the inputs of the
    convolution at the last n - 1 positions.

    References:
        Gated Delta Networks (arXiv 2412.06464), equation 10.
    """

    def __init__(self, config: Any, make: Any):
        sizes: Delta = config.delta
        self.sizes, self.act = sizes, config.hidden_act
        d, values = config.hidden_size, sizes.value_heads * sizes.value_dim
        if sizes.joined:
            self.inputs = make.linear(d, sizes.channels + values, use_bias=False)
            self.rates = make.linear(d, 2 * sizes.value_heads, use_bias=False)
        else:
            self.mixed = make.linear(d, sizes.channels, use_bias=False)
            self.gate = make.linear(d, values, use_bias=False)
            self.rate = make.linear(d, sizes.value_heads, use_bias=False)
            self.decay = make.linear(d, sizes.value_heads, use_bias=False)
        self.conv = make.array(sizes.channels, 1, sizes.kernel)
        self.shift = nnx.Param(jnp.ones(sizes.value_heads, make.dtype))
        self.log_decay = nnx.Param(jnp.zeros(sizes.value_heads, make.dtype))
        self.value_norm = RmsNorm(
            sizes.value_dim, epsilon=config.rms_norm_eps, param_dtype=make.dtype, rngs=make.rngs
        )
        self.delta_out = make.linear(values, d, use_bias=False)

    def empty_cache(self, b: int, dtype: Any) -> tuple[Array, Array]:
        """Returns what the cache holds before the first token."""
        sizes = self.sizes
        inputs = jnp.zeros((b, sizes.kernel - 1, 1, sizes.channels), dtype)
        shape = b, sizes.value_heads, sizes.key_dim, sizes.value_dim
        return inputs, jnp.zeros(shape, wide(inputs).dtype)

    def _parts(self, x: Float[Array, "b t d"]) -> tuple[Array, Array, Array, Array]:
        """Returns queries, keys and values (b, t, c), gates, and inputs of rates and of decays."""
        sizes = self.sizes
        if not sizes.joined:
            gate = self.gate(x).reshape(*x.shape[:2], -1, sizes.value_dim)
            return self.mixed(x), gate, self.rate(x), self.decay(x)
        shared = sizes.value_heads // sizes.key_heads
        grouped = self.inputs(x).reshape(*x.shape[:2], sizes.key_heads, -1)
        ends = [sizes.key_dim, 2 * sizes.key_dim, 2 * sizes.key_dim + shared * sizes.value_dim]
        *mixed, gate = jnp.split(grouped, ends, axis=-1)
        rates = self.rates(x).reshape(*x.shape[:2], sizes.key_heads, -1)
        rate, decay = (a.reshape(*x.shape[:2], -1) for a in jnp.split(rates, [shared], axis=-1))
        mixed = jnp.concatenate([a.reshape(*x.shape[:2], -1) for a in mixed], axis=-1)
        return mixed, gate.reshape(*x.shape[:2], -1, sizes.value_dim), rate, decay

    def __call__(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"], cache: CacheUpdate
    ) -> Float[Array, "b t d"]:
        """Reads the tokens in their order; padding changes nothing."""
        sizes, (b, t, _) = self.sizes, x.shape
        before, state = cache.state() or self.empty_cache(b, x.dtype)
        mixed, gate, rate, decay = self._parts(jnp.where(real[..., None], x, 0))
        mixed = jnp.concatenate([before[:, :, 0], mixed], axis=1)
        windows = jnp.stack([mixed[:, i : i + t] for i in range(sizes.kernel)], axis=-1)
        seen = (windows * self.conv[...][None, None, :, 0]).sum(-1)
        end = sizes.key_heads * sizes.key_dim
        q, k, v = jnp.split(activation(self.act)(seen), [end, 2 * end], axis=-1)
        shared = sizes.value_heads // sizes.key_heads
        q, k = (
            jnp.repeat(_unit(wide(a).reshape(b, t, -1, sizes.key_dim)), shared, axis=2)
            for a in (q, k)
        )
        v = wide(v).reshape(b, t, -1, sizes.value_dim)
        slope = -jnp.exp(wide(self.log_decay[...]))[None, None]
        decay = slope * jax.nn.softplus(wide(decay) + wide(self.shift[...])[None, None])
        # A right neighbor of the text must not change what the cache holds either.
        decay = jnp.where(real[..., None], decay, 0)
        rate = wide(jax.nn.sigmoid(rate))

        def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
            q, k, v, decay, rate = token
            state = state * jnp.exp(decay)[..., None, None]
            known = jnp.einsum("bhkv,bhk->bhv", state, k, precision="highest")
            state = state + k[..., None] * ((v - known) * rate[..., None])[..., None, :]
            return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision="highest")

        tokens = (q * sizes.key_dim**-0.5, k, v, decay, rate)
        state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in tokens))
        cache.replace(mixed[:, t:, None], state)
        y = self.value_norm(jnp.moveaxis(y, 0, 1).astype(x.dtype))
        y = (wide(y) * jax.nn.silu(wide(gate))).astype(x.dtype)
        return self.delta_out(y.reshape(b, t, -1))


def _unit(x: Float[Array, "b t g k"]) -> Float[Array, "b t g k"]:
    """Returns vectors of length 1."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(squares + jnp.asarray(1e-6, x.dtype))


def with_states(cache: Cache, layers: Any) -> Cache:
    """Returns an empty cache with the states of those layers whose attention is a `DeltaNet`."""
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(layers):
        if isinstance(layer.attention, DeltaNet):
            keys[i], values[i] = layer.attention.empty_cache(len(cache.real), keys[i].dtype)
    return cache._replace(keys=tuple(keys), values=tuple(values))


_OURS, _THEIRS = "layers.{l}.attention", "layers.{l}.linear_attn"
DELTA_RULES = (
    KeyRule(f"{_OURS}.inputs", f"{_THEIRS}.in_proj_qkvz", LINEAR),
    KeyRule(f"{_OURS}.rates", f"{_THEIRS}.in_proj_ba", LINEAR),
    KeyRule(f"{_OURS}.mixed", f"{_THEIRS}.in_proj_qkv", LINEAR),
    KeyRule(f"{_OURS}.gate", f"{_THEIRS}.in_proj_z", LINEAR),
    KeyRule(f"{_OURS}.rate", f"{_THEIRS}.in_proj_b", LINEAR),
    KeyRule(f"{_OURS}.decay", f"{_THEIRS}.in_proj_a", LINEAR),
    KeyRule(f"{_OURS}.delta_out", f"{_THEIRS}.out_proj", LINEAR),
    KeyRule(f"{_OURS}.value_norm", f"{_THEIRS}.norm", NORM),
    KeyRule(f"{_OURS}.conv", f"{_THEIRS}.conv1d.weight", {"": Leaf(("",))}),
    KeyRule(f"{_OURS}.shift", f"{_THEIRS}.dt_bias", {"": Leaf(("",))}),
    KeyRule(f"{_OURS}.log_decay", f"{_THEIRS}.A_log", {"": Leaf(("",))}),
)
"""The key rules of layers with the gated delta rule."""
