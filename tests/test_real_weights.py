"""Real checkpoints equal themselves in transformers; FUSION_JAX_MODELS says where they are."""

import json
import os
from importlib.resources import files
from pathlib import Path

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.tokens import load_tokenizer

MODELS = Path(os.environ.get("FUSION_JAX_MODELS", "nowhere"))
FOLDERS = sorted(path.parent for path in MODELS.glob("*/config.json"))
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not FOLDERS, reason="FUSION_JAX_MODELS names no folder with models"),
]


def batch_of(folder, head):
    """32 sentences; one line of text for a decoder, cut to 64 tokens."""
    text = files("fusion_jax.models").joinpath("sentences.txt").read_text(encoding="utf-8")
    sentences = [line for line in text.splitlines() if line.strip()][:32]
    tokenizer = load_tokenizer(str(folder))
    if head is not None:
        ids = tokenizer(" ".join(sentences), return_tensors="np")["input_ids"][:, :256]
        ids = ids[:, : ids.shape[1] // 64 * 64].reshape(-1, 64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    rows = tokenizer(sentences, padding=True, return_tensors="np")
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_equals_transformers(folder):
    import torch
    import transformers

    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    head = FAMILIES[model_type].text_head
    batch = batch_of(folder, head)
    cls = getattr(transformers, FAMILIES[model_type].architectures[head])
    with torch.no_grad():
        model = cls.from_pretrained(folder, dtype="float32").eval()
        out = model(**{name: torch.tensor(x).long() for name, x in batch.items()})
        want = (out.last_hidden_state if head is None else out.logits).numpy()
    del model
    got = jax.jit(lambda model, batch: model(**batch))(
        fj.load(folder, head=head, dtype="float32"), batch
    )
    real = batch["attention_mask"].astype(bool)
    mine = np.asarray(got.last_hidden_state if head is None else got.logits)[real]
    worst = float(np.abs(mine - want[real]).max() / np.abs(want[real]).max())
    print(f"{folder.name}: {worst:.2e} of the largest, {real.sum()} tokens")
    assert worst < 1e-4
