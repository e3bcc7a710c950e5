"""Nemotron 3 and 4, Minitron: layer norms with the scale 1 + w, squared ReLU."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "initializer_range": 0.0134,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 4096,
    "eos_token_id": 3,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    return DecoderConfig.read(
        {**fields, "rms_norm_eps": fields["norm_eps"]},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(norm="layer-offset", gated=False),
        partial_rotary=True,
    )


FAMILIES = {"nemotron": decoder_family("Nemotron", _config, answers="transformer.")}
