"""Odd configurations of every family against transformers, where torch is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.models.moe import mixtures
from fusion_jax.models.registry import FAMILIES
from tests import test_towers, test_vision, test_whisper, tiny

BASE = {name: x for name, x in tiny.LLAMA.items() if name not in ("model_type", "rope_parameters")}
BASE["pad_token_id"] = 0
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR = "linear_attention"
TYPES = [SLIDING, FULL, SLIDING]
PRIME = {"hidden_size": 14, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 2,
         "intermediate_size": 23}  # fmt: skip
# For experts torch needs rows of 16 bytes.
FIVE_HEADS = {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4,
              "intermediate_size": 28}  # fmt: skip
ONE_KEY = {"num_key_value_heads": 1}
WIDE_HEADS = {"head_dim": 10}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def rope(name, **more):
    return {"rope_parameters": {"rope_theta": 5000.0, **ROPES[name]}, **more}


def longrope(pairs, **more):
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)],
               "long_factor": [2.0 + i for i in range(pairs)]}  # fmt: skip
    return {"rope_scaling": {"type": "longrope", **factors}, "rope_theta": 1000.0,
            "original_max_position_embeddings": 6, **more}  # fmt: skip


SHARED = [WIDE_HEADS | {"head_dim": 6}, ONE_KEY, PRIME, TIED, rope("linear"), rope("yarn"),
          rope("llama3"), rope("dynamic", max_position_embeddings=5)]  # fmt: skip
NESTED = {
    FULL: {"rope_theta": 3000.0, **ROPES["linear"]},
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
}
# For each family what its config.json may say, beside BASE.
LLAMAS = {
    "llama": [*SHARED, BIASED, {"mlp_bias": True}, {"hidden_act": "gelu"}],
    "mistral": [*SHARED, {"sliding_window": 3}, {"sliding_window": None}],
    "ministral": [*SHARED, {"sliding_window": 3}, {"sliding_window": 2, "layer_types": TYPES}],
    "qwen2": [*SHARED, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}],
    "qwen3": [*SHARED, BIASED | {"head_dim": 6}],
    "gemma": [*SHARED, BIASED, {"hidden_act": "gelu"}, {"hidden_act": "silu"}],
    "gemma2": [*SHARED, BIASED, {"sliding_window": 3}, {"attn_logit_softcapping": None},
               {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 0.5, "layer_types": TYPES},
               {"final_logit_softcapping": 0.3, "hidden_activation": "silu"}],
    "gemma3_text": [WIDE_HEADS, ONE_KEY, PRIME, TIED, BIASED, {"sliding_window": 3},
                    {"sliding_window": 2, "sliding_window_pattern": 2},
                    {"sliding_window": 2, "layer_types": TYPES, "rope_parameters": NESTED},
                    {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "layer_types": TYPES,
                     "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
                    {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5}],
    "phi3": [WIDE_HEADS, ONE_KEY, PRIME, TIED, {"sliding_window": 3}, longrope(2),
             longrope(2, max_position_embeddings=6, original_max_position_embeddings=12),
             longrope(1, partial_rotary_factor=0.5, original_max_position_embeddings=64),
             {"partial_rotary_factor": 0.5, "resid_pdrop": 0.3}],
    "olmo2": [*SHARED, BIASED],
    "smollm3": [*SHARED, BIASED, {"mlp_bias": True}, {"no_rope_layers": [0, 1, 0]},
                {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 3}],
    "granite": [*SHARED, BIASED | {"mlp_bias": True},
                {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                 "attention_multiplier": 0.125}],
    "seed_oss": [*SHARED, {"attention_bias": False}, {"attention_out_bias": True},
                 {"mlp_bias": True, "residual_dropout": 0.2}],
    "mixtral": [WIDE_HEADS, ONE_KEY, FIVE_HEADS, TIED, {"sliding_window": 3}, rope("linear"),
                {"num_experts_per_tok": 1}, {"num_local_experts": 3, "num_experts_per_tok": 3},
                {"num_hidden_layers": 1, "num_experts": 3}],
    "qwen2_moe": [ONE_KEY, FIVE_HEADS, TIED, {"qkv_bias": False}, {"norm_topk_prob": True},
                  {"decoder_sparse_step": 2}, {"mlp_only_layers": [1], "num_experts_per_tok": 1},
                  {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}],
    "qwen3_moe": [WIDE_HEADS, ONE_KEY, FIVE_HEADS, TIED, BIASED, {"norm_topk_prob": True},
                  {"decoder_sparse_step": 3}, {"mlp_only_layers": [0], "num_experts_per_tok": 3}],
    "olmoe": [FIVE_HEADS | TIED, BIASED | ONE_KEY | {"clip_qkv": 0.5}, {"norm_topk_prob": True},
              {"num_experts": 3, "num_experts_per_tok": 1, **rope("linear")}],
    "gpt_oss": [FIVE_HEADS | TIED, ONE_KEY | {"attention_bias": False, "sliding_window": 3},
                {"swiglu_alpha": 1.0, "swiglu_limit": 0.1, "layer_types": TYPES},
                {"num_local_experts": 3, "num_experts_per_tok": 1, **rope("yarn")},
                {"rope_parameters": None, "hidden_act": "gelu"}],
    "glm4_moe": [FIVE_HEADS | TIED, BIASED | ONE_KEY | {"use_qk_norm": True},
                 {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0, "n_shared_experts": 2},
                 {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, **rope("linear")},
                 {"norm_topk_prob": False, "num_experts_per_tok": 1, "first_k_dense_replace": 2}],
    "deepseek_v3": [FIVE_HEADS | TIED, BIASED | {"rope_interleave": False},
                    {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 1},
                    {"n_group": 1, "topk_group": 1, "qk_nope_head_dim": 6, "v_head_dim": 3},
                    {"rope_parameters": {"rope_theta": 5000.0, **ROPES["yarn"], "mscale": 0.7,
                                         "mscale_all_dim": 1.3}, "rms_norm_eps": 1e-3},
                    {"norm_topk_prob": False, "first_k_dense_replace": 0, "kv_lora_rank": 4}],
    # Queries in layers without positions do not depend on padding, as they do in transformers.
    "llama4_text": [FIVE_HEADS | TIED | {"attn_temperature_tuning": False}, ONE_KEY | BIASED,
                    {"use_qk_norm": False, "interleave_moe_layer_step": 2, "floor_scale": 1},
                    {"no_rope_layers": [0, 1, 0], "moe_layers": [0], "num_experts_per_tok": 1},
                    {"layer_types": [CHUNKED, FULL, CHUNKED], **rope("yarn"),
                     "floor_scale": 99},
                    {"attention_chunk_size": None, "rms_norm_eps": 1e-3},
                    {"attn_scale": 0.5, "hidden_act": "gelu"}],
    "qwen3_next": [FIVE_HEADS | TIED | {"partial_rotary_factor": 1.0}, ONE_KEY | BIASED,
                   {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "num_experts": 3},
                   {"layer_types": [FULL, LINEAR, LINEAR], "linear_conv_kernel_dim": 1},
                   {"full_attention_interval": 2, "decoder_sparse_step": 2, "head_dim": 8},
                   {"mlp_only_layers": [0], "norm_topk_prob": False, "hidden_act": "gelu",
                    "rms_norm_eps": 1e-3, "num_experts_per_tok": 1}],
    "qwen3_5_text": [PRIME | TIED | {"partial_rotary_factor": 1.0}, ONE_KEY | BIASED,
                     {"layer_types": [FULL, LINEAR, LINEAR], "linear_num_key_heads": 4}],
    "qwen3_5_moe_text": [FIVE_HEADS | TIED, {"num_experts_per_tok": 1, "norm_topk_prob": False},
                         {"mlp_only_layers": [0], "hidden_act": "gelu"}],
    "granitemoe": [FIVE_HEADS | TIED, BIASED | ONE_KEY, WIDE_HEADS | rope("linear"),
                   {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "hidden_act": "gelu",
                    "residual_multiplier": 0.22, "attention_multiplier": 0.125,
                    "num_local_experts": 3, "num_experts_per_tok": 1}],
}  # fmt: skip
HALF_LINEAR = {"rope_scaling": {"type": "linear", "factor": 3.0}, "partial_rotary_factor": 0.5}
LLAMAS |= {
    "arcee": [PRIME, TIED | ONE_KEY, BIASED | {"mlp_bias": True, "head_dim": 6},
              rope("yarn") | {"hidden_act": "gelu"}],
    "ernie4_5": [PRIME, TIED | ONE_KEY | {"use_bias": True, "head_dim": 6}, rope("llama3"),
                 {"rope_theta": 100.0, "head_dim": None, "num_key_value_heads": None}],
    "glm4": [TIED | ONE_KEY, {"attention_bias": False, "head_dim": 6, "partial_rotary_factor": 0.7},
             HALF_LINEAR | {"head_dim": 12}, {"partial_rotary_factor": 1.0, "hidden_act": "gelu"}],
    "helium": [PRIME, TIED | ONE_KEY, BIASED | {"mlp_bias": True}, rope("dynamic")],
    "hunyuan_v1_dense": [
        PRIME, BIASED | {"head_dim": 6, "tie_word_embeddings": True}, rope("yarn") | ONE_KEY,
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}, "rope_theta": 50.0}],
    "olmo3": [PRIME, BIASED | TIED | ONE_KEY | {"sliding_window": 3, "head_dim": 6},
              {"sliding_window": 2, "layer_types": TYPES, "rope_parameters": NESTED},
              {"rope_theta": 500.0, "sliding_window": 4, "layer_types": TYPES,
               "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}],
    "cohere": [PRIME, TIED | ONE_KEY | {"use_qk_norm": True}, BIASED | {"logit_scale": 0.3},
               rope("dynamic") | {"head_dim": 6, "layer_norm_eps": 1e-2, "use_qk_norm": True}],
    "cohere2": [PRIME, TIED | ONE_KEY | {"logit_scale": 3.0}, BIASED | rope("linear"),
                {"sliding_window": 3, "sliding_window_pattern": 2},
                {"sliding_window": 2, "layer_types": TYPES, "rope_theta": 50.0}],
    "exaone4": [PRIME, TIED | ONE_KEY | {"sliding_window": 3, "head_dim": 6},
                {"sliding_window": 2, "sliding_window_pattern": 2},
                {"sliding_window": None, "layer_types": [FULL] * 3, **rope("llama3")},
                {"sliding_window": 2, "layer_types": TYPES, "sliding_window_pattern": "LG"}],
    "nemotron": [{"head_dim": 6, "partial_rotary_factor": 0.7}, TIED | ONE_KEY,
                 BIASED | {"mlp_bias": True}, {"norm_eps": 1e-2, "hidden_act": "gelu"},
                 HALF_LINEAR | {"num_attention_heads": 2}],
    "phi": [{"qk_layernorm": True}, TIED | ONE_KEY, HALF_LINEAR | {"num_attention_heads": 2},
            {"resid_pdrop": 0.3, "embd_pdrop": 0.4, "partial_rotary_factor": 1.0,
             "hidden_act": "relu", "layer_norm_eps": 1e-2}],
    "stablelm": [
        {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_parallel_residual": True},
        TIED | {"num_attention_heads": 2, "num_key_value_heads": 1, "use_qkv_bias": True},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "layer_norm_eps": 1e-2},
        HALF_LINEAR | {"hidden_dropout": 0.2, "qk_layernorm": True}],
    "starcoder2": [PRIME, ONE_KEY | {"use_bias": False, "tie_word_embeddings": True},
                   {"sliding_window": 3, "norm_epsilon": 1e-2, "hidden_act": "relu"},
                   rope("linear") | {"residual_dropout": 0.3, "embedding_dropout": 0.4}],
}  # fmt: skip
DENSE = {"enable_moe_block": False}
GLOBAL_ROPE = {"rope_parameters": {
    FULL: {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.6,
           "factor": 2.0},
    SLIDING: {"rope_theta": 100.0, **ROPES["yarn"]}}}  # fmt: skip
LLAMAS["gemma4_text"] = [
    DENSE | PRIME | {"global_head_dim": 6, "layer_types": TYPES, "attention_bias": True},
    FIVE_HEADS | {"layer_types": TYPES, "num_kv_shared_layers": 1, "sliding_window": 2},
    DENSE | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "num_hidden_layers": 4,
             "layer_types": [FULL, SLIDING, SLIDING, SLIDING], "final_logit_softcapping": 3.0},
    ONE_KEY | GLOBAL_ROPE | {"hidden_activation": "silu", "rms_norm_eps": 1e-2,
                             "layer_types": [SLIDING, FULL, FULL]},
    {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_experts": 3,
     "layer_types": [FULL, SLIDING, FULL], "hidden_size_per_layer_input": 0},
    DENSE | {"attention_k_eq_v": True, "num_kv_shared_layers": 2, "num_hidden_layers": 5,
             "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL], "sliding_window": 4},
    {"per_layer_config": {"00": {"head_dim": 6, "num_key_value_heads": 4}, "2": {"head_dim": 6,
     "num_key_value_heads": 4}}, "layer_types": [FULL, SLIDING, FULL], "top_k_experts": 1,
     "tie_word_embeddings": False},
    {"num_experts": 3, "top_k_experts": 3, "moe_intermediate_size": 20, "head_dim": 10,
     "num_hidden_layers": 7, "use_bidirectional_attention": "vision"},
    DENSE | {"hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": 70,
             "layer_types": [FULL] * 3, "num_kv_shared_layers": 2, "global_head_dim": 4,
             "rope_theta": 7.0, "use_double_wide_mlp": True},
]  # fmt: skip
ODD = dict(LLAMAS)
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "num_labels": 3,
}
ENCODERS = [
    {"hidden_size": 21, "num_attention_heads": 7, "intermediate_size": 23},
    {"num_attention_heads": 1, "hidden_act": "gelu_new"},
    {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    {"num_hidden_layers": 1, "vocab_size": 67},
    {"tie_word_embeddings": False, "hidden_act": "silu"},
    {"hidden_size": 26, "num_attention_heads": 13, "num_labels": 1},
    {"pad_token_id": 3, "intermediate_size": 1},
    {"hidden_act": "gelu_python", "num_hidden_layers": 3, "max_position_embeddings": 14},
]
ODD |= dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"), ENCODERS)
ODD["bert"] = [*ENCODERS, {"type_vocab_size": 5, "hidden_act": "quick_gelu"}]
ODD["electra"] = [*ENCODERS, {"embedding_size": 16}, {"embedding_size": 9}]
ODD["modernbert"] = [
    {"hidden_size": 28, "num_attention_heads": 7, "local_attention": 4, "norm_bias": True},
    {"num_attention_heads": 1, "attention_bias": True, "num_hidden_layers": 4, "norm_eps": 1e-2},
    {"mlp_bias": True, "classifier_bias": True, "rope_parameters": NESTED},
    {"classifier_activation": "relu", "hidden_activation": "silu", "classifier_pooling": "mean",
     "local_attention": 1},
    {"decoder_bias": False, "tie_word_embeddings": False, "norm_bias": True, "local_attention": 5,
     "layer_types": [SLIDING, SLIDING]},
    {"layer_types": [FULL, SLIDING], "global_rope_theta": 500.0, "local_rope_theta": 50.0},
    {"global_attn_every_n_layers": 2, "sliding_window": 1, "classifier_pooling": "mean",
     "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "norm_bias": True},
    {"num_hidden_layers": 1, "intermediate_size": 1, "classifier_bias": True},
]  # fmt: skip
ODD["albert"] = [
    {"hidden_size": 21, "num_attention_heads": 7, "embedding_size": 21, "intermediate_size": 23},
    {"num_attention_heads": 1, "embedding_size": 5, "num_hidden_layers": 5},
    {"hidden_act": "relu", "num_hidden_groups": 1, "layer_norm_eps": 1e-3},
    {"embedding_size": 16, "inner_group_num": 2, "type_vocab_size": 5},
    {"tie_word_embeddings": False, "embedding_size": 9, "hidden_act": "gelu"},
    {"num_hidden_layers": 3, "inner_group_num": 3, "vocab_size": 67},
]
ODD["eurobert"] = [
    {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, **rope("linear")},
    {"head_dim": 6, "num_key_value_heads": 2, "hidden_act": "gelu", "mlp_bias": True,
     "classifier_pooling": "mean"},
    {"num_attention_heads": 1, "attention_bias": True, "rms_norm_eps": 1e-2},
    {"tie_word_embeddings": True, "mlp_bias": True, **rope("yarn"), "intermediate_size": 23},
    {"num_hidden_layers": 1, "rope_theta": 100.0},
    {"classifier_pooling": "bos", "intermediate_size": 1},
    {"pad_token_id": 3, **rope("dynamic", max_position_embeddings=5)},
    {"tie_word_embeddings": False, "vocab_size": 67, **rope("llama3")},
]  # fmt: skip
ODD["nomic_bert"] = [
    {"hidden_size": 28, "num_attention_heads": 7, "intermediate_size": 23, **rope("linear")},
    {"head_dim": 6, "hidden_act": "gelu", "type_vocab_size": 5, "layer_norm_eps": 1e-3},
    {"num_attention_heads": 1, **rope("yarn")},
    {"tie_word_embeddings": False, "rope_theta": 100.0, "hidden_act": "relu"},
    {**rope("dynamic", max_position_embeddings=5), "num_hidden_layers": 1},
]
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ODD["deberta-v2"] = [
    {**RELATIVE, "hidden_size": 21, "num_attention_heads": 7, "position_buckets": 5,
     "max_relative_positions": 7, "position_biased_input": False},
    {**RELATIVE, "num_attention_heads": 1, "share_att_key": True, "norm_rel_ebd": "layer_norm",
     "pooler_hidden_act": "tanh", "type_vocab_size": 3},
    {**RELATIVE, "pos_att_type": "c2p", "max_relative_positions": 3, "embedding_size": 9,
     "conv_kernel_size": 5, "conv_act": "gelu", "conv_groups": 2},
    {**RELATIVE, "pos_att_type": "p2c", "position_buckets": 4, "hidden_act": "relu",
     "conv_kernel_size": 3},
    {**RELATIVE, "legacy": False, "conv_kernel_size": 1, "layer_norm_eps": 1e-2},
    {"hidden_act": "silu", "num_hidden_layers": 1},
    {"pos_att_type": "c2p|p2c", "relative_attention": False, "norm_rel_ebd": "layer_norm"},
    {"relative_attention": True, "vocab_size": 67},
    {"position_biased_input": False, "relative_attention": True},
    {"legacy": True, "tie_word_embeddings": False, "embedding_size": 9},
]  # fmt: skip
DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "hidden_act": "activation",
              "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"}  # fmt: skip
ODD["distilbert"] = ENCODERS
T5 = {**tiny.T5, "is_encoder_decoder": True}
ODD["t5"] = ODD["mt5"] = [
    {"d_kv": 3, "num_heads": 5, "d_ff": 23},
    {"num_heads": 1, "feed_forward_proj": "gated-silu"},
    {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    {"num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"},
    {"num_decoder_layers": None, "feed_forward_proj": "gelu"},
    {"tie_word_embeddings": False},
    {"d_model": 15, "layer_norm_epsilon": 1e-3},
    {"vocab_size": 67, "feed_forward_proj": "relu", "decoder_start_token_id": 4},
    {"hidden_size": 24, "num_attention_heads": 1, "head_dim": 4, "num_hidden_layers": 1,
     "feed_forward_proj": "gated-gelu", "dense_act_fn": "silu"},
]  # fmt: skip
ODD["umt5"] = [
    ODD["t5"][0] | {"num_decoder_layers": 1},
    {"tie_word_embeddings": False},
    ODD["t5"][4],
]
# Blocks of LongT5 do not depend on padding on the left, as they do in transformers.
BLOCKS = {"encoder_attention_type": "transient-global", "global_block_size": 2}
ODD["longt5"] = [
    {"d_kv": 3, "num_heads": 5, "d_ff": 23, "local_radius": 1, "num_decoder_layers": 1},
    BLOCKS | {"feed_forward_proj": "gated-gelu", "local_radius": 1},
    BLOCKS | {"global_block_size": 3, "num_heads": 1, "tie_word_embeddings": False},
    BLOCKS | {"global_block_size": 1, "d_kv": 3, "num_heads": 5, "feed_forward_proj": "silu"},
    {"local_radius": 4, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2},
    BLOCKS | {"global_block_size": 9, "relative_attention_num_buckets": 18, "local_radius": 9},
    BLOCKS | {"global_block_size": 4, "num_decoder_layers": None, "local_radius": 2,
              "relative_attention_max_distance": 5},
    BLOCKS | {"global_block_size": 16, "vocab_size": 67, "decoder_start_token_id": 4,
              "d_model": 15},
    {"local_radius": 127, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
]  # fmt: skip
GEMMA2 = {**BASE, "head_dim": 4, "sliding_window": 3, "num_hidden_layers": 2}


def pair(encoder, decoder, **more):
    """The fields of T5Gemma, whose encoder and decoder have fields of their own."""
    sides = {"encoder": {**GEMMA2, **encoder}, "decoder": {**GEMMA2, "bos_token_id": 2, **decoder}}
    return {**sides, "is_encoder_decoder": True, "eos_token_id": None, "pad_token_id": 0, **more}


ODD["t5gemma"] = [
    pair(PRIME | TIED, rope("linear"), dropout_rate=0.2, attention_dropout=0.1),
    pair(ONE_KEY | {"layer_types": [FULL, SLIDING]}, PRIME | {"num_hidden_layers": 3}),
    pair(BIASED | rope("yarn"), ONE_KEY | {"head_dim": 6, "layer_types": [FULL, SLIDING]},
         tie_word_embeddings=False),
    pair({"sliding_window": 1, "hidden_activation": "silu"}, BIASED | {"bos_token_id": 4}),
    pair({"attn_logit_softcapping": None, "num_hidden_layers": 3},
         {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 0.5, "rms_norm_eps": 1e-3}),
    pair({"query_pre_attn_scalar": 3, "final_logit_softcapping": 0.1},
         {"final_logit_softcapping": 0.3, "sliding_window": 1, "hidden_activation": "gelu"}),
    pair({"hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 23},
         {"final_logit_softcapping": None, "rope_theta": 100.0, **WIDE_HEADS},
         tie_word_embeddings=False, vocab_size=99),
    pair({"vocab_size": 67, "rms_norm_eps": 1e-2, "layer_types": [FULL] * 2},
         {"vocab_size": 67, "num_hidden_layers": 1, **rope("llama3")}, decoder_start_token_id=2),
]  # fmt: skip
BART = {**tiny.BART, "pad_token_id": 0, "is_encoder_decoder": True}
BARTS = [
    {"encoder_attention_heads": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 23},
    {"scale_embedding": True, "activation_function": "relu", "encoder_layers": 1},
    {"d_model": 15, "encoder_attention_heads": 5, "decoder_attention_heads": 3},
    {"tie_word_embeddings": False, "decoder_start_token_id": 4, "vocab_size": 67},
    {"encoder_layers": 1, "decoder_layers": 1, "activation_function": "swish",
     "static_position_embeddings": True, "normalize_before": True, "extra_pos_embeddings": 1},
    {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 1, "decoder_ffn_dim": 5,
     "scale_embedding": True, "max_position_embeddings": 9},
    {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 12, "decoder_layers": 1,
     "activation_function": "gelu_new", "activation_dropout": 0.1, "attention_dropout": 0.2},
    {"encoder_layers": 2, "decoder_layers": 1, "d_model": 12, "encoder_attention_heads": 12,
     "decoder_attention_heads": 1, "init_std": 0.1, "classifier_dropout": 0.3},
]  # fmt: skip
ODD |= dict.fromkeys(("bart", "mbart", "marian", "pegasus"), BARTS)
SWITCH = {**T5, **tiny.CONFIGS["switch"], "router_jitter_noise": 0.0}
ODD["switch_transformers"] = [
    {"d_kv": 3, "num_heads": 5, "d_ff": 20},
    {"num_heads": 1, "dense_act_fn": "gelu"},
    {"num_experts": 3, "expert_capacity": 1},
    {"num_decoder_layers": 1, "num_sparse_decoder_layers": 1},
    {"num_sparse_encoder_layers": 3, "expert_capacity": 64},
    {"tie_word_embeddings": False},
    {"d_model": 12, "layer_norm_epsilon": 1e-3},
    {"vocab_size": 67, "router_bias": True, "num_sparse_encoder_layers": 0},
]
ODD["gpt2"] = [
    {"n_embd": 21, "n_head": 7, "n_inner": 23},
    {"n_head": 1, "n_inner": None},
    {"activation_function": "gelu"},
    {"activation_function": "silu", "layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False, "n_layer": 1},
    {"reorder_and_upcast_attn": True, "vocab_size": 67},
    {"hidden_size": 18, "num_attention_heads": 3, "num_hidden_layers": 1, "n_inner": 1},
]
ODD["gpt_neox"] = [
    {"hidden_size": 14, "num_attention_heads": 7, "rotary_pct": 1.0, "intermediate_size": 23},
    {"num_attention_heads": 1, "use_parallel_residual": False, "rotary_emb_base": 500},
    {"attention_bias": False, "rotary_pct": 0.5, "tie_word_embeddings": True},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "num_attention_heads": 2},
    {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.5,
        },
        "hidden_act": "relu",
        "layer_norm_eps": 1e-2,
        "hidden_dropout": 0.2,
    },
]
ODD["gptj"] = [
    {"n_embd": 21, "n_head": 3, "n_inner": 23, "rotary_dim": 6},
    {"n_head": 1, "n_inner": None, "rotary_dim": 10, "resid_pdrop": 0.2, "embd_pdrop": 0.1},
    {"tie_word_embeddings": True, "n_layer": 1, "rotary_dim": 2},
    {"activation_function": "relu", "layer_norm_epsilon": 1e-2, "vocab_size": 67},
]
ODD["falcon"] = [
    {"num_ln_in_parallel_attn": 1, "num_kv_heads": 1, "bias": True},
    {"new_decoder_architecture": False, "num_kv_heads": None, "hidden_dropout": 0.2},
    {
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": None,
        "bias": True,
        "alibi": True,
        "num_attention_heads": 3,
        "hidden_size": 18,
        "parallel_attn": False,
        "attention_dropout": 0.1,
    },
    {"num_kv_heads": None, "tie_word_embeddings": False, "rope_theta": 50.0, "activation": "relu"},
    {"alibi": True, "layer_norm_epsilon": 1e-2, "ffn_hidden_size": None},
    {
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": None,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "n_embed": 24,
    },
]
ODD["opt"] = [
    {"do_layer_norm_before": False, "num_attention_heads": 4, "ffn_dim": 23},
    {"word_embed_proj_dim": None, "enable_bias": False, "activation_function": "gelu"},
    {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False, "dropout": 0.0},
    {"_remove_final_layer_norm": True, "hidden_size": 21, "num_attention_heads": 7},
]
ODD["gpt_neo"] = [
    {"num_heads": 4, "intermediate_size": None, "tie_word_embeddings": False},
    {"num_layers": 3, "attention_types": [[["local"], 2], [["global"], 1]], "window_size": 2},
    {
        "hidden_size": 21,
        "num_heads": 7,
        "activation_function": "relu",
        "resid_dropout": 0.1,
        "embed_dropout": 0.2,
        "layer_norm_epsilon": 1e-2,
        "attention_layers": ["local", "global"],
    },
]
ODD["bloom"] = [
    {"n_head": 1, "apply_residual_connection_post_layernorm": True, "hidden_dropout": 0.1},
    {"hidden_size": 18, "n_head": 6, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
    {"n_embed": 15, "n_head": 5, "n_layer": 3},
    {"n_head": 4, "slow_but_exact": True, "pretraining_tp": 1},
]
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
ONE_HEAD = {**ONE, "num_attention_heads": 1, "num_key_value_heads": 1}
UNTIED = {"tie_word_embeddings": False}
NARROW = {"intermediate_size": 1, "vocab_size": 67}
EPS, LAYER_EPS = {"rms_norm_eps": 0.1}, {"layer_norm_eps": 0.1}
STATED = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 4.0,
          "beta_slow": 0.5, "attention_factor": 0.8}  # fmt: skip
YARN = {"rope_scaling": STATED, "rope_theta": 50.0}


def partial_rope(name, part):
    return {"rope_parameters": {"rope_theta": 50.0, **ROPES[name], "partial_rotary_factor": part}}


MROPE = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0,
         "mrope_section": [1, 1, 0], "mrope_interleaved": True}  # fmt: skip
# Fields that checkpoints have and transformers ignores, too.
HUNYUAN_ROPE = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "type": "dynamic"}  # fmt: skip
MORE = {
    "arcee": [
        ONE_HEAD | EPS | {"head_dim": None, "intermediate_size": 1},
        TWO | YARN | {"mlp_bias": True, "attention_dropout": 0.2},
        ONE | longrope(2) | BIASED | {"hidden_act": "silu", "num_key_value_heads": None},
        TWO | TIED | rope("llama3") | {"hidden_act": "gelu_pytorch_tanh", "vocab_size": 67}],
    "ernie4_5": [
        ONE_HEAD | EPS | {"head_dim": None, "use_bias": True}, ONE | longrope(2) | NARROW,
        TWO | UNTIED | rope("dynamic", max_position_embeddings=5) | {"use_bias": None},
        TWO | YARN | WIDE_HEADS | {"use_bias": True, "compression_ratio": 1.0}],
    "glm4": [
        ONE_HEAD | EPS | {"head_dim": 16, "attention_bias": False}, TWO | PRIME | TIED | {
            "partial_rotary_factor": 1.0},
        ONE | partial_rope("llama3", 0.25) | {"head_dim": 8, "eos_token_id": [3, 5]},
        TWO | YARN | {"head_dim": 12, "partial_rotary_factor": 0.34, "hidden_act": "relu"}],
    "helium": [
        ONE_HEAD | EPS | {"head_dim": 16},
        TWO | TIED | rope("llama3") | {"hidden_size": 24, "head_dim": 6},
        ONE | longrope(2) | BIASED | {"num_key_value_heads": 4, "hidden_act": "gelu"},
        TWO | YARN | NARROW | {"mlp_bias": True, "attention_dropout": 0.2}],
    "hunyuan_v1_dense": [
        ONE | {"rope_scaling": HUNYUAN_ROPE, "head_dim": 6, "attention_head_dim": 6,
               "use_qk_norm": True, "use_cla": False, "rope_theta": 1e4},
        TWO | TIED | rope("llama3") | {"hidden_act": "gelu", "num_key_value_heads": None},
        ONE | NARROW | {"rope_parameters": {"rope_theta": 50.0, "alpha": 0, **ROPES["dynamic"]},
                        "max_position_embeddings": 5},
        ONE_HEAD | EPS | BIASED | YARN | {"head_dim": 16, "mlp_bias": True}],
    "olmo3": [
        ONE | {"layer_types": [FULL], "rope_parameters": {"rope_type": "default",
                                                          "rope_theta": 50.0}},
        TWO | {"layer_types": [FULL, FULL], "rope_parameters": {FULL: {**STATED, "rope_theta": 9.0,
                                                                       "rope_type": "yarn"}}},
        ONE_HEAD | EPS | TIED | {"sliding_window": 1, "rope_theta": 50.0},
        TWO | NARROW | {"layer_types": [SLIDING, FULL], "sliding_window": 4, "rope_parameters": {
            FULL: {"rope_theta": 50.0, **ROPES["llama3"]}, SLIDING: {"rope_theta": 9.0,
                                                                     **ROPES["linear"]}}}],
    "cohere": [
        ONE_HEAD | LAYER_EPS | UNTIED | {"use_qk_norm": True}, TWO | rope("llama3") | {
            "logit_scale": -2.0, "hidden_act": "gelu", "num_key_value_heads": None},
        ONE | longrope(2) | BIASED | {"use_qk_norm": True}, TWO | YARN | NARROW],
    "phi": [
        ONE_HEAD | LAYER_EPS | {"partial_rotary_factor": 0.25, "qk_layernorm": True},
        TWO | TIED | ONE_KEY | {"qk_layernorm": True, "hidden_act": "gelu"},
        ONE | longrope(1) | {"num_key_value_heads": None, "attention_dropout": 0.2},
        TWO | NARROW | partial_rope("yarn", 1.0)],
    "stablelm": [
        ONE | TIED | ONE_KEY | LAYER_EPS | {"qk_layernorm": True, "use_qkv_bias": True},
        TWO | partial_rope("yarn", 1.0) | {"use_parallel_residual": True, "hidden_act": "gelu"},
        ONE | longrope(1) | {"use_parallel_residual": True, "use_qkv_bias": True},
        TWO | NARROW | partial_rope("dynamic", 0.5) | {
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 5}],
    "starcoder2": [
        ONE_HEAD | UNTIED | {"norm_epsilon": 0.1, "use_bias": False}, ONE | longrope(3) | {
            "head_dim": 6},
        TWO | rope("llama3") | {"hidden_act": "silu", "sliding_window": 1,
                                "layer_types": [FULL, SLIDING]},
        TWO | YARN | NARROW | {"norm_type": "layer_norm", "mlp_type": "default"}],
    "nemotron": [
        ONE_HEAD | {"head_dim": None, "norm_eps": 0.1},
        TWO | TIED | partial_rope("yarn", 1.0) | {"head_dim": 6, "mlp_bias": True},
        ONE | longrope(1) | BIASED | {"hidden_act": "silu", "num_key_value_heads": 4}],
    "cohere2": [
        ONE_HEAD | LAYER_EPS | UNTIED | {"layer_types": [SLIDING], "sliding_window": 1},
        TWO | BIASED | {"head_dim": 6, "logit_scale": -0.5, "sliding_window_pattern": 1},
        TWO | YARN | {"layer_types": [FULL, SLIDING], "hidden_act": "gelu", "use_qk_norm": True,
                      "position_embedding_type": "rope_gptj", "use_embedding_sharing": True}],
    "exaone4": [
        ONE_HEAD | EPS | TIED | {"sliding_window": None, "layer_types": [FULL]},
        TWO | YARN | {"head_dim": 6, "layer_types": [FULL, SLIDING], "attention_dropout": 0.2},
        ONE | longrope(2) | NARROW | {"sliding_window": 3, "hidden_act": "gelu"}],
    "olmoe": [
        ONE_HEAD | EPS | {"num_experts": 2, "num_experts_per_tok": 2},
        TWO | rope("yarn") | {"hidden_act": "gelu", "clip_qkv": 1.0, "norm_topk_prob": True},
        ONE | TIED | longrope(2) | {"num_key_value_heads": None, "clip_qkv": None},
        TWO | YARN | ONE_KEY | {"intermediate_size": 4, "vocab_size": 67, "num_local_experts": 3,
                                "num_experts": 3}],
    "granitemoe": [
        ONE_HEAD | EPS | TIED | {"num_local_experts": 1, "num_experts_per_tok": 1},
        TWO | rope("llama3") | {"num_key_value_heads": None, "embedding_multiplier": 0.5,
                                "attention_multiplier": 2},
        ONE | longrope(2) | {"residual_multiplier": -3, "num_experts_per_tok": 4},
        TWO | YARN | {"intermediate_size": 4, "vocab_size": 67, "hidden_act": "relu"}],
    "gpt_oss": [
        ONE | EPS | TIED | {"head_dim": 8, "layer_types": [SLIDING], "sliding_window": 1},
        TWO | {"layer_types": [FULL, FULL], "rope_scaling": {**STATED, "truncate": False},
               "experts_per_token": 4, "initial_context_length": 4096, "num_experts_per_tok": 4},
        ONE | rope("llama3") | {"num_local_experts": 2, "swiglu_limit": 100.0,
                                "num_key_value_heads": 4, "vocab_size": 67}],
    "glm4_moe": [
        ONE | EPS | {"first_k_dense_replace": 0, "head_dim": 8, "num_experts_per_tok": 4,
                     "use_qk_norm": True, "routed_scaling_factor": 0.5},
        TWO | BIASED | partial_rope("yarn", 1.0) | {"first_k_dense_replace": 5,
                                                    "num_nextn_predict_layers": 0},
        TWO | {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "norm_topk_prob": False,
               "hidden_act": "gelu", "n_shared_experts": 3}],
    "deepseek_v3": [
        ONE_HEAD | EPS | {"first_k_dense_replace": 0, "q_lora_rank": None, "kv_lora_rank": 1,
                          "norm_topk_prob": False, "n_group": 4, "topk_group": 4,
                          "routed_scaling_factor": 1.0},
        TWO | rope("llama3") | {"qk_rope_head_dim": 6, "hidden_act": "gelu", "moe_layer_freq": 2,
                                "scoring_func": "sigmoid", "topk_method": "noaux_tc"}],
    "qwen3_next": [
        TWO | EPS | TIED | {"layer_types": [FULL, LINEAR], "linear_num_key_heads": 4,
                            "linear_conv_kernel_dim": 9, "num_experts_per_tok": 4},
        TWO | partial_rope("yarn", 1.0) | {"full_attention_interval": 1, "num_experts": 0,
                                           "attention_bias": True, "vocab_size": 67}],
    "qwen3_5_text": [
        TWO | EPS | {"layer_types": [LINEAR, FULL], "rope_parameters": MROPE},
        TWO | {"layer_types": [FULL, LINEAR], "linear_num_key_heads": 1,
               "linear_num_value_heads": 1, "linear_conv_kernel_dim": 2, **TIED},
        ONE_HEAD | {"layer_types": [FULL], "head_dim": 8, "intermediate_size": 1},
        TWO | BIASED | partial_rope("yarn", 1.0) | {"full_attention_interval": 1},
        TWO | {"linear_key_head_dim": 6, "linear_value_head_dim": 2, "linear_conv_kernel_dim": 8,
               "full_attention_interval": 2, "mamba_ssm_dtype": "float32", "vocab_size": 67,
               "attn_output_gate": True, "mtp_num_hidden_layers": 1}],
    "qwen3_5_moe_text": [
        TWO | EPS | {"layer_types": [LINEAR, FULL], "rope_parameters": MROPE, "num_experts": 3},
        TWO | TIED | {"layer_types": [FULL, LINEAR], "linear_num_key_heads": 1,
                      "linear_num_value_heads": 1, "linear_conv_kernel_dim": 1},
        ONE_HEAD | {"layer_types": [FULL], "head_dim": 8, "num_experts_per_tok": 4},
        TWO | BIASED | partial_rope("linear", 1.0) | {"full_attention_interval": 1,
                                                      "num_experts": 1, "num_experts_per_tok": 1},
        TWO | {"linear_key_head_dim": 6, "linear_value_head_dim": 2, "vocab_size": 67,
               "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4,
               "full_attention_interval": 2}],
    "llama4_text": [ONE_HEAD | EPS | {"head_dim": 16, "no_rope_layers": [], "floor_scale": 2,
                                      "attention_chunk_size": 1, "num_experts_per_tok": 4}],
    "albert": [
        ONE | {"num_hidden_groups": 1, "embedding_size": 32, "layer_norm_eps": 0.1, "gap_size": 0,
               "net_structure_type": 0, "hidden_dropout_prob": 0.2, "hidden_act": "quick_gelu"},
        {"num_hidden_layers": 2, "num_attention_heads": 8, "pad_token_id": 3, "embedding_size": 1,
         "max_position_embeddings": 9, "intermediate_size": 1}],
    "nomic_bert": [
        ONE | LAYER_EPS | {"pad_token_id": 3, "type_vocab_size": 1, "hidden_dropout_prob": 0.1,
                           "rope_scaling": STATED},
        ONE | rope("llama3") | {"head_dim": 8, "hidden_act": "gelu_new", "intermediate_size": 1},
        ONE | longrope(2) | {"vocab_size": 67, "activation_function": "swiglu",
                             "qkv_proj_bias": False}],
    "falcon": [
        ONE | {"new_decoder_architecture": False, "parallel_attn": False, "layer_norm_epsilon": 0.1,
               "vocab_size": 67, **rope("yarn")},
        ONE | {"num_attention_heads": 1, "num_kv_heads": 1, "bias": True, "ffn_hidden_size": 1,
               "num_ln_in_parallel_attn": 2, "activation": "gelu_new",
               **rope("dynamic", max_position_embeddings=5)}],
    "gpt_neox": [
        ONE | LAYER_EPS | {"num_attention_heads": 1, "use_parallel_residual": False,
                           "attention_bias": False},
        ONE | TIED | YARN | {"rotary_pct": 0.5, "hidden_act": "gelu_new", "rotary_emb_base": 9},
        ONE | NARROW | {"rope_scaling": ROPES["dynamic"], "rotary_pct": 1.0,
                        "max_position_embeddings": 5}],
    "gptj": [
        {"n_layer": 1, "n_head": 1, "rotary_dim": 16, "layer_norm_epsilon": 0.1, **TIED},
        {"n_layer": 1, "activation_function": "gelu", "n_positions": 9, "attn_pdrop": 0.1},
        {"n_layer": 1, "n_head": 8, "rotary_dim": 2, "n_inner": 1, "rotary": True},
        {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 67}],
    "opt": [
        ONE | {"num_attention_heads": 1, "word_embed_proj_dim": 16, "pad_token_id": 3,
               "activation_function": "silu"},
        ONE | {"do_layer_norm_before": False, "layer_norm_elementwise_affine": False,
               "enable_bias": False, "word_embed_proj_dim": 20},
        ONE | UNTIED | {"max_position_embeddings": 9, "ffn_dim": 1, "attention_dropout": 0.1},
        TWO | {"_remove_final_layer_norm": True, "do_layer_norm_before": False, "vocab_size": 67,
               "activation_function": "gelu_new"}],
    "gpt_neo": [
        {"num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 1,
         "layer_norm_epsilon": 0.1, "window_size": 1},
        {"attention_types": [[["local"], 2]], "window_size": 1, "activation_function": "gelu"},
        {"num_layers": 1, "attention_types": [[["local"], 1]], "window_size": 256,
         "max_position_embeddings": 9, **NARROW},
        {"num_hidden_layers": 1, "num_attention_heads": 4, "attention_types": [[["local"], 1]]},
        {"attention_layers": ["local", "local"], "attention_dropout": 0.1, "hidden_size": 12,
         "activation_function": "silu", **UNTIED}],
    "bloom": [
        {"n_layer": 1, "n_head": 3, "hidden_size": 12, "layer_norm_epsilon": 0.1,
         "apply_residual_connection_post_layernorm": True},
        {"num_hidden_layers": 1, "num_attention_heads": 8, "offset_alibi": 100, "seq_length": 9},
        {"n_layer": 1, "vocab_size": 67, "pretraining_tp": 4, "n_inner": None, **UNTIED},
        {"n_layer": 1, "n_head": 12, "hidden_size": 24, "attention_dropout": 0.1}],
    "umt5": [
        {"num_layers": 1, "num_decoder_layers": 1, "feed_forward_proj": "gated-silu",
         "num_heads": 1, "layer_norm_epsilon": 0.1},
        {"num_layers": 1, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu",
         "dense_act_fn": "gelu_new", "is_gated_act": True, "scale_decoder_outputs": False},
        {"num_layers": 2, "num_decoder_layers": 1, "relative_attention_num_buckets": 4,
         "relative_attention_max_distance": 5, "scale_decoder_outputs": True, **UNTIED},
        {"num_hidden_layers": 1, "num_attention_heads": 3, "head_dim": 4, "is_gated_act": True,
         "dense_act_fn": "relu"},
        {"num_layers": 1, "num_decoder_layers": 2, "d_model": 15, "vocab_size": 67,
         "decoder_start_token_id": 4, "feed_forward_proj": "gelu_new"},
        {"num_layers": 1, "num_decoder_layers": 1, "d_kv": 1, "d_ff": 1, "num_heads": 16},
    ],
}  # fmt: skip
for family, more in MORE.items():
    ODD[family] += more
DECODERS = [
    *(f for f in ODD if f in LLAMAS),
    "gpt2",
    *(f for f in tiny.OTHER_DECODERS if f != "bloom"),
]
DELTA = {"partial_rotary_factor": 0.5, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "head_dim": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
         "full_attention_interval": 3}  # fmt: skip
CASES = [(family, i) for family, changes in ODD.items() for i in range(len(changes))]
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "head_dim": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                    "n_group": 2, "topk_group": 1, "q_lora_rank": 6, "kv_lora_rank": 5,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 3, "v_head_dim": 5,
                    "first_k_dense_replace": 1, "num_key_value_heads": None,
                    "n_shared_experts": 2},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 20,
                    "no_rope_layer_interval": 2, "floor_scale": 3, "attention_chunk_size": 4},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 20, **DELTA},
    "qwen3_5_moe_text": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                         "shared_expert_intermediate_size": 20, **DELTA},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                    "moe_intermediate_size": 12, "global_head_dim": 8, "sliding_window": 3,
                    "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 6},
}  # fmt: skip
T5S = ("t5", "mt5", "umt5", "bart", "mbart")
NEED_HEAD_DIM = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "seed_oss", "qwen3", "ministral",
                 "ernie4_5", "glm4", "helium", "hunyuan_v1_dense", "gpt_oss",
                 "llama4_text")  # fmt: skip


def test_every_type_has_eight_odd_configurations():
    """A list that is in another file is added here."""
    listed = {
        **ODD,
        **test_vision.ODD,
        **dict.fromkeys(test_towers.TEXT_FAMILIES, test_towers.ODD_TEXT),
        **dict.fromkeys(test_towers.BOTH, test_towers.ODD_BOTH),
        "whisper": test_whisper.ODD,
    }
    counts = {
        family: len({json.dumps(x, sort_keys=True) for x in listed.get(family, [])})
        for family in FAMILIES
    }
    assert {family: count for family, count in counts.items() if count < 8} == {}


def odd_config(family, number=None):
    """The fields of ``config.json`` of a case; without a number as usual."""
    changes = {} if number is None else ODD[family][number]
    base = ENCODER | ({"num_hidden_groups": 2} if family == "albert" else {})
    if family in ("t5", "mt5", "umt5", "longt5"):
        base = T5
    elif family == "t5gemma":
        base = pair({}, {})
    elif ODD[family] is BARTS:
        base = BART
    elif family == "switch_transformers":
        base = SWITCH
    elif family in tiny.OTHER_DECODERS:
        base = {**tiny.CONFIGS[family], "pad_token_id": 0}
    elif family == "gpt2":
        base = tiny.GPT2
    elif family in LLAMAS:
        base = {**BASE, **({"head_dim": 4} if family in NEED_HEAD_DIM else {})}
        base |= {"partial_rotary_factor": 0.5} if family == "stablelm" else {}
        base |= EXPERTS.get(family, DELTA if family == "qwen3_5_text" else {})
    fields = {**base, **changes, "model_type": family}
    if family == "distilbert":
        fields = {DISTILBERT.get(name, name): value for name, value in fields.items()}
    return fields


def usual_head(family, number):
    """A head that the family has; encoders have each in turn."""
    heads = list(FAMILIES[family].architectures)
    return FAMILIES[family].text_head or heads[number % len(heads)]


def made(folder, family, fields, head):
    """Writes a checkpoint with reproducible weights; returns its folder and the class for it."""
    import transformers

    rest = json.loads(json.dumps(fields))  # transformers writes into nested fields
    config = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
    cls = getattr(transformers, FAMILIES[family].architectures[head])
    cls(config).save_pretrained(folder / "names")
    names = safetensors.numpy.load_file(folder / "names" / "model.safetensors")
    tensors = {name: tiny.weight(name, x.shape) for name, x in names.items()}
    return tiny.write_folder(folder / "model", fields, tensors), cls


def stored_otherwise(folder, kind):
    """Rewrites the weights of a folder in bfloat16, or in two files."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    if kind == "bfloat16":
        tensors = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if kind == "shards":
        (folder / "model.safetensors").unlink()
        names = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
        for file in set(names.values()):
            part = {name: x for name, x in tensors.items() if names[name] == file}
            safetensors.numpy.save_file(part, folder / file)
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


