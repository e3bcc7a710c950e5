"""Files with weights: their dtypes, and indexes with shards."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.checkpoint.mxfp4_files import Mxfp4Files
from fusion_jax.cli.demo import bit_equal
from fusion_jax.nn.linear_forms import params_dtype
from tests import tiny


def half(tensors, dtype=np.float16):
    return {name: x.astype(dtype) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (2,)),
        ("gpt2", "transformer.h.0.attn.masked_bias", ()),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", (2,)),
        ("gptj", "transformer.h.1.attn.masked_bias", ()),
        ("gpt_neo", "transformer.h.1.attn.attention.bias", (1, 1, 8, 8)),
        ("falcon", "h.1.self_attention.maybe_rotary.inv_freq", (2,)),
        ("opt", "decoder.version", (1,)),
        ("llama", "model.norm.weight", (16,)),
    ],
)
def test_one_tensor_of_another_dtype_does_not_change_the_models(family, name, shape, tmp_path):
    tensors = half(tiny.weights(family, "causal-lm"))
    tensors[name] = np.ones(shape, np.float32)
    folder = tiny.write_folder(tmp_path / "model", tiny.CONFIGS[family], tensors)
    assert params_dtype(fj.load(folder)) == jnp.float16


def test_the_output_layer_of_pythia_has_two_names(tmp_path):
    tensors = tiny.weights("gpt_neox", "causal-lm")
    ids = np.arange(5, 11)[None]
    first = fj.load(tiny.write_folder(tmp_path / "a", tiny.CONFIGS["gpt_neox"], tensors),
                    head="causal-lm")  # fmt: skip
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    folder = tiny.write_folder(tmp_path / "b", tiny.CONFIGS["gpt_neox"], tensors)
    second = fj.load(folder, head="causal-lm")
    np.testing.assert_array_equal(first(ids).logits, second(ids).logits)


def test_the_dtype_of_the_config_counts(tmp_path):
    tensors = tiny.weights("bert", None)
    for stated in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}):
        folder = tiny.write_folder(tmp_path / next(iter(stated)), {**tiny.BERT, **stated}, tensors)
        assert params_dtype(fj.load(folder)) == jnp.bfloat16
        assert params_dtype(fj.load(folder, dtype="float16")) == jnp.float16


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, np.uint8])
def test_tensors_that_are_not_floats_are_refused(dtype, tmp_path):
    tensors = tiny.weights("bert", None)
    name = "encoder.layer.1.intermediate.dense.weight"
    tensors[name] = tensors[name].astype(dtype)
    folder = tiny.write_folder(tmp_path / "model", tiny.BERT, tensors)
    with pytest.raises(fj.InputError, match=rf"not of a floating-point type.*: {name} is [IBCU]"):
        fj.load(folder)


def four_bits(bits):
    """The number that four bits stand for: a sign, two bits of exponent and one of mantissa."""
    exponent, mantissa = (bits >> 1) & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if bits & 8 else size


def test_mxfp4_is_read_as_it_is_specified(tmp_path):
    rng = np.random.RandomState(0)
    blocks = rng.randint(0, 256, (2, 3, 2, 16)).astype(np.uint8)
    scales = rng.randint(110, 140, (2, 3, 2)).astype(np.uint8)
    tensors = {"a_blocks": blocks, "a_scales": scales, "b": np.ones(4, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    files = Mxfp4Files(tmp_path)
    assert dict(files.shapes) == {"a": (2, 64, 3), "b": (4,)}
    want = np.zeros((2, 64, 3))
    for e, row, group, i in np.ndindex(blocks.shape):
        for j, bits in enumerate((blocks[e, row, group, i] & 15, blocks[e, row, group, i] >> 4)):
            number = four_bits(int(bits)) * 2.0 ** (int(scales[e, row, group]) - 127)
            want[e, 32 * group + 2 * i + j, row] = number
    assert (files.read("a") == want).all()
    one = np.empty((64, 3), jnp.bfloat16)
    files.read_into("a", one, first=64)
    assert (one.astype(np.float64) == want[1]).all()


@pytest.mark.parametrize("change", [{"a_scales": None}, {"a_scales": np.ones((2, 3, 2), np.int8)}])
def test_mxfp4_that_is_incomplete_is_refused(change, tmp_path):
    tensors = {"a_blocks": np.ones((2, 3, 2, 16), np.uint8), **change}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(fj.InputError, match="a_blocks and a_scales are not"):
        Mxfp4Files(tmp_path)


def with_eight_bits(folder, config, tensors, eight):
    """Writes a checkpoint of which some tensors are in E4M3, which NumPy's safetensors lacks."""
    tiny.write_folder(folder, config, tensors)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    for name, x in eight.items():
        data = x.astype(jnp.float8_e4m3fn).tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F8_E4M3", "shape": x.shape, "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return folder


