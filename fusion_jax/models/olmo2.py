"""OLMo 2 and 3: norms after attention and MLP, and of all queries and keys at once."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import (
    Blocks,
    DecoderConfig,
    layer_windows,
    ropes_by_type,
    sliding_layers,
)
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
_THETA = 5e5
_OLMO3 = {**_DEFAULTS, "sliding_window": 4096}
_BLOCKS = Blocks(norm="rms-wide", norms="after", query_key_norm="all")


def _olmo2(fields: Fields) -> DecoderConfig:
    optional = ("tie_word_embeddings", "attention_bias")
    return DecoderConfig.read({**_DEFAULTS, **fields}, optional=optional, blocks=_BLOCKS)


def _usual(layer: int) -> bool:
    return (layer + 1) % 4 != 0


def _olmo3(fields: Fields) -> DecoderConfig:
    fields = {**_OLMO3, **fields}
    config = _olmo2({**fields, "rope_parameters": None, "rope_scaling": None})
    config = layer_windows(config, fields, _usual)
    return ropes_by_type(
        config,
        fields,
        sliding_layers(config, fields, _usual),
        full_theta=fields.get("rope_theta", _THETA),
        sliding_theta=_THETA,
    )


FAMILIES = {
    "olmo2": decoder_family("Olmo2", _olmo2, heads=("causal-lm", "classification")),
    "olmo3": decoder_family("Olmo3", _olmo3, heads=("causal-lm", "classification")),
}
