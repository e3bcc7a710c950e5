"""GPT-J: attention and MLP in parallel behind one layer norm."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.errors import check_at_least
from fusion_jax.models.base import Fields, Head
from fusion_jax.models.decoder_config import Blocks, DecoderConfig, rate, renamed_fields
from fusion_jax.models.decoder_families import decoder_family, renamed_rules
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import KeyRules

_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
_DEFAULTS = {
    "vocab_size": 50400,
    "hidden_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 50256,
}
_NAMES = {
    "word": "wte",
    "norm": "ln_f",
    "attention_norm": "ln_1",
    "attention.query": "attn.q_proj",
    "attention.key": "attn.k_proj",
    "attention.value": "attn.v_proj",
    "attention.out": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
}
# Buffers in old checkpoints.
_IGNORED = (r"(transformer\.)?h\.\d+\.attn\.((masked_)?bias|embed_positions)",)


def _config(fields: Fields) -> DecoderConfig:
    fields = {**_DEFAULTS, **renamed_fields(fields, _FIELDS)}
    own = {
        "intermediate_size": fields.get("n_inner") or 4 * fields["hidden_size"],
        "hidden_act": fields["activation_function"],
        "rms_norm_eps": fields["layer_norm_epsilon"],
        "attention_dropout": rate(fields, "attn_pdrop"),
        "num_key_value_heads": None,
        "head_dim": None,
        "mlp_bias": True,
    }
    config = DecoderConfig.read(
        {**fields, **own},
        optional=("tie_word_embeddings", "mlp_bias"),
        blocks=Blocks(
            norm="layer",
            norms="shared",
            parallel=True,
            gated=False,
            residual_dropout=rate(fields, "resid_pdrop"),
            embedding_dropout=rate(fields, "embd_pdrop"),
            logit_bias=True,
        ),
        rotary=False,
    )
    check_at_least(2, rotary_dim=fields["rotary_dim"])
    rope = Rope(rotary_dim=fields["rotary_dim"], interleaved=True)
    rope.check(config.head_dim)
    return replace(config, ropes=(rope,) * config.num_hidden_layers)


def _rules(config: DecoderConfig, head: Head | None) -> KeyRules:
    return renamed_rules(
        config, head, _NAMES, prefix="transformer.", layer="h.{l}", ignored=_IGNORED
    )


FAMILIES = {
    "gptj": decoder_family(
        "GPTJ",
        _config,
        heads=("causal-lm", "classification", "question-answering"),
        rules=_rules,
        width_field="n_inner",
    )
}
