"""Models of images: against transformers, smaller, saved, exported, with kernels, and no text."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import fusion_jax as fj
import ntk
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.models.bert_layers import Shared
from fusion_jax.models.registry import FAMILIES
from tests import tiny

HEADS = [(family, head) for family in tiny.VISION for head in FAMILIES[family].architectures]
ONE = {"num_hidden_layers": 1}
ODD = {
    "vit": [
        {"image_size": [9, 14], "patch_size": [4, 3], "num_channels": 1, "qkv_bias": False,
         "pooler_output_size": 5, "pooler_act": "relu"},
        {"head_dim": 6, "hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "image_size": 8},
        {"hidden_size": 21, "num_attention_heads": 7, "intermediate_size": 23, "patch_size": 8},
        ONE | {"num_attention_heads": 1, "layer_norm_eps": 0.1, "patch_size": [8, 12]},
        ONE | {"num_channels": 4, "hidden_act": "quick_gelu", "pooler_act": "gelu",
               "qkv_bias": False, "encoder_stride": 8},
        {"num_attention_heads": 8, "head_dim": 2, "intermediate_size": 7, "pooler_act": "silu"},
        ONE | {"image_size": 13, "patch_size": [2, 5], "hidden_dropout_prob": 0.1,
               "attention_probs_dropout_prob": 0.2, "hidden_act": "relu"},
        {"num_hidden_layers": 3, "hidden_size": 18, "num_attention_heads": 3, "num_channels": 2,
         "pooler_output_size": 7},
    ],
    "dinov2": [
        {"image_size": 9, "num_channels": 1, "qkv_bias": False, "mlp_ratio": 1,
         "use_mask_token": False},
        {"use_swiglu_ffn": True, "head_dim": 6, "hidden_act": "relu", "num_labels": 5},
        {"hidden_act": "relu", "layer_norm_eps": 1e-2, "patch_size": 2, "mlp_ratio": 3},
        {"use_swiglu_ffn": True, "hidden_size": 15, "num_attention_heads": 5, "mlp_ratio": 3,
         "layerscale_value": 0.0, "patch_size": [2, 4], "image_size": 8},
        ONE | {"num_attention_heads": 1, "layer_norm_eps": 0.1, "patch_size": 8,
               "use_mask_token": False},
        ONE | {"use_swiglu_ffn": True, "mlp_ratio": 1, "hidden_size": 12, "num_attention_heads": 3,
               "qkv_bias": False, "num_channels": 4},
        {"head_dim": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2,
         "layerscale_value": 0.1, "mlp_ratio": 1, "hidden_act": "gelu_new"},
        ONE | {"image_size": 13, "patch_size": 6, "apply_layernorm": False, "drop_path_rate": 0.0,
               "reshape_hidden_states": False, "out_features": ["stage1"]},
    ],
    "clip_vision_model": [
        {"image_size": 9, "num_channels": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-2},
        {"hidden_size": 21, "num_attention_heads": 7, "intermediate_size": 23,
         "projection_dim": 5, "attention_dropout": 0.5},
        ONE | {"num_attention_heads": 1, "layer_norm_eps": 0.1, "patch_size": 8},
        ONE | {"num_channels": 4, "hidden_act": "gelu_new", "intermediate_size": 7,
               "initializer_factor": 0.5},
        ONE | {"num_attention_heads": 16, "patch_size": 3, "image_size": 10, "hidden_act": "relu"},
        {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 3, "num_channels": 2,
         "patch_size": 1, "image_size": 2},
        ONE | {"hidden_size": 8, "intermediate_size": 40, "hidden_act": "silu",
               "layer_norm_eps": 1e-12},
        ONE | {"patch_size": 2, "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.5},
    ],
    "siglip_vision_model": [
        {"image_size": 9, "num_channels": 1, "hidden_act": "relu", "layer_norm_eps": 1e-2},
        {"hidden_size": 21, "num_attention_heads": 7, "vision_use_head": False,
         "patch_size": 2, "attention_dropout": 0.5},
        ONE | {"num_attention_heads": 1, "layer_norm_eps": 0.1, "patch_size": 8},
        ONE | {"num_channels": 4, "hidden_act": "gelu", "intermediate_size": 7},
        ONE | {"num_attention_heads": 16, "patch_size": 3, "image_size": 10,
               "vision_use_head": False, "hidden_act": "quick_gelu"},
        {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 3, "num_channels": 2,
         "patch_size": 1, "image_size": 2},
        ONE | {"hidden_size": 8, "intermediate_size": 40, "hidden_act": "silu",
               "layer_norm_eps": 1e-12, "vision_use_head": False, "num_channels": 1},
        ONE | {"patch_size": 2, "hidden_act": "gelu_new", "attention_dropout": 0.1},
    ],
}  # fmt: skip
CASES = [(family, i) for family, changes in ODD.items() for i in range(len(changes))]
SEEN = Shared({None: jnp.ones((16, 1, 1, 5), bool)}, None, {}, None)
PREPROCESSOR = "preprocessor_config.json"


@functools.cache
def golden():
    with safe_open(tiny.GOLDENS / "vision.safetensors", "np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return shapes, {name: file.get_tensor(name) for name in file.keys()}


def checkpoint(folder, family="vit", head=None, **changes):
    shapes = golden()[0][f"{family} {head or 'base'}"]
    tensors = {name: tiny.weight(name, shape) for name, shape in shapes.items()}
    tiny.write_folder(folder, {**tiny.VISION[family], **changes}, tensors)
    (folder / PREPROCESSOR).write_text('{"size": 8}')
    return folder


def ours(model, x):
    return jax.jit(lambda model, x: model(pixel_values=x, output_hidden_states=True))(model, x)


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_equals_hugging_face(family, head, tmp_path):
    model = fj.load(checkpoint(tmp_path / "m", family, head), head=head)
    out = ours(model, tiny.images(tiny.VISION[family]))
    case = f"{family} {head or 'base'} "
    want = {n.removeprefix(case): x for n, x in golden()[1].items() if n.startswith(case)}
    assert want
    for name, x in want.items():
        np.testing.assert_allclose(getattr(out, name), x, atol=1e-4, err_msg=name)


def test_smaller_saved_exported_and_its_kernel(tmp_path, key):
    folder = checkpoint(tmp_path / "m", head="classification")
    model = fj.load(folder, head="classification")
    x = tiny.images(tiny.VIT)
    batches = [{"pixel_values": x}, {"pixel_values": x[:2]}]
    seen = fj.calibrate(model, batches, key=key)
    assert {path: y.shape for path, y in seen.items()} == {
        f"layers.{i}.mlp": (5 * 7, 16) for i in range(2)
    }
    smaller, _ = fj.compress(model, fj.Fusion(width=9), key=key, calibration=batches)
    assert {site.mlp.width for site in fj.sites(smaller)} == {9}
    saved = fj.save(smaller, tmp_path / "artefact")
    assert (saved / PREPROCESSOR).is_file()
    assert bit_equal(fj.load(saved), smaller)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    assert (exported / PREPROCESSOR).is_file()
    card = (exported / "README.md").read_text()
    assert "from transformers import AutoImageProcessor, AutoModelForImageClassification" in card
    other = fj.load(exported, head="classification")
    assert {site.mlp.width for site in fj.sites(other)} == {9}
    np.testing.assert_allclose(ours(other, x).logits, ours(smaller, x).logits, atol=1e-5)

    f, params = ntk.functional(smaller, outputs="logits", wrt=r"layers\.1\..*|cls_token|patches.*")
    kernel = ntk.kernel(f, params, x)
    rows = jax.tree.leaves(jax.jit(jax.jacobian(f))(params, x))
    rows = jnp.concatenate([g.reshape(3, 3, -1) for g in rows], axis=-1)
    want = jnp.einsum("nop,mqp->nmoq", rows, rows)
    np.testing.assert_allclose(kernel, want, atol=1e-4 * float(jnp.abs(want).max()))


def test_what_is_not_an_image_is_an_error(tmp_path, key):
    folder = checkpoint(tmp_path / "m", head="classification")
    model = fj.load(folder, head="classification")
    text = "this is a model of images"
    ids, x = jnp.ones((2, 5), int), tiny.images(tiny.VIT)
    for source in (["A text."], "random"):
        with pytest.raises(fj.InputError, match=text):
            fj.calibrate(model, source, key=key)
    with pytest.raises(fj.InputError, match="takes pixel_values, images; got input_ids"):
        fj.calibrate(model, [{"input_ids": ids}], key=key)
    with pytest.raises(fj.InputError, match=text):
        fj.load(folder, head="classification", label_words=["a", "b", "c"])
    for wrong, said in (
        ({"input_ids": ids}, "got input_ids"),
        ({}, "got nothing"),
        ({"pixel_values": ids}, r"must be \(images, 3, 8, 12\).*got \(2, 5\)"),
        ({"pixel_values": x[:, :, :, :8]}, r"got \(3, 3, 8, 8\); resize"),
        ({"pixel_values": x.astype(np.uint8)}, "must be floats"),
    ):
        with pytest.raises(fj.InputError, match=said):
            model(**wrong)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("vit", {"image_size": 3}, "patch_size .* is larger than image_size"),
        ("vit", {"image_size": [8, 8, 8]}, "image_size must be a number from 1 to 65535, or two"),
        ("vit", {"patch_size": 0}, "patch_size must be a number"),
        ("vit", {"pooler_act": "unknown"}, "unknown activation 'unknown'"),
        ("dinov2", {"image_size": [8, 12]}, "image_size must be one number"),
        ("dinov2", {"mlp_ratio": 2.5}, "mlp_ratio must be of type int"),
    ],
)
def test_configurations_that_are_an_error(family, changes, said, tmp_path):
    with pytest.raises(fj.InputError, match=said):
        fj.load(checkpoint(tmp_path / "m", family, **changes))


def test_export_says_that_a_width_cannot_be_stated(tmp_path, capsys):
    model = fj.load(checkpoint(tmp_path / "m", "dinov2"))
    smaller, _ = fj.compress(model, fj.Fusion(width=9), key=jax.random.key(0))
    folder, out = str(fj.save(smaller, tmp_path / "a")), str(tmp_path / "hf")
    assert main(["export", folder, out]) == 0
    said = capsys.readouterr().out
    assert "with MLPs of width 16." in said
    assert "The format cannot state a width of 9: zero units pad" in said


@pytest.mark.parametrize("command", ["finetune", "certify", "bench"])
def test_commands_for_text_are_an_error(command, tmp_path, capsys):
    folder = str(checkpoint(tmp_path / "m", head="classification"))
    (tmp_path / "texts.csv").write_text("text,label\na b c,no\nd e f,yes\n")
    if command == "certify":
        smaller, _ = fj.compress(fj.load(folder), fj.Fusion(width=9), key=jax.random.key(0))
        folder = str(fj.save(smaller, tmp_path / "smaller"))
    data = ["--train-file", str(tmp_path / "texts.csv"), "--out", str(tmp_path / "run")]
    assert main([command, folder, *(data if command == "finetune" else [])]) == 1
    assert "this is a model of images, which cannot read text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_leaves_out_what_layers_add_example_by_example(tmp_path, key):
    model = fj.load(checkpoint(tmp_path / "m", "dinov2"))
    x = tiny.images(tiny.DINOV2, 16)
    states = model(pixel_values=x, output_hidden_states=True, key=key).hidden_states
    whole = model.layers[0](states[0], SEEN, None)
    y = model.layers[0].attention(model.layers[0].attention_norm(states[0]), SEEN, None)
    y = y * model.layers[0].attention_scale[...][None, None]

    def close(x, want):
        return np.isclose(x, want, atol=1e-4).all(axis=(1, 2))

    added = states[1] - states[0]
    neither, attention = close(added, 0), close(added, 2 * y)
    assert neither.any() and attention.any() and not (neither | attention).all()
    assert not close(states[1], whole).any()


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("family", "number"), CASES)
def test_odd_configurations_equal_transformers(family, number, tmp_path, key):
    """As loaded, and fused and exported."""
    import torch
    import transformers

    heads = list(FAMILIES[family].architectures)
    head = heads[number % len(heads)]
    fields = {**tiny.VISION[family], **ODD[family][number]}
    rest = json.loads(json.dumps(fields))
    config = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
    cls = getattr(transformers, FAMILIES[family].architectures[head])
    cls(config).save_pretrained(tmp_path / "names")
    names = safetensors.numpy.load_file(tmp_path / "names/model.safetensors")
    tensors = {name: tiny.weight(name, y.shape) for name, y in names.items()}
    folder = tiny.write_folder(tmp_path / "m", fields, tensors)
    model = fj.load(folder, head=head)
    smaller, _ = fj.compress(model, fj.Fusion(width=7), key=key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    x = tiny.images(fields)
    for mine, where in ((model, folder), (smaller, exported)):
        other, info = cls.from_pretrained(where, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            want = other.eval()(torch.tensor(x), output_hidden_states=True)
        got = ours(mine, x)
        pairs = list(zip(got.hidden_states, want.hidden_states, strict=True))
        for name in ("last_hidden_state", "pooler_output", "logits"):
            if want.get(name) is not None:
                pairs.append((getattr(got, name), want[name]))
        for a, b in pairs:
            assert np.abs(np.asarray(a) - b.numpy()).max() < 1e-4 * np.abs(b.numpy()).max()
