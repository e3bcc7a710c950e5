"""SmolLM3: Llama with layers that have no rotary positions."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import DecoderConfig, layer_windows
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    optional = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    config = DecoderConfig.read(fields, optional=optional)
    interval, layers = fields.get("no_rope_layer_interval", 4), config.num_hidden_layers
    check_at_least(1, no_rope_layer_interval=interval)
    rotary = fields.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(rotary, list) or len(rotary) < layers:
        raise InputError(f"no_rope_layers must have a 0 or 1 for each of the {layers} layers")
    ropes = [rope if has else None for rope, has in zip(config.ropes, rotary, strict=False)]
    window = fields.get("use_sliding_window") and fields.get("sliding_window")
    config = replace(config, ropes=tuple(ropes))
    return layer_windows(
        config, {**fields, "sliding_window": window}, lambda layer: not rotary[layer]
    )


FAMILIES = {"smollm3": decoder_family("SmolLM3", _config, answers="transformer.")}
