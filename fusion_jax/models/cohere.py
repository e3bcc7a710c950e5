"""Command R (Cohere), and Command R7B and A (Cohere2), which have windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows, window_pattern
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "logit_scale": 0.0625,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 255001,
    "pad_token_id": 0,
}
_COHERE2 = {**_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4}


def _read(fields: Fields, **flags: Any) -> DecoderConfig:
    factor = fields["logit_scale"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor:
        raise InputError(f"logit_scale must be a number other than 0; got {str(factor)[:100]!r}")
    flags |= {"norm": "layer-scaled", "norms": "shared", "parallel": True}
    return DecoderConfig.read(
        {**fields, "rms_norm_eps": fields["layer_norm_eps"]},
        optional=("tie_word_embeddings", "attention_bias"),
        blocks=Blocks(logit_divisor=1 / factor, **flags),
        interleaved=True,
    )


def _cohere(fields: Fields) -> DecoderConfig:
    normed = "apart" if fields.get("use_qk_norm") else None
    return _read({**_DEFAULTS, "rope_theta": 5e5, **fields}, query_key_norm=normed)


def _cohere2(fields: Fields) -> DecoderConfig:
    fields = {**_COHERE2, **fields}
    pattern = 0 if fields.get("layer_types") else window_pattern(fields)
    config = layer_windows(_read(fields), fields, lambda layer: (layer + 1) % pattern != 0)
    pairs = zip(config.ropes, config.sliding_windows, strict=True)
    return replace(config, ropes=tuple(rope if size else None for rope, size in pairs))


FAMILIES = {
    "cohere": decoder_family("Cohere", _cohere, heads=("causal-lm",)),
    "cohere2": decoder_family("Cohere2", _cohere2, heads=("causal-lm",)),
}
