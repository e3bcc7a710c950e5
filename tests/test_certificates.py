"""Certificates of artefacts are checked again from the weights, and refused after any change."""

import json

import jax
import pytest

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.verification.certificate_files import check_certificate, write_certificate
from tests import glue

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


@pytest.fixture
def artefact(tmp_path):
    model = fj.load(glue.checkpoint(tmp_path / "model"))
    smaller, _ = fj.compress(model, fj.Fusion(width=8), layers=[0], key=jax.random.key(0))
    return fj.save(smaller, tmp_path / "artefact")


@pytest.mark.full
def test_certificate_holds_until_something_changes(artefact, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    command = ["certify", str(artefact), "--text", str(tmp_path / "t.txt"), "--positions", "4"]
    assert main(command) == 0
    assert main(["verify", str(artefact)]) == 0
    assert "The certificate holds: 3 figures of 1 MLPs" in capsys.readouterr().out
    assert main(command) == 1 and "has a certificate already" in capsys.readouterr().err
    # The artefact loads with it.
    assert fj.load(artefact) is not None

    file = artefact / "certificate.json"
    stated = json.loads(file.read_text())
    (path,) = stated["sites"]
    bound = stated["sites"][path][1]["data"]
    stated["sites"][path][1]["data"] = bound / 2
    file.write_text(json.dumps(stated))
    (problem,) = check_certificate(artefact).problems
    assert f"SGD kernel, data: {bound / 2:.4g} is stated, {bound:.4g} was found" in problem
    # Bounds of format 1 are looser, and hold if those of today are no larger.
    stated["sites"][path][1]["data"] = 2 * bound
    for version, problems in ((2, 1), (1, 0)):
        file.write_text(json.dumps(stated | {"format": version}))
        assert len(check_certificate(artefact).problems) == problems
    stated["sites"][path][1]["data"] = bound
    file.write_text(json.dumps(stated))

    weights = artefact / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert main(["verify", str(artefact)]) == 1
    assert "model.safetensors is not the file that was certified" in capsys.readouterr().err
    weights.write_bytes(good)
    assert not check_certificate(artefact).problems

    original = tmp_path / "model" / "model.safetensors"
    same = original.read_bytes()
    original.write_bytes(same[:-40000] + bytes(40000))
    problems = check_certificate(artefact).problems
    original.write_bytes(same)
    assert problems == [f"{path}: the original's weights are not those that were certified"]


def test_what_cannot_be_certified(artefact, tmp_path):
    with pytest.raises(fj.InputError, match=r"has no certificate\.json; write one"):
        check_certificate(artefact)
    with pytest.raises(fj.InputError, match="is not an artefact"):
        write_certificate(tmp_path / "model", None, TEXTS)
    (artefact / "certificate.json").write_text('{"format": 1}')
    with pytest.raises(fj.InputError, match="is not a certificate of this version"):
        check_certificate(artefact)