def test_eight_bit_floats_without_scales_are_refused(tmp_path):
    tensors = tiny.weights("bert", None)
    name = "encoder.layer.1.intermediate.dense.weight"
    folder = with_eight_bits(tmp_path / "model", tiny.BERT, tensors, {name: tensors.pop(name)})
    with pytest.raises(fj.InputError, match=rf"{name} is F8_E4M3"):
        fj.load(folder)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 12]}


def eight_bits_of(tensors, block):
    """Matrices of MLPs and of attention in E4M3, their scales, and what the two stand for."""
    eight, scales, want = {}, {}, {}
    for i, name in enumerate(sorted(n for n in tensors if n.endswith("proj.weight"))):
        rows, columns = tensors[name].shape
        shape = () if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        scale = np.random.RandomState(i).rand(*shape) + 0.5
        scale = np.asarray(scale, jnp.bfloat16 if i % 2 else np.float32)
        eight[name] = (tensors.pop(name) * 4).astype(jnp.float8_e4m3fn)
        want[name] = np.empty((rows, columns), np.float32)
        for r, c in np.ndindex(rows, columns):
            by = scale if block is None else scale[r // block[0], c // block[1]]
            want[name][r, c] = np.float32(eight[name][r, c]) * np.float32(by)
        scales[name + "_scale_inv"] = scale
    return eight, scales, want


@pytest.mark.parametrize("block", [(8, 12), None], ids=["blocks", "whole"])
def test_matrices_of_eight_bits_are_read_with_their_scales(block, tmp_path):
    tensors = tiny.weights("llama", "causal-lm")
    eight, scales, want = eight_bits_of(tensors, block)
    plain = tiny.write_folder(tmp_path / "plain", tiny.LLAMA, tensors | want)
    settings = FP8 | {"weight_block_size": block}
    config = {**tiny.LLAMA, "quantization_config": settings}
    unused = {"model.layers.0.mlp.up_proj.activation_scale": np.ones((), np.float32)}
    folder = with_eight_bits(tmp_path / "model", config, tensors | scales | unused, eight)
    models = [fj.load(f, head="causal-lm", dtype="float32") for f in (folder, plain)]
    assert bit_equal(*models)
    assert params_dtype(fj.load(folder, head="causal-lm")) == jnp.bfloat16
    # What is exported is of full precision, and says so.
    exported = fj.export_hf(models[0], tmp_path / "hf")
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_block_size": [8, 8]}, r"_scale_inv must be \(\d, \d\) for model"),
        ({"weight_block_size": None}, r"_scale_inv must be \(\) for model"),
        ({"weight_block_size": [0, 8]}, "weight_block_size must be two sizes"),
        ({"weight_block_size": 128}, "weight_block_size must be two sizes"),
    ],
)
def test_scales_that_do_not_fit_are_refused(settings, message, tmp_path):
    tensors = tiny.weights("llama", "causal-lm")
    eight, scales, _ = eight_bits_of(tensors, (8, 12))
    config = {**tiny.LLAMA, "quantization_config": FP8 | settings}
    folder = with_eight_bits(tmp_path / "model", config, tensors | scales, eight)
    with pytest.raises(fj.InputError, match=message):
        fj.load(folder, head="causal-lm")


