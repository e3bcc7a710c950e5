"""Helium: Llama with pairs of neighboring features in its rotary positions."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 48000,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "rms_norm_eps": 1e-8,
    "rope_theta": 1e5,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def _config(fields: Fields) -> DecoderConfig:
    return DecoderConfig.read(
        {**_DEFAULTS, **fields},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(norm="rms-wide"),
        interleaved=True,
        out_bias=False,
    )


FAMILIES = {
    "helium": decoder_family(
        "Helium", _config, heads=("causal-lm", "classification", "token-classification")
    )
}
