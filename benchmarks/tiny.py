"""A tiny random encoder and tiny tasks, for self-checks without any data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flax import nnx

import fusion_jax as fj
from fusion_jax.models.bert import Bert, BertConfig
from fusion_jax.models.provenance import Provenance

WORDS = 90
FIELDS = {
    "model_type": "bert",
    "vocab_size": WORDS + 5,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
}


def encoder(folder: Path, **sizes: int) -> Path:
    """Writes a checkpoint of a random BERT, by default of two layers, and returns its folder."""
    fields = {**FIELDS, **sizes}
    parts = folder.with_name(f"{folder.name}-parts")
    parts.mkdir(parents=True)
    config = json.dumps(fields)
    (parts / "config.json").write_text(config)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    (parts / "vocab.txt").write_text("\n".join(words) + "\n")
    model = Bert(BertConfig.from_json(fields), rngs=nnx.Rngs(0))
    model.provenance = Provenance(str(parts), str(parts), config, None)
    return fj.export_hf(model, folder)


def tasks(folder: Path, count: int = 64) -> Path:
    """Writes folders like those of SST-2 and CoLA, and returns the folder that holds them.

    The class of a sentence is whether its first word is one of the first half.
    """
    draw = np.random.default_rng(0)
    for part in ("train", "dev"):
        rows = [draw.integers(0, WORDS, draw.integers(1, 20)) for _ in range(count)]
        found = [(" ".join(f"w{i}" for i in row), int(row[0] < WORDS // 2)) for row in rows]
        lines = {
            "SST-2": ["sentence\tlabel", *(f"{text}\t{label}" for text, label in found)],
            "CoLA": [f"gj04\t{label}\t\t{text}" for text, label in found],
        }
        for name, each in lines.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{part}.tsv").write_text("\n".join(each) + "\n")
    return folder
