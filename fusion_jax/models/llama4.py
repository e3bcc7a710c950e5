"""The text model of Llama 4: experts with weighted inputs, chunks, and layers without positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.cache import Chunk
from fusion_jax.models.decoder_config import FULL, Blocks, DecoderConfig
from fusion_jax.models.decoder_families import (
    MLP_NAMES,
    decoder_family,
    decoder_rules,
    linear_rules,
)
from fusion_jax.models.moe import RouterRule
from fusion_jax.models.packed_experts import packed_rules
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "eos_token_id": 2,
}
_CHUNKED = "chunked_attention"
_SHARED = "shared_expert_intermediate_size"
_OPTIONAL = (
    "tie_word_embeddings",
    "attention_bias",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    _SHARED,
)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    fields |= {
        "num_experts": fields["num_local_experts"],
        "moe_intermediate_size": fields["intermediate_size"],
        _SHARED: fields["intermediate_size"],
        "intermediate_size": fields["intermediate_size_mlp"],
    }
    floor, scale = fields["floor_scale"], fields["attn_scale"]
    for name, value in (("floor_scale", floor), ("attn_scale", scale)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{name} must be a number above 0; got {str(value)[:100]!r}")
    blocks = Blocks(
        unit_norms=bool(fields["use_qk_norm"]),
        temperature=(float(floor), float(scale)) if fields["attn_temperature_tuning"] else None,
    )
    router = RouterRule(scores="sigmoid", weighs="inputs", shared_gated=False)
    config = DecoderConfig.read(fields, optional=_OPTIONAL, blocks=blocks, router=router)
    step, interval = fields["interleave_moe_layer_step"], fields["no_rope_layer_interval"]
    check_at_least(1, interleave_moe_layer_step=step, no_rope_layer_interval=interval)
    layers = range(config.num_hidden_layers)
    sparse = fields.get("moe_layers")
    sparse = [i for i in layers if (i + 1) % step == 0] if sparse is None else sparse
    usual = [int((i + 1) % interval != 0) for i in layers]
    turned = fields.get("no_rope_layers") or usual
    _check_list("no_rope_layers", turned, (0, 1), len(layers))
    chunk = fields["attention_chunk_size"]
    first = _CHUNKED if chunk is not None else FULL
    types = fields.get("layer_types") or [first if turned[i] else FULL for i in layers]
    _check_list("layer_types", types, (_CHUNKED, FULL), len(layers))
    windows: tuple[Chunk | None, ...] = (None,) * len(layers)
    if _CHUNKED in types:
        if chunk is None:
            raise InputError(f"{_CHUNKED} needs an attention_chunk_size")
        check_at_least(1, attention_chunk_size=chunk)
        windows = tuple(Chunk(chunk) if types[i] == _CHUNKED else None for i in layers)
    return replace(
        config,
        sparse=tuple(i in sparse for i in layers),
        ropes=tuple(
            replace(rope, interleaved=True) if rope is not None and turned[i] else None
            for i, rope in enumerate(config.ropes)
        ),
        sliding_windows=windows,
    )


def _check_list(name: str, values: Any, known: Sequence[Any], count: int) -> None:
    if not isinstance(values, list) or len(values) < count or not all(x in known for x in values):
        either = " or ".join(map(str, known))
        raise InputError(f"{name} must be {either} for each of the {count} layers")


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    theirs = "feed_forward"
    mlps = (
        *linear_rules("mlp", theirs, {"router": "router"}),
        *packed_rules(f"{theirs}.experts", interleaved=False, biases=False),
        *linear_rules("mlp.shared", f"{theirs}.shared_expert", MLP_NAMES),
        *linear_rules("mlp", theirs, MLP_NAMES),
    )
    return decoder_rules(config, head, mlps)


FAMILIES = {
    "llama4_text": decoder_family(
        "Llama4",
        _config,
        heads=("causal-lm",),
        rules=_rules,
        width_fields={"mlp": "intermediate_size_mlp"},
        experts_field="num_local_experts",
        base="TextModel",
    )
}
