"""The commands finetune, tune, evaluate and predict, as a user types them; killed and resumed."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax import checkpoint
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.training import predict
from tests import glue

OPTIONS = ["--max-steps", "4", "--batch-size", "8", "--shapes", "1", "--no-dropout"]
OPTIONS += ["--log-every", "2", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    data = glue.sst2(folder / "SST-2", n=16)
    return str(glue.checkpoint(folder / "model")), str(data)


def test_compress_tune_finetune_evaluate_predict(places, tmp_path, capsys):
    model, data = places
    fused, tuned, run = (str(tmp_path / name) for name in ("fused", "tuned", "run"))
    assert main(["compress", model, fused, "fusion", "--width", "12", "--layers", "-1"]) == 0
    task = ["--task", "sst2", "--data", data]
    assert main(["tune", fused, "--teacher", model, "--out", tuned, *task, *OPTIONS]) == 0
    assert not (tmp_path / "tuned.run").exists()
    assert main(["finetune", tuned, "--out", run, *task, *OPTIONS]) == 0
    said = capsys.readouterr()
    assert "Training: 4/4 loss" in said.err
    assert re.search(r"Tokenizing \d+ texts \.\.\.", said.err)
    assert "Training: 4/4 evaluating" in said.err and "Evaluating: 0/" in said.err
    assert "accuracy" in said.out
    assert main(["finetune", tuned, "--out", run, *task, *OPTIONS]) == 0  # nothing left to do
    capsys.readouterr()
    assert main(["evaluate", run, *task]) == 0
    name, metric, value = capsys.readouterr().out.split()
    assert (name, metric) == ("dev", "accuracy")
    assert 0 <= float(value) <= 1
    assert main(["evaluate", run, "--file", f"{data}/dev.tsv", "--text", "sentence"]) == 0
    assert capsys.readouterr().out.split()[-1] == value
    out = tmp_path / "out.jsonl"
    arguments = ["predict", run, "--file", f"{data}/dev.tsv", "--out", str(out)]
    assert main([*arguments, "--text", "sentence"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    labels = [text.split("\t")[1] for text in Path(data, "dev.tsv").read_text().splitlines()[1:]]
    names = {"0": "negative", "1": "positive"}
    right = [row["label"] == names[label] for row, label in zip(rows, labels, strict=True)]
    assert f"{sum(right) / 16:.4f}" == value
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-9 for row in rows)


@pytest.mark.full
def test_tuning_resumes_only_with_the_same_models_and_texts(places, tmp_path, monkeypatch, capsys):
    model, data = places
    fused, other = str(tmp_path / "fused"), str(tmp_path / "other")
    for out, seed in ((fused, "0"), (other, "1")):
        assert main(["compress", "sketch", model, out, "--seed", seed]) == 0
    third = tmp_path / "third"
    fj.export_hf(fj.load(model, dtype="float16"), third)
    lines = Path(data, "train.tsv").read_text().splitlines()
    moved = tmp_path / "SST-2"
    shutil.copytree(data, moved)
    (moved / "train.tsv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    tuned = str(tmp_path / "tuned")

    def command(student, teacher, texts):
        rest = ["--teacher", str(teacher), "--out", tuned, "--task", "sst2", "--data", str(texts)]
        return main(["tune", student, *rest, *OPTIONS])

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopped)
        assert command(fused, model, data) == 130
    assert (tmp_path / "tuned.run").is_dir()
    capsys.readouterr()
    for arguments, what in (
        ((other, model, data), "student"),
        ((fused, third, data), "teacher"),
        ((fused, model, moved), "first batch"),
    ):
        assert command(*arguments) == 1
        assert f"other settings ({what} " in capsys.readouterr().err
    assert command(fused, model, data) == 0


@pytest.mark.full
def test_texts_are_cut_off_as_they_were_in_training(places, tmp_path, capsys):
    model, data = places
    run, task = str(tmp_path / "run"), ["--task", "sst2", "--data", data]
    assert main(["finetune", model, "--out", run, *task, *OPTIONS, "--max-length", "4"]) == 1
    assert "tokens" in capsys.readouterr().err  # too long; a run that did not begin
    short = ["--max-length", "4", "--truncate"]
    assert main(["finetune", model, "--out", run, *task, *OPTIONS, *short]) == 0
    loaded = fj.load(tmp_path / "run" / "best")
    texts = fj.load_task("sst2", data).dev["dev"]
    want = predict(loaded, texts, max_length=4, truncate=True)
    files = ["--file", f"{data}/dev.tsv", "--text", "sentence"]
    found = {}
    for length in ([], ["--max-length", "6"]):
        out = tmp_path / f"{len(length)}.jsonl"
        assert main(["predict", run, *files, "--out", str(out), "--truncate", *length]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found[len(length)] = [row["probabilities"]["positive"] for row in rows]
    logits = want.astype(np.float64)
    share = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(found[0], share, rtol=1e-5)
    assert np.abs(np.array(found[2]) - found[0]).max() > 1e-4
    capsys.readouterr()
    assert main(["predict", run, *files, "--out", str(tmp_path / "new"), "--beams", "2"]) == 1
    assert "--beams is for generated texts" in capsys.readouterr().err
    assert main(["evaluate", run, *task]) == 1
    assert "above 4" in capsys.readouterr().err
    assert main(["finetune", model, "--out", run, *task, *OPTIONS, "--truncate"]) == 1
    assert "another max_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "MODEL", "--out", "OUT"], "give either --task and --data, or --train-file"),
        (["finetune", "MODEL", "--out", "MODEL", "TASK"], "not an empty folder"),
        (["finetune", "MODEL", "--out", "OUT", "TASK", "--mesh", "date=8"], "mean 'data'"),
        (["finetune", "MODEL", "--out", "OUT", "TASK", "--mesh", "data=3"], "the 8 devices"),
        (["finetune", "MODEL", "--out", "OUT", "TASK", "--batch-size", "9"], "not a multiple of 8"),
        (["finetune", "MODEL", "--out", "OUT", "TASK", "--router-z", "1"], "models with experts"),
        (["tune", "MODEL", "--teacher", "MODEL", "--out", "OUT", "TASK"], "before compression"),
        (
            ["finetune", "MODEL", "--out", "OUT", "TASK", "--text", "x"],
            "--text does not apply to a published task; leave it out",
        ),
        (
            ["finetune", "MODEL", "--out", "OUT", "--train-file", "x.csv", "--source", "x"],
            "--source does not apply to labeled texts",
        ),
        (
            ["tune", "MODEL", "--teacher", "MODEL", "--out", "OUT", "COLUMN", "--context", "9"],
            "--context does not apply to a column of texts",
        ),
        (
            ["evaluate", "MODEL", "TASK", "--file", "x.csv"],
            "--task does not apply to a file with labels",
        ),
        (
            ["evaluate", "MODEL", "TASK", "--label", "x"],
            "--label does not apply to a published task",
        ),
        (["evaluate", "MODEL", "--file", "x.csv"], "have no classification head"),
        (["predict", "MODEL", "--file", "x.csv", "--out", "MODEL"], "exists; choose another"),
    ],
)
def test_errors(arguments, message, places, tmp_path, capsys):
    names = {"MODEL": [places[0]], "OUT": [str(tmp_path / "out")]}
    names["TASK"] = ["--task", "sst2", "--data", places[1]]
    names["COLUMN"] = ["--train-file", "x.csv"]
    assert main([a for name in arguments for a in names.get(name, [name])]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Ctrl-C is ignored in what a shell starts in the background.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fusion_jax.cli.main import main
sys.exit(main())
"""


