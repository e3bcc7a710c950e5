"""Llama, and what it is by other names: Mistral, Ministral; Arcee; with experts Mixtral."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows
from fusion_jax.models.decoder_families import decoder_family, decoder_rules, linear_rules
from fusion_jax.models.rules import KeyRules

_TIED = "tie_word_embeddings"
_LLAMA = {"max_position_embeddings": 2048, "eos_token_id": 2}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
    "eos_token_id": 2,
}
_ARCEE = {
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "eos_token_id": 128001,
}
_MIXTRAL = {
    **_MISTRAL,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def _llama(fields: Fields, blocks: Blocks | None = None) -> DecoderConfig:
    optional = (_TIED, "attention_bias", "mlp_bias")
    return DecoderConfig.read({**_LLAMA, **fields}, optional=optional, blocks=blocks)


def _arcee(fields: Fields) -> DecoderConfig:
    return _llama({**_ARCEE, **fields}, Blocks(gated=False))


def _mistral(fields: Fields) -> DecoderConfig:
    fields = {**_MISTRAL, **fields}
    return layer_windows(DecoderConfig.read(fields), fields, lambda layer: True)


def _mixtral(fields: Fields) -> DecoderConfig:
    fields = {**_MIXTRAL, **fields, "layer_types": None}  # transformers ignores the types
    fields["num_experts"] = fields.get("num_experts") or fields["num_local_experts"]
    optional = (_TIED, "num_experts", "num_experts_per_tok", "norm_topk_prob")
    config = DecoderConfig.read(fields, optional=(*optional, "router_jitter_noise"))
    return layer_windows(config, fields, lambda layer: True)


def _mixtral_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    theirs = "block_sparse_moe"
    mlps = (
        *linear_rules("mlp", theirs, {"router": "gate"}),
        *linear_rules(
            "mlp.experts", f"{theirs}.experts.{{e}}", {"gate": "w1", "up": "w3", "down": "w2"}
        ),
    )
    return decoder_rules(config, head, mlps)


FAMILIES = {
    "arcee": decoder_family("Arcee", _arcee, answers="transformer."),
    "llama": decoder_family("Llama", _llama, answers="transformer."),
    "mistral": decoder_family("Mistral", _mistral),
    "ministral": decoder_family("Ministral", _mistral, answers="transformer."),
    "mixtral": decoder_family(
        "Mixtral", _mixtral, rules=_mixtral_rules, experts_field="num_local_experts"
    ),
}
