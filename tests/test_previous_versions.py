"""What previous versions wrote is read and gone on with, and gives the same numbers.

How the files were made is in ``previous_versions/make_v0_1_0.py``.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.training import Chains, Recipe, lottery, squeeze
from tests import nlg
from tests.helpers import run

FOLDER = Path(__file__).parent / "previous_versions" / "v0.1.0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
TENSORS = safetensors.numpy.load_file(FOLDER / "expected.safetensors")
ARTEFACTS = sorted(path.name for path in (FOLDER / "artefacts").iterdir())

# How the runs were begun.
KEY = jax.random.key(0)
CONFIG = fj.TrainConfig(
    epochs=99,
    max_steps=6,
    batch_size=8,
    learning_rate=1e-3,
    shapes=1,
    log_every=1,
    eval_every=6,
    checkpoint_every=2,
    keep_checkpoints=1,
)
SGD = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _copy(tmp_path, monkeypatch):
    """The working directory is a copy, since runs change, and paths in the files are relative."""
    shutil.copytree(FOLDER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def close(a, b):
    """Equal but for rounding, which differs between processors."""
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def outputs(model, artefact):
    """What a model says of the inputs of an artefact."""
    start = f"inputs.{artefact}."
    batch = {k.removeprefix(start): x for k, x in TENSORS.items() if k.startswith(start)}
    found = run(model, **batch)
    return found.last_hidden_state if found.logits is None else found.logits


# ------------------------------------------------------------------------------------------------
# Artefacts, reports and calibration


@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.full(quick=3)
def test_artefact(name):
    close(outputs(fj.load(f"artefacts/{name}"), name), TENSORS[f"artefacts.{name}"])


def test_masks_whose_base_was_moved():
    name = "gpt2-masks"
    Path("models/gpt2").rename("moved")
    with pytest.raises(fj.InputError, match="models/gpt2"):
        fj.load(f"artefacts/{name}")
    close(outputs(fj.load(f"artefacts/{name}", base="moved"), name), TENSORS[f"artefacts.{name}"])
    assert main(["rebase", f"artefacts/{name}", "moved"]) == 0
    close(outputs(fj.load(f"artefacts/{name}"), name), TENSORS[f"artefacts.{name}"])


@pytest.mark.full
def test_calibration_and_report():
    """The artefact and its report come out of the calibration in the file as they did."""
    command = "compress models/bert again fusion --width 8 --represent mean --head classification"
    assert main([*command.split(), "--calibration", "data/calibration.safetensors"]) == 0
    close(outputs(fj.load("again"), "bert"), TENSORS["artefacts.bert"])
    old, new = (json.loads(Path(f, "report.json").read_text()) for f in ("artefacts/bert", "again"))
    for site, want in zip(new["rows"], old["rows"], strict=True):
        assert site.pop("facts") == pytest.approx(want.pop("facts"), rel=1e-4)
        want.pop("seconds")
        assert site.items() >= want.items()
    for part in ("method", "before", "after"):
        assert new[part].items() >= old[part].items()
    page = "report artefacts/bert --original models/bert --out page.html --num-examples 2"
    assert main(page.split()) == 0


# ------------------------------------------------------------------------------------------------
# Runs that were told to stop after three of six steps


def check_run(fit, name, artefact):
    """It went on where it was stopped, and ended as a run that was not."""
    expected = EXPECTED["runs"][name]
    assert (fit.step, fit.finished) == (6, True)
    check_history(fit.history, expected["history"])
    check_history(record(f"runs/{name}"), expected["metrics"])
    check_begun(name)
    close(outputs(fit.model, artefact), TENSORS[f"runs.{name}"])


def check_begun(name):
    """What was written before the stop is still there, with the speeds of that time."""
    begun = (FOLDER / "runs" / name / "metrics.jsonl").read_text()
    assert begun and Path("runs", name, "metrics.jsonl").read_text().startswith(begun)


def check_history(entries, expected):
    assert [list(entry) for entry in entries] == [list(entry) for entry in expected]
    for entry, want in zip(entries, expected, strict=True):
        close(list(entry.values()), list(want.values()))


def record(folder):
    """What a run's record says, but for speeds."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def bert():
    return fj.load("artefacts/bert")


def llama():
    return fj.load("artefacts/llama-sgd")


def teacher():
    return fj.load("models/bert", head="classification")


def sst2():
    return fj.load_task("sst2", "data/SST-2")


def test_finetune():
    config = dataclasses.replace(CONFIG, eval_every=2)
    fit = fj.finetune(bert(), sst2(), config, key=KEY, folder="runs/finetune")
    check_run(fit, "finetune", "bert")
    close(outputs(fj.load("runs/finetune/last"), "bert"), TENSORS["runs.finetune"])


