"""The commands finetune, evaluate and predict on tags of words and on answers to questions."""

import json

import pytest

import fusion_jax as fj
from fusion_jax.cli.main import main
from tests import glue

OPTIONS = ["--max-steps", "2", "--batch-size", "8", "--shapes", "1", "--no-dropout"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(glue.checkpoint(tmp_path_factory.mktemp("cli") / "model"))


def metrics(capsys):
    lines = [line.rsplit(" ", 2) for line in capsys.readouterr().out.splitlines()]
    return {(where, name): float(value) for where, name, value in lines}


@pytest.mark.full
def test_tags(model, tmp_path, capsys):
    text = "".join(f"w{i} O\nw{i + 1} B-X\n\n" for i in range(16))
    (tmp_path / "train.conll").write_text(text)
    run, exported = str(tmp_path / "run"), str(tmp_path / "hf")
    task = ["--task", "token-classification"]
    files = ["--train-file", str(tmp_path / "train.conll"), "--dev-file"]
    command = ["finetune", model, "--out", run, *task, *files, str(tmp_path / "train.conll")]
    assert main([*command, *OPTIONS]) == 0
    assert "f1" in capsys.readouterr().out
    rows = [{"tokens": [f"w{i}", f"w{i + 1}"], "ner": ["O", "B-X"]} for i in range(16)]
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["--file", str(dev), "--text", "tokens", "--label", "ner"]
    assert main(["evaluate", run, *fields]) == 0
    found = metrics(capsys)
    assert found.keys() == {("dev.jsonl", n) for n in ("f1", "precision", "recall", "accuracy")}
    assert main(["export", f"{run}/best", exported]) == 0
    capsys.readouterr()
    for given in ([], task):
        assert main(["evaluate", exported, *given, *fields]) == 0
        assert metrics(capsys) == found
    out = tmp_path / "out.jsonl"
    assert main(["predict", run, *fields[:4], "--out", str(out)]) == 0
    again = tmp_path / "again.jsonl"
    assert main(["predict", exported, *fields[:4], "--out", str(again)]) == 0
    assert again.read_text() == out.read_text()
    given = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["words"] for row in given] == [row["tokens"] for row in rows]
    pairs = [
        (a, b)
        for x, y in zip(given, rows, strict=True)
        for a, b in zip(x["tags"], y["ner"], strict=True)
    ]
    assert sum(a == b for a, b in pairs) / 32 == found["dev.jsonl", "accuracy"]


def test_answers(model, tmp_path, capsys):
    rows = [
        {
            "question": "w80",
            "context": f"w{i} w{i + 1}",
            "answers": {"text": [f"w{i}"], "answer_start": [0]},
        }
        for i in range(16)
    ]
    path, run = tmp_path / "squad.jsonl", str(tmp_path / "run")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train-file", str(path), "--dev-file", str(path)]
    command = ["finetune", model, "--out", run, "--task", "question-answering", *files]
    assert main([*command, *OPTIONS, "--max-length", "12"]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert main(["evaluate", run, "--file", str(path)]) == 0
    found = metrics(capsys)
    assert found.keys() == {("squad.jsonl", name) for name in ("f1", "exact_match")}
    out = tmp_path / "out.jsonl"
    assert main(["predict", run, "--file", str(path), "--out", str(out)]) == 0
    again = tmp_path / "again.jsonl"
    artefact = f"{run}/best"
    arguments = ["predict", artefact, "--file", str(path), "--max-length", "12"]
    assert main([*arguments, "--out", str(again)]) == 0
    assert again.read_text() == out.read_text()
    given = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in given] == ["w80"] * 16
    right = [x["answer"] == y["answers"]["text"][0] for x, y in zip(given, rows, strict=True)]
    assert found["squad.jsonl", "exact_match"] == 100 * sum(right) / 16
    assert all(x["answer"] in y["context"] for x, y in zip(given, rows, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "M", "--out", "R", "--task", "question-answering"], "needs --train-file"),
        (
            ["finetune", "M", "--out", "R", "--task", "question-answering", "--train-file", "F",
             "--label", "x"],
            "--label does not apply to questions",
        ),
        (
            ["finetune", "M", "--out", "R", "--task", "token-classification", "--train-file", "F",
             "--text", "a", "b"],
            "words are in one field; give one to --text",
        ),
        (["evaluate", "M", "--task", "token-classification"], "to measure on by --file"),
        (
            ["evaluate", "M", "--task", "question-answering", "--file", "F", "--text", "x"],
            "--text does not apply to a file with tags or questions",
        ),
        (
            ["evaluate", "M", "--task", "question-answering", "--file", "F", "--truncate"],
            "--truncate does not apply to questions",
        ),
        (
            ["evaluate", "M", "--task", "question-answering", "--file", "F"],
            "the files have no question-answering head",
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(arguments, message, model, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q", "context": "c", "answers": []}\n')
    names = {"M": model, "R": str(tmp_path / "run"), "F": str(file)}
    assert main([names.get(word, word) for word in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_compressed_model_without_a_head_gets_one(tmp_path, model, capsys):
    """Compress, fine-tune: the commands as a user types them."""
    fused = str(tmp_path / "fused")
    assert main(["compress", model, fused, "fusion", "--width", "12", "--layers", "-1"]) == 0
    assert fj.load(fused).pooler is not None
    path = tmp_path / "train.conll"
    path.write_text("w1 O\nw2 B-X\n\n" * 8)
    command = ["finetune", fused, "--out", str(tmp_path / "run"), "--train-file", str(path)]
    assert main([*command, "--task", "token-classification", *OPTIONS]) == 0
    trained = fj.load(tmp_path / "run" / "last")
    assert trained.provenance.labels == ("O", "B-X") and trained.pooler is None
