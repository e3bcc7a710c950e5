"""ModernBERT: norms first, rotary positions, windows in most layers, and gated MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head, config_from_fields
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.bert_rules import BIAS, encoder_rules, head_rule
from fusion_jax.models.decoder_config import FULL, SLIDING
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` whose names or defaults are ModernBERT's own."""

    vocab_size: int = 50368
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    local_attention: int = 128
    sliding_window: int = -1
    """The largest distance in layers with windows, instead of half of ``local_attention``."""
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] = ()
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"

    def types(self) -> Sequence[str]:
        """Returns which layers attend to all positions, and which to near ones."""
        types, layers, step = (
            self.layer_types,
            self.num_hidden_layers,
            self.global_attn_every_n_layers,
        )
        types = types or [SLIDING if i % step else FULL for i in range(layers)]
        if len(types) != layers or not set(types) <= {SLIDING, FULL}:
            raise InputError(
                f"layer_types must be {SLIDING} or {FULL} for each of the {layers} layers"
            )
        return types


_THETAS = {FULL: ("global_rope_theta", 160000.0), SLIDING: ("local_rope_theta", 10000.0)}


def _rope(fields: Fields, kind: str, features: int) -> Rope:
    """Returns the rotary embedding of the layers of a type."""
    given = fields.get("rope_parameters") or {}
    if not set(given) <= {FULL, SLIDING}:
        raise InputError(f"rope_parameters of ModernBERT must have only {FULL} and {SLIDING}")
    name, theta = _THETAS[kind]
    own = {"rope_theta": fields.get(name, theta), **(given.get(kind) or {})}
    scaling = fields.get("rope_scaling") or {}
    if "type" in scaling and "rope_type" not in scaling:
        raise InputError(
            "rope_scaling of ModernBERT needs a rope_type; transformers ignores a type"
        )
    own |= scaling
    length = fields.get("max_position_embeddings") or _Own.max_position_embeddings
    rope = Rope.from_json({"rope_parameters": own, "max_position_embeddings": length})
    rope.check(features)
    return rope


def _config(fields: Fields) -> BertConfig:
    own = config_from_fields(_Own, fields)
    if own.mlp_dropout:
        raise InputError("an mlp_dropout other than 0, inside of the MLPs, is not implemented")
    named = {
        "type_vocab_size": 0,
        "hidden_act": own.hidden_activation,
        "hidden_dropout_prob": own.attention_dropout,
        "attention_probs_dropout_prob": own.attention_dropout,
        "layer_norm_eps": own.norm_eps,
        "pooled": False,
        "head_act": own.classifier_activation,
        "lm_act": own.classifier_activation,
        "embedding_size": 0,
    }
    config = BertConfig.from_json({"pad_token_id": 50283, **fields, **asdict(own)}, **named)
    window = own.local_attention // 2 if own.sliding_window < 0 else own.sliding_window
    types, features = own.types(), config.hidden_size // config.num_attention_heads
    ropes = {kind: _rope(fields, kind, features) for kind in set(types)}
    blocks = EncoderBlocks(
        norm="layer" if own.norm_bias else "layer-unbiased",
        norm_first=True,
        first_norm=False,
        positions=False,
        embedding_dropout=own.embedding_dropout,
        mlp_dropout=0.0,
        gated=True,
        attention_bias=own.attention_bias,
        mlp_bias=own.mlp_bias,
        ropes=tuple(ropes[kind] for kind in types),
        windows=tuple(window if kind == SLIDING else None for kind in types),
        head_norm=True,
        head_input_dropout=0.0,
        head_bias=own.classifier_bias,
        pooling="mean" if own.classifier_pooling == "mean" else "first",
        lm_bias=own.decoder_bias,
    )
    return replace(config, blocks=blocks)


_LAYER = "layers.{l}"
_QKV = tuple(f"{_LAYER}.attention.{part}" for part in ("query", "key", "value"))
_GATED = (f"{_LAYER}.mlp.gate", f"{_LAYER}.mlp.up")
_LAYERS = (
    KeyRule("embeddings.word", "embeddings.tok_embeddings", EMBED),
    KeyRule("embeddings.norm", "embeddings.norm", NORM),
    *(KeyRule(path, f"{_LAYER}.attn.Wqkv", LINEAR, joined=_QKV) for path in _QKV),
    KeyRule(f"{_LAYER}.attention.out", f"{_LAYER}.attn.Wo", LINEAR),
    KeyRule(f"{_LAYER}.attention_norm", f"{_LAYER}.attn_norm", NORM),
    *(KeyRule(path, f"{_LAYER}.mlp.Wi", LINEAR, joined=_GATED) for path in _GATED),
    KeyRule(f"{_LAYER}.mlp.down", f"{_LAYER}.mlp.Wo", LINEAR),
    KeyRule(f"{_LAYER}.mlp_norm", f"{_LAYER}.mlp_norm", NORM),
    KeyRule("norm", "final_norm", NORM),
)
_TRANSFORM = (
    head_rule("head.dense", "head.dense", LINEAR),
    head_rule("head.norm", "head.norm", NORM),
)
_CLASSES = (*_TRANSFORM, head_rule("head.out", "classifier", LINEAR))


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="model.",
        layers=_LAYERS,
        classification=_CLASSES,
        tokens=_CLASSES,
        answers=_CLASSES,
        masked_lm=(*_TRANSFORM, head_rule("head.bias", "decoder.bias", BIAS)),
        decoder="decoder",
        ignored=(r"head\.(dense|norm)\.(weight|bias)", r"decoder\.(weight|bias)"),
    )


FAMILIES = {"modernbert": encoder_family("ModernBert", _config, _rules, pooler=False)}
