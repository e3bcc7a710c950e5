"""Hunyuan, dense: Llama with norms of queries and keys after the rotary positions."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import decoder_family, decoder_rules, norm_rules
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 290943,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BLOCKS = Blocks(query_key_norm="head", normed_last=True)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    alpha = rope.get("alpha") if rope.get("rope_type", rope.get("type")) == "dynamic" else None
    if alpha:  # The base grows once, for texts of all lengths.
        rope |= {"rope_type": "default"}
        fields |= {"rope_scaling": None, "rope_parameters": rope}
    optional = ("tie_word_embeddings", "attention_bias")
    config = DecoderConfig.read(fields, optional=optional, blocks=_BLOCKS)
    if not alpha:
        return config
    if not isinstance(alpha, int | float) or alpha < 0 or config.head_dim < 4:
        raise InputError(
            "alpha of the rotary embedding must be a number above 0, and head_dim at least 4; got "
            f"{str(alpha)[:100]!r} and {config.head_dim}"
        )
    power = config.head_dim / (config.head_dim - 2)
    ropes = [r and replace(r, rope_theta=r.rope_theta * alpha**power) for r in config.ropes]
    return replace(config, ropes=tuple(ropes))


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    names = {
        "attention.query_norm": "self_attn.query_layernorm",
        "attention.key_norm": "self_attn.key_layernorm",
    }
    return decoder_rules(config, head, norm_rules(names))


FAMILIES = {
    "hunyuan_v1_dense": decoder_family(
        "HunYuanDenseV1", _config, heads=("causal-lm", "classification"), rules=_rules
    )
}
