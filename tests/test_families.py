"""Odd configurations of every family against transformers, where torch is installed."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.models.registry import FAMILIES
from tests import tiny

BASE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = [SLIDING, FULL, SLIDING]
PRIME = {"hidden_size": 14, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 2,
         "intermediate_size": 23}  # fmt: skip
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
ODD = {
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
}  # fmt: skip
CASES = [(family, i) for family, changes in ODD.items() for i in range(len(changes))]
KINDS = ("left", "whole", "right", "single")


def odd_config(family, number):
    usual = (
        {"head_dim": 4}
        if family in ("gemma", "gemma2", "gemma3_text", "seed_oss", "qwen3", "ministral")
        else {}
    )
    return {"model_type": family, **BASE, **usual, **ODD[family][number]}


def odd_folder(folder, family, number, head="causal-lm"):
    """Writes a checkpoint of the case, and returns its folder."""
    import transformers

    fields = odd_config(family, number)
    rest = dict(fields)
    config = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
    cls = getattr(transformers, FAMILIES[family].architectures[head])
    cls(config).save_pretrained(folder / "names")
    names = safetensors.numpy.load_file(folder / "names" / "model.safetensors")
    tensors = {name: tiny.weight(name, x.shape) for name, x in names.items()}
    return tiny.write_folder(folder / "model", fields, tensors), cls


def inputs(kind):
    rng = np.random.RandomState(3)
    shape = (2, 1) if kind == "single" else (3, 9)
    ids, mask = rng.randint(3, 61, shape).astype(np.int32), np.ones(shape, np.int32)
    if kind in ("left", "right"):
        for row, length in enumerate((9, 6, 3)):
            mask[row, length:] = 0
        mask = mask[:, ::-1].copy() if kind == "left" else mask
        ids[mask == 0] = 0
    return ids, mask


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize(("family", "number"), CASES)
def test_odd_configurations_equal_transformers(family, number, tmp_path):
    import torch

    folder, cls = odd_folder(tmp_path, family, number)
    ids, mask = inputs(KINDS[number % 4])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    theirs = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids).long(), torch.tensor(mask), position_ids=torch.tensor(positions),
            output_hidden_states=True,
        )  # fmt: skip
    model = fj.load(folder, head="causal-lm")
    got = jax.jit(lambda m, *x: m(*x, output_hidden_states=True))(model, ids, mask)
    for ours, other in zip(
        (*got.hidden_states, got.logits), (*want.hidden_states, want.logits), strict=True
    ):
        ours, other, real = np.asarray(ours), other.numpy(), mask.astype(bool)
        np.testing.assert_allclose(ours[real], other[real], atol=1e-4 * np.abs(other[real]).max())
