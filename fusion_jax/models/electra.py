"""ELECTRA: BERT's layers, embeddings of a smaller size, and a head of two layers."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_rules import (
    BIAS,
    ENCODER_RULES,
    TWO_LAYERS,
    encoder_rules,
    head_rule,
)
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules

_DEFAULTS = {
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def _config(config: Fields) -> BertConfig:
    own = {"pooled": False, "head_act": "gelu", "lm_act": "gelu"}
    return BertConfig.from_json({**_DEFAULTS, **config}, **own)


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="electra.",
        layers=(*ENCODER_RULES, KeyRule("embeddings.project", "embeddings_project", LINEAR)),
        classification=TWO_LAYERS,
        masked_lm=(
            head_rule("head.dense", "generator_predictions.dense", LINEAR),
            head_rule("head.norm", "generator_predictions.LayerNorm", NORM),
            head_rule("head.bias", "generator_lm_head.bias", BIAS),
        ),
        decoder="generator_lm_head",
    )


FAMILIES = {"electra": encoder_family("Electra", _config, _rules, pooler=False)}
