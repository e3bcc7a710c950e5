"""Nomic's BERT: rotary positions, gated MLPs, and no biases in the layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head, config_from_fields
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.bert_rules import BIAS, EMBEDDING_RULES, encoder_rules, head_rule
from fusion_jax.models.eurobert import LLAMA_LAYERS
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` that BERT does not have, or with another default."""

    vocab_size: int = 30528
    hidden_act: str = "silu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 2048
    head_dim: int = 0


def _config(fields: Fields) -> BertConfig:
    if "n_embd" in fields:
        raise InputError(
            "this config.json has the names of Nomic's own code, such as n_embd; only those of "
            "transformers, such as hidden_size, are read"
        )
    own = config_from_fields(_Own, fields)
    fields = {"rope_theta": 1000.0, **fields, **asdict(own)}
    config = BertConfig.from_json(fields, embedding_size=0)
    rope = Rope.from_json(fields)
    rope.check(own.head_dim or config.hidden_size // config.num_attention_heads)
    blocks = EncoderBlocks(
        positions=False,
        gated=True,
        attention_bias=False,
        mlp_bias=False,
        head_dim=own.head_dim,
        ropes=(rope,) * config.num_hidden_layers,
    )
    return replace(config, blocks=blocks)


_LAYER = "layers.{l}"
_FILES = f"encoder.{_LAYER}"
_QKV = tuple(f"{_LAYER}.attention.{part}" for part in ("query", "key", "value"))
# transformers writes the names of Nomic's own code, and reads those of its modules as well.
_BASE = (
    KeyRule("embeddings.norm", "emb_ln", NORM),
    *(KeyRule(path, f"{_FILES}.attn.Wqkv", LINEAR, joined=_QKV) for path in _QKV),
    KeyRule(f"{_LAYER}.attention.out", f"{_FILES}.attn.out_proj", LINEAR),
    KeyRule(f"{_LAYER}.mlp.up", f"{_FILES}.mlp.fc11", LINEAR),
    KeyRule(f"{_LAYER}.mlp.gate", f"{_FILES}.mlp.fc12", LINEAR),
    KeyRule(f"{_LAYER}.mlp.down", f"{_FILES}.mlp.fc2", LINEAR),
    KeyRule(f"{_LAYER}.attention_norm", f"{_FILES}.norm1", NORM),
    KeyRule(f"{_LAYER}.mlp_norm", f"{_FILES}.norm2", NORM),
    *EMBEDDING_RULES,
    *LLAMA_LAYERS,
    KeyRule(f"{_LAYER}.attention_norm", f"{_LAYER}.post_attention_layernorm", NORM),
    KeyRule(f"{_LAYER}.mlp_norm", f"{_LAYER}.post_mlp_layernorm", NORM),
    KeyRule("pooler", "pooler.dense", LINEAR),
)


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="nomic_bert.",
        layers=_BASE,
        classification=(head_rule("head.out", "classifier", LINEAR),),
        masked_lm=(
            head_rule("head.dense", "cls.predictions.transform.dense", LINEAR),
            head_rule("head.norm", "cls.predictions.transform.layer_norm", NORM),
            head_rule("head.bias", "cls.predictions.bias", BIAS),
        ),
        decoder="cls.predictions.decoder",
        decoder_bias=True,
        ignored=(r"(.+\.)?(original_)?inv_freq",),
    )


FAMILIES = {
    "nomic_bert": encoder_family(
        "NomicBert", _config, _rules, heads=("classification", "token-classification", "masked-lm")
    )
}
