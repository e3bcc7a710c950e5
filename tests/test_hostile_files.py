"""Mutated JSON files beside the weights: an error in one sentence, or a model that is whole."""

import copy
import json
import random
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.checkpoint.files import read_json
from fusion_jax.checkpoint.opening import open_checkpoint
from fusion_jax.checkpoint.tensor_files import TensorFiles
from fusion_jax.cli.main import main
from fusion_jax.cli.run_folders import read_run
from fusion_jax.models.registry import FAMILIES
from fusion_jax.report import Report
from fusion_jax.training import read_task
from tests import tiny

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -1e300, 1e300, 10**30, 2**31, "", "a", "3", "\ud7ff",
    "bert", "float16", [], [1], ["a"], [[]], {}, {"a": 1}, {"0": 1}, [None], 100_000, "../x",
]  # fmt: skip


def places(value, path=()):
    """The paths of all values in a JSON value, without the value itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items if isinstance(value, dict | list) else ():
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))


def mutated(fields, rng):
    """The fields with one of their values replaced, or removed, or moved."""
    new = copy.deepcopy(fields)
    *parents, last = rng.choice(list(places(new)))
    at = new
    for key in parents:
        at = at[key]
    kind = rng.random()
    if kind < 0.15:
        del at[last]
    elif kind < 0.25:
        _, other = rng.choice(list(fields.items()))
        at[last] = other
    else:
        at[last] = rng.choice(VALUES)
    return new


def accepted(folder, **options):
    """Whether a model is loaded, which then computes finite numbers; else an error of one line."""
    try:
        model = fj.load(folder, **options)
    except fj.InputError:
        return False
    for leaf in jax.tree.leaves(model):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    return True


FUZZED = {
    "bert": ("bert", "classification"),
    "roberta": ("roberta", "masked-lm"),
    "gpt2": ("gpt2", "causal-lm"),
    "llama": ("llama", "causal-lm"),
    "qwen2-moe": ("qwen2-moe", "causal-lm"),
    "t5": ("t5", "seq2seq-lm"),
    "gemma3": ("gemma3", "causal-lm"),
    "phi3": ("phi3", "causal-lm"),
    "smollm3": ("smollm3", "causal-lm"),
    "granite": ("granite", "causal-lm"),
}


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


@pytest.mark.parametrize(
    "name",
    [*list(FUZZED)[:6], *(pytest.param(n, marks=pytest.mark.full) for n in list(FUZZED)[6:])],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_config(name, seed, tmp_path):
    """Each mutation is refused in words, or the model is opened with shapes that fit the files."""
    family, head = FUZZED[name]
    folder = tiny.checkpoint(tmp_path / "model", family, head)
    fields = json.loads((folder / "config.json").read_text())
    # Fewer layers are made sooner; what is left of the tensors is not looked at here.
    fields |= {layers: 2 for layers in LAYERS if layers in fields}
    rng = random.Random(f"{name} {seed}")
    refused = longest = 0
    count = 40 if seed == 0 else 80
    for _ in range(count):
        (folder / "config.json").write_text(json.dumps(mutated(fields, rng)))
        try:
            opened = open_checkpoint(folder, head=head)
            opened.abstract  # noqa: B018 - computed here
        except fj.InputError as error:
            refused += 1
            longest = max(longest, len(str(error)))
    assert refused > count / 8
    assert longest < 5000


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    # One layer is loaded sooner.
    tensors = {
        n: x for n, x in tiny.weights("bert", None).items() if not re.search(r"r\.[12]\.", n)
    }
    config = {**tiny.BERT, "num_hidden_layers": 1}
    model = fj.load(tiny.write_folder(folder / "model", config, tensors))
    smaller, report = fj.compress(
        model, fj.Sketch(width=12), key=jax.random.key(0), layers=slice(-1, None)
    )
    return fj.save(smaller, folder / "artefact", report=report)


counts = pytest.mark.parametrize("count", [100, pytest.param(200, marks=pytest.mark.full)])


@counts
def test_fusion_json(count, artefact, tmp_path):
    folder = shutil.copytree(artefact, tmp_path / "artefact")
    fields = json.loads((folder / "fusion.json").read_text())
    rng, refused = random.Random(count), 0
    for _ in range(count):
        (folder / "fusion.json").write_text(json.dumps(mutated(fields, rng)))
        refused += not accepted(folder)
    assert refused > count / 8


def refused_by(read, path, fields, count):
    """How many mutations of a JSON file are refused; all others are read."""
    rng, refused = random.Random(count), 0
    for _ in range(count):
        path.write_text(json.dumps(mutated(fields, rng)))
        try:
            read()
        except fj.InputError:
            refused += 1
    return refused


@counts
def test_mutated_run_json(count, tmp_path):
    (tmp_path / "best").mkdir()
    task = {"name": "own", "labels": ["a", "b"], "metrics": ["accuracy"]}
    fields = {"task": task, "max_length": 9, "model": "m", "seed": 0}
    refused = refused_by(lambda: read_run(str(tmp_path)), tmp_path / "run.json", fields, count)
    assert count / 8 < refused < count


@counts
def test_mutated_report_json(count, artefact, tmp_path):
    path = tmp_path / "report.json"
    fields = json.loads((artefact / "report.json").read_text())
    refused = refused_by(lambda: Report.from_json(read_json(path)[1]), path, fields, count)
    assert count / 8 < refused < count


@counts
def test_mutated_index(count, tmp_path):
    tensors = {f"x{i}": np.zeros(2, np.float32) for i in range(3)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    fields = {"metadata": {"total_size": 24}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    refused = refused_by(lambda: TensorFiles(tmp_path), path, fields, count)
    assert count / 8 < refused < count


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@counts
def test_mutated_tables(name, count, tmp_path):
    """Bytes replaced, removed and doubled: an error with the file and, in its rows, the line."""
    row = '{{"text": "so, so {0}", "label": {0}}}\n' if name == "a.jsonl" else '"so ""{0}""",{0}\n'
    text = "" if name == "a.jsonl" else "text,label\n"
    text += "".join(row.format(i % 2) for i in range(6))
    text = text.replace(",", "\t") if name == "a.tsv" else text
    whole, rng, refused = text.encode(), random.Random(f"{name} {count}"), 0
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b"[{"]
            )
        (tmp_path / name).write_bytes(data)
        try:
            read_task(tmp_path / name)
        except fj.InputError as error:
            assert name in str(error)  # noqa: PT017 - many of them
            refused += 1
    assert 0 < refused < count


