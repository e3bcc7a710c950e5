"""Verification of a compressed model's kernels, and the page on it."""

import contextlib
import io
import json
import pkgutil
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusion_jax as fj
from fusion_jax import methods
from fusion_jax.cli.main import main
from fusion_jax.models.tokens import TokenBatch
from fusion_jax.progress import progress_shown
from fusion_jax.report import EXPLANATIONS, Report
from fusion_jax.verification import charts
from fusion_jax.verification.checks import VerifiedArtefact, load_original, verify
from fusion_jax.verification.outlook import FirstStep, first_steps, mover, validity, verdict
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
def found_and_said(artefact):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), progress_shown(True):
        return verified(artefact), said.getvalue()


@pytest.fixture(scope="module")
def found(found_and_said):
    return found_and_said[0]


@pytest.mark.full
def test_each_stage_is_announced_before_it_begins(found_and_said):
    said = found_and_said[1]
    stages = re.findall(r"^Verifying: (\d+)/10 (.*) \(", said, re.M)
    assert [(int(n), re.sub(r" \(.*", "", what)) for n, what in stages] == list(
        enumerate(
            [
                "outputs of the original",
                "SGD kernel of the original model",
                "SGD kernel of the compressed model",
                "first steps with SGD",
                "Adam kernel of the original model",
                "Adam kernel of the compressed model",
                "first steps with Adam",
                "comparison of the engines",
                "inputs of the MLPs",
                "bounds of layers.0.mlp",
                "done",
            ]
        )
    )
    assert re.search(r"\nKernel: 0/\d+ compiling", said)
    assert said.startswith("Loading ")


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
    assert str(found).startswith("Will the smaller model train like the original?")
    assert "compress with scaling 'sgd'" in found.outlook("sgd")[0]
    assert "compress with" not in found.outlook("adam")[0]
    for kind, steps in found.steps.items():
        assert steps[0].explained > 0.99, kind  # small steps are linear
    assert json.loads(json.dumps(found.to_json()))["failures"] == []


