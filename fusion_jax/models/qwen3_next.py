"""Qwen3-Next: layers with the gated delta rule beside gated attention, and experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder import decoder_family
from fusion_jax.models.decoder_config import FULL, Blocks, DecoderConfig
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


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    for name in (*_SIZES.values(), "full_attention_interval"):
        check_at_least(1, **{name: fields[name]})
    delta = Delta(**{ours: fields[theirs] for ours, theirs in _SIZES.items()})
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


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    rules = moe_rules(config, head)
    # What predicts further tokens is used by other programs alone.
    ignored = (*rules.ignored, r"mtp\..+")
    return replace(rules, rules=(*DELTA_RULES, *rules.rules), ignored=ignored)


_family = partial(
    decoder_family,
    rules=_rules,
    width_fields={"experts": "moe_intermediate_size", "shared": _SHARED},
)

FAMILIES = {"qwen3_next": _family("Qwen3Next", _config, answers="transformer.")}
