"""What a config.json may say, against transformers where torch is installed."""

import json

import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.checkpoint.opening import open_checkpoint
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.rope import Rope
from tests import tiny
from tests.helpers import unchecked

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
# Changes of a tiny configuration that transformers reads in its own way.
CONFIGS = {
    "mistral-types": ("mistral", {"layer_types": [FULL, SLIDING, FULL], "head_dim": 4}),
    "scaling-first": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0},
    ),
    "original-outside": (
        "llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 32},
         "original_max_position_embeddings": 16},
    ),
    "yarn-without-factor": (
        "qwen3",
        {"rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 16}},
    ),
}  # fmt: skip


def written(name, folder):
    family, changes = CONFIGS[name]
    config = {**tiny.CONFIGS[family], **changes}
    return tiny.write_folder(folder, config, tiny.weights(family, "causal-lm"))


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = written(name, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tiny.batch(CONFIGS[name][0])["input_ids"][:1]
    ids = np.tile(ids, (1, 4))
    with torch.no_grad():
        want = theirs(torch.tensor(ids).long()).logits.numpy()
    got = np.asarray(fj.load(folder, head="causal-lm")(ids).logits)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_windows_follow_the_types_of_layers():
    config = {**tiny.CONFIGS["mistral"], "layer_types": [FULL, SLIDING, FULL]}
    assert tiny.decoder_config(config).sliding_windows == (None, 4, None)
    assert tiny.decoder_config(tiny.CONFIGS["mistral"]).sliding_windows == (4, 4, 4)
    mixtral = {**tiny.CONFIGS["mixtral"], "sliding_window": 4, "layer_types": [FULL] * 3}
    assert tiny.decoder_config(mixtral).sliding_windows == (4, 4, 4)
    for types in ([FULL], [FULL, SLIDING, "other"]):
        with pytest.raises(fj.InputError, match="layer_types must be sliding_attention or full"):
            tiny.decoder_config({**config, "layer_types": types})


def test_precedence_of_rope_settings():
    both = {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": YARN}
    assert Rope.from_json({**both, "rope_theta": 5.0}) == Rope(
        rope_type="linear", factor=3.0, rope_theta=5.0
    )
    outside = {"rope_parameters": {**YARN, "original_max_position_embeddings": 8}}
    outside["original_max_position_embeddings"] = 16
    assert Rope.from_json(outside).original_max_position_embeddings == 16
    absent = {"rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 16}}
    assert Rope.from_json({**absent, "max_position_embeddings": 64}).factor == 4.0
    for name in ("linear", "llama3"):
        with pytest.raises(fj.InputError, match=f"rope_type {name} needs a factor"):
            Rope.from_json({"rope_parameters": {"rope_type": name, "factor": None}})


def test_routers_of_another_dtype_are_refused(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", "switch", "seq2seq-lm", router_dtype="bfloat16")
    with pytest.raises(fj.InputError, match="a router_dtype other than float32 is not implemented"):
        fj.load(folder)


SECOND_NAMES = [
    ("bart", {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers",
              "num_attention_heads": "encoder_attention_heads"}),
    ("t5", {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "head_dim": "d_kv",
            "num_attention_heads": "num_heads"}),
    ("switch", {"hidden_size": "d_model", "num_hidden_layers": "num_layers",
                "num_attention_heads": "num_heads"}),
    ("gpt2", {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
              "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}),
    ("mixtral", {"num_experts": "num_experts"}),
    ("glm4_moe", {"num_mtp_layers": "further_layers"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "names"), SECOND_NAMES)
def test_second_names_of_fields_count(family, names):
    """Where both are there, as in transformers."""
    config = tiny.decoder_config({**tiny.CONFIGS[family], **dict.fromkeys(names, 8)})
    assert {getattr(config, name) for name in names.values()} == {8}


def test_sizes_of_vocabularies_are_not_numbers_of_layers():
    """Gemma 4 has a second one, for what its layers read of the tokens."""
    config = FAMILIES["gemma4_text"].config({"model_type": "gemma4_text"})
    assert config.vocab_size == 262144
    with pytest.raises(fj.InputError, match="num_hidden_layers must be from 1 to 10000"):
        tiny.decoder_config({**tiny.CONFIGS["llama"], "num_hidden_layers": 262144})


DEFAULTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
            "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "eos_token_id",
            "num_experts", "num_experts_per_tok", "moe_intermediate_size",
            "tie_word_embeddings")  # fmt: skip


@pytest.mark.torch
def test_defaults_of_decoders_are_those_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wrong = {}
    # By default, GLM-4 with experts rotates 21 features; Llama 4 has other names, and Gemma 4 more
    # than one size of heads.
    for family in FAMILIES.keys() - {"glm4_moe", "llama4_text", "gemma4_text"}:
        ours = FAMILIES[family].config({"model_type": family})
        if not isinstance(ours, DecoderConfig):
            continue
        theirs = CONFIG_MAPPING[family]().to_dict()
        for name in DEFAULTS:
            want = theirs.get(name)
            want = tuple(want) if isinstance(want, list) else want
            if want is not None and getattr(ours, name) != want:
                wrong[family, name] = getattr(ours, name), want
    assert wrong == {}


def test_types_of_layers_that_are_null_are_the_usual_ones():
    config = FAMILIES["gpt_neo"].config({"model_type": "gpt_neo", "attention_types": None})
    assert config.sliding_windows == (None, 256) * 12


def test_activations_of_t5_that_are_stated_twice():
    fields = {**tiny.CONFIGS["t5"], "feed_forward_proj": "gated-gelu"}
    for more, want in (
        ({}, ("gelu_new", True)),
        ({"dense_act_fn": "silu"}, ("silu", True)),
        ({"is_gated_act": False}, ("gelu_new", False)),
    ):
        config = tiny.decoder_config({**fields, **more})
        assert (config.act, config.gated) == want


REFUSED = [
    ("modernbert", {"mlp_dropout": 0.1}, "an mlp_dropout other than 0"),
    ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling must be of type"),
    ("modernbert", {"layer_types": [FULL]}, "for each of the 3 layers"),
    ("modernbert", {"rope_parameters": {"rope_theta": 5.0}}, "must have only full_attention"),
    ("modernbert", {"rope_scaling": {"type": "linear"}}, "needs a rope_type"),
    ("albert", {"num_hidden_groups": 5}, "num_hidden_groups must be at most"),
    ("eurobert", {"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
    ("nomic_bert", {"n_embd": 16}, "has the names of Nomic's own code"),
    ("deberta-v2", {"conv_kernel_size": 2}, "conv_kernel_size must be odd"),
    ("deberta-v2", {"attention_head_size": 5}, "attention_head_size must be 4"),
    ("deberta-v2", {"position_buckets": 3}, "half of position_buckets must be from 2"),
    ("bart", {"encoder_layerdrop": 0.1}, "encoder_layerdrop other than 0"),
    ("bart", {"decoder_attention_heads": 3}, "is not a multiple of decoder_attention_heads 3"),
    ("marian", {"share_encoder_decoder_embeddings": False}, "is not implemented"),
    ("marian", {"decoder_vocab_size": 7}, "decoder_vocab_size other than vocab_size"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_variants_that_are_refused(family, changes, message):
    with pytest.raises(fj.InputError, match=message):
        tiny.decoder_config({**tiny.CONFIGS[family], **changes})


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("olmoe", {"clip_qkv": 0}, "clip_qkv must be above 0; got 0"),
        ("olmoe", {"num_experts_per_tok": 5}, "uses 5 experts, of which there are 4"),
        ("gpt_oss", {"swiglu_limit": "7"}, "swiglu_limit must be a number above 0; got '7'"),
        ("deepseek_v3", {"n_group": 3}, "8 experts are not 3 groups of one size"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 5}, "among 5 of 4 groups"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "must be num_attention_heads, 4"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank must be an integer of at least 1"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts must be an integer of at least 1"),
        ("glm4_moe", {"routed_scaling_factor": None}, "routed_scaling_factor must be a number"),
        ("llama4", {"attention_chunk_size": 0}, "attention_chunk_size must be at least 1; got 0"),
        ("llama4", {"no_rope_layers": [0, 2, 1]}, "no_rope_layers must be 0 or 1"),
        ("llama4", {"layer_types": ["full_attention"]}, "must be chunked_attention or full"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 is not a multiple of linear_num"),
        ("qwen3_5", {"layer_types": [FULL, SLIDING, FULL]}, "must be linear_attention or full"),
    ],
)  # fmt: skip
def test_fields_of_mixtures_that_cannot_be(family, fields, message):
    with pytest.raises(fj.InputError, match=message):
        tiny.decoder_config({**tiny.CONFIGS[family], **fields})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t5", {"num_decoder_layers": "six"}, "num_decoder_layers must be of type int; got 'six'"),
        ("bert", {"layer_norm_eps": [1]}, "layer_norm_eps must be of type float"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps must be of type float"),
    ],
)
def test_numbers_that_are_none(family, changes, message, tmp_path):
    """Also for users, who do not check types while code runs."""
    folder = tiny.checkpoint(tmp_path / family, family, dict(tiny.GENERATIVE).get(family))
    fields = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    with unchecked(), pytest.raises(fj.InputError, match=message):
        open_checkpoint(folder)


def test_minus_one_is_no_limit_in_deberta():
    """As published files of its third version state it."""
    fields = {**tiny.CONFIGS["deberta-v2"], "max_relative_positions": -1, "position_buckets": -1}
    config = tiny.decoder_config(fields)
    assert config.blocks.relative.most == fields["max_position_embeddings"]
    assert config.blocks.relative.buckets <= 0
