"""CLIP and SigLIP: text towers, both towers, and image classification, against transformers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.tokens import check_takes_text
from tests import glue, tiny

END = 9
TEXT = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "eos_token_id": END,
}
ODD_TEXT = [
    {"hidden_size": 21, "num_attention_heads": 7, "intermediate_size": 23, "projection_dim": 5},
    {"eos_token_id": 2, "hidden_act": "relu", "layer_norm_eps": 1e-2},
    {"num_attention_heads": 1, "hidden_act": "gelu_new", "attention_dropout": 0.5},
    {"num_hidden_layers": 1, "vocab_size": 67, "projection_size": 5, "max_position_embeddings": 9},
    {"hidden_act": "silu", "pad_token_id": END, "initializer_range": 0.1},
    {"hidden_size": 26, "num_attention_heads": 13, "projection_size": 26, "eos_token_id": 60},
    {"intermediate_size": 1, "layer_norm_eps": 1e-3, "num_hidden_layers": 3},
    {"hidden_act": "gelu", "bos_token_id": 3, "max_position_embeddings": 40, "num_labels": 5},
]
VISION = {name: x for name, x in tiny.TOWER.items() if name != "model_type"}
ODD_BOTH = [
    ({"hidden_size": 21, "num_attention_heads": 7}, {"hidden_size": 21, "num_attention_heads": 3},
     {"projection_dim": 5}),
    ({"eos_token_id": 2, "hidden_act": "relu"}, {"image_size": 9, "num_channels": 1}, {}),
    ({"intermediate_size": 23}, {"intermediate_size": 9, "layer_norm_eps": 1e-2},
     {"logit_scale_init_value": 1.0}),
    ({"num_hidden_layers": 1}, {"hidden_act": "gelu", "num_hidden_layers": 3},
     {"projection_dim": 7, "initializer_factor": 2.0}),
    ({"layer_norm_eps": 1e-2, "num_attention_heads": 4}, {"patch_size": 2},
     {"projection_dim": 16, "num_labels": 5}),
    ({"hidden_act": "gelu_new", "vocab_size": 67}, {"attention_dropout": 0.5},
     {"projection_dim": 1}),
    ({"hidden_size": 8, "projection_size": 16}, {"patch_size": 8, "num_attention_heads": 1}, {}),
    ({"pad_token_id": END, "attention_dropout": 0.5}, {"intermediate_size": 1},
     {"num_labels": 1}),
]  # fmt: skip
TEXT_FAMILIES, BOTH = ("clip_text_model", "siglip_text_model"), ("clip", "siglip")
HEADS = (None, "classification")


def both(family, number=None):
    text, vision, more = ODD_BOTH[number] if number is not None else ({}, {}, {})
    nested = {"text_config": {**TEXT, **text}, "vision_config": {**VISION, **vision}}
    return {"model_type": family, **nested, **more}


def made(folder, fields, head=None):
    """A checkpoint with reproducible weights, and the class of transformers for it."""
    import transformers

    rest = json.loads(json.dumps(fields))  # transformers writes into nested fields
    config = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
    cls = getattr(transformers, FAMILIES[fields["model_type"]].architectures[head])
    cls(config).save_pretrained(folder / "names")
    names = safetensors.numpy.load_file(folder / "names/model.safetensors")
    tensors = {n: np.asarray(tiny.weight(n, np.shape(x))) for n, x in names.items()}
    return tiny.write_folder(folder / "m", fields, tensors), cls


def texts(kind="right", end=END):
    """Token ids and their mask, with two end tokens in the first text."""
    ids, mask = np.ones((3, 9), np.int32), np.zeros((3, 9), np.int32)
    for row, length in enumerate((9, 6, 3)):
        at = slice(9 - length, None) if kind == "left" else slice(length)
        ids[row, at] = np.random.RandomState(row).randint(10, 60, length)
        ids[row, at.indices(9)[1] - 1] = end
        mask[row, at] = 1
    ids[0, 4] = end
    return {"input_ids": ids, "attention_mask": np.ones_like(mask) if kind == "whole" else mask}


def outputs(cls, folder, batch):
    """What transformers computes; every tensor of the files must fit."""
    import torch

    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    given = {
        name: torch.tensor(x).long() if np.issubdtype(x.dtype, np.integer) else torch.tensor(x)
        for name, x in batch.items()
    }
    with torch.no_grad():
        return model.eval()(**given, output_hidden_states=True)


@jax.jit
def ours(model, batch):
    return model(**batch, output_hidden_states=True)


def close(mine, other):
    mine, other = np.asarray(mine), other.numpy()
    assert mine.shape == other.shape
    assert np.abs(mine - other).max() < 1e-4 * np.abs(other).max()


def shrunk(model, number, key):
    """A model with MLPs of one width, or of several."""
    if number % 2:
        return fj.compress(model, fj.Fusion(width=0.5), key=key)[0]
    paths = [site.path for site in fj.sites(model)]
    plan = {path: fj.Prune(width=0.3 + 0.1 * (i % 4)) for i, path in enumerate(paths[:-1])}
    return fj.compress(model, plan, key=key)[0] if plan else model


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize("number", range(len(ODD_TEXT)))
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_towers_equal_transformers(family, number, tmp_path, key):
    """As loaded, and smaller and exported, with padding on either side."""
    folder, cls = made(tmp_path, {**TEXT, **ODD_TEXT[number], "model_type": family})
    model = fj.load(folder)
    smaller = shrunk(model, number, key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    end = ODD_TEXT[number].get("eos_token_id", END)
    batch = texts(("right", "whole", "left")[number % 3], max(END, end))
    for mine, where in ((model, folder), (smaller, exported)):
        want, got = outputs(cls, where, batch), ours(mine, batch)
        real = batch["attention_mask"].astype(bool)
        pairs = zip(got.hidden_states, want.hidden_states, strict=True)
        for a, b in (*pairs, (got.last_hidden_state, want.last_hidden_state)):
            close(np.asarray(a)[real], b[real])
        if family == "clip_text_model" or number % 3:  # the last position may be padding
            close(got.pooler_output, want.pooler_output)


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize("number", range(len(ODD_BOTH)))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", BOTH)
def test_both_towers_equal_transformers(family, head, number, tmp_path, key):
    """As loaded, and smaller and exported."""
    fields = both(family, number)
    if family == "siglip":
        text, vision = fields["text_config"], fields["vision_config"]
        text["projection_size"] = vision["hidden_size"]
        vision["vision_use_head"] = head is None or number % 2 == 0
    folder, cls = made(tmp_path, fields, head)
    model = fj.load(folder, head=head)
    smaller = shrunk(model, number, key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    batch = {"pixel_values": tiny.images(fields["vision_config"], 2)}
    batch |= texts("whole" if number % 2 else "right") if head is None else {}
    for mine, where in ((model, folder), (smaller, exported)):
        want, got = outputs(cls, where, batch), ours(mine, batch)
        if head is not None:
            close(got.logits, want.logits)
            continue
        for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            close(getattr(got, name), want[name])


@pytest.mark.torch
@pytest.mark.parametrize("family", BOTH)
def test_whole_checkpoints(family, tmp_path, key):
    """Calibrated on pairs, saved, with one tower alone, and with a new head for images."""
    folder, _ = made(tmp_path, both(family))
    model = fj.load(folder)
    batch = {"pixel_values": tiny.images(VISION, 2), **texts()}
    seen = fj.calibrate(model, [batch], key=key)
    real, positions = int(batch["attention_mask"].sum()), 4 + (family == "clip")
    for path, x in seen.items():
        tower = positions if "pooler" not in path else 1
        assert len(x) == (real if path.startswith("text.") else 2 * tower)
    smaller, _ = fj.compress(model, fj.Fusion(width=9), key=key, calibration=[batch])
    assert {site.mlp.width for site in fj.sites(smaller)} == {9}
    saved = fj.save(smaller, tmp_path / "artefact")
    assert bit_equal(fj.load(saved), smaller)
    whole = smaller(**batch)
    one = smaller(pixel_values=batch["pixel_values"])
    np.testing.assert_array_equal(one.image_embeds, whole.image_embeds)
    assert one.logits_per_image is None and one.text is None
    images = [{"pixel_values": batch["pixel_values"]}]
    with pytest.raises(fj.InputError, match="does not call one of its MLPs"):
        fj.calibrate(model, images, key=key)
    assert set(fj.calibrate(model, images, key=key, layers=r"vision\..*")) < set(seen)
    glue.vocabulary(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    of_text = fj.calibrate(model, ["w1 w2 w3", "w4 w5"], key=key, layers=r"text\..*")
    assert {path.partition(".")[0] for path in of_text} == {"text"}
    with pytest.raises(fj.InputError, match="does not call one of its MLPs"):
        fj.calibrate(model, ["w1 w2"], key=key)
    with pytest.raises(fj.InputError, match="model of images and text, not of text alone"):
        check_takes_text(model)
    with pytest.raises(fj.InputError, match="takes input_ids, pixel_values, or both"):
        model()
    with pytest.raises(fj.InputError, match=r"missing .*classifier\.weight"):
        fj.load(folder, head="classification")
    for where in (folder, fj.export_hf(smaller, tmp_path / "hf")):
        head = fj.load(where, head="classification", num_labels=4, key=key)
        assert head(pixel_values=batch["pixel_values"]).logits.shape == (2, 4)
    with pytest.raises(fj.InputError, match="saved with the head None and has no"):
        fj.load(saved, head="classification", num_labels=4, key=key)


@pytest.mark.torch
def test_the_old_form_of_towers(tmp_path, key):
    """``text_config_dict`` replaces ``text_config``, with its defaults; both get new widths."""
    fields = both("clip")
    old = {name: x for name, x in TEXT.items() if name != "hidden_act"}
    fields |= {"text_config_dict": old, "text_config": {**TEXT, "hidden_act": "relu"}}
    folder, cls = made(tmp_path, fields)
    batch = {"pixel_values": tiny.images(VISION, 2), **texts()}
    smaller, _ = fj.compress(fj.load(folder), fj.Fusion(width=9), key=key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    for mine, where in ((fj.load(folder), folder), (smaller, exported)):
        close(ours(mine, batch).logits_per_image, outputs(cls, where, batch).logits_per_image)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("clip_text_model", {"eos_token_id": None}, "eos_token_id is null"),
        ("clip_text_model", {"eos_token_id": [3, 4]}, "eos_token_id must be of type int"),
        ("clip_text_model", {"is_causal": False}, "is_causal false"),
        ("siglip_text_model", {"hidden_act": "unknown"}, "unknown activation 'unknown'"),
        ("siglip", {"vision_config": {**VISION, "vision_use_head": False}}, "vision_use_head"),
        ("siglip", {"text_config": {**TEXT, "projection_size": 5}}, "projection_size 5, but"),
        ("clip", {"text_config": 3}, "text_config must be a JSON object"),
        ("clip", {"text_config": {**TEXT, "num_hidden_layers": 999}}, "num_hidden_layers is 999"),
        ("clip", {"projection_dim": "wide"}, "projection_dim must be of type int"),
    ],
)
def test_configurations_that_are_an_error(family, changes, said, tmp_path):
    base = both(family) if family in BOTH else {**TEXT, "model_type": family}
    folder, _ = made(tmp_path, base)
    (folder / "config.json").write_text(json.dumps({**base, **changes}))
    with pytest.raises(fj.InputError, match=said):
        fj.load(folder)
