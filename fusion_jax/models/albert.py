"""ALBERT: BERT with few layers, each applied several times, and embeddings of a smaller size."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head, config_from_fields
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.bert_rules import BIAS, EMBEDDING_RULES, encoder_rules, head_rule
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules

_DEFAULTS = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` that only ALBERT has."""

    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    inner_group_num: int = 1
    classifier_dropout_prob: float | None = 0.1


def _config(fields: Fields) -> BertConfig:
    own = config_from_fields(_Own, fields)
    steps, groups, inner = own.num_hidden_layers, own.num_hidden_groups, own.inner_group_num
    if groups > steps:
        raise InputError(
            f"num_hidden_groups must be at most num_hidden_layers, {steps}; got {groups}"
        )
    order = [int(i / (steps / groups)) for i in range(steps)]  # rounded as in transformers
    schedule = tuple(inner * group + i for group in order for i in range(inner))
    blocks = EncoderBlocks(mlp_dropout=0.0, project=True, schedule=schedule, inner=inner)
    dropout = {"classifier_dropout": own.classifier_dropout_prob}
    return BertConfig.from_json({**_DEFAULTS, **fields}, blocks=blocks, **dropout)


_NAMES = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.out": "attention.dense",
    "mlp.up": "ffn",
    "mlp.down": "ffn_output",
}
_NORMS = {"attention_norm": "attention.LayerNorm", "mlp_norm": "full_layer_layer_norm"}


def _layer(number: int, inner: int) -> tuple[KeyRule, ...]:
    group, own = divmod(number, inner)
    theirs = f"encoder.albert_layer_groups.{group}.albert_layers.{own}"
    return tuple(
        KeyRule(f"layers.{number}.{a}", f"{theirs}.{b}", leaves)
        for names, leaves in ((_NAMES, LINEAR), (_NORMS, NORM))
        for a, b in names.items()
    )


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    layers, inner = config.blocks.schedule, config.blocks.inner
    return encoder_rules(
        config,
        head,
        prefix="albert.",
        layers=(
            *EMBEDDING_RULES,
            KeyRule("embeddings.project", "encoder.embedding_hidden_mapping_in", LINEAR),
            *(rule for number in sorted(set(layers)) for rule in _layer(number, inner)),
            KeyRule("pooler", "pooler", LINEAR),
        ),
        classification=(head_rule("head.out", "classifier", LINEAR),),
        masked_lm=(
            head_rule("head.dense", "predictions.dense", LINEAR),
            head_rule("head.norm", "predictions.LayerNorm", NORM),
            head_rule("head.bias", "predictions.bias", BIAS),
        ),
        decoder="predictions.decoder",
        decoder_bias=True,
        ignored=(r"(albert\.)?pooler\.(weight|bias)", r"(predictions|sop_classifier)\..+"),
    )


FAMILIES = {"albert": encoder_family("Albert", _config, _rules)}
