"""BLOOM: biases of the scores instead of positions, and a norm of the embeddings."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate, renamed_fields
from fusion_jax.models.decoder_families import (
    QUERY_KEY_VALUE,
    decoder_family,
    joined_rules,
    renamed_rules,
)
from fusion_jax.models.rules import KeyRules

_FIELDS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "layer_norm_epsilon": 1e-5,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
_NAMES = {
    "word": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "norm": "ln_f",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **renamed_fields(fields, _FIELDS)}
    if fields.get("slow_but_exact") and fields.get("pretraining_tp", 1) != 1:
        raise InputError("slow_but_exact is not implemented; false computes the same but for bits")
    size = fields.get("n_embed") or fields["hidden_size"]
    own = {
        "hidden_size": size,
        "intermediate_size": 4 * size,
        "hidden_act": "gelu_new",
        "rms_norm_eps": fields["layer_norm_epsilon"],
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": True,
        "mlp_bias": True,
    }
    return DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            gated=False,
            residual_dropout=rate(fields, "hidden_dropout"),
            residual_normed=bool(fields.get("apply_residual_connection_post_layernorm")),
            embedding_norm=True,
            alibi="plain",
        ),
        rotary=False,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    return renamed_rules(
        config,
        head,
        _NAMES,
        prefix="transformer.",
        layer="h.{l}",
        own=joined_rules(
            "attention",
            "self_attention.query_key_value",
            QUERY_KEY_VALUE,
            layer="h.{l}",
            groups=config.num_attention_heads,
        ),
    )


FAMILIES = {
    "bloom": decoder_family("Bloom", _config, rules=_rules, tokens="classifier", width_field=None)
}
