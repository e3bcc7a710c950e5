"""OLMoE: experts, norms of all queries and keys at once, and limits of them and of the values."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields
from fusion_jax.models.decoder_config import Blocks, DecoderConfig
from fusion_jax.models.decoder_families import decoder_family
from fusion_jax.models.qwen import moe_rules

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}
_OPTIONAL = (
    "tie_word_embeddings",
    "attention_bias",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    fields["num_experts"] = fields.get("num_local_experts") or fields["num_experts"]
    clip = fields.get("clip_qkv")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float)):
        raise InputError(f"clip_qkv must be a number; got {str(clip)[:100]!r}")
    if clip is not None and not clip > 0:
        raise InputError(f"clip_qkv must be above 0; got {clip}")
    limit = None if clip is None else float(clip)
    blocks = Blocks(query_key_norm="all", clip_qkv=limit)
    return DecoderConfig.read(fields, optional=_OPTIONAL, blocks=blocks)


FAMILIES = {"olmoe": decoder_family("Olmoe", _config, heads=("causal-lm",), rules=moe_rules)}
