"""MPNet: BERT's layers with a bias for relative positions, and RoBERTa's positions and heads."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_rules import (
    ENCODER_RULES,
    ROBERTA_LM,
    TWO_LAYERS,
    encoder_rules,
)
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules

_BUCKETS = 32
_ATTENTION = "encoder.layer.{l}.attention"
_LAYERS = (
    KeyRule("relative", "encoder.relative_attention_bias", EMBED),
    KeyRule("layers.{l}.attention.query", f"{_ATTENTION}.attn.q", LINEAR),
    KeyRule("layers.{l}.attention.key", f"{_ATTENTION}.attn.k", LINEAR),
    KeyRule("layers.{l}.attention.value", f"{_ATTENTION}.attn.v", LINEAR),
    KeyRule("layers.{l}.attention.out", f"{_ATTENTION}.attn.o", LINEAR),
    KeyRule("layers.{l}.attention_norm", f"{_ATTENTION}.LayerNorm", NORM),
    *ENCODER_RULES,
)


def _config(config: Fields) -> BertConfig:
    # transformers computes 32 buckets, whatever the configuration says.
    if config.get("relative_attention_num_buckets", _BUCKETS) != _BUCKETS:
        raise InputError(f"relative_attention_num_buckets must be {_BUCKETS}")
    own = {
        "type_vocab_size": 0,
        "shifted_positions": True,
        "relative_buckets": _BUCKETS,
        "head_act": "tanh",
        "lm_act": "gelu",
        "classifier_dropout": None,
    }
    # transformers counts positions from 2, without tokens of id 1, whatever pad_token_id says.
    fields = {"vocab_size": 30527, **config, "pad_token_id": 1}
    return BertConfig.from_json(fields, **own)


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="mpnet.",
        layers=_LAYERS,
        classification=TWO_LAYERS,
        masked_lm=ROBERTA_LM,
        decoder="lm_head.decoder",
        decoder_bias=True,
    )


FAMILIES = {"mpnet": encoder_family("MPNet", _config, _rules)}
