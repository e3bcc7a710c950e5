"""OPT and Galactica: learned positions, norms before or after the residual connections."""

from __future__ import annotations

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, count, rate
from fusion_jax.models.decoder_families import decoder_family, renamed_rules
from fusion_jax.models.rules import KeyRules

_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "activation_function": "relu",
    "init_std": 0.02,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_NAMES = {
    "word": "decoder.embed_tokens",
    "position": "decoder.embed_positions",
    "project_in": "decoder.project_in",
    "project_out": "decoder.project_out",
    "norm": "decoder.final_layer_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **fields}
    if rate(fields, "layerdrop"):
        raise InputError("layerdrop is not implemented; 0.0 trains all layers at every step")
    first, bias = bool(fields["do_layer_norm_before"]), bool(fields["enable_bias"])
    own = {
        "intermediate_size": fields["ffn_dim"],
        "hidden_act": fields["activation_function"],
        "initializer_range": fields["init_std"],
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    return DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        blocks=Blocks(
            norm="layer" if fields["layer_norm_elementwise_affine"] else "layer-bare",
            norms="before" if first else "outside",
            final_norm=first and not fields.get("_remove_final_layer_norm"),
            gated=False,
            residual_dropout=rate(fields, "dropout"),
            positions=count(fields, "max_position_embeddings"),
            first_position=2,
            embedding_size=count(fields, "word_embed_proj_dim"),
        ),
        rotary=False,
    )


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    first = config.blocks.norms == "before"
    ours = ("attention_norm", "mlp_norm") if first else ("attention_post_norm", "mlp_post_norm")
    names = {**_NAMES, **dict(zip(ours, _NORMS, strict=True))}
    return renamed_rules(
        config,
        head,
        names,
        prefix="model.",
        layer="decoder.layers.{l}",
        ignored=(r"(model\.)?decoder\.version",),  # in old checkpoints
    )


FAMILIES = {
    "opt": decoder_family(
        "OPT",
        _config,
        heads=("causal-lm", "classification", "question-answering"),
        rules=_rules,
        width_field="ffn_dim",
    )
}
