"""ERNIE 4.5: Llama with pairs of neighboring features in its rotary positions."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(fields: Fields) -> DecoderConfig:
    bias = bool(fields.get("use_bias"))
    # transformers ignores the dropout of attention.
    own = {"attention_bias": bias, "mlp_bias": bias, "attention_dropout": 0.0}
    optional = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    return DecoderConfig.read({**_DEFAULTS, **fields, **own}, optional=optional, interleaved=True)


FAMILIES = {"ernie4_5": decoder_family("Ernie4_5", _config, heads=("causal-lm",))}
