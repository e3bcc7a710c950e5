"""Qwen3-Next and Qwen3.5: the gated delta rule beside gated attention, dense or with experts."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import FULL, Blocks, DecoderConfig
from fusion_jax.models.decoder_families import decoder_family
from fusion_jax.models.delta import DELTA_RULES, Delta
from fusion_jax.models.qwen import moe_rules, with_experts
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 32768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}
_SIZES = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
_LINEAR = "linear_attention"
_SHARED = "shared_expert_intermediate_size"
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_OPTIONAL = ("tie_word_embeddings", "attention_bias", _SHARED, *_EXPERTS)
_BLOCKS = Blocks(norm="rms-offset", query_key_norm="head", gated_attention=True)


_QWEN3_5 = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_QWEN3_5_MOE = {
    "vocab_size": 248320,
    "num_hidden_layers": 40,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}


def _config(fields: Fields, *, joined: bool = True) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    for name in (*_SIZES.values(), "full_attention_interval"):
        check_at_least(1, **{name: fields[name]})
    delta = Delta(**{ours: fields[theirs] for ours, theirs in _SIZES.items()}, joined=joined)
    if delta.value_heads % delta.key_heads:
        raise InputError(
            f"linear_num_value_heads {delta.value_heads} is not a multiple of "
            f"linear_num_key_heads {delta.key_heads}"
        )
    config = DecoderConfig.read(
        fields, optional=_OPTIONAL, blocks=_BLOCKS, partial_rotary=True, delta=delta
    )
    layers, interval = config.num_hidden_layers, fields["full_attention_interval"]
    usual = [_LINEAR if (i + 1) % interval else FULL for i in range(layers)]
    types = fields.get("layer_types") or usual
    if len(types) != layers or not set(types) <= {_LINEAR, FULL}:
        raise InputError(f"layer_types must be {_LINEAR} or {FULL} for each of the {layers} layers")
    config = replace(config, delta_layers=tuple(kind == _LINEAR for kind in types))
    return with_experts(config, fields)


def _qwen3_5(fields: Fields) -> DecoderConfig:
    return _config({**_QWEN3_5, **fields, "num_experts": 0, _SHARED: 0}, joined=False)


def _qwen3_5_moe(fields: Fields) -> DecoderConfig:
    always = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": None}
    return _config({**_QWEN3_5_MOE, **fields, **always}, joined=False)


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    rules = moe_rules(config, head)
    # What predicts further tokens is used by other programs alone.
    ignored = (*rules.ignored, r"mtp\..+")
    return replace(rules, rules=(*DELTA_RULES, *rules.rules), ignored=ignored)


def _text_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    """Returns the key rules of a text model, whose files may also hold a model of images."""
    rules = _rules(config, head)
    ignored = (*rules.ignored, r"model\.visual\..+")
    return replace(rules, other_prefixes=("model.language_model.",), ignored=ignored)


_WIDTHS = {"experts": "moe_intermediate_size", "shared": _SHARED}

FAMILIES = {
    "qwen3_next": decoder_family(
        "Qwen3Next", _config, rules=_rules, width_fields=_WIDTHS, answers="transformer."
    ),
    "qwen3_5_text": decoder_family(
        "Qwen3_5",
        _qwen3_5,
        heads=("causal-lm", "classification"),
        rules=_text_rules,
        base="TextModel",
        classification="TextForSequenceClassification",
    ),
    "qwen3_5_moe_text": decoder_family(
        "Qwen3_5Moe",
        _qwen3_5_moe,
        heads=("causal-lm",),
        rules=_text_rules,
        width_fields=_WIDTHS,
        base="TextModel",
    ),
}
