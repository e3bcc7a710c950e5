"""LongT5: T5 whose encoder attends to near tokens, and to the blocks of the text if asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.models.cache import KeysValues, Window
from fusion_jax.models.layers import RmsNorm, attention
from fusion_jax.models.t5 import T5, t5_family
from fusion_jax.models.t5_config import T5Config
from fusion_jax.models.t5_stacks import Attention, Layer, Stack, relative_embed, t5_attention
from fusion_jax.mpo import AnyEmbed


def split(x: Shaped[Array, "b t *n"], size: int) -> Shaped[Array, "b c size *n"]:
    """Returns chunks of positions, after zeros at the end for a whole number of them."""
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *rest))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def with_neighbors(x: Shaped[Array, "b t *n"], size: int) -> Shaped[Array, "b c s *n"]:
    """Returns chunks of positions, each with those before and after it; or zeros at the ends."""
    chunks = split(x, size)
    count = chunks.shape[1]
    chunks = jnp.pad(chunks, ((0, 0), (1, 1), *[(0, 0)] * (chunks.ndim - 2)))
    return jnp.concatenate([chunks[:, i : i + count] for i in range(3)], axis=2)


def block_ids(real: Bool[Array, "b t"], size: int) -> Int[Array, "b t"]:
    """Returns the block of each token: ``size`` tokens one after the other, the last one with more.

    It is -1 for padding, which does not count, and in texts of fewer tokens. In transformers
    padding on the left counts, and divisions are rounded, so that for sizes such as 25 some tokens
    of a text of more than 400 belong to the block before.
    """
    counts = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    ids = jnp.minimum((counts - 1) // size, counts[:, -1:] // size - 1)
    return jnp.where(real, ids, -1)


class LongAttention(Attention):
    """Attention to the tokens within a radius, and to the blocks of the text if there is a norm.

    Args:
        *args: The arguments of `Attention`.
        config: The configuration.
        **options: The options of `Attention`.
    """

    def __init__(self, *args: Any, config: T5Config, **options: Any):
        super().__init__(*args, **options)
        common = {name: options[name] for name in ("param_dtype", "rngs")}
        self.near, self.block = config.local_radius + 1, config.global_block_size
        blocks = config.encoder_attention_type == "transient-global"
        epsilon = config.layer_norm_epsilon
        self.norm = RmsNorm(config.d_model, epsilon=epsilon, **common) if blocks else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keys_values: KeysValues,
        visible: Bool[Array, "b 1 1 t"],
        bias: Float[Array, "_ h near every"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position; ``visible`` says where tokens are not padding."""
        real, size = visible[:, 0, 0], self.near
        b, t = real.shape
        query = split(self.query(x).reshape(b, t, self.heads, -1), size)
        count = query.shape[1]
        keys, values = (with_neighbors(y, size) for y in keys_values)
        distance = jnp.arange(3 * size)[None] - jnp.arange(size, 2 * size)[:, None]
        near = (jnp.abs(distance) < size)[None, None]
        seen = with_neighbors(real, size)[:, :, None] & near
        if self.norm is not None and t >= self.block:
            ids = block_ids(real, self.block)
            member = jax.nn.one_hot(ids, t // self.block, dtype=x.dtype)
            sums = self.norm(jnp.einsum("btd,btg->bgd", x, member))
            more = self.keys_values(sums)
            shape = (b, count, *more[0].shape[1:])
            more = (jnp.broadcast_to(y[:, None], shape) for y in more)
            keys, values = (jnp.concatenate(y, 2) for y in zip((keys, values), more, strict=True))
            full = member.any(axis=1)[:, None, None]
            full = jnp.broadcast_to(full, (*seen.shape[:3], full.shape[-1]))
            seen = jnp.concatenate([seen, full], axis=3)
        query, keys, values, seen = (
            y.reshape(b * count, *y.shape[2:]) for y in (query, keys, values, seen)
        )
        options = {"scale": self.scale, "bias": bias}
        y = attention(query, keys, values, seen[:, None], self.dropout, key, **options)
        return self.out(y.reshape(b, count * size, -1)[:, :t])


class LongLayer(Layer):
    """One layer, in an encoder with `LongAttention`."""

    def own_attention(
        self, config: T5Config, decoder: bool, param_dtype: Any, rngs: nnx.Rngs
    ) -> Attention:
        """Returns the attention to positions of the same stack."""
        if decoder:
            return super().own_attention(config, decoder, param_dtype, rngs)
        return t5_attention(config, param_dtype, rngs, partial(LongAttention, config=config))


class LongStack(Stack):
    """The layers of an encoder or decoder, and the relative positions of tokens and of blocks."""

    layer = LongLayer

    def __init__(self, config: T5Config, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, decoder, param_dtype, rngs)
        blocks = not decoder and config.encoder_attention_type == "transient-global"
        self.block_relative = relative_embed(config, param_dtype, rngs) if blocks else None

    def bias(self, relative: AnyEmbed, seen: Window) -> Float[Array, "_ h _ _"]:
        """Returns what is added to the scores: of a chunk of tokens, or of all chunks in turn."""
        if self.decoder:
            return super().bias(relative, seen)
        config, size = self.config, self.config.local_radius + 1
        near = self.distance_bias(relative, jnp.arange(size, 2 * size), 3 * size)
        most = seen.real.shape[1] // config.global_block_size
        if self.block_relative is None or not most:
            return near
        ids = block_ids(seen.real, config.global_block_size)
        pairs = self.distance_bias(self.block_relative, jnp.arange(most), most)[0]
        # Where there are no blocks, the row does not matter, as nothing is visible.
        far = pairs[:, jnp.maximum(ids, 0)].transpose(1, 2, 0, 3)
        far = split(far, size).swapaxes(2, 3)
        far = far.reshape(-1, *far.shape[2:])
        near = jnp.broadcast_to(near, (len(far), *near.shape[1:]))
        return jnp.concatenate([near, far], axis=3)


class LongT5(T5):
    """A LongT5 encoder-decoder.

    References:
        LongT5 (arXiv 2112.07916).

    Example:
        >>> config = T5Config.from_json({"model_type": "longt5", "vocab_size": 50, "d_model": 8,
        ...     "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "local_radius": 2})
        >>> model = LongT5(config, head="seq2seq-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]]), decoder_input_ids=jnp.array([[0, 5]])).logits.shape
        (1, 2, 50)
    """

    stack = LongStack


FAMILIES = {"longt5": t5_family("LongT5", {}, model=LongT5)}