@pytest.mark.full
def test_killed_and_terminated_runs_end_with_the_same_bits(places, tmp_path):
    """kill -9, SIGTERM and Ctrl-C at arbitrary moments, in processes of their own."""
    model, data = places
    command = [sys.executable, "-c", INTERRUPTIBLE, "finetune", model, "--task", "sst2"]
    command += ["--data", data, "--max-steps", "220", "--epochs", "9999", "--batch-size", "8"]
    command += ["--shapes", "1", "--log-every", "1", "--checkpoint-every", "20"]
    command += ["--eval-every", "999"]

    def start(run):
        return subprocess.Popen(
            [*command, "--out", str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(process, run, steps):
        path = run / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < steps:
            assert process.poll() is None
            time.sleep(0.01)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(whole)
    process.communicate()
    assert process.returncode == 0
    stops = (50, signal.SIGKILL, -9), (90, signal.SIGTERM, 0), (130, signal.SIGINT, 130)
    for steps, how, code in stops:
        process = start(parts)
        until(process, parts, steps)
        process.send_signal(how)
        said = "".join(process.communicate())
        assert process.returncode == code
        assert (how == signal.SIGKILL) != ("To resume, give the same command again." in said)
        assert "Traceback" not in said
    process = start(parts)
    process.communicate()
    assert process.returncode == 0
    assert bit_equal(fj.load(whole / "last"), fj.load(parts / "last"))
    assert jax.process_count() == 1