BROKEN = {
    "deep": "[" * 200_000,
    "digits": '{"model_type": "bert", "hidden_size": %s}' % ("1" * 5000),
    "list": "[]",
    "nothing": "",
    "twice": '{"model_type": "bert", "model_type": "bert"}',
    "half a surrogate": '{"model_type": "\\ud800"}',
}


@pytest.mark.parametrize("file", ["config.json", "fusion.json", "generation_config.json"])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_files_that_are_not_json_objects(file, text, artefact, tmp_path, capsys):
    folder = shutil.copytree(artefact, tmp_path / "artefact")
    (folder / file).write_text(text)
    assert main(["inspect", str(folder)]) == 1
    said = capsys.readouterr().err
    assert file in said and said.count("\n") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("value", [None, {}, [], "a", 3, {"a": None}, {"a": 1}, {"a": "b"}])
def test_index(value, tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(fj.InputError):
        fj.load(folder)


@pytest.mark.parametrize("text", [*BROKEN.values(), "{}", '{"task": 3}', '{"task": {"name": 3}}'])
def test_run_json(text, artefact, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(artefact, run / "best")
    (run / "run.json").write_text(text)
    for command in (["predict", str(run), "--file", "a.csv", "--out", str(tmp_path / "o.jsonl")],
                    ["evaluate", str(run), "--file", "a.csv"]):  # fmt: skip
        assert main(command) == 1
        assert "run.json" in capsys.readouterr().err


def test_more_layers_than_tensors(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", num_hidden_layers=100)
    with pytest.raises(fj.InputError, match="num_hidden_layers is 100, but the files have only 55"):
        fj.load(folder)
    folder = tiny.checkpoint(tmp_path / "more", num_hidden_layers=100_000)
    with pytest.raises(fj.InputError, match="num_hidden_layers must be from 1 to 10000; got 10000"):
        fj.load(folder)


def test_masks_that_are_their_own_base(artefact, tmp_path):
    folder = shutil.copytree(artefact, tmp_path / "masks")
    fields = json.loads((folder / "fusion.json").read_text())
    base = {"name": str(folder), "revision": None}
    fields["masks"] = {"base": base, "shapes": {}, "prints": {}}
    (folder / "fusion.json").write_text(json.dumps(fields))
    with pytest.raises(fj.InputError, match="holds masks whose base is itself"):
        fj.load(folder)


@pytest.mark.parametrize("model_type", ["mamba", "xlnet", None, 3, ["a"]])
def test_types_that_are_not_supported(model_type, tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", model_type=model_type)
    with pytest.raises(fj.InputError, match=r"is not supported; supported: albert, .*t5") as e:
        fj.load(folder)
    assert "did you mean" not in str(e.value)


def test_a_type_with_a_typo(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", model_type="robert")
    with pytest.raises(fj.InputError, match="not supported; did you mean 'roberta'"):
        fj.load(folder)


def test_fields_of_other_types_count_for_nothing():
    """As in transformers."""
    qwen2 = {**tiny.CONFIGS["qwen2"], "attention_bias": True, "num_experts": 8, "mlp_bias": True}
    assert tiny.decoder_config(qwen2) == tiny.decoder_config(tiny.CONFIGS["qwen2"])
    llama = {**tiny.LLAMA, "num_experts": 8, "num_local_experts": 4, "qkv_bias": True}
    assert tiny.decoder_config(llama) == tiny.decoder_config(tiny.LLAMA)
    assert tiny.decoder_config({**tiny.LLAMA, "attention_bias": True}).out_bias
    assert set(FAMILIES) >= {"qwen2", "llama"}
