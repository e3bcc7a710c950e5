"""EuroBERT: Llama's layers, with attention in both directions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head, config_from_fields
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.bert_rules import BIAS, encoder_rules, head_rule
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` that BERT does not have, or with another default."""

    vocab_size: int = 128256
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    classifier_pooling: Literal["bos", "mean", "late"] = "late"


def _config(fields: Fields) -> BertConfig:
    own = config_from_fields(_Own, fields)
    named = {
        "type_vocab_size": 0,
        "embedding_size": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": own.attention_dropout,
        "classifier_dropout": None,
        "layer_norm_eps": own.rms_norm_eps,
        "pooled": False,
        "head_act": "gelu",
    }
    fields = {"pad_token_id": 128001, **fields, **asdict(own)}
    config = BertConfig.from_json(fields, **named)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if own.num_key_value_heads and heads % own.num_key_value_heads:
        raise InputError(
            f"num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {own.num_key_value_heads}"
        )
    rope = Rope.from_json(fields)
    rope.check(own.head_dim or config.hidden_size // heads)
    blocks = EncoderBlocks(
        norm="rms",
        norm_first=True,
        positions=False,
        embedding_norm=False,
        gated=True,
        attention_bias=own.attention_bias,
        mlp_bias=own.mlp_bias,
        head_dim=own.head_dim,
        key_heads=own.num_key_value_heads,
        ropes=(rope,) * layers,
        pooling="first" if own.classifier_pooling == "bos" else own.classifier_pooling,
        lm_transform=False,
        lm_bias=own.mlp_bias,
    )
    return replace(config, blocks=blocks)


_LAYER = "layers.{l}"
_LINEARS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
LLAMA_LAYERS = tuple(KeyRule(f"{_LAYER}.{a}", f"{_LAYER}.{b}", LINEAR) for a, b in _LINEARS.items())
_BASE = (
    KeyRule("embeddings.word", "embed_tokens", EMBED),
    *LLAMA_LAYERS,
    *(KeyRule(f"{_LAYER}.{a}", f"{_LAYER}.{b}", NORM) for a, b in _NORMS.items()),
    KeyRule("norm", "norm", NORM),
)


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="model.",
        layers=_BASE,
        classification=(
            head_rule("head.dense", "dense", LINEAR),
            head_rule("head.out", "classifier", LINEAR),
        ),
        masked_lm=(head_rule("head.bias", "lm_head.bias", BIAS),),
        decoder="lm_head",
        ignored=(r"lm_head\.weight", r"dense\.(weight|bias)", r"(model\.)?rotary_emb\.inv_freq"),
    )


FAMILIES = {
    "eurobert": encoder_family(
        "EuroBert",
        _config,
        _rules,
        pooler=False,
        heads=("classification", "token-classification", "masked-lm"),
    )
}
