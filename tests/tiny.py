"""Tiny Hugging Face checkpoints with weights that depend only on their names."""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

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
CONFIGS = {"bert": BERT, "roberta": ROBERTA}
HEADS = {
    None: "Model",
    "classification": "ForSequenceClassification",
    "masked-lm": "ForMaskedLM",
}
CASES = [(family, head) for family in CONFIGS for head in HEADS]


def golden_path(family, head):
    return GOLDENS / f"{family}-{head or 'base'}.safetensors"


def weight(name, shape):
    """A reproducible array; RandomState's stream is fixed for ever, unlike Generator's."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    scale, shift = (0.1, 1.0) if "orm.weight" in name else (0.2, 0.0)
    return (shift + scale * values).astype(np.float32)


def batch(family):
    """Token ids, attention mask (padding on the right) and token types of three sequences."""
    config = CONFIGS[family]
    rng = np.random.RandomState(7)
    ids = rng.randint(5, config["vocab_size"], (3, 9))
    mask = np.ones((3, 9), np.int32)
    for row, length in enumerate((9, 6, 3)):
        mask[row, length:] = 0
        ids[row, length:] = config["pad_token_id"]
    types = (np.arange(9)[None] >= 4) * np.ones((3, 1), int) * (config["type_vocab_size"] > 1)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": types.astype(np.int32),
    }


class Golden(NamedTuple):
    config: dict
    shapes: dict
    outputs: dict


def read_golden(family, head):
    with safe_open(golden_path(family, head), "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return Golden(
            CONFIGS[family], shapes, {name: file.get_tensor(name) for name in file.keys()}
        )


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
