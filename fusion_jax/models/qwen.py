"""Qwen2 and Qwen3, dense and with experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fusion_jax.errors import check_at_least
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows
from fusion_jax.models.decoder_families import (
    MLP_NAMES,
    decoder_family,
    decoder_rules,
    linear_rules,
)
from fusion_jax.models.rules import KeyRules

_TIED = "tie_word_embeddings"
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_SHARED = "shared_expert_intermediate_size"
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
_QWEN_MOE = {**_QWEN, "hidden_size": 2048, "num_hidden_layers": 24}
_QWEN2_MOE = {
    **_QWEN_MOE,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    _SHARED: 5632,
}
_QWEN3_MOE = {
    **_QWEN_MOE,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_NORMED = Blocks(query_key_norm="head")


def _windowed(
    config: DecoderConfig, fields: Fields, sliding: Callable[[int], bool] | None = None
) -> DecoderConfig:
    """Returns a configuration with windows, for which Qwen has a switch."""
    first = fields.get("max_window_layers", 28)
    used = {
        **fields,
        "sliding_window": fields.get("use_sliding_window") and fields.get("sliding_window"),
    }
    return layer_windows(config, used, sliding or (lambda layer: layer >= first))


def _qwen2(fields: Fields) -> DecoderConfig:
    fields = {**_QWEN, **fields}
    config = DecoderConfig.read(fields, qkv_bias=True, out_bias=False)
    return _windowed(config, fields)


def _qwen3(fields: Fields) -> DecoderConfig:
    fields = {**_QWEN, "head_dim": 128, **fields}
    config = DecoderConfig.read(fields, optional=(_TIED, "attention_bias"), blocks=_NORMED)
    return _windowed(config, fields)


def with_experts(config: DecoderConfig, fields: Fields) -> DecoderConfig:
    """Returns a configuration with experts in every n-th layer, except for listed ones."""
    step, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers") or ()
    check_at_least(1, decoder_sparse_step=step)
    layers = range(config.num_hidden_layers)
    sparse = [config.num_experts > 0 and (i + 1) % step == 0 and i not in dense for i in layers]
    return replace(config, sparse=tuple(sparse))


def _qwen2_moe(fields: Fields) -> DecoderConfig:
    fields = {**_QWEN2_MOE, **fields}
    bias = bool(fields.get("qkv_bias", True))
    config = DecoderConfig.read(
        fields, optional=(_TIED, _SHARED, *_EXPERTS), qkv_bias=bias, out_bias=False
    )
    first = fields.get("max_window_layers", 28)
    config = _windowed(config, fields, lambda layer: layer < first and layer % 2 == 0)
    return with_experts(config, fields)


def _qwen3_moe(fields: Fields) -> DecoderConfig:
    fields = {**_QWEN3_MOE, **fields, "layer_types": None}  # transformers ignores the types
    fields["num_experts"] = fields.get("num_local_experts") or fields["num_experts"]
    optional = (_TIED, "attention_bias", *_EXPERTS)
    config = DecoderConfig.read(fields, optional=optional, blocks=_NORMED)
    return with_experts(_windowed(config, fields, lambda layer: True), fields)


def moe_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    """Returns the key rules of a decoder with experts, whose tensors have Qwen's names."""
    mlps = (
        *linear_rules("mlp", "mlp", {"router": "gate", "shared_gate": "shared_expert_gate"}),
        *linear_rules("mlp.experts", "mlp.experts.{e}", MLP_NAMES),
        *linear_rules("mlp.shared", "mlp.shared_expert", MLP_NAMES),
        *linear_rules("mlp", "mlp", MLP_NAMES),
    )
    return decoder_rules(config, head, mlps)


_WIDTHS = {"experts": "moe_intermediate_size", "shared": _SHARED}
_family = partial(decoder_family, rules=moe_rules, width_fields=_WIDTHS)

FAMILIES = {
    "qwen2": decoder_family("Qwen2", _qwen2, answers="transformer."),
    "qwen2_moe": _family("Qwen2Moe", _qwen2_moe),
    "qwen3": decoder_family("Qwen3", _qwen3, answers="transformer."),
    "qwen3_moe": _family("Qwen3Moe", _qwen3_moe, answers="transformer."),
}
