"""Tiny Hugging Face checkpoints with weights that depend only on their names."""

import copy
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from fusion_jax.models.registry import FAMILIES

GOLDENS = Path(__file__).parent / "goldens"

BERT = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "id2label": {"0": "no", "1": "maybe", "2": "yes"},
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
}
ROBERTA = {**BERT, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
ROBERTA["layer_norm_eps"] = 1e-5
MPNET = {**ROBERTA, "model_type": "mpnet", "num_attention_heads": 2}
del MPNET["type_vocab_size"]
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 99,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "id2label": BERT["id2label"],
    "label2id": BERT["label2id"],
}
MODERNBERT = {
    "model_type": "modernbert",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "local_attention": 12,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "id2label": BERT["id2label"],
    "label2id": BERT["label2id"],
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 24,
    "activation_function": "gelu_new",
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(rope_type, **options):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


SMALL = {**LLAMA, **rope("default"), "num_hidden_layers": 2}
T5 = {
    "model_type": "t5",
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BART = {
    "model_type": "bart",
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 24,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "forced_eos_token_id": None,
}
CONFIGS = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": {**ROBERTA, "model_type": "xlm-roberta", "pad_token_id": 3},
    "camembert": {**ROBERTA, "model_type": "camembert"},
    "electra": {**BERT, "model_type": "electra", "embedding_size": 24, "hidden_act": "gelu_new"},
    "distilbert": DISTILBERT,
    "mpnet": MPNET,
    # As version 3, with the convolution of version 2.
    "deberta-v2": {**BERT, "model_type": "deberta-v2", "hidden_size": 16, "intermediate_size": 24,
                   "type_vocab_size": 0, "relative_attention": True, "position_buckets": 4,
                   "norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3,
                   "pos_att_type": "p2c|c2p", "position_biased_input": False},
    "nomic_bert": {**BERT, "model_type": "nomic_bert", "hidden_size": 16, "intermediate_size": 24,
                   "hidden_act": "silu", "hidden_dropout_prob": 0.1},
    "eurobert": {**MODERNBERT, "model_type": "eurobert", "num_attention_heads": 4,
                 "num_key_value_heads": 2, "attention_dropout": 0.1},
    # The first of three layers is applied twice.
    "albert": {**BERT, "model_type": "albert", "hidden_size": 16, "intermediate_size": 24,
               "embedding_size": 8, "num_hidden_layers": 4, "num_hidden_groups": 3,
               "hidden_dropout_prob": 0.1},
    "modernbert": MODERNBERT,
    "gpt2": GPT2,
    "gpt2-exact": {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
    "llama": LLAMA,
    "mistral": {**LLAMA, **rope("default"), "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**LLAMA, **rope("linear", factor=4.0), "model_type": "qwen2",
              "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 3,
              "max_window_layers": 2},
    "qwen3": {**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=16),
              "model_type": "qwen3", "head_dim": 6},
    "mixtral": {**LLAMA, **rope("default"), "model_type": "mixtral", "num_local_experts": 4,
                "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3-moe": {**LLAMA, **rope("default"), "model_type": "qwen3_moe", "num_experts": 4,
                  "num_experts_per_tok": 2, "norm_topk_prob": False, "head_dim": 4,
                  "moe_intermediate_size": 24},
    # Experts in the second layer alone.
    "qwen2-moe": {**LLAMA, **rope("default"), "model_type": "qwen2_moe", "num_experts": 4,
                  "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 20, "num_hidden_layers": 4,
                  "decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True,
                  "sliding_window": 3, "max_window_layers": 2},
    "gemma": {**LLAMA, **rope("default"), "model_type": "gemma", "head_dim": 6,
              "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {**LLAMA, **rope("default"), "model_type": "gemma2", "head_dim": 4,
               "sliding_window": 3, "tie_word_embeddings": True},
    "gemma3": {**LLAMA, "model_type": "gemma3_text", "head_dim": 6, "sliding_window": 3,
               "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
               "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "granite": {**LLAMA, **rope("default"), "model_type": "granite", "embedding_multiplier": 12.0,
                "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125,
                "tie_word_embeddings": True},
    "ministral": {**LLAMA, **rope("default"), "model_type": "ministral", "head_dim": 4,
                  "sliding_window": 3,
                  "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "olmoe": {**LLAMA, **rope("default"), "model_type": "olmoe", "num_experts": 4,
              "num_experts_per_tok": 2, "clip_qkv": 0.5, "pad_token_id": 0},
    "gpt_oss": {**LLAMA, **rope("yarn", factor=32.0, original_max_position_embeddings=16),
                "model_type": "gpt_oss", "head_dim": 4, "num_local_experts": 4,
                "num_experts_per_tok": 2, "sliding_window": 3, "swiglu_limit": 0.3},
    "deepseek_v3": {**LLAMA, "model_type": "deepseek_v3", "n_routed_experts": 8,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2,
                    "n_group": 4, "topk_group": 2, "q_lora_rank": 6, "kv_lora_rank": 5,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 3, "v_head_dim": 5,
                    "first_k_dense_replace": 1, "num_key_value_heads": 4,
                    **rope("yarn", factor=4.0, original_max_position_embeddings=16,
                           mscale=1.0, mscale_all_dim=1.0)},
    "glm4_moe": {**LLAMA, **rope("default"), "model_type": "glm4_moe", "n_routed_experts": 4,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 12, "use_qk_norm": True},
    "llama4": {**LLAMA, "model_type": "llama4_text", "num_local_experts": 4, "head_dim": 4,
               "num_experts_per_tok": 2, "intermediate_size_mlp": 20, "no_rope_layer_interval": 2,
               "floor_scale": 64, "attention_chunk_size": 4, "interleave_moe_layer_step": 2},
    "qwen3_next": {**LLAMA, **rope("default"), "model_type": "qwen3_next", "head_dim": 8,
                   "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 20, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 3,
                   "linear_value_head_dim": 5, "full_attention_interval": 2},
    "qwen3_5": {**LLAMA, **rope("default"), "model_type": "qwen3_5_text", "head_dim": 8,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3,
                "linear_value_head_dim": 5, "full_attention_interval": 2,
                "tie_word_embeddings": True},
    "granitemoe": {**LLAMA, **rope("default"), "model_type": "granitemoe",
                   "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 8.0,
                   "attention_multiplier": 0.125, "residual_multiplier": 0.22},
    "olmo2": {**LLAMA, **rope("default"), "model_type": "olmo2"},
    "phi3": {**LLAMA, **rope("default"), "model_type": "phi3", "pad_token_id": 0},
    "seed_oss": {**LLAMA, **rope("default"), "model_type": "seed_oss", "head_dim": 6},
    "smollm3": {**LLAMA, **rope("default"), "model_type": "smollm3", "no_rope_layers": [1, 0, 1],
                "tie_word_embeddings": True, "pad_token_id": 0},
    "bloom": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2,
              "bos_token_id": None, "eos_token_id": None},
    "falcon": {"model_type": "falcon", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True,
               "ffn_hidden_size": 24, "bos_token_id": None, "eos_token_id": None},
    "gpt_neo": {"model_type": "gpt_neo", "vocab_size": 61, "hidden_size": 16, "num_layers": 2,
                "num_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
                "attention_types": [[["global", "local"], 1]], "window_size": 3,
                "bos_token_id": None, "eos_token_id": None},
    "opt": {"model_type": "opt", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "ffn_dim": 24, "max_position_embeddings": 32,
            "word_embed_proj_dim": 12, "pad_token_id": 0, "bos_token_id": None,
            "eos_token_id": None},
    "arcee": {**SMALL, "model_type": "arcee", "hidden_act": "relu2"},
    "cohere": {**SMALL, "model_type": "cohere", "use_qk_norm": True, "tie_word_embeddings": True,
               "logit_scale": 0.5},
    "cohere2": {**SMALL, "model_type": "cohere2", "sliding_window": 3,
                "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "ernie4_5": {**SMALL, "model_type": "ernie4_5", "head_dim": 4, "tie_word_embeddings": True},
    "exaone4": {**SMALL, "model_type": "exaone4", "sliding_window": 3,
                "sliding_window_pattern": 2},
    "glm4": {**SMALL, "model_type": "glm4", "head_dim": 4, "pad_token_id": 0},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 16,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
                 "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None},
    "gptj": {"model_type": "gptj", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2,
             "n_inner": 24, "rotary_dim": 4, "n_positions": 32, "bos_token_id": None,
             "eos_token_id": None},
    "helium": {**SMALL, "model_type": "helium", "head_dim": 4},
    "hunyuan": {**SMALL, "model_type": "hunyuan_v1_dense", "head_dim": 4,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0,
                                    "factor": 1.0}},
    "nemotron": {**SMALL, "model_type": "nemotron", "partial_rotary_factor": 0.5},
    "olmo3": {**SMALL, "model_type": "olmo3", "sliding_window": 3, "rope_parameters": None,
              "rope_scaling": {"rope_type": "linear", "factor": 2.0},
              "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {**SMALL, "model_type": "phi", "qk_layernorm": True, "resid_pdrop": 0.1,
            "embd_pdrop": 0.1},
    "stablelm": {**SMALL, "model_type": "stablelm", "num_attention_heads": 2,
                 "use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": {**SMALL, "model_type": "starcoder2", "sliding_window": 3},
    "t5": T5,
    "t5-v1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": BART,
    "mbart": {**BART, "model_type": "mbart", "pad_token_id": 0, "scale_embedding": True},
    "marian": {**BART, "model_type": "marian", "pad_token_id": 0, "activation_function": "silu"},
    "pegasus": {**BART, "model_type": "pegasus", "pad_token_id": 0, "scale_embedding": True},
    "umt5": {**T5, "model_type": "umt5", "feed_forward_proj": "gated-gelu"},
    "mt5": {**T5, "model_type": "mt5", "feed_forward_proj": "gated-gelu"},
    "switch": {**T5, "model_type": "switch_transformers", "num_experts": 4, "expert_capacity": 2,
               "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
               "router_jitter_noise": 0.1},
}  # fmt: skip


# Decoders whose fields, or whose layers, do not have the names that Llama's have.
OTHER_DECODERS = ("bloom", "falcon", "gpt_neo", "gpt_neox", "gptj", "opt")


def decoder_config(fields):
    """The configuration of a model with these fields in its config.json."""
    return FAMILIES[fields["model_type"]].config(fields)


# Models of images, which tests/test_vision.py tests.
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [8, 12],
    "patch_size": 4,
    "id2label": BERT["id2label"],
    "label2id": BERT["label2id"],
}
DINOV2 = {**VIT, "model_type": "dinov2", "image_size": 8, "mlp_ratio": 2, "drop_path_rate": 0.5}
del DINOV2["intermediate_size"]
TOWER = {n: x for n, x in VIT.items() if n not in ("id2label", "label2id")} | {"image_size": 8}
VISION = {
    "vit": VIT,
    "dinov2": DINOV2,
    "clip_vision_model": {**TOWER, "model_type": "clip_vision_model"},
    "siglip_vision_model": {**TOWER, "model_type": "siglip_vision_model"},
}


def images(config, count=3):
    """Pixels for a configuration of a model of images."""
    height, width = np.broadcast_to(config["image_size"], 2)
    shape = (count, config.get("num_channels", 3), height, width)
    return np.random.RandomState(5).standard_normal(shape).astype(np.float32)


def _cases(*heads):
    return [
        (name, head)
        for name, config in CONFIGS.items()
        for head in heads
        if head in FAMILIES[config["model_type"]].architectures
    ]


DECODERS = ("gpt2", "gpt2-exact", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2-moe",
            "qwen3-moe")  # fmt: skip
HEADS = _cases("token-classification", "question-answering")
T5S = ("t5", "t5-v1.1", "mt5", "umt5")
HEADS += [(name, head) for name, head in _cases("classification") if name in (*DECODERS, *T5S)]
# Of relatives, what the others do not show.
HEAD_GOLDENS = [
    (name, head)
    for name, head in HEADS
    if name in ("bert", "electra", "distilbert", "mpnet", "gpt2", "llama", "t5")
    or (name, head) in (("roberta", "token-classification"), ("mistral", "question-answering"))
]


def config_of(family, head):
    """The fields of a case's config.json: classes, and the tokens that a head needs to know."""
    config = copy.deepcopy(CONFIGS[family])  # transformers writes into nested fields
    if (family, head) not in HEADS:
        return config
    names = ("id2label", "label2id")
    config = {name: value for name, value in config.items() if name not in names}
    if head != "question-answering":
        config |= {name: BERT[name] for name in names}
    ends = {"eos_token_id": END} if family in T5S else {}
    return {"pad_token_id": 0, **config, **ends}


GENERATIVE = _cases("causal-lm", "seq2seq-lm")
# RoBERTa under other names.
ROBERTAS = ("xlm-roberta", "camembert")
# Encoders whose hidden states are those of the cases with heads.
WITH_HEADS = ("albert", "deberta-v2", "eurobert", "nomic_bert")
ENCODERS = [
    (name, head)
    for name, head in _cases(None, "classification", "masked-lm")
    if name not in dict(GENERATIVE)
    and (name not in ROBERTAS or head == "classification")
    and (name not in WITH_HEADS or head is not None)
]
CASES = [*ENCODERS, ("gpt2", None), ("llama", None), ("t5", None), *GENERATIVE]
END = 1  # of texts, where T5 reads their class
PAD = 1  # after generated texts; transformers takes 0 for none in beam search
# Their configurations ask for none.
WITHOUT_DROPOUT = ("llama", "mixtral", "gemma3", "phi3")


def _distinct(cases):
    """One case for each class of models and head, as variants of a class share its code."""
    found = {}
    for name, head in cases:
        found.setdefault((FAMILIES[CONFIGS[name]["model_type"]].model, head), (name, head))
    return list(found.values())


# What does not depend on the variant is tested with one, and with mixtures and windows.
_MORE = ("mixtral", "causal-lm"), ("gemma3", "causal-lm"), ("switch", "seq2seq-lm")
DISTINCT = list(dict.fromkeys([*_distinct(CASES), *_MORE]))


def architecture(family, head):
    """The name of the Hugging Face class."""
    return FAMILIES[CONFIGS[family]["model_type"]].architectures[head]


def golden_path(family, head):
    return GOLDENS / f"{family}-{head or 'base'}.safetensors"


def weight(name, shape):
    """A reproducible array; RandomState's stream is fixed for ever, unlike Generator's."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    norm = re.search(r"(orm|ln_\w)\.weight$", name)
    scale, shift = (0.1, 1.0) if norm else (0.2, 0.0)
    return (shift + scale * values).astype(np.float32)


def batch(family, head=None):
    """Arguments of a model for three sequences: padded on the left where it generates."""
    config = CONFIGS[family]
    rng = np.random.RandomState(7)
    pad = config.get("pad_token_id", 0)
    ids = rng.randint(5, config["vocab_size"], (3, 9)).astype(np.int32)
    mask = np.ones((3, 9), np.int32)
    for row, length in enumerate((9, 6, 3)):
        mask[row, length:] = 0
    encoder = family in dict(ENCODERS)
    pair = "d_kv" in config or "decoder_layers" in config
    if not encoder and not pair:
        mask = mask[:, ::-1].copy()
    ids[mask == 0] = pad
    result = {"input_ids": ids, "attention_mask": mask}
    if pair and (family, head) in HEADS:
        ids[np.arange(3), mask.sum(axis=1) - 1] = END
        return result
    if pair:
        target = rng.randint(5, config["vocab_size"], (3, 7)).astype(np.int32)
        return {**result, "decoder_input_ids": target}
    if encoder and "type_vocab_size" in config:
        types = (np.arange(9)[None] >= 4) * np.ones((3, 1), int) * (config["type_vocab_size"] > 1)
        return {**result, "token_type_ids": types.astype(np.int32)}
    return result


def head_goldens():
    """The logits, the loss and the tensors' shapes of each of `HEAD_GOLDENS`."""
    with safe_open(GOLDENS / "heads.safetensors", "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return {
            (family, head): Golden(
                config_of(family, head),
                shapes[f"{family} {head}"],
                {name: file.get_tensor(f"{family} {head} {name}") for name in ("logits", "loss")},
                None,
            )
            for family, head in HEAD_GOLDENS
        }


def head_labels(head):
    """Labels for the loss of a head, of the first text of a batch, which has no padding."""
    return {
        "classification": np.array([2]),
        "token-classification": np.array([[-100, 2, 0, -100, 1, 1, 0, 2, -100]]),
        "question-answering": np.array([[3, 5]]),
    }[head].astype(np.int32)


class Golden(NamedTuple):
    config: dict
    shapes: dict
    outputs: dict
    eos: int | None


def read_golden(family, head):
    with safe_open(golden_path(family, head), "np") as file:
        metadata = file.metadata()
        outputs = {name: file.get_tensor(name) for name in file.keys()}
        eos = json.loads(metadata.get("eos", "null"))
        return Golden(CONFIGS[family], json.loads(metadata["shapes"]), outputs, eos)


def weights(family, head):
    return {name: weight(name, shape) for name, shape in read_golden(family, head).shapes.items()}


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def checkpoint(folder, family="bert", head=None, **config):
    """Writes the checkpoint of a golden case and returns its folder."""
    return write_folder(folder, {**CONFIGS[family], **config}, weights(family, head))


def hugging_face(folder, family, head):
    """The Hugging Face model of a checkpoint, which must fit it exactly."""
    import transformers

    cls = getattr(transformers, architecture(family, head))
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    assert not problems, problems
    return model.eval()
