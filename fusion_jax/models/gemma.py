"""Gemma, Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import (
    Blocks,
    DecoderConfig,
    layer_windows,
    ropes_by_type,
    sliding_layers,
    window_pattern,
)
from fusion_jax.models.decoder_families import decoder_family

_OPTIONAL = ("tie_word_embeddings", "attention_bias")
_DEFAULTS = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA = {
    **_DEFAULTS,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
}
_GEMMA2 = {
    **_DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = {
    **_GEMMA2,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def _read(fields: Fields, **flags: Any) -> DecoderConfig:
    if fields.get("use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is not implemented")
    config = DecoderConfig.read(fields, optional=_OPTIONAL)
    flags = {"embedding_scale": math.sqrt(config.hidden_size), "embedding_rounded": True, **flags}
    return replace(config, blocks=Blocks(norm="rms-offset", **flags))


def _gemma(fields: Fields) -> DecoderConfig:
    fields = {**_GEMMA, **fields}
    if fields["hidden_act"] == "gelu":  # what the first release said for the tanh form
        fields["hidden_act"] = "gelu_pytorch_tanh"
    return _read(fields)


def positive_number(fields: Fields, name: str) -> float | None:
    """Returns a field that is a number above 0 or null; raises `InputError` otherwise."""
    value = fields[name]
    if value is not None and not (isinstance(value, int | float) and value > 0):
        raise InputError(f"{name} must be a number above 0, or null; got {str(value)[:100]!r}")
    return None if value is None else float(value)


def _usual(pattern: int) -> Callable[[int], bool]:
    """Returns which layers have windows: all but every ``pattern``-th one."""
    return lambda layer: bool((layer + 1) % pattern)


def _both(fields: Fields, pattern: int, **flags: Any) -> DecoderConfig:
    """Reads what Gemma 2 and 3 have in common."""
    fields = {**fields, "hidden_act": fields.get("hidden_activation", "gelu_pytorch_tanh")}
    scalar = positive_number(fields, "query_pre_attn_scalar")
    flags |= {"norms": "both", "logit_cap": positive_number(fields, "final_logit_softcapping")}
    config = _read(fields, score_scale=None if scalar is None else scalar**-0.5, **flags)
    return layer_windows(config, fields, _usual(pattern))


def gemma2_config(fields: Fields) -> DecoderConfig:
    """Reads the fields of Gemma 2; raises `InputError` for an unknown variant."""
    fields = {**_GEMMA2, **fields}
    return _both(fields, 2, score_cap=positive_number(fields, "attn_logit_softcapping"))


def _gemma3(fields: Fields) -> DecoderConfig:
    fields = {**_GEMMA3, **fields}
    pattern = window_pattern(fields)
    # transformers ignores the cap of the scores in Gemma 3.
    plain = {**fields, "rope_parameters": None, "rope_scaling": None}
    config = _both(plain, pattern, query_key_norm="head")
    return ropes_by_type(
        config,
        fields,
        sliding_layers(config, fields, _usual(pattern)),
        full_theta=fields.get("rope_theta", 1e6),
        sliding_theta=fields.get("rope_local_base_freq", 1e4),
    )


_HEADS: tuple[Head, ...] = ("causal-lm", "classification", "token-classification")
FAMILIES = {
    "gemma": decoder_family("Gemma", _gemma, heads=_HEADS),
    "gemma2": decoder_family("Gemma2", gemma2_config, heads=_HEADS),
    "gemma3_text": decoder_family(
        "Gemma3",
        _gemma3,
        heads=_HEADS[:2],
        base="TextModel",
        classification="TextForSequenceClassification",
    ),
}