KINDS = ("left", "whole", "right", "single")
STORED = ("plain", "bfloat16", "shards")


def inputs(kind, family):
    """Token ids and masks, by the names of arguments."""
    rng = np.random.RandomState(3)
    shape = (2, 1) if kind == "single" else (3, 9)
    ids, mask = rng.randint(4, 61, shape).astype(np.int32), np.ones(shape, np.int32)
    if kind in ("left", "right"):
        for row, length in enumerate((9, 6, 3)):
            mask[row, length:] = 0
        mask = mask[:, ::-1].copy() if kind == "left" else mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[family].text_head == "seq2seq-lm":
        batch["decoder_input_ids"] = rng.randint(4, 61, (shape[0], 5)).astype(np.int32)
    return batch


def theirs(model, batch):
    """The outputs of a model of transformers."""
    import torch

    given = {name: torch.tensor(x).long() for name, x in batch.items()}
    if model.config.model_type in DECODERS:
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**given, output_hidden_states=True)


@jax.jit
def ours(model, batch):
    return model(**batch, output_hidden_states=True)


def compare(got, want, real, tolerance=1e-4):
    """Compares outputs where tokens are real, relative to the largest; returns the worst."""
    hidden = getattr(want, "hidden_states", None) or want.decoder_hidden_states
    pairs = list(zip(got.hidden_states, hidden, strict=True))
    logits = getattr(want, "logits", None)
    if hasattr(want, "start_logits"):
        pairs += [
            (got.logits[..., i], x) for i, x in enumerate((want.start_logits, want.end_logits))
        ]
    elif logits is not None:
        pairs.append((got.logits, logits))
    worst = 0.0
    for mine, other in pairs:
        mine, other = np.asarray(mine), other.numpy()
        assert mine.shape == other.shape
        if mine.shape[:2] == real.shape:
            mine, other = mine[real], other[real]
        worst = max(worst, float(np.abs(mine - other).max() / np.abs(other).max()))
    assert worst < tolerance
    return worst


