"""GPT-NeoX and Pythia: attention and MLP in parallel, each behind a layer norm."""

from __future__ import annotations

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
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "classifier_dropout": 0.1,
    "attention_bias": True,
    "use_parallel_residual": True,
    "rotary_emb_base": 1e4,
    "rotary_pct": 0.25,
    "eos_token_id": 2,
}
_NAMES = {
    "word": "embed_in",
    "norm": "final_layer_norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_LAYER = "layers.{l}"
# Buffers in old checkpoints.
_IGNORED = (r"(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    own = {
        "rms_norm_eps": fields["layer_norm_eps"],
        "rope_theta": fields["rotary_emb_base"],
        "partial_rotary_factor": fields["rotary_pct"],
        "mlp_bias": True,
        "head_dim": None,
        "num_key_value_heads": None,
    }
    return DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            parallel=bool(fields["use_parallel_residual"]),
            gated=False,
            residual_dropout=rate(fields, "hidden_dropout"),
            embedding_dropout=rate(fields, "hidden_dropout"),
        ),
        partial_rotary=True,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    own = joined_rules(
        "attention",
        "attention.query_key_value",
        QUERY_KEY_VALUE,
        groups=config.num_attention_heads,
    )
    return renamed_rules(
        config,
        head,
        _NAMES,
        prefix="gpt_neox.",
        layer=_LAYER,
        own=own,
        ignored=_IGNORED,
        output="embed_out",
    )


FAMILIES = {"gpt_neox": decoder_family("GPTNeoX", _config, rules=_rules, tokens="classifier")}
