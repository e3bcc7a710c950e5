"""The encoder and the decoder of T5 and Switch Transformers; `bart_stacks` builds on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.models.base import DecoderOutput, Model
from fusion_jax.models.cache import CacheUpdate, KeysValues, Window, window
from fusion_jax.models.layers import (
    ArrayLike,
    Dropout,
    RmsNorm,
    attention,
    relative_bias,
    split_key,
    token_mask,
)
from fusion_jax.models.moe import Moe, RouterRule
from fusion_jax.models.t5_config import T5Config
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.mlp import GatedMlp, Mlp

EncoderKeysValues = tuple[Float[Array, "b u h f"], Float[Array, "b u h f"]]
EncoderView = tuple[EncoderKeysValues, Bool[Array, "b 1 1 u"]]
"""The keys and values of the encoder for one layer, and where source texts are not padding."""


class Attention(nnx.Module):
    """Attention to positions of the same stack or of the encoder.

    Args:
        d: The number of features of a position.
        inner: That of all heads together.
        heads: The number of heads.
        scale: The factor of the scores; None for one over the root of the features of a head.
        stds: The standard deviations of the initial weights: of queries, of keys and values, and of
            the output.
        dropout: The dropout of the weights of positions.
        key_bias: Whether keys have a bias where the others have one.
        groups: The number of heads of keys and values; 0 for as many as there are heads.
        source: The number of features of the positions that it attends to; 0 for ``d``.
        cap: The soft cap of the scores, see `soft_capped`; None for none.
        **common: Further arguments of linear layers.
    """

    def __init__(
        self,
        d: int,
        inner: int,
        heads: int,
        *,
        scale: float | None,
        stds: tuple[float, float, float],
        dropout: float,
        key_bias: bool = True,
        groups: int = 0,
        source: int = 0,
        cap: float | None = None,
        **common: Any,
    ):
        self.heads, self.scale, self.cap = heads, scale, cap
        self.groups = groups or heads
        query, other, out = (nnx.initializers.normal(std) for std in stds)
        sizes = source or d, inner // heads * self.groups
        self.query = nnx.Linear(d, inner, kernel_init=query, **common)
        keys = common if key_bias else {**common, "use_bias": False}
        self.key = nnx.Linear(*sizes, kernel_init=other, **keys)
        self.value = nnx.Linear(*sizes, kernel_init=other, **common)
        self.out = nnx.Linear(inner, d, kernel_init=out, **common)
        self.dropout = Dropout(dropout)

    def keys_values(self, x: Float[Array, "b s d"]) -> KeysValues:
        """Returns the keys and values of positions."""
        key, value = (a(x).reshape(*x.shape[:2], self.groups, -1) for a in (self.key, self.value))
        return key, value

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keys_values: KeysValues,
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "1 h t s"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        options = {"scale": self.scale, "cap": self.cap, "bias": bias}
        y = attention(query, *keys_values, visible, self.dropout, key, **options)
        return self.out(y.reshape(*x.shape[:2], -1))


def relative_embed(config: T5Config, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """Returns the biases of the scores for each range of distances and each head."""
    init = nnx.initializers.normal(config.initializer_factor * config.d_model**-0.5)
    count, heads = config.relative_attention_num_buckets, config.num_heads
    return nnx.Embed(count, heads, embedding_init=init, param_dtype=param_dtype, rngs=rngs)


def t5_attention(
    config: T5Config,
    param_dtype: Any,
    rngs: nnx.Rngs,
    make: Callable[..., Attention] = Attention,
) -> Attention:
    """Returns T5's attention, without scaling and without biases."""
    d, inner, factor = config.d_model, config.num_heads * config.d_kv, config.initializer_factor
    stds = factor * (d * config.d_kv) ** -0.5, factor * d**-0.5, factor * inner**-0.5
    common = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
    options = {"scale": 1.0, "stds": stds, "dropout": config.dropout_rate}
    return make(d, inner, config.num_heads, **options, **common)


