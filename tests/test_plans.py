"""Widths for any budget from scores that are computed once."""

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.compression import allocation
from fusion_jax.compression.budgets import UnitCost, kind_of
from fusion_jax.compression.width_scores import SiteScores, plan_from_json, plan_to_json
from fusion_jax.report import size_of
from tests import glue
from tests.helpers import unchecked

KEY = jax.random.key(0)


def model():
    """Two MLPs whose units cost 9 and 19 parameters."""
    return nnx.List(
        [
            fj.Mlp(4, 24, act="relu", rngs=nnx.Rngs(0)),
            fj.GatedMlp(6, 16, act="silu", use_bias=False, rngs=nnx.Rngs(1)),
        ]
    )


def scores(of=None):
    """Errors that fall with the width, at all multiples of 2."""
    draw = np.random.default_rng(0)
    made = []
    for path, site in enumerate(fj.sites(of or model())):
        widths = np.arange(2, site.mlp.width + 1, 2)
        errors = np.sort(draw.random(len(widths)))[::-1]
        made.append(SiteScores(str(path), widths, errors, UnitCost.of(site.mlp)))
    mlps = [site.mlp for site in fj.sites(of or model())]
    size = size_of(of or model(), mlps)
    totals = {"params": size.params, "megabytes": size.bytes / 1e6, "flops": size.mlp_flops}
    return fj.WidthScores(method=fj.Fusion(), by="loss", sites=tuple(made), totals=totals)


def cost_after(plan, name):
    """Returns what the model costs once it is compressed."""
    smaller, _ = fj.compress(
        model(), {path: fj.Prune(width=how.width) for path, how in plan.items()}, key=KEY
    )
    size = size_of(smaller, [site.mlp for site in fj.sites(smaller)])
    return {"params": size.params, "megabytes": size.bytes / 1e6, "flops": size.mlp_flops}[name]


@pytest.mark.parametrize("limit", [0.4, 0.75])
@pytest.mark.parametrize("name", ["params", "megabytes", "flops"])
def test_plans_cost_what_was_asked_and_are_the_best(name, limit):
    found = scores()
    plan = found.plan(fj.Budget(**{name: limit}))
    allowed = limit * found.totals[name]
    assert cost_after(plan, name) <= allowed * (1 + 1e-9)
    fixed = found.totals[name] - sum(
        float(fj.Budget(**{name: 1.0}).costs(site.unit, site.widths)[-1]) for site in found.sites
    )
    best = min(
        sum(float(site.errors[i]) for site, i in zip(found.sites, chosen, strict=True))
        for chosen in itertools.product(*(range(len(site.widths)) for site in found.sites))
        if fixed
        + sum(
            float(fj.Budget(**{name: 1.0}).costs(site.unit, site.widths)[i])
            for site, i in zip(found.sites, chosen, strict=True)
        )
        <= allowed * (1 + 1e-9)
    )
    got = sum(
        float(site.errors[list(site.widths).index(plan[site.path].width)]) for site in found.sites
    )
    assert got == pytest.approx(best)


def test_a_plan_by_time_is_within_its_share():
    table = fj.Latency(
        device="test",
        tokens=1,
        seconds={
            kind_of(site.mlp): [(1, 1.0), (site.mlp.width, 3.0)] for site in fj.sites(model())
        },
    )
    found = scores()
    for limit in (0.5, 0.9):
        plan = found.plan(fj.Budget(latency=limit, table=table))
        widths = [np.array([plan[site.path].width]) for site in found.sites]
        kinds = [site.unit.kind for site in found.sites]
        seconds = sum(float(table.at(*each)[0]) for each in zip(kinds, widths, strict=True))
        assert seconds <= limit * 6 + 1e-4
    assert fj.Latency.from_json(json.loads(json.dumps(table.to_json()))) == table
    with pytest.raises(fj.InputError, match="no MLP gelu 4x4 float32, but relu 4x4 float32"):
        table.at("gelu 4x4 float32", np.array([1]))


def test_scores_and_plans_are_read_as_they_were_written():
    found = scores()
    again = fj.WidthScores.from_json(json.loads(json.dumps(found.to_json())))
    plan = found.plan(fj.Budget(params=0.6))
    assert again.plan(fj.Budget(params=0.6)) == plan
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_scores_of_a_model_give_plans_for_several_budgets(monkeypatch):
    monkeypatch.setattr(allocation, "TRIED", (1 / 2,))
    seen = {"0": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)}
    mlps = nnx.List([fj.Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))])
    found = fj.score_widths(mlps, fj.Fusion(round_to=4), calibration=seen, key=KEY)
    widths = [found.plan(fj.Budget(width=width))["0"].width for width in (4, 9, 0.75, 16)]
    assert widths == [4, 8, 12, 16]
    alone = fj.allocate(
        mlps, fj.Fusion(round_to=4), budget=fj.Budget(width=9), calibration=seen, key=KEY
    )
    assert alone["0"].width == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of width, params, megabytes, flops and latency; got none"),
        ({"params": 1, "flops": 1}, "got params and flops"),
        ({"params": 0}, "must be above 0"),
        ({"latency": 0.5}, "with a table"),
    ],
)
def test_what_a_budget_is(fields, message):
    with unchecked(), pytest.raises(fj.InputError, match=message):
        fj.Budget(**fields)


def test_budgets_that_cannot_be_met():
    with pytest.raises(fj.InputError, match="is too small: the smallest widths need"):
        scores().plan(fj.Budget(params=0.05))
    with pytest.raises(fj.InputError, match="give total_width or budget"):
        fj.allocate(model(), fj.Fusion(), calibration="random", key=KEY)


@pytest.mark.parametrize("read", [fj.WidthScores.from_json, plan_from_json, fj.Latency.from_json])
@pytest.mark.parametrize(
    "fields", [{}, {"format": 1, "sites": {}}, {"format": 9}, {"seconds": [1]}]
)
def test_files_of_others_are_refused(read, fields):
    with pytest.raises(fj.InputError, match=r"this is not|these are not"):
        read(fields)


@pytest.mark.full
def test_one_calibration_many_budgets_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glue.checkpoint(tmp_path / "m")
    (tmp_path / "t.txt").write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(60)))
    assert (
        main(["calibrate", "m", "t.txt", "in.safetensors", "--scores", "s.json", "--round-to", "4"])
        == 0
    )
    assert main(["plan", "s.json", "p.json", "--width", "0.5"]) == 0
    assert main(["compress", "m", "out", "plan", "p.json", "--calibration", "in.safetensors"]) == 0
    plan = json.loads((tmp_path / "p.json").read_text())["sites"]
    for site in fj.sites(fj.load(tmp_path / "out")):
        assert site.mlp.width == plan[site.path]["width"] and site.mlp.width % 4 == 0
    assert main(["plan", "s.json", "p.json", "--width", "0.5"]) == 1
    assert "p.json exists already" in capsys.readouterr().err
    assert main(["compress", "m", "out2", "plan", "p.json", "--stream"]) == 1
