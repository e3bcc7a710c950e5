"""DistilBERT: BERT's layers under other names, without token types and without a pooler."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.bert_rules import (
    BIAS,
    EMBEDDING_RULES,
    encoder_rules,
    head_rule,
)
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules

# BERT's names of the fields.
_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "seq_classif_dropout": "sequence_dropout",
    "qa_dropout": "answer_dropout",
}
_LAYER = "transformer.layer.{l}"
_LAYERS = (
    *EMBEDDING_RULES,
    KeyRule("layers.{l}.attention.query", f"{_LAYER}.attention.q_lin", LINEAR),
    KeyRule("layers.{l}.attention.key", f"{_LAYER}.attention.k_lin", LINEAR),
    KeyRule("layers.{l}.attention.value", f"{_LAYER}.attention.v_lin", LINEAR),
    KeyRule("layers.{l}.attention.out", f"{_LAYER}.attention.out_lin", LINEAR),
    KeyRule("layers.{l}.attention_norm", f"{_LAYER}.sa_layer_norm", NORM),
    KeyRule("layers.{l}.mlp.up", f"{_LAYER}.ffn.lin1", LINEAR),
    KeyRule("layers.{l}.mlp.down", f"{_LAYER}.ffn.lin2", LINEAR),
    KeyRule("layers.{l}.mlp_norm", f"{_LAYER}.output_layer_norm", NORM),
)


def _config(config: Fields) -> BertConfig:
    fields = {_NAMES.get(name, name): value for name, value in config.items()}
    defaults = {"num_hidden_layers": 6, "sequence_dropout": 0.2, "answer_dropout": 0.1}
    own = {
        "type_vocab_size": 0,
        "pooled": False,
        "head_act": "relu",
        "layer_norm_eps": 1e-12,
        "classifier_dropout": None,
    }
    blocks = EncoderBlocks(head_input_dropout=0.0)
    return BertConfig.from_json({**defaults, **fields}, **own, blocks=blocks)


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="distilbert.",
        layers=_LAYERS,
        classification=(
            head_rule("head.dense", "pre_classifier", LINEAR),
            head_rule("head.out", "classifier", LINEAR),
        ),
        masked_lm=(
            head_rule("head.dense", "vocab_transform", LINEAR),
            head_rule("head.norm", "vocab_layer_norm", NORM),
            head_rule("head.bias", "vocab_projector.bias", BIAS),
        ),
        decoder="vocab_projector",
    )


FAMILIES = {
    "distilbert": encoder_family(
        "DistilBert", _config, _rules, width_field="hidden_dim", pooler=False
    )
}