@pytest.mark.full
def test_finetune_language():
    ids = [3 + nlg.CHARS.index(char) for char in Path("data/text.txt").read_text()]
    ids = np.array(ids, np.int32)
    config = dataclasses.replace(SGD, momentum=0.5)
    text = fj.PlainText(ids, dev=ids[:50], context=8)
    fit = fj.finetune(llama(), text, config, key=KEY, folder="runs/language")
    check_run(fit, "language", "llama-sgd")


@pytest.mark.full
def test_finetune_pairs():
    rows = fj.read_pairs("data/pairs.csv", "data/pairs.csv")
    fit = fj.finetune(llama(), rows, CONFIG, key=KEY, folder="runs/pairs")
    check_run(fit, "pairs", "llama-sgd")


@pytest.mark.full
def test_tune():
    fit = fj.tune(bert(), teacher(), sst2().train, CONFIG, key=KEY, folder="runs/tune")
    check_run(fit, "tune", "bert")


@pytest.mark.full
def test_static_prune():
    pruning = fj.StaticPruning(keep=0.4, ramp=4, penalty=1.0, train_head=True)
    fit = fj.static_prune(teacher(), sst2(), CONFIG, pruning, key=KEY, folder="runs/static-prune")
    check_run(fit, "static-prune", "bert")
    close(outputs(fj.load("runs/static-prune/last"), "bert"), TENSORS["runs.static-prune"])


@pytest.mark.full
def test_growth():
    batches, loss, *_ = sst2().prepare(bert(), CONFIG, key=KEY)
    growth = Chains(
        source=batches,
        loss=loss,
        every=2,
        per_round=1,
        total=2,
        cores=3,
        batches=2,
        matrices=r"layers\.\d\.attention\.query",
    )
    recipe = Recipe(growth=growth)
    fit = fj.finetune(bert(), sst2(), SGD, key=KEY, recipe=recipe, folder="runs/growth")
    check_run(fit, "growth", "bert")


@pytest.mark.parametrize(
    ("method", "name", "start", "options"),
    [
        (lottery, "lottery", "bert", {}),
        (squeeze, "squeeze", "bert-chains", {"measure": lambda model: 0.0, "step": 2}),
    ],
)
@pytest.mark.full
def test_rounds(method, name, start, options):
    """Stopped after one of two steps in the second of three rounds."""
    config = dataclasses.replace(SGD, max_steps=2, eval_every=9)
    rounds = []

    def train(model, folder):
        rounds.append(folder.name)
        fit = fj.finetune(model, sst2(), config, key=KEY, folder=folder)
        if len(rounds) == 1:
            check_begun(f"{name}/round-1")
        return fit

    model = fj.load(f"artefacts/{start}")
    result = method(model, train, rounds=3, folder=f"runs/{name}", **options)
    assert result.finished and rounds == ["round-1", "round-2"]
    close(outputs(result.model, start), TENSORS[f"runs.{name}"])


# ------------------------------------------------------------------------------------------------
# Runs of the command line


def check_command(name, capsys, run="runs/command"):
    """A command prints the numbers that it did, on this run too."""
    expected = EXPECTED["commands"][name]
    assert main(expected["command"].replace("runs/command", run).split()) == 0
    texts = capsys.readouterr().out, expected["says"]
    said, want = (re.findall(r"\d+\.\d+", text) for text in texts)
    assert want
    np.testing.assert_allclose(np.array(said, float), np.array(want, float), atol=1.1e-4)


@pytest.mark.parametrize("run", ["command", "command-stopped"])
@pytest.mark.full
def test_finetune_command(run, capsys):
    """The same command, where nothing is left to do and after a stop."""
    check_command("finetune", capsys, f"runs/{run}")
    check_history(record(f"runs/{run}"), EXPECTED["commands"]["finetune"]["metrics"])
    check_begun(run)


@pytest.mark.parametrize("name", ["evaluate", "evaluate text", "evaluate pairs"])
@pytest.mark.full(quick=1)
def test_evaluate_command(name, capsys):
    check_command(name, capsys)


def test_predict_command():
    files = ["--file", "data/SST-2/dev.tsv", "--text", "sentence", "--out", "out.jsonl"]
    assert main(["predict", "runs/command", *files]) == 0
    for line, want in zip(
        Path("out.jsonl").read_text().splitlines(),
        Path("expected-predictions.jsonl").read_text().splitlines(),
        strict=True,
    ):
        row, want = json.loads(line), json.loads(want)
        assert row["label"] == want["label"]
        close(list(row["probabilities"].values()), list(want["probabilities"].values()))
