"""Masks in files: what is packed, and where the base is."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from tests import tiny

NEW = {16: 6, 24: 7, 48: 18}
"""Sizes in place of the tiny model's: the bits of a mask do not fill whole bytes."""


@pytest.fixture
def base(tmp_path):
    config = {**tiny.GPT2, "n_embd": NEW[16], "n_inner": NEW[24], "n_layer": 1}
    tensors = {
        name: tiny.weight(name, tuple(NEW.get(size, size) for size in x.shape))
        for name, x in tiny.weights("gpt2", None).items()
        if ".1." not in name and ".2." not in name
    }
    return tiny.write_folder(tmp_path / "base", config, tensors)


@pytest.fixture
def pruned(base):
    return fj.compress(fj.load(base), fj.MaskPrune(keep=0.4), key=jax.random.key(0))[0]


def test_masks_that_do_not_fill_whole_bytes(pruned, tmp_path):
    folder = fj.save_masks(pruned, tmp_path / "masks")
    packed = safetensors.numpy.load_file(folder / "model.safetensors")
    mlp = pruned.layers[0].mlp
    for name in ("up", "down"):
        mask = np.asarray(getattr(mlp, name).mask)
        bits = packed[f"layers.0.mlp.{name}.mask"]
        assert mask.size == 42 and bits.nbytes == 6
        np.testing.assert_array_equal(np.unpackbits(bits)[:42].reshape(mask.shape), mask)
    assert bit_equal(pruned, fj.load(folder))


def test_masks_of_a_model_that_was_given_its_base(base, pruned, tmp_path):
    """The base is looked for where it was found last, not where the first file says."""
    folder = fj.save_masks(pruned, tmp_path / "masks")
    moved = base.rename(tmp_path / "elsewhere")
    again = fj.save_masks(fj.load(folder, base=moved), tmp_path / "again")
    written = json.loads((again / "fusion.json").read_text())["masks"]["base"]
    assert written == {"name": str(moved), "revision": None}
    assert bit_equal(pruned, fj.load(again))
