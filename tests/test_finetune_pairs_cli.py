"""The commands on models that generate text, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.training import measure_pairs, nats_per_token
from tests import nlg, tiny

OPTIONS = ["--max-steps", "4", "--batch-size", "8", "--shapes", "1", "--no-dropout"]
OPTIONS += ["--log-every", "2", "--learning-rate", "1e-2"]
TUNING = [option for option in OPTIONS if option != "--no-dropout"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    nlg.checkpoint(folder / "gpt2", "gpt2", n_positions=64)
    nlg.checkpoint(folder / "t5", "t5")
    nlg.webnlg(folder / "webnlg")
    nlg.e2e(folder / "e2e")
    nlg.csv(folder / "own.csv", nlg.pairs(12))
    (folder / "plain.txt").write_text("the cat sat on the mat. " * 20)
    (folder / "held.txt").write_text("the mat sat on the cat. " * 8)
    return folder


def said(capsys):
    """The numbers that were printed, by name."""
    lines = [line.rpartition(" ") for line in capsys.readouterr().out.splitlines()]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.full
def test_webnlg_from_compression_to_measures(places, tmp_path, capsys):
    fused, tuned, run, out = (str(tmp_path / n) for n in ("fused", "tuned", "run", "out.jsonl"))
    model = str(places / "gpt2")
    assert main(["compress", model, fused, "fusion", "--width", "8", "--head", "causal-lm"]) == 0
    task = ["--task", "webnlg", "--data", str(places)]
    assert main(["tune", fused, "--teacher", model, "--out", tuned, *task, *TUNING]) == 0
    assert main(["finetune", tuned, "--out", run, *task, *OPTIONS]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["finetune", tuned, "--out", run, *task, *OPTIONS]) == 0  # nothing left to do
    capsys.readouterr()
    short = ["--max-new-tokens", "8"]
    assert main(["evaluate", run, *task, *short, "--beams", "2", "--out", out]) == 0
    found = said(capsys)
    data = fj.load_pairs("webnlg", places)
    best = fj.load(tmp_path / "run" / "best")
    likely = measure_pairs(best, data.test)
    assert found["test nats"] == pytest.approx(likely["nats"], abs=1e-4)
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["source"] for row in rows] == list(data.test.sources)
    assert [tuple(row["references"]) for row in rows] == list(data.test.references)
    texts = [row["text"] for row in rows]
    assert texts == fj.generate_texts(
        best, data.test, max_new_tokens=8, beams=fj.Beams(2), batch_size=64
    )
    for group, metrics in fj.measure_texts(data.test, texts).items():
        for name, value in metrics.items():
            assert found[f"test {group} {name}"] == pytest.approx(value, abs=1e-4)
    assert len(found) == 2 + 3 * 4
    assert main(["evaluate", run, *task, *short, "--split", "dev"]) == 0
    found = said(capsys)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    history = map(json.loads, lines)
    nats = min(line["nats"] for line in history if "nats" in line)
    assert found["dev nats"] == pytest.approx(nats, abs=1e-4)
    assert "dev bleu" in found


@pytest.mark.full
def test_own_table_with_an_encoder_decoder(places, tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "out.jsonl")
    table = str(places / "own.csv")
    files = ["--train-file", table, "--dev-file", table, "--target", "target"]
    length = ["--max-length", "3"]
    assert main(["finetune", str(places / "t5"), "--out", run, *files, *OPTIONS, *length]) == 0
    capsys.readouterr()
    short = ["--max-new-tokens", "5"]
    assert main(["evaluate", run, "--file", table, *short]) == 0
    found = said(capsys)
    assert set(found) == {
        f"own.csv {name}" for name in ("nats", "perplexity", "bleu", "chrf", "chrf++", "ter")
    }
    arguments = ["predict", run, "--file", table, "--text", "source", "--out", out]
    assert main([*arguments, "--max-length", "2"]) == 1
    assert "above 2; allow more with max_length" in capsys.readouterr().err
    assert main([*arguments, *short]) == 0
    texts = [json.loads(line)["text"] for line in Path(out).read_text().splitlines()]
    sources = [source for source, _ in nlg.pairs(12)]
    best = fj.load(tmp_path / "run" / "best")
    assert texts == fj.generate_texts(best, sources, max_new_tokens=5, batch_size=64)
    table = str(nlg.csv(tmp_path / "long.csv", [("abcabc", "")]))
    arguments = ["predict", run, "--file", table, "--text", "source", "--out", f"{out}-cut", *short]
    assert main(arguments) == 1
    assert "above 3; allow more with max_length" in capsys.readouterr().err  # as the run's
    assert main([*arguments, "--truncate"]) == 0
    (text,) = fj.generate_texts(best, ["ab"], max_new_tokens=5)
    assert json.loads(Path(f"{out}-cut").read_text())["text"] == text


@pytest.mark.full
def test_plain_text(places, tmp_path, capsys):
    fused, tuned, run = (str(tmp_path / name) for name in ("fused", "tuned", "run"))
    model = str(places / "gpt2")
    assert main(["compress", model, fused, "fusion", "--width", "8"]) == 0
    task = ["--task", "text", "--data", str(places / "plain.txt"), "--context", "16"]
    assert main(["tune", fused, "--teacher", model, "--out", tuned, *task, *TUNING]) == 0
    held = str(places / "held.txt")
    arguments = ["finetune", tuned, "--out", run, *task, "--dev-file", held, *OPTIONS]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--task", "text", "--data", held]) == 0
    found = said(capsys)
    ids = np.array([3 + nlg.CHARS.index(char) for char in Path(held).read_text()], np.int32)
    nats = nats_per_token(fj.load(tmp_path / "run" / "best"), ids, 16)
    assert found == pytest.approx(
        {"held.txt nats": nats, "held.txt perplexity": np.exp(nats)}, abs=1e-3
    )
    assert main(["evaluate", run, "--perplexity", held]) == 0
    assert said(capsys) == found


def test_plain_text_is_a_file_or_tokens(places, key):
    model = fj.load(places / "gpt2", head="causal-lm")
    text = (places / "plain.txt").read_text()
    ids = np.array([3 + nlg.CHARS.index(char) for char in text], np.int32)
    config = fj.TrainConfig(max_steps=2, batch_size=8, dropout=False)
    found = [
        fj.finetune(model, fj.PlainText(train, dev, context=16), config, key=key)
        for train, dev in ((ids, ids[:50]), (str(places / "plain.txt"), ids[:50]))
    ]
    assert found[0].history == found[1].history


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "GPT2", "--task", "webnlg"], "give either --task and --data"),
        (["finetune", "GPT2", "--task", "webnlg", "--data", "hub"], "there is no folder hub"),
        (["finetune", "GPT2", "--target", "target"], "give either --task and --data"),
        (["finetune", "GPT2", "--train-file", "OWN", "--target", "targt"], "did you mean 'target'"),
        (["finetune", "GPT2", "--task", "text"], "needs --data FILE.txt"),
        (["finetune", "GPT2", "--task", "text", "--data", "PLAIN"], "context 512 is above"),
        (["finetune", "T5", "--task", "text", "--data", "PLAIN"], "decoder-only"),
        (["finetune", "GPT2", "--task", "e2e", "--data", "E2E", "--max-length", "9"], "train.txt:"),
        (["finetune", "BERT", "--task", "e2e", "--data", "E2E"], "not a model that generates text"),
        (["tune", "GPT2", "--teacher", "GPT2", "--task", "e2e", "--data", "E2E"], "differs from"),
        (["evaluate", "GPT2", "--task", "e2e"], "give either --task and --data, or --file"),
        (["evaluate", "GPT2", "--task", "e2e", "--data", "E2E", "--out", "OWN"], "exists; choose"),
        (
            ["finetune", "GPT2", "--task", "text", "--data", "PLAIN", "--target", "x"],
            "--target does not apply to plain text; leave it out",
        ),
        (
            ["finetune", "GPT2", "--train-file", "OWN", "--target", "target", "--regression"],
            "--regression does not apply to sources and targets",
        ),
        (
            ["evaluate", "GPT2", "--task", "e2e", "--data", "E2E", "--source", "x"],
            "--source does not apply to a published task",
        ),
        (
            ["evaluate", "GPT2", "--task", "e2e", "--file", "OWN"],
            "--task does not apply to a file of sources and targets",
        ),
        (
            ["evaluate", "GPT2", "--task", "text", "--data", "PLAIN", "--label", "x"],
            "--label does not apply to plain text",
        ),
        (
            ["evaluate", "GPT2", "--task", "text", "--file", "OWN"],
            "--task text --data FILE.txt, not",
        ),
        (["evaluate", "GPT2", "--task", "sst2", "--beams", "2"], "for generated texts"),
        (
            ["finetune", "GPT2", "--task", "text", "--data", "PLAIN", "--max-length", "9"],
            "max_length and truncate do not apply to plain text; see context",
        ),
        (
            ["evaluate", "GPT2", "--task", "text", "--data", "PLAIN", "--truncate"],
            "--truncate are not for plain text",
        ),
        (["evaluate", "GPT2", "--task", "text"], "needs --data FILE.txt"),
    ],
)
def test_errors(arguments, message, places, tmp_path, capsys):
    names = {"GPT2": places / "gpt2", "T5": places / "t5", "OWN": places / "own.csv"}
    names |= {"E2E": places / "e2e", "PLAIN": places / "plain.txt", "BERT": tmp_path / "bert"}
    if "BERT" in arguments:
        tiny.checkpoint(tmp_path / "bert")
    arguments = [str(names.get(a, a)) for a in arguments]
    if arguments[0] != "evaluate":
        arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