def real_tokens(batch):
    decoder = batch.get("decoder_input_ids")
    return batch["attention_mask"].astype(bool) if decoder is None else np.ones(decoder.shape, bool)


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize(("family", "number"), CASES)
def test_odd_configurations_equal_transformers(family, number, tmp_path, record_property):
    head = usual_head(family, number)
    fields = odd_config(family, number)
    if head in ("question-answering", "classification"):
        fields["num_labels"] = 2
    folder, cls = made(tmp_path, family, fields, head)
    stored_otherwise(folder, STORED[number % 3])
    batch = inputs(KINDS[number % 4], family)
    want = theirs(cls.from_pretrained(folder, dtype="float32").eval(), batch)
    got = ours(fj.load(folder, head=head, dtype="float32"), batch)
    record_property("worst", compare(got, want, real_tokens(batch)))


# Others have the heads of T5 or BART, and configurations that are compared above.
T5_CASES = [
    (family, number, head)
    for family in T5S
    for number in range({"t5": 8, "bart": 4}.get(family, 2))
    for head in FAMILIES[family].architectures
    if head not in (None, "seq2seq-lm")
]


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("family", "number", "head"), T5_CASES)
def test_heads_of_t5_equal_transformers(family, number, head, tmp_path, recwarn):
    """Loaded and fused models, with two end tokens in each text, and padding on either side."""
    labels = 2 if head == "question-answering" else 3
    fields = {**odd_config(family, number), "num_labels": labels, "eos_token_id": 1}
    folder, cls = made(tmp_path, family, fields, head)
    batch = inputs(("left", "right", "whole")[number % 3], family)
    del batch["decoder_input_ids"]
    mask = batch["attention_mask"].astype(bool)
    for row, real in zip(batch["input_ids"], mask, strict=True):
        row[np.flatnonzero(real)[[0, -1 - number % 2]]] = 1
    want = theirs(cls.from_pretrained(folder).eval(), batch)
    model = fj.load(folder, head=head)
    compare(ours(model, batch), want, mask)
    smaller, _ = fj.compress(model, fj.Fusion(width=7), key=jax.random.key(0))
    exported = fj.export_hf(smaller, tmp_path / "hf")
    other, info = cls.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    compare(ours(smaller, batch), theirs(other.eval(), batch), mask)
    assert not [w for w in recwarn if "hf" in str(w.message)]


