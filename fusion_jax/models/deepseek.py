"""DeepSeek-V3, and GLM-4 with experts: routers with corrections, groups, and shared experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, count
from fusion_jax.models.decoder_families import (
    MLP_NAMES,
    decoder_family,
    decoder_rules,
    linear_rules,
)
from fusion_jax.models.latent_attention import LATENT_RULES, Latent
from fusion_jax.models.moe import RouterRule
from fusion_jax.models.rules import KeyRule, KeyRules, Leaf

_DEEPSEEK = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
}
_GLM = {
    "vocab_size": 151552,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
}
_COMMON = {"n_shared_experts": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1}
_SHARED = "shared_expert_intermediate_size"
_OPTIONAL = (
    "tie_word_embeddings",
    "attention_bias",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    _SHARED,
)


def _read(fields: dict[str, Any], **options: Any) -> DecoderConfig:
    """Reads a configuration whose router and experts are DeepSeek-V3's."""
    fields["num_experts"] = fields.get("num_local_experts") or count(fields, "n_routed_experts", 1)
    one = count(fields, "moe_intermediate_size", 1)
    fields[_SHARED] = count(fields, "n_shared_experts", 1) * one
    scale = fields["routed_scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise InputError(f"routed_scaling_factor must be a number; got {str(scale)[:100]!r}")
    router = RouterRule(
        scores="sigmoid",
        correction=True,
        groups=count(fields, "n_group", 1),
        used_groups=count(fields, "topk_group", 1),
        scale=float(scale),
        shared_gated=False,
    )
    config = DecoderConfig.read(fields, optional=_OPTIONAL, router=router, **options)
    dense = count(fields, "first_k_dense_replace")
    sparse = tuple(i >= dense for i in range(config.num_hidden_layers))
    further = max(count(fields, name) for name in ("num_nextn_predict_layers", "num_mtp_layers"))
    return replace(config, sparse=sparse, further_layers=further)


def _glm(fields: Fields) -> DecoderConfig:
    fields = {**_COMMON, **_GLM, **fields}
    blocks = Blocks(query_key_norm="head" if fields.get("use_qk_norm") else None)
    return _read(fields, blocks=blocks, partial_rotary=True, out_bias=False)


def _deepseek(fields: Fields) -> DecoderConfig:
    fields = {**_COMMON, **_DEEPSEEK, **fields}
    rank = None if fields["q_lora_rank"] is None else count(fields, "q_lora_rank", 1)
    latent = Latent(
        query_rank=rank,
        rank=count(fields, "kv_lora_rank", 1),
        plain=count(fields, "qk_nope_head_dim"),
        values=count(fields, "v_head_dim", 1),
    )
    heads = fields["num_attention_heads"]
    if fields.get("num_key_value_heads") not in (None, heads):
        raise InputError(
            f"num_key_value_heads must be num_attention_heads, {heads}, as each head has its keys"
        )
    fields |= {"head_dim": count(fields, "qk_rope_head_dim", 1), "num_key_value_heads": heads}
    config = _read(fields, latent=latent)
    interleaved = bool(fields["rope_interleave"])
    ropes = [replace(rope, interleaved=interleaved) for rope in config.ropes if rope is not None]
    return replace(config, ropes=tuple(ropes))


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    correction = KeyRule(
        "layers.{l}.mlp.correction",
        "layers.{l}.mlp.gate.e_score_correction_bias",
        {"": Leaf(("",))},
    )
    mlps = (
        correction,
        *LATENT_RULES,
        *linear_rules("mlp", "mlp", {"router": "gate"}),
        *linear_rules("mlp.experts", "mlp.experts.{e}", MLP_NAMES),
        *linear_rules("mlp.shared", "mlp.shared_experts", MLP_NAMES),
        *linear_rules("mlp", "mlp", MLP_NAMES),
    )
    rules = decoder_rules(config, head, mlps)
    # The layers after the last one predict further tokens, which is used by other programs alone.
    further = "|".join(str(config.num_hidden_layers + i) for i in range(config.further_layers))
    more = (rf"(model\.)?layers\.({further})\..+",) if further else ()
    return replace(rules, ignored=(*rules.ignored, *more))


def _family(*args: Any, **options: Any) -> Any:
    family = decoder_family(
        *args,
        rules=_rules,
        experts_field="n_routed_experts",
        width_fields={"experts": "moe_intermediate_size", "shared": "moe_intermediate_size"},
        **options,
    )
    return replace(family, width_factor=_shared_experts)


def _shared_experts(config: DecoderConfig, path: str) -> int:
    """Returns how many experts an MLP stands for: one for all shared experts, which are alike."""
    if not path.endswith(".shared"):
        return 1
    return config.shared_expert_intermediate_size // config.moe_intermediate_size


FAMILIES = {
    "deepseek_v3": _family(
        "DeepseekV3", _deepseek, heads=("causal-lm", "classification", "token-classification")
    ),
    "glm4_moe": _family("Glm4Moe", _glm, heads=("causal-lm",)),
}
