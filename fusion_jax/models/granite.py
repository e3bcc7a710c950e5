"""Granite: Llama with factors of embeddings, scores, residual connections and logits."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields
from fusion_jax.models.decoder import decoder_family
from fusion_jax.models.decoder_config import Blocks, DecoderConfig

# Our names of the factors.
_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "score_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}


def _config(fields: Fields) -> DecoderConfig:
    factors = {ours: fields.get(theirs, 1.0) for theirs, ours in _FACTORS.items()}
    for theirs, ours in _FACTORS.items():
        value = factors[ours]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value:
            raise InputError(f"{theirs} must be a number other than 0; got {str(value)[:100]!r}")
    optional = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    defaults = {"eos_token_id": 2, "max_position_embeddings": 2048}
    return DecoderConfig.read({**defaults, **fields}, optional=optional, blocks=Blocks(**factors))


FAMILIES = {"granite": decoder_family("Granite", _config, heads=("causal-lm",))}
