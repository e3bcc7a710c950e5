"""Small real models do what is known of them; FUSION_JAX_DATA says where they are."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import fusion_jax as fj
from benchmarks.small_models import hf_folder, shakespeare_ids
from fusion_jax.models.decoding import generate
from fusion_jax.training import nats_per_token

DATA = Path(os.environ.get("FUSION_JAX_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason="FUSION_JAX_DATA names no folder with models"
)


@pytest.fixture
def load(tmp_path):
    return lambda name: fj.load(hf_folder(DATA, name, tmp_path / name), head="causal-lm")


def test_stories260k_tells_its_known_story(load):
    known = json.loads((DATA / "models/stories260K/golden_greedy.json").read_text())
    story = known["greedy_ids"][len(known["prompt_ids"]) :]
    ids = generate(
        load("stories260K"), np.array([known["prompt_ids"]], np.int32), max_new_tokens=len(story)
    )
    assert ids[0].tolist() == story


def test_llm_viz_gpt_has_its_reference_activations(load):
    with safe_open(DATA / "models/llm-viz-gpt-nano-sort/golden_partials.safetensors", "np") as file:
        golden = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}
    model = load("llm-viz-gpt-nano-sort")
    # The published weights lack the biases of attention's inputs. Those of the first layer follow
    # from its activations; the later layers are not comparable.
    linear = model.layers[0].qkv
    bias = golden["qkv"] - linear(model.layers[0].attention_norm(golden["x"]))
    assert np.std(bias, axis=(0, 1)).max() < 1e-6
    linear.bias.set_value(bias.mean((0, 1)))
    states = model(golden["idx"].astype(jnp.int32), output_hidden_states=True).hidden_states
    ours = {"x": states[0], "block0": states[1], "ln_f": model.norm(golden["block2"])}
    ours["lm_head"] = model.logits(ours["ln_f"])
    for name, x in ours.items():
        np.testing.assert_allclose(x, golden[name], atol=1e-5, err_msg=name)


def test_tinygpt_has_its_stated_loss(load):
    nats = nats_per_token(load("tinygpt-shakespeare"), shakespeare_ids(DATA), context=128)
    assert abs(nats - 1.975) < 0.01
