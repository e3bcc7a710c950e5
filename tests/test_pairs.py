"""Text families that only `test_families` has configurations of: padding, and generated texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.models.decoding import generate
from fusion_jax.models.longt5 import block_ids
from fusion_jax.models.registry import FAMILIES
from tests.test_families import inputs, made, odd_config

# A family, and which of its odd configurations.
CASES = [("longt5", 0), ("longt5", 1), ("longt5", 2)]


@jax.jit
def read(model, batch):
    return model(**batch).last_hidden_state


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("family", "number"), CASES)
def test_padding_changes_nothing_and_texts_equal_transformers(family, number, tmp_path):
    import torch

    head = FAMILIES[family].text_head
    folder, cls = made(tmp_path, family, odd_config(family, number), head)
    model = fj.load(folder, head=head)
    batch = inputs("whole", family)
    whole = np.asarray(read(model, batch))
    for side in ((0, 4), (4, 0)):
        padded = {
            name: np.pad(x, ((0, 0), (0, 0) if "decoder" in name else side), constant_values=0)
            for name, x in batch.items()
        }
        got = np.asarray(read(model, padded))
        kept = slice(side[0], side[0] + whole.shape[1]) if head == "causal-lm" else slice(None)
        np.testing.assert_allclose(got[:, kept], whole, atol=1e-4 * np.abs(whole).max())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids, mask = (np.pad(x, ((0, 0), (3, 0))) for x in (ids, mask))  # prompts are on the right
    if head == "seq2seq-lm":
        ids, mask = ids[:, 3:], mask[:, 3:]
    given = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = cls.from_pretrained(folder).eval().generate(**given, **options).numpy()
    want = want[:, 1:] if head == "seq2seq-lm" else want[:, ids.shape[1] :]
    got = generate(model, ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)


@pytest.mark.full
def test_blocks_of_longt5_do_not_depend_on_padding():
    real = jnp.array([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    ids = np.asarray(block_ids(real.astype(bool), 3))
    assert ids[0, 1:].tolist() == ids[1, :7].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (ids[2] == -1).all() and ids[0, 0] == ids[1, 7] == -1
