"""StarCoder2: layer norms, MLPs without gates, biases everywhere."""

from __future__ import annotations

from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows, rate
from fusion_jax.models.decoder_families import decoder_family, decoder_rules, linear_rules
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.018042,
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "use_bias": True,
    "eos_token_id": 50256,
}


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    bias = bool(fields["use_bias"])
    own = {"attention_bias": bias, "mlp_bias": bias, "rms_norm_eps": fields["norm_epsilon"]}
    config = DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            gated=False,
            residual_dropout=rate(fields, "residual_dropout"),
            embedding_dropout=rate(fields, "embedding_dropout"),
        ),
    )
    return layer_windows(config, {**fields, "layer_types": None}, lambda layer: True)


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    return decoder_rules(config, head, linear_rules("mlp", "mlp", {"up": "c_fc", "down": "c_proj"}))


FAMILIES = {
    "starcoder2": decoder_family(
        "Starcoder2",
        _config,
        heads=("causal-lm", "classification", "token-classification"),
        rules=_rules,
    )
}
