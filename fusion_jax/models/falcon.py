"""Falcon: attention and MLP in parallel; the forms of 7B, of 40B and 11B, and of RW (ALiBi)."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate
from fusion_jax.models.decoder_families import (
    QUERY_KEY_VALUE,
    decoder_family,
    joined_rules,
    renamed_rules,
)
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "multi_query": True,
    "parallel_attn": True,
    "activation": "gelu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "eos_token_id": 11,
}
_NAMES = {
    "word": "word_embeddings",
    "norm": "ln_f",
    "attention.out": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_TWO_NORMS = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
# A buffer in old checkpoints.
_IGNORED = (r"(transformer\.)?h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    new, parallel = bool(fields.get("new_decoder_architecture")), bool(fields["parallel_attn"])
    norms = fields.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if new and not parallel:
        raise InputError("new_decoder_architecture needs parallel_attn")
    if parallel and norms not in ((1, 2) if new else (1,)):
        raise InputError(
            "num_ln_in_parallel_attn must be 1, or 2 with new_decoder_architecture; got "
            f"{str(norms)[:100]!r}"
        )
    alibi, bias = bool(fields.get("alibi")), bool(fields.get("bias"))
    size = fields.get("n_embed") or fields["hidden_size"]
    own = {
        "hidden_size": size,
        "intermediate_size": fields.get("ffn_hidden_size") or 4 * size,
        "hidden_act": fields["activation"],
        "rms_norm_eps": fields["layer_norm_epsilon"],
        "num_key_value_heads": fields.get("num_kv_heads") if new else None,
        "head_dim": None,
        "attention_bias": bias,
        "mlp_bias": bias,
        # transformers has no dropout of attention with rotary positions.
        "attention_dropout": rate(fields, "attention_dropout") if alibi else 0.0,
    }
    if not new and fields["multi_query"]:
        own["num_key_value_heads"] = 1
    return DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            norms="shared" if parallel and norms == 1 else "before",
            parallel=parallel,
            gated=False,
            residual_dropout=rate(fields, "hidden_dropout"),
            attention_out_dropout=None if parallel else rate(fields, "attention_dropout"),
            joint_dropout=parallel,
            alibi="rounded" if alibi else None,
        ),
        rotary=not alibi,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    blocks = config.blocks
    return renamed_rules(
        config,
        head,
        {**_NAMES, **(_TWO_NORMS if blocks.parallel and blocks.norms == "before" else _NORMS)},
        prefix="transformer.",
        layer="h.{l}",
        own=joined_rules(
            "attention",
            "self_attention.query_key_value",
            QUERY_KEY_VALUE,
            layer="h.{l}",
            groups=config.num_key_value_heads,
        ),
        ignored=_IGNORED,
    )


FAMILIES = {
    "falcon": decoder_family(
        "Falcon", _config, rules=_rules, tokens="classifier", width_field="ffn_hidden_size"
    )
}
