"""The command that measures speed and memory before and after."""

import pytest

from fusion_jax.cli.main import main
from tests import nlg, tiny


@pytest.mark.full
@pytest.mark.parametrize(("family", "writes"), [("gpt2", True), ("t5", True), ("bert", False)])
def test_models_before_and_after(family, writes, tmp_path, capsys):
    model, smaller = str(tmp_path / "model"), str(tmp_path / "smaller")
    if writes:
        nlg.checkpoint(tmp_path / "model", family)
    else:
        tiny.checkpoint(tmp_path / "model", family)
    assert main(["compress", model, smaller, "prune", "--width", "0.5"]) == 0
    capsys.readouterr()
    given = [model, smaller] if family == "gpt2" else [model]
    assert main(["bench", *given, "--tokens", "4", "--new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert ("write tokens/s" in out) == writes and "read tokens/s" in out
    assert ("times as fast as" in out) == (len(given) > 1)


@pytest.mark.torch
def test_beside_pytorch(tmp_path, capsys):
    nlg.checkpoint(tmp_path / "model", "gpt2")
    given = [str(tmp_path / "model"), "--tokens", "4", "--new-tokens", "2", "--torch"]
    assert main(["bench", *given]) == 0
    assert "transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere/at/all"], "no such folder"),
        (["M", "--tokens", "0"], "tokens must be at least 1"),
        (["M", "--new-tokens", "1"], "new_tokens must be at least 2"),
    ],
)
def test_mistakes_are_named_before_anything_runs(given, message, tmp_path, capsys):
    model = str(tiny.checkpoint(tmp_path / "m"))
    assert main(["bench", *[model if word == "M" else word for word in given]]) == 1
    assert message in capsys.readouterr().err
