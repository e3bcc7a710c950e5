"""The embeddings and the layers of encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.models.bert_config import BertConfig, EncoderConfig
from fusion_jax.models.layers import Dropout, LayerNorm, RmsNorm, attention, split_key
from fusion_jax.models.rope import Rope
from fusion_jax.nn.mlp import GatedMlp, Mlp


class LayerFactory:
    """Makes the layers of a model, all with its initializer, dtype, epsilon and random keys."""

    def __init__(self, config: EncoderConfig, param_dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        norms: dict[str, Callable[..., nnx.Module]] = {
            "layer": LayerNorm,
            "layer-unbiased": partial(LayerNorm, use_bias=False),
            "rms": RmsNorm,
        }
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.embed = partial(nnx.Embed, embedding_init=init, **common)
        self.conv = partial(nnx.Conv, kernel_init=init, **common)
        self.norm = partial(norms[config.blocks.norm], epsilon=config.layer_norm_eps, **common)
        self.mlp = partial(
            GatedMlp if config.blocks.gated else Mlp,
            act=config.hidden_act,
            use_bias=config.blocks.mlp_bias,
            kernel_init=init,
            **common,
        )
        self.param_dtype = param_dtype


class Shared(NamedTuple):
    """The arguments that are the same for all layers in one call.

    Args:
        visible: Which positions each position attends to, by the size of the layer's window.
        bias: What is added to the scores of each head.
        angles: The angles of each rotary embedding.
        relative: The embeddings of relative positions.
    """

    visible: Mapping[int | None, Bool[Array, "b 1 #t t"]]
    bias: Float[Array, "1 h t t"] | None
    angles: Mapping[Rope, Float[Array, "b t half"]]
    relative: Float[Array, "p d"] | None


class Embeddings(nnx.Module):
    """The sum of word, position and token-type embeddings, normalized."""

    def __init__(self, config: BertConfig, make: LayerFactory):
        self.config = config
        size = config.embedding_size or config.hidden_size
        self.word = make.embed(config.vocab_size, size)
        count = config.max_position_embeddings
        self.position = make.embed(count, size) if config.blocks.positions else None
        types = config.type_vocab_size
        self.token_type = make.embed(types, size) if types else None
        self.project_first = config.blocks.project_first
        normed = config.hidden_size if self.project_first else size
        self.norm = make.norm(normed) if config.blocks.embedding_norm else None
        mapped = size != config.hidden_size or config.blocks.project
        linear = partial(make.linear, use_bias=not self.project_first)
        self.project = linear(size, config.hidden_size) if mapped else None
        rate = config.blocks.embedding_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if rate is None else rate)

    def positions(self, input_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Returns position ids: 0, 1, ...; in RoBERTa from pad_token_id + 1, without padding."""
        if self.config.shifted_positions:
            real = (input_ids != self.config.pad_token_id).astype(input_ids.dtype)
            return jnp.cumsum(real, axis=1, dtype=input_ids.dtype) * real + self.config.pad_token_id
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None], input_ids.shape)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        token_type_ids: Int[Array, "b t"] | None,
        position_ids: Int[Array, "b t"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the input of the first layer."""
        x = self.word(input_ids)
        if self.position is not None:
            x = x + self.position(position_ids)
        if self.token_type is not None:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(types)
        if self.project is not None and self.project_first:
            x = self.project(x)
        x = self.dropout(x if self.norm is None else self.norm(x), key)
        return x if self.project is None or self.project_first else self.project(x)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, config: EncoderConfig, index: int, make: LayerFactory):
        d, blocks = config.hidden_size, config.blocks
        heads = config.num_attention_heads
        self.features = blocks.head_dim or d // heads
        inner, own = (n * self.features for n in (heads, blocks.key_heads or heads))
        linear = partial(make.linear, use_bias=blocks.attention_bias)
        self.query = linear(d, inner)
        self.key = linear(d, own)
        self.value = linear(d, own)
        out_bias = blocks.attention_out_bias
        out_bias = blocks.attention_bias if out_bias is None else out_bias
        self.out = make.linear(inner, d, use_bias=out_bias)
        self.rope = blocks.ropes[index] if blocks.ropes else None
        self.window = blocks.windows[index] if blocks.windows else None
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def _heads(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h f"]:
        return x.reshape(*x.shape[:2], -1, self.features)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        shared: Shared,
        key: Key[Array, ""] | None,
        source: Float[Array, "b s d"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones, of the source if there is one."""
        read = x if source is None else source
        q, k, v = (
            self._heads(self.query(x)),
            self._heads(self.key(read)),
            self._heads(self.value(read)),
        )
        if self.rope is not None:
            q, k = (self.rope.rotated(a, shared.angles[self.rope]) for a in (q, k))
        visible = shared.visible[self.window]
        y = attention(q, k, v, visible, self.dropout, key, bias=shared.bias)
        return self.out(y.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """One encoder layer: attention and MLP, each with a norm and a residual connection."""

    def __init__(
        self,
        config: EncoderConfig,
        index: int,
        make: LayerFactory,
        attention: type[SelfAttention] = SelfAttention,
    ):
        d, blocks = config.hidden_size, config.blocks
        self.first = blocks.norm_first
        bare = blocks.norm_first and not blocks.first_norm and not index
        self.attention = attention(config, index, make)
        self.attention_norm = None if bare else make.norm(d)
        self.mlp = make.mlp(d, config.intermediate_size)
        self.mlp_norm = make.norm(d)
        self.dropout = Dropout(config.hidden_dropout_prob)
        rate = blocks.mlp_dropout
        self.mlp_dropout = self.dropout if rate is None else Dropout(rate)
        if blocks.path_dropout is not None:
            self.dropout = Dropout(blocks.path_dropout, broadcast_dims=(1, 2))
            self.mlp_dropout = self.dropout
        scale = blocks.layer_scale
        factors = None if scale is None else jnp.full(d, scale, make.param_dtype)
        self.attention_scale = None if factors is None else nnx.Param(factors)
        self.mlp_scale = None if factors is None else nnx.Param(factors)

    def __call__(
        self, x: Float[Array, "b t d"], shared: Shared, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns the hidden states after the layer."""
        keys = split_key(key, 3)
        norm = self.attention_norm
        y = norm(x) if norm is not None and self.first else x
        y = _scaled(self.attention(y, shared, keys[0]), self.attention_scale)
        x = x + self.dropout(y, keys[1])
        if self.first:
            y = _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)
            return x + self.mlp_dropout(y, keys[2])
        assert norm is not None
        x = norm(x)
        y = _scaled(self.mlp(x), self.mlp_scale)
        return self.mlp_norm(x + self.mlp_dropout(y, keys[2]))


def _scaled(x: Float[Array, "b t d"], factors: nnx.Param | None) -> Float[Array, "b t d"]:
    return x if factors is None else x * factors[...][None, None]
