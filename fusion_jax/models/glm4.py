"""GLM-4: norms before and after attention and MLP, and rotary positions of a part of the heads."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import (
    decoder_family,
    decoder_rules,
    joined_rules,
    norm_rules,
)
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "pad_token_id": 151329,
}
_NORMS = {
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    if fields.get("eos_token_id") is None:
        fields["eos_token_id"] = [151329, 151336, 151338]
    return DecoderConfig.read(
        fields,
        optional=("tie_word_embeddings", "attention_bias"),
        blocks=Blocks(norms="both"),
        partial_rotary=True,
        interleaved=True,
        out_bias=False,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    joined = joined_rules("mlp", "mlp.gate_up_proj", ("gate", "up"))
    return decoder_rules(config, head, (*norm_rules(_NORMS), *joined))


FAMILIES = {
    "glm4": decoder_family(
        "Glm4",
        _config,
        heads=("causal-lm", "classification", "token-classification"),
        rules=_rules,
    )
}
