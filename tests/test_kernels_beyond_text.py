"""Kernels of models of images and sounds equal products of their Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
import ntk
from fusion_jax.models.registry import FAMILIES
from tests import test_towers, test_whisper, tiny

CLIP = {**test_towers.both("clip"), "projection_dim": 8}
TEXTS = test_towers.texts()
SOUNDS = {"input_features": test_whisper.features(test_whisper.WHISPER)}
CASES = {
    "images": (CLIP, {"pixel_values": tiny.images(test_towers.VISION, 3)}, "image_embeds"),
    "texts": (CLIP, TEXTS, "text_embeds"),
    "sounds": (
        test_whisper.WHISPER,
        {**SOUNDS, **test_whisper.texts(padded=False)},
        ntk.token(-1, "last_hidden_state"),
    ),
}


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_products_of_jacobians(case, kind, key):
    fields, x, outputs = CASES[case]
    family = FAMILIES[fields["model_type"]]
    model = family.model(family.config(fields), rngs=nnx.Rngs(0))
    smaller, _ = fj.compress(model, fj.Fusion(width=7), key=key)
    f, params = ntk.functional(smaller, outputs=outputs, wrt=r".*layers\.[01]\.mlp\..*")
    shape = f(params, x).shape
    rows = [g.reshape(*shape, -1) for g in jax.tree.leaves(jax.jit(jax.jacobian(f))(params, x))]
    rows = jnp.concatenate(rows, axis=-1)
    want = jnp.einsum("ikp,jlp->ijkl", rows, jnp.sign(rows) if kind == "adam" else rows)
    got = ntk.kernel(f, params, x, kind=kind)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
