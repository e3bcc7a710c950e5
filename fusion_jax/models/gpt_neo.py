"""GPT-Neo: learned positions, unscaled attention, and windows in every other layer."""

from __future__ import annotations

from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import MOST_LAYERS, Fields, Head
from fusion_jax.models.decoder_config import (
    FULL,
    SLIDING,
    Blocks,
    DecoderConfig,
    count,
    layer_windows,
    rate,
    renamed_fields,
)
from fusion_jax.models.decoder_families import decoder_family, renamed_rules
from fusion_jax.models.rules import KeyRules

_FIELDS = {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
_DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "attention_types": [[["global", "local"], 12]],
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "classifier_dropout": 0.1,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
_TYPES = {"global": FULL, "local": SLIDING}
_NAMES = {
    "word": "wte",
    "position": "wpe",
    "norm": "ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.query": "attn.attention.q_proj",
    "attention.key": "attn.attention.k_proj",
    "attention.value": "attn.attention.v_proj",
    "attention.out": "attn.attention.out_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
# The causal mask, a buffer in old checkpoints.
_IGNORED = (r"(transformer\.)?h\.\d+\.attn\.attention\.(masked_)?bias",)


def _layer_types(fields: Fields) -> list[str]:
    """Returns the type of each layer; ``attention_types`` has lists with numbers of repetitions."""
    types: Any = fields.get("attention_layers")
    try:
        if not types:
            types = [
                x
                for part, times in fields["attention_types"] or _DEFAULTS["attention_types"]
                for x in part * min(times, MOST_LAYERS)
            ]
        return [_TYPES[name] for name in types]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            "attention_layers must be global or local for each layer, or attention_types lists of "
            "these, each with its number of repetitions"
        ) from None


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **renamed_fields(fields, _FIELDS)}
    size = fields["hidden_size"]
    own = {
        "intermediate_size": fields.get("intermediate_size") or 4 * size,
        "hidden_act": fields["activation_function"],
        "rms_norm_eps": fields["layer_norm_epsilon"],
        "num_key_value_heads": None,
        "head_dim": None,
        "mlp_bias": True,
        "layer_types": _layer_types(fields),
        "sliding_window": fields["window_size"],
    }
    fields = {**fields, **own}
    config = DecoderConfig.read(
        fields,
        optional=("tie_word_embeddings", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            gated=False,
            score_scale=1.0,
            residual_dropout=rate(fields, "resid_dropout"),
            embedding_dropout=rate(fields, "embed_dropout"),
            positions=count(fields, "max_position_embeddings"),
        ),
        rotary=False,
        out_bias=True,
    )
    return layer_windows(config, fields, lambda layer: False)


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    return renamed_rules(
        config, head, _NAMES, prefix="transformer.", layer="h.{l}", ignored=_IGNORED
    )


FAMILIES = {"gpt_neo": decoder_family("GPTNeo", _config, rules=_rules, tokens="classifier")}
