"""Compressing from files to files, layer by layer, gives what compressing in memory gives."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import fusion_jax as fj
from fusion_jax.checkpoint import files
from fusion_jax.cli.main import main
from fusion_jax.nn.surgery import path_name
from fusion_jax.streaming import layerwise
from tests import tiny

BATCHES = [{"input_ids": np.arange(2 * 12).reshape(2, 12) % 50 + 3} for _ in range(3)]


def variables(model):
    return {path_name(p): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}


def both(folder, tmp_path, key, head, **options):
    """The model that was compressed in memory, and that from files, with their reports."""
    smaller, report = fj.compress(
        fj.load(folder, head=head), fj.Fusion(width=8), key=key, **options
    )
    streamed = fj.compress_files(
        folder, tmp_path / "streamed", fj.Fusion(width=8), key=key, head=head, **options
    )
    return (smaller, report), (fj.load(tmp_path / "streamed"), streamed)


@pytest.mark.parametrize(("family", "head"), [("bert", "masked-lm"), ("gemma3", "causal-lm")])
def test_weights_alone_are_equal_to_the_bit(family, head, tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", family, head)
    (a, before), (b, after) = both(folder, tmp_path, key, head)
    a_flat, b_flat = variables(a), variables(b)
    assert a_flat.keys() == b_flat.keys()
    for name, x in a_flat.items():
        assert (np.asarray(x) == np.asarray(b_flat[name])).all(), name
    assert a.provenance.history == b.provenance.history
    assert (before.before, before.after, before.method) == (after.before, after.after, after.method)
    assert [row.site for row in before.rows] == [row.site for row in after.rows]


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "phi3", "mixtral", "qwen2-moe"])
def test_calibrated_on_tokens(family, tmp_path, key):
    """Layers run one by one see what they see inside the model, but for rounding."""
    folder = tiny.checkpoint(tmp_path / "model", family, "causal-lm")
    (a, before), (b, after) = both(
        folder, tmp_path, key, "causal-lm", calibration=BATCHES, layers=slice(1, None)
    )
    x, y = (jax.jit(lambda m, ids: m(ids).logits)(m, BATCHES[0]["input_ids"]) for m in (a, b))
    np.testing.assert_allclose(x, y, atol=1e-4)
    assert before.calibration == after.calibration
    dense = fj.load(folder, head="causal-lm")(BATCHES[0]["input_ids"]).logits
    assert np.abs(np.asarray(x) - dense).max() > 1e-2


def test_given_inputs(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "bert", "masked-lm")
    model = fj.load(folder, head="masked-lm")
    inputs = fj.calibrate(model, BATCHES, key=key)
    (a, _), (b, _) = both(folder, tmp_path, key, "masked-lm", calibration=inputs)
    for name, x in variables(a).items():
        assert (np.asarray(x) == np.asarray(variables(b)[name])).all(), name


def test_encoders_are_not_calibrated_on_text(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "bert", "masked-lm")
    with pytest.raises(fj.InputError, match="only decoders are calibrated on text layer by layer"):
        fj.compress_files(folder, tmp_path / "out", fj.Fusion(), key=key, calibration=BATCHES)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_found_first(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "llama", "causal-lm", num_hidden_layers=4)
    with pytest.raises(fj.InputError, match=r"missing.*layers\.3"):
        fj.compress_files(folder, tmp_path / "out", fj.Fusion(), key=key)
    assert not (tmp_path / "out").exists()


def test_one_layer_is_in_memory_at_a_time(tmp_path, key, monkeypatch):
    folder = tiny.checkpoint(tmp_path / "model", "llama", "causal-lm")
    monkeypatch.setattr(layerwise, "SHARD_BYTES", 6_000)
    held = []
    write = files.write_tensors

    def watched(new, tensors, **options):
        def each():
            for name, x in tensors:
                held.append(name)
                yield name, x

        write(new, each(), **options)

    monkeypatch.setattr(files, "write_tensors", watched)
    fj.compress_files(folder, tmp_path / "out", fj.Fusion(width=8), key=key, head="causal-lm")
    layers = [name.split(".")[1] for name in held if name.startswith("layers.")]
    assert layers == sorted(layers)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    with safe_open(shards[0], "np") as file:
        assert {name.split(".")[1] for name in file.keys()} <= {"0", "1"}


def test_the_command(tmp_path, capsys):
    folder = tiny.checkpoint(tmp_path / "model", "llama", "causal-lm")
    out = tmp_path / "out"
    arguments = ["compress", str(folder), str(out), "fusion", "--width", "8", "--stream"]
    assert main([*arguments, "--head", "causal-lm"]) == 0
    assert "Saved" in capsys.readouterr().out
    assert json.loads((out / "fusion.json").read_text())["head"] == "causal-lm"
    arguments[2] = str(tmp_path / "other")
    assert main([*arguments, "--new-head"]) == 1
    assert "--stream does not make a new head" in capsys.readouterr().err
