"""Seed-OSS: Llama with biases of queries, keys and values, and dropout of residual connections."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 155136,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "attention_bias": True,
    "attention_out_bias": False,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    return DecoderConfig.read(
        fields,
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(residual_dropout=rate(fields, "residual_dropout")),
        out_bias=bool(fields["attention_out_bias"]),
    )


FAMILIES = {"seed_oss": decoder_family("SeedOss", _config, answers="transformer.")}
