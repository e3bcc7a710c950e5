"""OLMo 2: norms after attention and MLP, and of all queries and keys at once."""

from __future__ import annotations

from fusion_jax.models.base import Fields
from fusion_jax.models.decoder import decoder_family
from fusion_jax.models.decoder_config import Blocks, DecoderConfig

_DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1}
_BLOCKS = Blocks(norm="rms-wide", norms="after", query_key_norm="all")


def _config(fields: Fields) -> DecoderConfig:
    optional = ("tie_word_embeddings", "attention_bias")
    return DecoderConfig.read({**_DEFAULTS, **fields}, optional=optional, blocks=_BLOCKS)


FAMILIES = {"olmo2": decoder_family("Olmo2", _config, heads=("causal-lm", "classification"))}