def test_first_steps_of_linear_models_are_those_of_their_kernels():
    """For f(x) = w . x, a step of SGD moves outputs by -rate K (f - y), all of it explained."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 5)).astype(np.float32)
    y = rng.normal(size=11)
    w = rng.normal(size=5).astype(np.float32)
    batch = (jax.numpy.asarray(x),)
    movers = [mover(lambda p, b, c=c: c * b[0] @ p, w, batch, y) for c in (1.0, 1.1)]
    for kind in ("sgd", "adam"):
        moves = []
        for c in (1.0, 1.1):
            gradient = c * x.T @ (c * x @ w - y)
            moves.append(-c * x @ (np.sign(gradient) if kind == "adam" else gradient))
        want = [np.linalg.norm(moves[1] - moves[0]), np.linalg.norm(moves[1])]
        want = np.array(want) / np.linalg.norm(moves[0])
        for step in first_steps(movers[0], movers[1], kind, (0.01, 0.1)):
            np.testing.assert_allclose([step.apart, step.size], want, rtol=1e-4)
            assert step.explained > 1 - 1e-6


def test_the_verdict_is_for_the_largest_step_that_the_kernel_explains():
    steps = [FirstStep(1e-4, 0.02, 1.0, 0.99), FirstStep(1e-3, 0.2, 1.1, 0.91),
             FirstStep(1e-2, 3.0, 1.0, 0.4)]  # fmt: skip
    assert "much like the original" in verdict("adam", 0.05, steps)
    assert "rates up to 0.001" in validity("adam", steps)
    assert "nearly like" in verdict("sgd", 0.05, steps[:1])
    assert "unlike" in verdict("sgd", 0.31, steps[:1])
    assert "At none of these rates" in validity("sgd", steps[2:])
    assert "unlike" in verdict("sgd", 0.05, [steps[0]._replace(apart=float("nan"))])


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


def page_of(found, artefact, **changed):
    history = fj.load(artefact).provenance.history
    fields = (found, artefact, "hub/<model> & more", (100, 80), ("a <b>", "c", "d"), history, None)
    return html_page(VerifiedArtefact(*fields)._replace(**changed))


@pytest.fixture(scope="module")
def report(artefact):
    return Report.from_json(json.loads((artefact / "report.json").read_text()))


def test_the_page_is_whole(found, artefact, report):
    html = page_of(found, artefact, report=report)
    title = "hub/&lt;model&gt; &amp; more, compressed by fusion (width 12)"
    assert f"<title>{title}</title>" in html
    assert "<li>a &lt;b&gt;</li><li>c</li>" in html
    assert "layers.0.mlp" in html
    assert "change of the SGD kernel; the scaling 'adam' keeps the other kernel" in html
    assert html.index("<h2>Adam kernel") < html.index("<h2>SGD kernel")
    for name in report.rows[0].facts:
        assert f"<dt>{name}</dt>" in html
    assert "http" not in html
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_the_page_tells_rows_of_the_adam_kernel_from_columns(found, artefact):
    sections = page_of(found, artefact).split("<h2>")
    (adam,) = (s for s in sections if s.startswith("Adam kernel"))
    assert adam.count(">text, its gradient</text>") == 3
    assert adam.count(">text, the sign of its gradient</text>") == 3
    assert "sign of the gradient at the text of the column" in adam
    first, second = found.kernels["adam"]
    change = charts.heatmap(
        second - first,
        float(np.abs(second - first).max()),
        ("text, its gradient", "text, the sign of its gradient"),
        "compressed minus original, colors of its own",
    )
    assert change in adam
    # <g(x), sign g(z)>: each diagonal entry is the largest of its row's gradient.
    assert (np.diagonal(first)[:, None] >= np.abs(first) * (1 - 1e-5)).all()


def test_signs_and_numbers_of_a_heatmap():
    both = charts.heatmap(np.array([[2.0, -1.0], [0.0, 0.5]]), 2.0, ("r", "c"), "k")
    paths = re.findall(r'<path d="(M\S+ \d)\S*" fill="var\(--(c\d)\)" fill-opacity="(\S+)"', both)
    assert paths == [("M1 0", "c1", "0.500"), ("M1 1", "c0", "0.250"), ("M0 0", "c0", "1.000")]
    numbers = re.findall(r">([^<>]+)</text>", both)
    assert numbers == ["1", "2", "1", "2", "r", "c", "2", "1", "0", "-1", "-2"]
    # Room for eight characters beside the bar.
    tiny_values = charts.heatmap(np.array([[1.95e-7, -3.9e-7]]), 3.9e-7, ("r", "c"), "k")
    at = [float(x) for x in re.findall(r'<text x="(\S+)" y="\S+">-1.95e-7<', tiny_values)]
    assert at and at[0] + 8 * 6.2 <= 340
    positive = charts.heatmap(np.array([[2.0, 1.0]]), 2.0, ("r", "c"), "k")
    assert re.findall(r">([^<>]+)</text>", positive)[-3:] == ["2", "1", "0"]
    assert "--c1" not in positive


@pytest.mark.full
def test_bounds_above_100_percent_are_loose_on_the_page_and_in_the_table(found, artefact):
    certificate = found.certificates["layers.0.mlp"]
    values = {"measured": 0.1, "data": 0.2, "a_priori": 0.3}
    tight = tuple(line._replace(**values) for line in certificate.lines)
    loose = (tight[0]._replace(data=1.5, a_priori=7.0), *tight[1:])

    def having(lines):
        return replace(found, certificates={"layers.0.mlp": replace(certificate, lines=lines)})

    html = page_of(having(tight), artefact)
    assert '<p class="good">✓ Every certified bound holds, and none is above 100 %.' in html
    assert having(tight).loose_bounds() is None
    html = page_of(having(loose), artefact)
    assert "✓ Every" not in html
    assert '<p class="warn">No certified bound is violated, but 1 of 3 certified bounds' in html
    assert html.count('fill="var(--card)" stroke="var(--c1)"') == 1  # hollow
    assert "1 of 3 certified bounds are loose" in str(having(loose))
    changed = (loose[0]._replace(measured=1.4), *loose[1:])
    assert "in 1 cases, the change itself" in str(having(changed))


def test_the_page_fits_small_and_dark_screens(found, artefact, report):
    html = page_of(found, artefact, report=report)
    # A column that is at least so wide, whatever the screen, makes a horizontal scroll bar.
    assert re.findall(r"minmax\((?!min\(100%)", html) == []
    assert re.findall(r"min-width:(\w+)", html) == ["0"]
    assert "nowrap" not in html and "overflow-x" not in html
    assert "darker" not in html.lower() and "stronger color" in html
    for name in set(re.findall(r"var\((--\w+)\)", html)):
        assert len(re.findall(rf"[{{;\n]{name}:", html)) == 2, name  # for light and dark


def test_a_page_on_matrices_and_on_methods_by_site(found, artefact, report):
    row = replace(report.rows[0], width_before=None, width_after=None, facts={"error": 0.5})
    html = page_of(found, artefact, report=replace(report, rows=(row,)))
    assert "<th>width</th>" not in html and "<dt>error</dt>" in html
    methods = {f"layers.{i}.mlp": {**report.method, "width": 8 + i} for i in range(2)}
    steps = (json.dumps({"compress": methods}), json.dumps({"static pruning": {}}))
    html = page_of(found, artefact, report=replace(report, method=methods), history=steps)
    assert "compressed by fusion, sizes by site, then static pruning</title>" in html
    assert "layers.1.mlp: method fusion, width 9" in html


def test_every_fact_of_a_method_is_explained():
    modules = [getattr(methods, m.name) for m in pkgutil.iter_modules(methods.__path__, "")]
    facts = {c for m in modules for n, c in vars(m).items() if n.endswith("Facts")}
    assert len(facts) >= 5
    assert {name for c in facts for name in c._fields} == set(EXPLANATIONS)


def test_a_damaged_report_is_one_sentence_before_the_work(artefact, tmp_path, capsys):
    text = (artefact / "report.json").read_text()
    assert Report.from_json(json.loads(text)).to_json() == json.loads(text)
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    for damage in (
        ("{", ""),
        ('"rows": [', '"rows": 3, "x": ['),
        ('"width_before": 48', '"width_before": "48"'),
        ('"method": {', '"method": [], "x": {'),
    ):
        assert damage[0] in text
        (copy / "report.json").write_text(text.replace(*damage, 1))
        assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 1
        error = capsys.readouterr().err
        assert "report.json" in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    log_x=st.booleans(),
    log_y=st.booleans(),
)
def test_charts_of_any_values_are_numbers(values, log_x, log_y):
    line = charts.Line("a", np.arange(len(values)), values)
    chart = charts.line_chart([line], "x", "y", log_x=log_x, log_y=log_y)
    chart += charts.dot_chart([("a", values)], ["b"], "x", limit=1.0)
    chart += charts.heatmap(np.array([values]), 1.0, ("r", "c"), "k")
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
