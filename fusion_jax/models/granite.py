"""Granite, dense and with experts: factors of embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import (
    decoder_family,
    decoder_rules,
    joined_rules,
    linear_rules,
)
from fusion_jax.models.rules import KeyRules

# Our names of the factors.
_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "score_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_divisor",
}
_DEFAULTS = {"eos_token_id": 2, "max_position_embeddings": 2048}


def _blocks(fields: Fields) -> Blocks:
    factors: dict[str, Any] = {ours: fields.get(theirs, 1.0) for theirs, ours in _FACTORS.items()}
    for theirs, ours in _FACTORS.items():
        value = factors[ours]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value:
            raise InputError(f"{theirs} must be a number other than 0; got {str(value)[:100]!r}")
    factors = {name: float(value) for name, value in factors.items()}
    return Blocks(**factors)


def _granite(fields: Fields) -> DecoderConfig:
    optional = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    return DecoderConfig.read({**_DEFAULTS, **fields}, optional=optional, blocks=_blocks(fields))


def _granitemoe(fields: Fields) -> DecoderConfig:
    fields = {"num_local_experts": 8, "num_experts_per_tok": 2, **_DEFAULTS, **fields}
    fields |= {"num_experts": fields["num_local_experts"], "norm_topk_prob": True}
    optional = ("tie_word_embeddings", "attention_bias", "num_experts", "num_experts_per_tok")
    optional = (*optional, "norm_topk_prob")
    return DecoderConfig.read(fields, optional=optional, blocks=_blocks(fields))


def _granitemoe_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    theirs = "block_sparse_moe"
    packed = (
        *joined_rules("mlp.experts", f"{theirs}.input_linear", ("gate", "up")),
        *linear_rules("mlp.experts", theirs, {"down": "output_linear"}),
    )
    mlps = (
        *linear_rules("mlp", theirs, {"router": "router.layer"}),
        *(replace(rule, packed=True) for rule in packed),
    )
    return decoder_rules(config, head, mlps)


FAMILIES = {
    "granite": decoder_family("Granite", _granite, heads=("causal-lm",)),
    "granitemoe": decoder_family(
        "GraniteMoe",
        _granitemoe,
        heads=("causal-lm",),
        rules=_granitemoe_rules,
        experts_field="num_local_experts",
    ),
}