def sharded(folder, split, weight_map=None, family="bert"):
    """A checkpoint whose tensors are in files by ``split``: name of the file -> tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.CONFIGS[family]))
    for file, tensors in split.items():
        safetensors.numpy.save_file(tensors, folder / file)
    found = {name: file for file, tensors in split.items() for name in tensors}
    index = {"weight_map": {**found, **(weight_map or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def halves():
    tensors = tiny.weights("bert", None)
    names = sorted(tensors)
    return tensors, *({n: tensors[n] for n in part} for part in (names[::2], names[1::2]))


def test_the_index_says_which_of_two_shards_counts(halves, tmp_path):
    tensors, one, two = halves
    name = next(iter(one))
    want = fj.load(tiny.write_folder(tmp_path / "whole", tiny.BERT, tensors))
    two[name] = one[name] + 1
    places = {name: "weights-a.safetensors"}
    split = {"weights-a.safetensors": one, "weights-b.safetensors": two}
    assert bit_equal(fj.load(sharded(tmp_path / "model", split, places)), want)
    places = {name: "weights-b.safetensors"}
    assert not bit_equal(fj.load(sharded(tmp_path / "other", split, places)), want)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../secret.safetensors", "is not the name of a safetensors file in the same folder"),
        ("/etc/secret.safetensors", "is not the name of a safetensors file in the same folder"),
        ("a/b.safetensors", "is not the name of a safetensors file in the same folder"),
        (3, "is not the name of a safetensors file in the same folder"),
        ("config.json", "is not the name of a safetensors file in the same folder"),
        ("b.safetensors", "b.safetensors lacks embeddings.LayerNorm.bias, against"),
        ("c.safetensors", "lacks c.safetensors"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(place, message, halves, tmp_path):
    _, one, two = halves
    split = {"a.safetensors": one, "b.safetensors": two}
    folder = sharded(tmp_path / "model", split, {"embeddings.LayerNorm.bias": place})
    with pytest.raises(fj.InputError, match=message):
        fj.load(folder)


def test_shards_are_downloaded_by_the_index(halves, tmp_path, monkeypatch):
    _, one, two = halves
    folder = sharded(tmp_path / "hub", {"a.safetensors": one, "b.safetensors": two})
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append(set(allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fj.load("someone/model")
    assert asked[1] - asked[0] == {"a.safetensors", "b.safetensors"}


@pytest.mark.full
def test_t5_is_finite_in_float16(tmp_path):
    """As in transformers, MLPs and the sums over layers are in float32."""
    config, tensors = tiny.CONFIGS["t5"], tiny.weights("t5", "seq2seq-lm")
    tensors = {n: x * (400 if ".wo." in n or ".wi." in n else 1) for n, x in tensors.items()}
    folder = tiny.write_folder(tmp_path / "model", config, tensors)
    batch = tiny.batch("t5")
    want = np.asarray(fj.load(folder, head="seq2seq-lm")(**batch).last_hidden_state)
    model = fj.load(folder, head="seq2seq-lm", dtype="float16")
    out = model(**batch)
    assert (
        max(
            np.abs(np.asarray(s)).max()
            for s in model(**batch, output_hidden_states=True).encoder.hidden_states
        )
        > 7e4
    )  # the largest number of float16 is 65,504
    assert out.last_hidden_state.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out.last_hidden_state, np.float32), want, atol=0.05)
    again = fj.load(fj.save(model, tmp_path / "artefact"))
    assert bit_equal(model, again)


@pytest.mark.torch
def test_t5_in_float16_equals_transformers(tmp_path):
    import torch
    import transformers

    tensors = tiny.weights("t5", "seq2seq-lm")
    tensors = half({n: x * (100 if ".wo." in n or ".wi." in n else 1) for n, x in tensors.items()})
    folder = tiny.write_folder(tmp_path / "m", {**tiny.CONFIGS["t5"], "dtype": "float16"}, tensors)
    cls = transformers.T5ForConditionalGeneration
    theirs = cls.from_pretrained(folder, dtype=torch.float16).eval()
    batch = {k: v[:1] for k, v in tiny.batch("t5").items()}
    with torch.no_grad():
        want = (
            theirs(**{k: torch.tensor(v).long() for k, v in batch.items()}).logits.float().numpy()
        )
    got = np.asarray(fj.load(folder, head="seq2seq-lm")(**batch).logits, np.float32)
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
