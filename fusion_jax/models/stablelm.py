"""StableLM: layer norms, and rotary positions of a part of the heads."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate
from fusion_jax.models.decoder_families import decoder_family, decoder_rules
from fusion_jax.models.rules import KeyRule, KeyRules, Leaf

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_key_value_heads": 32,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 4096,
    "hidden_dropout": 0.0,
    "eos_token_id": 0,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    parallel = bool(fields.get("use_parallel_residual"))
    return DecoderConfig.read(
        {**fields, "rms_norm_eps": fields["layer_norm_eps"], "head_dim": None},
        blocks=Blocks(
            norm="layer",
            norms="shared" if parallel else "before",
            parallel=parallel,
            query_key_norm="apart" if fields.get("qk_layernorm") else None,
            residual_dropout=rate(fields, "hidden_dropout"),
            attention_out_dropout=0.0,
        ),
        partial_rotary=True,
        qkv_bias=bool(fields.get("use_qkv_bias")),
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    # One norm for each head, all along an axis of ours.
    own = tuple(
        KeyRule(
            f"layers.{{l}}.attention.{ours}_norm",
            f"layers.{{l}}.self_attn.{theirs}_layernorm.norms.{{e}}",
            {"scale": Leaf(("weight",))},
        )
        for ours, theirs in (("query", "q"), ("key", "k"))
    )
    return decoder_rules(config, head, own)


FAMILIES = {
    "stablelm": decoder_family(
        "StableLm",
        _config,
        heads=("causal-lm", "classification", "token-classification"),
        rules=_rules,
    )
}