class Layer(nnx.Module):
    """One layer: attention, attention to the encoder in a decoder, and an MLP or experts."""

    def __init__(
        self, config: T5Config, decoder: bool, sparse: bool, param_dtype: Any, rngs: nnx.Rngs
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        d = config.d_model
        norm = partial(RmsNorm, d, epsilon=config.layer_norm_epsilon, **common)
        mlp = partial(
            GatedMlp if config.gated else Mlp,
            d,
            config.d_ff,
            act=config.act,
            use_bias=False,
            param_dtype=param_dtype,
        )
        self.attention_norm = norm()
        self.attention = self.own_attention(config, decoder, **common)
        self.relative = relative_embed(config, **common) if config.every_relative else None
        if decoder:
            self.cross_norm = norm()
            self.cross = t5_attention(config, **common)
        self.mlp_norm = norm()
        # MLPs are in float32, as their sums would overflow in float16.
        self.precise = param_dtype == jnp.float16 and not sparse
        if sparse:
            self.mlp: Mlp | Moe = Moe(
                mlp,
                d,
                config.num_experts,
                top_k=1,
                normalized=False,
                capacity=config.expert_capacity,
                jitter=config.router_jitter_noise,
                rule=RouterRule(bias=config.router_bias),
                kernel_init=nnx.initializers.normal(config.initializer_factor * d**-0.5),
                **common,
            )
        else:
            self.mlp = mlp(rngs=rngs, **({"param_dtype": jnp.float32} if self.precise else {}))
        self.dropout = Dropout(config.dropout_rate)

    def own_attention(
        self, config: T5Config, decoder: bool, param_dtype: Any, rngs: nnx.Rngs
    ) -> Attention:
        """Returns the attention to positions of the same stack."""
        return t5_attention(config, param_dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "_ h _ _"] | None,
        cache: CacheUpdate,
        source: EncoderView | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the input of the next layer, and the logits of the router, if there is one."""
        keys = split_key(key, 6)
        y = self.attention_norm(x)
        own = cache.extended(*self.attention.keys_values(y))
        y = self.attention(y, own, visible, bias, keys[0])
        x = x + self.dropout(y, keys[1]).astype(x.dtype)
        if source is not None:
            y = self.cross(self.cross_norm(x), *source, None, keys[2])
            x = x + self.dropout(y, keys[3]).astype(x.dtype)
        y, router = self.mlp_norm(x), None
        if isinstance(self.mlp, Moe):
            y, router = self.mlp(y, keys[4])
        else:
            y = self.mlp(wide(y) if self.precise else y)
        return x + self.dropout(y, keys[5]).astype(x.dtype), router


class Stack(nnx.Module):
    """The layers of an encoder or decoder, the relative positions, and a final norm."""

    layer: Callable[..., Layer] = Layer
    wide: bool = True
    """Whether hidden states are in float32 where parameters are in float16."""

    def __init__(self, config: T5Config, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.config, self.decoder = config, decoder
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.relative = None if config.every_relative else relative_embed(config, **common)
        self.layers = nnx.List(
            [self.layer(config, decoder, sparse, **common) for sparse in config.sparse(decoder)]
        )
        self.norm: Any = RmsNorm(config.d_model, epsilon=config.layer_norm_epsilon, **common)
        self.dropout = self.last_dropout = Dropout(config.dropout_rate)

    def distance_bias(
        self, relative: AnyEmbed, slots: Int[Array, " t"], count: int
    ) -> Float[Array, "1 h t s"]:
        """Returns the bias of the scores of each head, which depends on relative positions.

        Args:
            relative: The bias of each range of distances.
            slots: (t,) the slots of the tokens that attend.
            count: The number s of slots that they attend to.

        Returns:
            The bias. Distances are counted in slots, including padding.
        """
        config = self.config
        far, buckets = config.relative_attention_max_distance, config.relative_attention_num_buckets
        options = {"far": far, "buckets": buckets, "causal": self.decoder}
        return relative_bias(relative, slots, count, **options)

    def bias(self, relative: AnyEmbed, seen: Window) -> Float[Array, "_ h _ _"]:
        """Returns what is added to the scores of the attention in this stack."""
        return self.distance_bias(relative, seen.slots, seen.real.shape[1])

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        sources: Sequence[EncoderView | None],
        key: Key[Array, ""] | None,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Runs the layers on embeddings.

        The ``sources`` are what each layer attends to in the encoder; None for the encoder's own.
        """
        *keys, embed_key, norm_key = split_key(key, len(self.layers) + 2)
        common = None if self.relative is None else self.bias(self.relative, seen)
        x = self.dropout(x, embed_key)
        if x.dtype == jnp.float16 and self.wide:  # in which the sums over layers would overflow
            x = wide(x)
        states, routers = [x], []
        for layer, source, layer_key in zip(self.layers, sources, keys, strict=True):
            bias = common if layer.relative is None else self.bias(layer.relative, seen)
            x, router = layer(x, seen.visible, bias, cache, source, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        x = states[-1] = self.last_dropout(x if self.norm is None else self.norm(x), norm_key)
        return DecoderOutput(
            x,
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=cache.result(seen),
        )


class EncoderDecoder(Model):
    """The token embeddings and the stacks, on which a head is put.

    Args:
        config: The configuration.
        decodes: Whether there is a decoder.
        stack: Makes an encoder or a decoder.
    """

    stack: Callable[..., Stack] = Stack

    def __init__(self, config: Any, *, decodes: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        common = {"param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_factor)
        embed = partial(nnx.Embed, config.vocab_size, embedding_init=init, **common)
        self.word = embed(config.d_model)
        self.encoder = self.stack(config, False, **common)
        self.decoder = self.stack(config, True, **common) if decodes else None
        own = config.own_embeddings
        self.encoder_word = embed(self.encoder_features) if "encoder" in own else None
        self.decoder_word = embed(config.d_model) if "decoder" in own and decodes else None

    @property
    def encoder_features(self) -> int:
        """The number of features of the encoder's positions."""
        return self.config.d_model

    def embed(
        self, ids: Int[Array, "b t"], slots: Int[Array, " t"], *, decoder: bool
    ) -> Float[Array, "b t d"]:
        """Returns the input of the encoder or of the decoder for tokens in these slots."""
        return ((self.decoder_word if decoder else self.encoder_word) or self.word)(ids)

    def encode(
        self,
        input_ids: Int[ArrayLike, "b u"],
        attention_mask: Shaped[ArrayLike, "b u"] | None,
        output_hidden_states: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[DecoderOutput, Bool[Array, "b 1 1 u"]]:
        """Returns the encoder's output, and where the source texts are not padding."""
        ids = jnp.asarray(input_ids)
        real = token_mask(ids, attention_mask)
        source = real[:, None, None]
        seen = window(real, None)._replace(visible=source)
        nothing = [None] * len(self.encoder.layers)
        x = self.embed(ids, seen.slots, decoder=False)
        return self.encoder(x, seen, CacheUpdate(None), nothing, key, output_hidden_states), source

    def keys_values(self, encoded: DecoderOutput) -> tuple[EncoderKeysValues, ...]:
        """Returns the keys and values of the encoder's output for each layer of the decoder."""
        assert self.decoder is not None
        states = encoded.last_hidden_state
        return tuple(layer.cross.keys_values(states) for layer in self.decoder.layers)

    def decode(
        self,
        ids: Int[Array, "b t"],
        seen: Window,
        cache: CacheUpdate,
        keys_values: Sequence[EncoderKeysValues],
        source: Bool[Array, "b 1 1 u"],
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Returns the decoder's output for its tokens ``ids``, beside what the encoder gives."""
        assert self.decoder is not None
        sources = [(pair, source) for pair in keys_values]
        x = self.embed(ids, seen.slots, decoder=True)
        return self.decoder(x, seen, cache, sources, key, output_hidden_states)

    def read(
        self,
        input_ids: Int[ArrayLike, "b u"],
        attention_mask: Shaped[ArrayLike, "b u"] | None,
        ids: Int[Array, "b t"],
        mask: Shaped[ArrayLike, "b t"] | None,
        key: Key[Array, ""] | None,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Encodes source texts, and returns the decoder's output for its tokens ``ids``."""
        keys = split_key(key, 2)
        encoded, source = self.encode(input_ids, attention_mask, output_hidden_states, keys[0])
        seen = window(token_mask(ids, mask), None)
        pairs = self.keys_values(encoded)
        options = (keys[1], output_hidden_states)
        out = self.decode(ids, seen, CacheUpdate(None), pairs, source, *options)
        return out._replace(encoder=encoded)

    def shift_right(self, ids: Int[ArrayLike, "b t"]) -> Int[Array, "b t"]:
        """Returns the decoder's input for target texts: the start token, then all but the last."""
        start = self.config.decoder_start_token_id
        shifted = jnp.pad(jnp.asarray(ids)[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        return jnp.where(shifted < 0, self.config.pad_token_id, shifted)
