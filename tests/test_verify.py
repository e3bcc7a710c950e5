"""Verification of a compressed model's kernels, and the page on it."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.models.tokens import TokenBatch
from fusion_jax.verification import charts
from fusion_jax.verification.checks import VerifiedArtefact, load_original, verify
from fusion_jax.verification.page import html_page
from tests import tiny


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    # One layer, as the kernels of each layer take seconds to compile.
    tensors = {
        n: x for n, x in tiny.weights("bert", None).items() if not re.search(r"layer\.[12]", n)
    }
    tiny.write_folder(folder / "model", {**tiny.BERT, "num_hidden_layers": 1}, tensors)
    model = fj.load(folder / "model")
    smaller, report = fj.compress(
        model, fj.Fusion(width=12), key=jax.random.key(0), layers=slice(-1, None)
    )
    return fj.save(smaller, folder / "out", report=report)


@pytest.fixture(scope="module")
def found(artefact):
    return verified(artefact)


def verified(artefact):
    smaller = fj.load(artefact)
    original = load_original(smaller.provenance.name, smaller, key=jax.random.key(0))
    drawn = tiny.batch("bert")
    ids, mask = (jax.numpy.asarray(drawn[name]) for name in ("input_ids", "attention_mask"))
    batch = TokenBatch(ids.astype("int32"), mask.astype(bool))
    return verify(original, smaller, batch, key=jax.random.key(0), positions=8)


def test_bounds_hold_and_engines_agree(found):
    assert found.failures() == []
    assert list(found.certificates) == ["layers.0.mlp"]
    assert set(found.engine_differences) == {"vector-product", "neural-tangents"}
    assert 0 < found.comparisons["sgd"].frobenius < 10
    sgd = found.kernels["sgd"]
    assert sgd.shape == (2, 3, 3)
    np.testing.assert_allclose(sgd, sgd.transpose(0, 2, 1), rtol=1e-4, atol=1e-5 * sgd.max())
    assert "layers.0.mlp SGD kernel" in str(found)
    assert json.loads(json.dumps(found.to_json()))["failures"] == []


@pytest.mark.full
def test_experts_have_no_certificates(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "mixtral", "causal-lm")
    model = fj.load(folder)
    smaller, _ = fj.compress(model, fj.Fusion(width=8), key=key)
    drawn = tiny.batch("mixtral")
    ids, mask = (jax.numpy.asarray(drawn[name]) for name in ("input_ids", "attention_mask"))
    batch = TokenBatch(ids.astype("int32"), mask.astype(bool))
    found = verify(model, smaller, batch, key=key, cross_check=False)
    assert found.certificates == {} and found.failures() == []
    assert 0 < found.comparisons["adam"].frobenius < 10


def test_a_violated_bound_and_a_wrong_engine_are_failures(found):
    certificate = found.certificates["layers.0.mlp"]
    line = certificate.lines[0]._replace(measured=1e9)
    wrong = replace(certificate, lines=(line, *certificate.lines[1:]))
    for bad in (1.0, float("nan")):
        changed = replace(
            found,
            certificates={"layers.0.mlp": wrong},
            engine_differences={"vector-product": bad},
        )
        assert len(changed.failures()) == 2


def test_the_page_is_whole(found, artefact):
    html = html_page(VerifiedArtefact(found, artefact, "<model> & more", (100, 80)))
    assert "&lt;model&gt; &amp; more" in html
    assert "every certified bound holds" in html
    assert "layers.0.mlp" in html
    assert "change of the SGD kernel; the scaling 'adam' keeps the other kernel" in html
    assert html.index("<h2>Adam kernel") < html.index("<h2>SGD kernel")
    assert "http" not in html
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    log_x=st.booleans(),
    log_y=st.booleans(),
)
def test_charts_of_any_values_are_numbers(values, log_x, log_y):
    line = charts.Line("a", np.arange(len(values)), values)
    chart = charts.line_chart([line], "x", "y", log_x=log_x, log_y=log_y)
    chart += charts.dot_chart([("a", values)], ["b"], "x") + charts.heatmap(
        np.array([values]), 1.0, "k"
    )
    assert "nan" not in chart
    assert "inf" not in chart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify-ntk", "MODEL", "OUT", "--num-examples", "1"], "at least 2"),
        (["verify-ntk", "MODEL", "OUT", "--text", "nowhere.txt"], "no file nowhere.txt"),
        (["report", "OUT", "--out", "no/where.html"], "no folder no"),
    ],
)
def test_input_that_cannot_be_used(arguments, message, artefact, capsys):
    places = {"MODEL": str(artefact.parent / "model"), "OUT": str(artefact)}
    assert main([places.get(a, a) for a in arguments]) == 1
    assert message in capsys.readouterr().err
