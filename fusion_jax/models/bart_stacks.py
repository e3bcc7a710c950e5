"""The configuration, the encoder and the decoder of BART and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, config_from_fields, with_aliases
from fusion_jax.models.cache import CacheUpdate
from fusion_jax.models.layers import Dropout, LayerNorm, split_key
from fusion_jax.models.t5_stacks import Attention, EncoderView, Stack
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import activation

_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
}


@dataclass(frozen=True, kw_only=True)
class BartConfig:
    """The fields of a ``config.json`` that the models use, with BART's defaults except for tokens.

    The last fields say what a family has of its own.
    """

    model_type: str = "bart"
    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = None
    decoder_start_token_id: int = 0
    num_labels: int = 2
    own_embeddings: tuple[str, ...] = ()
    """Which of ``"encoder"`` and ``"decoder"`` have token embeddings of their own."""
    norm_first: bool = False
    """Whether norms come before attention and MLPs, with one more after the last layer."""
    embedding_norm: bool = True
    """Whether embeddings are normalized."""
    learned_positions: bool = True
    """Whether positions have embeddings, the first two of which are not used, or sinusoids."""
    key_bias: bool = True
    """Whether keys of attention have a bias."""
    wraps: bool = False
    """Whether a decoder's input starts with the last token of the target, its language."""

    @classmethod
    def read(cls, fields: Fields, **own: Any) -> BartConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        fields = with_aliases(fields, _ALIASES)
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if fields.get(name):
                raise InputError(f"a {name} other than 0 is not implemented")
        if not fields.get("share_encoder_decoder_embeddings", True):
            raise InputError("share_encoder_decoder_embeddings false is not implemented")
        if fields.get("decoder_vocab_size") not in (None, fields.get("vocab_size")):
            raise InputError("a decoder_vocab_size other than vocab_size is not implemented")
        if fields.get("decoder_start_token_id", 0) is None:
            own["decoder_start_token_id"] = fields.get("bos_token_id") or 0
        if fields.get("eos_token_id", 0) is None:
            own["eos_token_id"] = None
        result = config_from_fields(cls, fields, **own)
        activation(result.activation_function)
        for stack in ("encoder", "decoder"):
            heads = getattr(result, f"{stack}_attention_heads")
            if result.d_model % heads:
                raise InputError(
                    f"d_model {result.d_model} is not a multiple of {stack}_attention_heads {heads}"
                )
        return result

    # What T5's modules ask for.
    @property
    def num_decoder_layers(self) -> int:
        """The number of layers of the decoder."""
        return self.decoder_layers

    @property
    def num_heads(self) -> int:
        """The number of heads of the decoder."""
        return self.decoder_attention_heads

    @property
    def d_kv(self) -> int:
        """The number of features of a head of the decoder."""
        return self.d_model // self.decoder_attention_heads

    @property
    def scaled(self) -> bool:
        """Whether hidden states are scaled before the output layer."""
        return False

    @property
    def initializer_factor(self) -> float:
        """The standard deviation of initial embeddings."""
        return self.init_std

    @property
    def head_std(self) -> float:
        """The standard deviation of the initial weights of heads."""
        return self.init_std


def sinusoids(count: int, d: int) -> np.ndarray:
    """Returns the embeddings of positions, (count, d): sines, then cosines, not interleaved."""
    angles = np.arange(count)[:, None] / 10000 ** (2 * (np.arange(d) // 2)[None] / d)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], 1).astype(np.float32)


class BartLayer(nnx.Module):
    """One layer: attention, attention to the encoder in a decoder, and an MLP."""

    relative = None

    def __init__(self, config: BartConfig, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        d, side = config.d_model, "decoder" if decoder else "encoder"
        heads, width = (getattr(config, f"{side}_{x}") for x in ("attention_heads", "ffn_dim"))
        stds = (config.init_std,) * 3
        options = {"scale": None, "stds": stds, "key_bias": config.key_bias}
        options |= {"dropout": config.attention_dropout}
        norm = partial(LayerNorm, d, epsilon=1e-5, **common)
        self.first = config.norm_first
        self.attention = Attention(d, d, heads, **options, **common)
        self.attention_norm = norm()
        if decoder:
            self.cross = Attention(d, d, heads, **options, **common)
            self.cross_norm = norm()
        init = nnx.initializers.normal(config.init_std)
        self.mlp = Mlp(d, width, act=config.activation_function, kernel_init=init, **common)
        self.mlp_norm = norm()
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        bias: None,
        cache: CacheUpdate,
        source: EncoderView | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], None]:
        """Returns the input of the next layer, and None in place of a router's logits."""
        keys = split_key(key, 5)
        y = self.attention_norm(x) if self.first else x
        own = cache.extended(*self.attention.keys_values(y))
        y = x + self.dropout(self.attention(y, own, visible, bias, keys[0]), keys[1])
        x = y if self.first else self.attention_norm(y)
        if source is not None:
            y = self.cross_norm(x) if self.first else x
            y = x + self.dropout(self.cross(y, *source, None, keys[2]), keys[3])
            x = y if self.first else self.cross_norm(y)
        y = self.mlp(self.mlp_norm(x) if self.first else x)
        y = x + self.dropout(y, keys[4])
        return y if self.first else self.mlp_norm(y), None


class BartStack(Stack):
    """The layers of an encoder or decoder, with a norm before and after them in some families."""

    wide = False

    def __init__(self, config: BartConfig, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        norm = partial(LayerNorm, config.d_model, epsilon=1e-5, **common)
        count = config.decoder_layers if decoder else config.encoder_layers
        self.relative = None
        self.layers = nnx.List([BartLayer(config, decoder, **common) for _ in range(count)])
        self.embedding_norm = norm() if config.embedding_norm else None
        self.norm = norm() if config.norm_first else None
        self.dropout, self.last_dropout = Dropout(config.dropout), Dropout(0.0)

    def begin(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the sum of all embeddings, normalized where the family does so."""
        return x if self.embedding_norm is None else self.embedding_norm(x)


def positions(config: BartConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """Returns the embeddings of positions, after two that are not used."""
    init = nnx.initializers.normal(config.init_std)
    count = config.max_position_embeddings + 2
    common = {"param_dtype": param_dtype, "rngs": rngs}
    return nnx.Embed(count, config.d_model, embedding_init=init, **common)


def computed(config: BartConfig, param_dtype: Any) -> Array:
    """Returns the sinusoids of a model whose files have none."""
    return jnp.asarray(sinusoids(config.max_position_embeddings, config.d_model), param_dtype)
