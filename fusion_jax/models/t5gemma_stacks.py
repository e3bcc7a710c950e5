"""The configuration, the encoder and the decoder of T5Gemma: Gemma 2's layers in a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Fields, config_from_fields
from fusion_jax.models.cache import CacheUpdate, Reach, Window
from fusion_jax.models.decoder import Attention, Context, LayerFactory
from fusion_jax.models.decoder_config import DecoderConfig, count, rate
from fusion_jax.models.gemma import gemma2_config
from fusion_jax.models.layers import Dropout, split_key
from fusion_jax.models.t5_stacks import Attention as CrossAttention
from fusion_jax.models.t5_stacks import EncoderView, Stack


@dataclass(frozen=True, kw_only=True)
class T5GemmaConfig:
    """The fields of a ``config.json`` that the model uses, with the defaults of transformers."""

    encoder: DecoderConfig
    decoder: DecoderConfig
    model_type: str = "t5gemma"
    is_encoder_decoder: bool = True
    dropout_rate: float = 0.0
    classifier_dropout_rate: float = 0.0
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    decoder_start_token_id: int = 2
    num_labels: int = 2

    @classmethod
    def read(cls, fields: Fields) -> T5GemmaConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        parts: dict[str, Any] = {}
        for side in ("encoder", "decoder"):
            dropout = {"attention_dropout": rate(fields, "attention_dropout")}
            inner = {**_inner(fields, side), **dropout}
            count({"sliding_window": 1, **inner}, "sliding_window", 1)
            parts[side] = gemma2_config(inner)
        sizes = [part.vocab_size for part in parts.values()]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"a vocab_size of the encoder, {sizes[0]}, other than the decoder's, {sizes[1]}, "
                "is not implemented"
            )
        decoder = _inner(fields, "decoder")
        start = decoder.get("bos_token_id", 2)
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < sizes[1]:
            raise InputError(
                f"bos_token_id of the decoder must be one of its tokens; got {start!r}"
            )
        for name in ("bos_token_id", "decoder_start_token_id"):
            if fields.get(name, start) not in (None, start):
                raise InputError(
                    f"a {name} other than the decoder's bos_token_id is not implemented"
                )
        inherited = {
            name: getattr(parts["decoder"], name) for name in ("pad_token_id", "eos_token_id")
        }
        fields = {**inherited, **fields}
        return config_from_fields(cls, fields, decoder_start_token_id=start, **parts)

    def side(self, decoder: bool) -> DecoderConfig:
        """Returns the configuration of the decoder or of the encoder."""
        return self.decoder if decoder else self.encoder

    # What T5's modules ask for.
    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.decoder.vocab_size

    @property
    def d_model(self) -> int:
        """The number of features of the positions that a head reads."""
        return self.side(self.is_encoder_decoder).hidden_size

    @property
    def num_decoder_layers(self) -> int:
        """The number of layers of the decoder."""
        return self.decoder.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """The number of heads of the decoder's keys and values."""
        return self.decoder.num_key_value_heads

    @property
    def d_kv(self) -> int:
        """The number of features of a head of the decoder."""
        return self.decoder.head_dim

    @property
    def initializer_factor(self) -> float:
        """The standard deviation of initial weights."""
        return self.decoder.initializer_range

    @property
    def scaled(self) -> bool:
        """Whether hidden states are scaled before the output layer."""
        return False

    @property
    def own_embeddings(self) -> tuple[str, ...]:
        """Which stacks have token embeddings beside those of the one that a head reads."""
        return ("encoder",) if self.is_encoder_decoder else ()


def _inner(fields: Fields, side: str) -> dict[str, Any]:
    inner = fields.get(side) or {}
    if not isinstance(inner, dict):
        raise InputError(f"{side} must be a JSON object; got {str(inner)[:100]!r}")
    return dict(inner)


class GemmaLayer(nnx.Module):
    """One layer: attention, attention to the encoder in a decoder, and an MLP, all normed twice."""

    def __init__(self, config: T5GemmaConfig, index: int, decoder: bool, make: LayerFactory):
        own = config.side(decoder)
        d, f, heads = own.hidden_size, own.head_dim, own.num_attention_heads
        std = own.initializer_range
        self.attention_norm, self.attention_post_norm = make.norm(d), make.norm(d)
        self.attention = Attention(own, own.ropes[index], make)
        if decoder:
            self.cross_norm, self.cross_post_norm = make.norm(d), make.norm(d)
            self.cross = CrossAttention(
                d,
                heads * f,
                heads,
                scale=own.blocks.score_scale,
                stds=(std, std, std),
                dropout=own.attention_dropout,
                groups=own.num_key_value_heads,
                source=config.encoder.hidden_size,
                cap=own.blocks.score_cap,
                use_bias=own.qkv_bias,
                param_dtype=make.dtype,
                rngs=make.rngs,
            )
        self.mlp_norm, self.mlp_post_norm = make.norm(d), make.norm(d)
        self.mlp = make.dense()
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        cache: CacheUpdate,
        context: Context,
        source: EncoderView | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the input of the next layer."""
        keys = split_key(key, 5)
        y = self.attention(self.attention_norm(x), visible, cache, context, keys[0])
        x = x + self.dropout(self.attention_post_norm(y), keys[1])
        if source is not None:
            y = self.cross(self.cross_norm(x), *source, None, keys[2])
            x = x + self.dropout(self.cross_post_norm(y), keys[3])
        y = self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return x + self.dropout(y, keys[4])


class GemmaStack(Stack):
    """The layers of an encoder or decoder, some with windows, and a norm."""

    def __init__(self, config: T5GemmaConfig, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.own, self.decoder = config.side(decoder), decoder
        make = LayerFactory(self.own, param_dtype, rngs)
        count = self.own.num_hidden_layers
        self.layers = nnx.List([GemmaLayer(config, i, decoder, make) for i in range(count)])
        self.norm = make.norm(self.own.hidden_size)
        self.dropout = Dropout(config.dropout_rate)

    def visible(self, seen: Window, size: Reach) -> Bool[Array, "b 1 _ s"]:
        """Returns what tokens attend to; the window of an encoder has this size on both sides."""
        if size is None:
            return seen.visible
        distance = seen.slots[:, None] - jnp.arange(seen.real.shape[1])[None]
        assert isinstance(size, int)
        near = distance < size if self.decoder else jnp.abs(distance) <= size
        return seen.visible & near[None, None]

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        sources: Sequence[EncoderView | None],
        key: Key[Array, ""] | None,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Runs the layers on embeddings; see `Stack`."""
        *keys, embed_key, norm_key = split_key(key, len(self.layers) + 2)
        slots = None if cache.cache is None else seen.real.shape[1]
        rope = self.own.ropes[0]
        assert rope is not None
        context: Context = {rope: rope.angles(seen.positions, self.own.head_dim, slots)}
        x = self.dropout(x, embed_key)
        states = [x]
        parts = zip(self.layers, self.own.sliding_windows, sources, keys, strict=True)
        for layer, size, source, layer_key in parts:
            x = layer(x, self.visible(seen, size), cache, context, source, layer_key)
            states.append(x)
        x = states[-1] = self.dropout(self.norm(x), norm_key)
        hidden = tuple(states) if output_hidden_states else None
        return DecoderOutput(x, hidden, cache=cache.result(seen))
