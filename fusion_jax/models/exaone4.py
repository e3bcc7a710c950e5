"""EXAONE 4: norms after attention and MLP; layers without windows have no positions."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows, window_pattern
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 102400,
    "intermediate_size": 16384,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "eos_token_id": 2,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    config = DecoderConfig.read(fields, blocks=Blocks(norms="after", query_key_norm="head"))
    if not fields["sliding_window"]:
        return config
    pattern = 0 if fields.get("layer_types") else window_pattern(fields)
    config = layer_windows(config, fields, lambda layer: (layer + 1) % pattern != 0)
    pairs = zip(config.ropes, config.sliding_windows, strict=True)
    return replace(config, ropes=tuple(rope if size else None for rope, size in pairs))


FAMILIES = {"exaone4": decoder_family("Exaone4", _config, answers="transformer.")}