NEW = ("gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "ministral", "seed_oss",
       "arcee", "glm4", "helium", "hunyuan_v1_dense", "olmo3", "starcoder2",
       "exaone4", "nemotron", "phi", "stablelm", *tiny.OTHER_DECODERS,
       "gpt_oss", "deepseek_v3", "qwen3_next", "qwen3_5_text")  # fmt: skip
HEADS = [
    (family, head)
    for family in NEW
    for head in FAMILIES[family].architectures
    if head not in (None, "causal-lm")
]


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_heads_of_decoders_equal_transformers(family, head, tmp_path):
    """Whole texts: in transformers, a text's last token does not depend on the mask."""
    labels = 2 if head == "question-answering" else 3
    fields = {**odd_config(family), "num_labels": labels}
    folder, cls = made(tmp_path, family, fields, head)
    batch = inputs("whole", family)
    want = theirs(cls.from_pretrained(folder).eval(), batch)
    compare(ours(fj.load(folder, head=head), batch), want, real_tokens(batch))


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "unequal") for family in ODD] + [(family, "equal") for family in ("bert", "llama",
     "gpt2", "t5", "bart", "mixtral", "gpt_oss", "llama4_text", "t5gemma", "gemma4_text")],
)  # fmt: skip
def test_fused_exports_equal_in_transformers(family, kind, tmp_path, key, recwarn):
    """All MLPs of one width, or some MLPs of different widths."""
    head = usual_head(family, 0)
    folder, cls = made(tmp_path, family, odd_config(family), head)
    model = fj.load(folder, head=head)
    paths = [site.path for site in fj.sites(model)]
    plan = {path: fj.Fusion(width=5 + i) for i, path in enumerate(paths[1:])}
    smaller, _ = fj.compress(model, fj.Fusion(width=7) if kind == "equal" else plan, key=key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    batch = inputs("whole", family)
    other, info = cls.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    compare(ours(smaller, batch), theirs(other.eval(), batch), real_tokens(batch))
    assert not [w for w in recwarn if "hf" in str(w.message)]


def test_both_names_of_nomic(tmp_path):
    """Those of Nomic's own code, which transformers writes, and those of transformers' modules."""
    folder = tiny.checkpoint(tmp_path / "old", "nomic_bert", "masked-lm")
    names = {"attn.out_proj": "self_attn.o_proj", "fc11": "up_proj", "fc12": "gate_proj",
             "fc2": "down_proj", "norm1": "post_attention_layernorm", "encoder.layers": "layers",
             "norm2": "post_mlp_layernorm", "emb_ln": "embeddings.LayerNorm"}  # fmt: skip
    new = {}
    for name, x in safetensors.numpy.load_file(folder / "model.safetensors").items():
        for old, own in names.items():
            name = name.replace(old, own)
        if "Wqkv" not in name:
            new[name] = x
            continue
        for letter, part in zip("qkv", np.split(x, 3), strict=True):
            new[name.replace("attn.Wqkv", f"self_attn.{letter}_proj")] = np.ascontiguousarray(part)
    other = tiny.write_folder(tmp_path / "new", tiny.CONFIGS["nomic_bert"], new)
    assert bit_equal(*(fj.load(each, head="masked-lm") for each in (folder, other)))


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize("family", EXPERTS)
def test_dropped_experts_equal_in_transformers(family, tmp_path, key, recwarn):
    """Experts that are chosen on text, and then fused."""
    head = usual_head(family, 0)
    folder, cls = made(tmp_path, family, odd_config(family), head)
    batch = inputs("whole", family)
    model = fj.load(folder, head=head)
    fewer, _ = fj.compress(model, fj.DropExperts(keep=0.5), key=key, calibration=[batch])
    counts = [{m.router.out_features for m in mixtures(each).values()} for each in (model, fewer)]
    assert counts[1] == {counts[0].pop() / 2}
    smaller, _ = fj.compress(fewer, fj.Fusion(width=9), key=key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    other, info = cls.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    compare(ours(smaller, batch), theirs(other.eval(), batch), real_tokens(batch))
    assert not [w for w in recwarn if "hf" in str(w.message)]


@pytest.mark.torch
@pytest.mark.full
def test_weights_of_four_bits_equal_transformers(tmp_path):
    """Which computes the matrices on a CPU too; what is exported has plain matrices."""
    fields = {**odd_config("gpt_oss"), "hidden_size": 32, "intermediate_size": 32}
    folder, cls = made(tmp_path, "gpt_oss", fields, "causal-lm")
    tensors, rng = (
        safetensors.numpy.load_file(folder / "model.safetensors"),
        np.random.RandomState(5),
    )
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        e, d, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.randint(0, 256, (e, rows, d // 32, 16)).astype(np.uint8)
        tensors[f"{name}_scales"] = rng.randint(118, 126, (e, rows, d // 32)).astype(np.uint8)
    fields |= {
        "quantization_config": {"quant_method": "mxfp4", "dequantize": True},
        "dtype": "bfloat16",
    }
    folder = tiny.write_folder(tmp_path / "four", fields, tensors)
    batch = inputs("whole", "gpt_oss")
    model = fj.load(folder, head="causal-lm", dtype="float32")
    want = theirs(cls.from_pretrained(folder, dtype="float32").eval(), batch)
    compare(ours(model, batch), want, real_tokens(batch))
    other = cls.from_pretrained(fj.export_hf(model, tmp_path / "hf")).eval()
    compare(ours(model, batch), theirs(other, batch), real_tokens(batch))
