"""gpt-oss: experts with clamped gates and biases, heads that can attend to nothing, windows."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, layer_windows
from fusion_jax.models.decoder_families import decoder_family, decoder_rules, linear_rules
from fusion_jax.models.moe import RouterRule
from fusion_jax.models.packed_experts import packed_rules
from fusion_jax.models.rules import KeyRule, KeyRules, Leaf
from fusion_jax.nn.submlps import ClampedSwish

_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "max_position_embeddings": 131072,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "attention_bias": True,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_OPTIONAL = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
        fields["rope_parameters"] = _ROPE
    count = fields.get("num_experts") or fields["num_local_experts"]
    # The softmax over the chosen logits is that over all, scaled to add up to 1.
    fields |= {"num_experts": count, "norm_topk_prob": True, "mlp_bias": True}
    alpha, limit = fields.get("swiglu_alpha", 1.702), fields.get("swiglu_limit", 7.0)
    for name, value in (("swiglu_alpha", alpha), ("swiglu_limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{name} must be a number above 0; got {str(value)[:100]!r}")
    blocks = Blocks(norm="rms-wide", sinks=True, act=ClampedSwish(float(alpha), float(limit)))
    config = DecoderConfig.read(
        fields, optional=_OPTIONAL, blocks=blocks, router=RouterRule(bias=True)
    )
    return layer_windows(config, fields, lambda layer: layer % 2 == 0)


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    sinks = KeyRule("layers.{l}.attention.sinks", "layers.{l}.self_attn.sinks", {"": Leaf(("",))})
    mlps = (
        *linear_rules("mlp", "mlp", {"router": "router"}),
        *packed_rules("mlp.experts", interleaved=True, biases=True),
    )
    return decoder_rules(config, head, (sinks, *mlps))


FAMILIES = {
    "gpt_oss": decoder_family(
        "GptOss",
        _config,
        heads=("causal-lm", "classification", "token-classification"),
        rules=_rules,
        experts_field="num_local_experts",
    )
}
