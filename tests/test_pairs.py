"""Text families that only `test_families` has configurations of: padding, and generated texts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.models.decoding import generate
from fusion_jax.models.longt5 import block_ids
from fusion_jax.models.registry import FAMILIES
from tests.test_families import GEMMA2 as SIDE
from tests.test_families import compare, inputs, made, odd_config, ours, theirs
from tests.tiny import decoder_config, write_folder

# A family, and which of its odd configurations.
CASES = [("longt5", 0), ("longt5", 1), ("longt5", 2), *(("t5gemma", i) for i in range(0, 8, 3)),
         *(("gemma4_text", i) for i in (2, 3, 5, 6))]  # fmt: skip


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


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("head", ["classification", "token-classification"])
def test_heads_of_t5gemma_equal_transformers(head, decodes, tmp_path, key):
    """Without padding and with padding on the right, also exported when some units are zeros."""
    fields = {**odd_config("t5gemma", 1), "num_labels": 3, "is_encoder_decoder": decodes}
    folder, cls = made(tmp_path, "t5gemma", fields, head)
    model = fj.load(folder, head=head)
    plan = {site.path: fj.Fusion(width=5 + i) for i, site in enumerate(fj.sites(model)[1:])}
    smaller, _ = fj.compress(model, plan, key=key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    for kind in ("whole", "right"):
        batch = {name: inputs(kind, "bert")[name] for name in ("input_ids", "attention_mask")}
        real = batch["attention_mask"].astype(bool)
        batch["input_ids"][~real] = 0
        for mine, place in ((model, folder), (smaller, exported)):
            want = theirs(cls.from_pretrained(place).eval(), batch)
            compare(ours(mine, batch), want, real)
    padded = {name: np.pad(x[:1], ((0, 0), (3, 0))) for name, x in batch.items()}
    got = np.asarray(ours(model, padded).logits)
    got = got if head == "classification" else got[:, 3:]
    whole = {name: x[:1] for name, x in batch.items()}
    np.testing.assert_allclose(got, ours(model, whole).logits, atol=1e-4)


TYPES = ("full_attention", "sliding_attention")
TURNED = {"rope_type": "proportional", "partial_rotary_factor": 2}
WRONG = [
    ("t5gemma", {"encoder": {**SIDE, "vocab_size": 67}}, "vocab_size of the encoder, 67"),
    ("t5gemma", {"decoder": {**SIDE, "bos_token_id": None}}, "bos_token_id of the decoder"),
    ("t5gemma", {"bos_token_id": 7}, "bos_token_id other than"),
    ("t5gemma", {"decoder_start_token_id": 7}, "decoder_start_token_id other than"),
    ("t5gemma", {"encoder": {**SIDE, "sliding_window": None}}, "sliding_window must be"),
    ("t5gemma", {"encoder": 3}, "encoder must be a JSON object"),
    ("t5gemma", {"attention_dropout": 3}, "attention_dropout must be"),
    ("t5gemma", {"dropout_rate": "x"}, "dropout_rate must be"),
    ("longt5", {"encoder_attention_type": "full"}, "encoder_attention_type must be"),
    ("longt5", {"local_radius": 0}, "local_radius must be"),
    ("longt5", {"global_block_size": -1}, "global_block_size must be"),
    ("longt5", {"feed_forward_proj": "gated-x-relu"}, "feed_forward_proj"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ("gemma4_text", {"num_experts": None}, "num_experts must be"),
    ("gemma4_text", {"top_k_experts": 5}, "each position uses 5 experts"),
    ("gemma4_text", {"vocab_size_per_layer_input": 5}, "vocab_size_per_layer_input below"),
    ("gemma4_text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers must leave"),
    ("gemma4_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers must be"),
    ("gemma4_text", {"layer_types": ["full_attention"]}, "layer_types must be"),
    ("gemma4_text", {"sliding_window": None}, "sliding_window must be"),
    ("gemma4_text", {"global_head_dim": None}, "global_head_dim must be"),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 3}, "multiple of the"),
    ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 6}}}, "per_layer_config must be the s"),
    ("gemma4_text", {"per_layer_config": {"9": {"head_dim": 6}}}, "per_layer_config must have"),
    ("gemma4_text", {"per_layer_config": {"0": {"skip": ["mlp"]}}}, "skip in per_layer_config"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {}}}, "rope_parameters must have"),
    ("gemma4_text", {"rope_parameters": {x: {"rope_type": "axial"} for x in TYPES}}, "'axial'"),
    ("gemma4_text", {"rope_parameters": dict.fromkeys(TYPES, TURNED)}, "partial_rotary_fac"),
    ("t5", {"relative_attention_max_distance": 4}, "relative_attention_max_distance must be"),
]


@pytest.mark.parametrize(("family", "changes", "message"), WRONG)
def test_what_is_not_implemented_is_an_error(family, changes, message):
    with pytest.raises(fj.InputError, match=message):
        decoder_config({**odd_config(family), **changes})


@pytest.mark.torch
@pytest.mark.full
def test_gemma4_is_read_from_files_of_a_larger_model(tmp_path, key):
    """Which has models of images and of sounds, and unused layers where keys are reused."""
    folder, _ = made(tmp_path, "gemma4_text", odd_config("gemma4_text", 1), "causal-lm")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    inner = {name.replace("model.", "model.language_model."): x for name, x in tensors.items()}
    unused = ("vision_tower.a", "audio_tower.b", "embed_vision.c", "embed_audio.d",
              "language_model.layers.2.self_attn.k_norm.weight",
              "language_model.layers.2.self_attn.v_proj.weight")  # fmt: skip
    inner |= {f"model.{name}": np.ones(3, np.float32) for name in unused}
    larger = write_folder(
        tmp_path / "larger", json.loads((folder / "config.json").read_text()), inner
    )
    models = [fj.load(each, head="causal-lm") for each in (folder, larger)]
    assert bit_equal(*models)
    batch = [inputs("whole", "gemma4_text")]
    method, out = fj.Fusion(width=7), tmp_path / "out"
    with pytest.raises(fj.InputError, match="only if layers share nothing"):
        fj.compress_files(folder, out, method, key=key, head="causal-lm", calibration=batch)


@pytest.mark.full
def test_blocks_of_longt5_do_not_depend_on_padding():
    real = jnp.array([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    ids = np.asarray(block_ids(real.astype(bool), 3))
    assert ids[0, 1:].tolist() == ids[1, :7].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (ids[2] == -1).all() and ids[0, 0] == ids[1, 7] == -1
