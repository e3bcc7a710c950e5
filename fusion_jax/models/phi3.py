"""Phi-3 and Phi-4: Llama with joined matrices, and rotary positions for long texts."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows, rate
from fusion_jax.models.decoder_families import decoder_family

_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn"):  # what LongRoPE was called first
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise InputError(f"Phi-3 has the rope_types default and longrope; got {str(kind)[:100]!r}")
    fields |= {"rope_scaling": None, "rope_parameters": {**rope, "rope_type": kind}}
    blocks = Blocks(joined=True, residual_dropout=rate(fields, "resid_pdrop"))
    config = DecoderConfig.read(fields, blocks=blocks, partial_rotary=True)
    return layer_windows(config, {**fields, "layer_types": None}, lambda layer: True)


_HEADS: tuple[Head, ...] = ("causal-lm", "classification", "token-classification")
FAMILIES = {"phi3": decoder_family("Phi3", _config, heads=_HEADS)}
