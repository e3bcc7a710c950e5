"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel behind one layer norm."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate
from fusion_jax.models.decoder_families import (
    decoder_family,
    decoder_rules,
    linear_rules,
    norm_rules,
)
from fusion_jax.models.rules import NORM, KeyRule, KeyRules

_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    own = {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": fields["layer_norm_eps"]}
    return DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            norms="shared",
            parallel=True,
            gated=False,
            query_key_norm="head" if fields.get("qk_layernorm") else None,
            residual_dropout=rate(fields, "resid_pdrop"),
            embedding_dropout=rate(fields, "embd_pdrop"),
            logit_bias=True,
        ),
        partial_rotary=True,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    norms = {
        "attention.query_norm": "self_attn.q_layernorm",
        "attention.key_norm": "self_attn.k_layernorm",
    }
    own = (
        KeyRule("norm", "final_layernorm", NORM),
        *norm_rules(norms),
        *linear_rules("attention", "self_attn", {"out": "dense"}),
        *linear_rules("mlp", "mlp", {"up": "fc1", "down": "fc2"}),
    )
    return decoder_rules(config, head, own)


FAMILIES = {
    "phi": decoder_family(
        "Phi",
        _config,
        heads=("causal-lm", "classification", "token-classification"),
        rules=_rules,
    )
}
