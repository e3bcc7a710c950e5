"""Experts of mixtures: whole ones are dropped, or each is narrowed at its own positions."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fusion_jax as fj
from fusion_jax.calibration import sample, sources
from fusion_jax.calibration.calibrator import Calibrator
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.methods.drop_experts import ExpertScore
from fusion_jax.methods.scores import ON_GRADIENTS, ON_UPSTREAM, UnitScore
from fusion_jax.models.moe import Moe, RouterRule, mixtures
from fusion_jax.training.methods.layerwise import compressed
from tests import tiny
from tests.helpers import run, unchecked

KEY = jax.random.key(0)
ROUTERS = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", "num_local_experts"),
    "qwen2-moe": ("mlp.gate", "mlp.experts", "num_experts"),
    "qwen3-moe": ("mlp.gate", "mlp.experts", "num_experts"),
    "switch": ("mlp.router.classifier", "mlp.experts", "num_experts"),
}
"""The names of routers and experts in files, and the field with the number of experts."""


def folder_of(family, folder, **config):
    return tiny.checkpoint(folder, family, dict(tiny.GENERATIVE)[family], **config)


def load(folder, family):
    return fj.load(folder, head=dict(tiny.GENERATIVE)[family])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {family: load(folder_of(family, root / family), family) for family in ROUTERS}


@pytest.fixture(scope="module")
def mixtral(models):
    return models["mixtral"]


def logits(model, family):
    return np.asarray(run(model, **tiny.batch(family)).logits)


def loop_over_tokens(model, batch, monkeypatch):
    """Returns the REAP score and the positions of each expert, token by token in float64."""
    seen, call = [], Moe.__call__
    monkeypatch.setattr(Moe, "__call__", lambda moe, *a: seen.append((moe, a[0])) or call(moe, *a))
    model(**batch)
    monkeypatch.undo()
    paths = {id(moe): path for path, moe in mixtures(model).items()}
    found = {}
    for moe, x in seen:
        path = paths[id(moe)]
        name = "decoder_attention_mask" if path.startswith("decoder.") else "attention_mask"
        mask = batch.get(name, np.ones(x.shape[:2], int))
        router = np.asarray(moe.router.kernel[...], np.float64)
        weights = {
            n: np.asarray(v.kernel[...], np.float64) for n, v in moe.experts.linears().items()
        }
        lengths = [[] for _ in range(router.shape[1])]
        for text, real in zip(np.asarray(x, np.float64), np.asarray(mask), strict=True):
            taken = np.zeros(len(lengths), int)
            for token, counts in zip(text, real, strict=True):
                shares = np.exp(token @ router)
                shares /= shares.sum()
                best = np.argsort(-shares)[: moe.top_k]
                total = shares[best].sum() if moe.normalized else 1
                for e in best:
                    taken[e] += 1
                    if not counts or (moe.capacity is not None and taken[e] > moe.capacity):
                        continue
                    up = token @ weights["up"][e]
                    if "gate" in weights:
                        gate = token @ weights["gate"][e]
                        hidden = gate / (1 + np.exp(-gate)) * up
                    else:
                        hidden = np.maximum(up, 0)
                    output = hidden @ weights["down"][e]
                    lengths[e].append(shares[e] / total * np.linalg.norm(output))
        means = [np.mean(each) if each else 0.0 for each in lengths]
        found[path] = np.array(means), np.array([len(each) for each in lengths])
    return found


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("own", [0, 256])
@pytest.mark.parametrize("family", ROUTERS)
def test_scores_are_those_of_a_loop_over_tokens(family, own, models, monkeypatch):
    """Also where an expert has so few positions that it is calibrated on those of others."""
    model, batch = models[family], tiny.batch(family)
    if "decoder_input_ids" in batch:
        batch["decoder_attention_mask"] = np.arange(7)[None] < np.array([[7], [2], [5]])
    want = loop_over_tokens(model, batch, monkeypatch)
    monkeypatch.setattr(sample, "OWN_POSITIONS", own)
    chosen = [site for site in fj.sites(model) if site.mlp.stack]
    source = Calibrator(model, chosen, [batch], sequential=False, key=KEY).capture()
    assert {site.path for site in chosen} == want.keys()
    for site in chosen:
        subs, routing = site.mlp.sub_mlps(), source.routing(site)
        means, counts = want[site.path]
        scores = {
            score: np.asarray(fj.DropExperts(score=score).scores(subs, routing))
            for score in ExpertScore.__args__
        }
        np.testing.assert_allclose(scores["reap"], means, rtol=1e-4)
        np.testing.assert_allclose(scores["total"], means * counts, rtol=1e-4)
        np.testing.assert_array_equal(scores["frequency"], counts)
        norms = [np.linalg.norm(np.asarray(x, np.float64), axis=-1) for x in (subs.up, subs.down)]
        if subs.gate is not None:
            norms[0] = np.hypot(norms[0], np.linalg.norm(np.asarray(subs.gate), axis=-1))
        np.testing.assert_allclose(scores["magnitude"], (norms[0] * norms[1]).sum(1), rtol=1e-5)


def with_rows_deleted(folder, family, report, new):
    """Writes a checkpoint whose routers and experts lack what was dropped, tensor by tensor."""
    router, experts, field = ROUTERS[family]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    made = {}
    for row in report.rows:
        stack, number = row.site.split(".layers.") if "dec" in row.site or "enc" in row.site else (
            "model", row.site.removeprefix("layers.")
        )  # fmt: skip
        number = int(number.split(".")[0])
        start = f"model.layers.{number}." if stack == "model" else f"{stack}.block.{number}."
        for name in [n for n in tensors if n.startswith(start)]:
            if router in name:
                made[name] = tensors.pop(name)[row.experts]
            elif experts in name:
                value, old = tensors.pop(name), name.split(f"{experts}.")[1].split(".")[0]
                e = int(old.removeprefix("expert_"))
                if e in row.experts:
                    fresh = old.replace(str(e), str(row.experts.index(e)))
                    made[name.replace(f"{experts}.{old}", f"{experts}.{fresh}")] = value
    assert made
    config = json.loads((folder / "config.json").read_text())
    return tiny.write_folder(new, {**config, field: len(report.rows[0].experts)}, tensors | made)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """Returns a model with three of four experts, its report, and the same made by hand."""

    def make(family):
        root = tmp_path_factory.mktemp("dropped")
        folder = folder_of(family, root / "model")
        model = load(folder, family)
        method = fj.DropExperts(keep=3)
        smaller, report = fj.compress(model, method, key=KEY, calibration=[tiny.batch(family)])
        return smaller, report, with_rows_deleted(folder, family, report, root / "by-hand")

    return make


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("family", ROUTERS)
def test_equals_a_checkpoint_whose_rows_are_deleted(family, dropped, tmp_path):
    smaller, report, by_hand = dropped(family)
    assert all(len(row.experts) == 3 for row in report.rows)
    assert len({tuple(row.experts) for row in report.rows} - {(0, 1, 2)}) > 0
    again = load(by_hand, family)
    assert bit_equal(smaller, again) and smaller.config == again.config
    np.testing.assert_array_equal(logits(smaller, family), logits(again, family))
    # Saved and exported, it is the same model.
    artefact = fj.save(smaller, tmp_path / "artefact", report=report)
    for other in (fj.load(artefact), load(fj.export_hf(smaller, tmp_path / "hf"), family)):
        assert bit_equal(smaller, other) and smaller.config == other.config
    history = fj.load(artefact).provenance.history
    kept = {row.site: row.experts for row in report.rows}
    assert json.loads(history[0])["experts"] == kept
    saved = json.loads((artefact / "report.json").read_text())
    assert fj.Report.from_json(saved) == report
    assert "experts" in str(report)


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize("family", ROUTERS)
def test_equals_hugging_face(family, dropped, tmp_path):
    import torch

    smaller, _, by_hand = dropped(family)
    head = dict(tiny.GENERATIVE)[family]
    batch = {name: torch.from_numpy(np.ascontiguousarray(x)).long() for name, x in
             tiny.batch(family).items()}  # fmt: skip
    real = tiny.batch(family)["attention_mask"] > 0 if family != "switch" else np.ones((3, 7), bool)
    for folder in (by_hand, fj.export_hf(smaller, tmp_path / "hf")):
        theirs = tiny.hugging_face(folder, family, head)
        with torch.no_grad():
            want = theirs(**batch).logits.numpy()
        np.testing.assert_allclose(logits(smaller, family)[real], want[real], atol=2e-4)


def test_a_router_with_a_bias_loses_its_entries():
    """The softmax runs over the experts that stay."""
    make = partial(fj.GatedMlp, 6, 5, 6, act="silu", use_bias=False)
    moe = Moe(
        make, 6, 8, top_k=2, normalized=False, rule=RouterRule(bias=True), param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0),
    )  # fmt: skip
    moe.router.bias[...] = jax.random.normal(KEY, (8,))
    members = [1, 4, 7]
    fewer, x = moe.with_experts(members), jax.random.normal(KEY, (2, 9, 6))
    scores = np.asarray(x) @ np.asarray(moe.router.kernel[...]) + np.asarray(moe.router.bias[...])
    shares = np.exp(scores[..., members])
    shares /= shares.sum(-1, keepdims=True)
    shares[np.arange(2)[:, None], np.arange(9), shares.argmin(-1)] = 0
    outputs = np.asarray(moe.experts(jnp.broadcast_to(x.reshape(1, -1, 6), (8, 18, 6))))[members]
    want = np.einsum("end,ne->nd", outputs, shares.reshape(-1, 3)).reshape(2, 9, 6)
    np.testing.assert_allclose(fewer(x, None)[0], want, atol=1e-5)
    assert moe.router.out_features == 8 and moe.experts.stack == (8,)


def test_experts_whose_inputs_are_weighted_are_calibrated_on_these(tmp_path, monkeypatch):
    """In Llama 4 the weights of the router multiply what the experts see, not what they return."""
    model, batch = load(folder_of("llama4", tmp_path / "m"), "llama4"), tiny.batch("llama4")
    seen, call = [], Moe.__call__
    monkeypatch.setattr(Moe, "__call__", lambda moe, *a: seen.append(a[0]) or call(moe, *a))
    model(**batch)
    monkeypatch.undo()
    (path, moe), (x,) = *mixtures(model).items(), seen
    x = np.asarray(x)[batch["attention_mask"].astype(bool)]
    scores = 1 / (1 + np.exp(-x @ np.asarray(moe.router.kernel[...])))
    chosen = np.argsort(-scores, axis=1)[:, : moe.top_k]
    site = next(site for site in fj.sites(model) if site.path == path)
    monkeypatch.setattr(sample, "OWN_POSITIONS", 0)
    source = Calibrator(model, [site], [batch], sequential=False, key=KEY).capture()
    sizes = np.asarray(source.routing(site).sizes)
    for e, got in enumerate(np.asarray(source.of(site).inputs)):
        own = (chosen == e).any(1)
        want = x[own] * scores[own, e, None]
        got = got[: len(want)]
        order = [a[np.lexsort(a.T.round(5))] for a in (got, want)]
        np.testing.assert_allclose(*order, atol=1e-5)
        outputs = moe.experts(jnp.broadcast_to(jnp.asarray(want), (4, *want.shape)))[e]
        np.testing.assert_allclose(sizes[e], np.linalg.norm(outputs, axis=1).mean(), rtol=1e-4)


def test_groups_of_experts_keep_one_size(tmp_path):
    """DeepSeek's router chooses groups first, so that each keeps as many of its experts."""
    fields = {"n_group": 2, "topk_group": 1}
    model = fj.load(folder_of("deepseek_v3", tmp_path / "m", **fields), head="causal-lm")
    fewer, _ = fj.compress(model, fj.DropExperts(keep=4, score="magnitude"), key=KEY)
    for before, after in zip(mixtures(model).values(), mixtures(fewer).values(), strict=True):
        subs = before.experts.sub_mlps()
        scores = np.asarray(fj.DropExperts(score="magnitude").scores(subs, None)).reshape(2, 4)
        kept = np.sort(np.argsort(-scores, axis=1)[:, :2], axis=1) + np.array([[0], [4]])
        kept = kept.reshape(-1)
        np.testing.assert_array_equal(after.correction[...], before.correction[...][kept])
        np.testing.assert_array_equal(after.router.kernel[...], before.router.kernel[...][:, kept])
        np.testing.assert_array_equal(after.experts.sub_mlps().up, subs.up[kept])
    with pytest.raises(fj.InputError, match="would keep 5 experts: 5 experts are not 2 groups"):
        fj.compress(model, fj.DropExperts(keep=5, score="magnitude"), key=KEY)


def test_all_experts_are_the_same_model(mixtral):
    batch = tiny.batch("mixtral")
    same, report = fj.compress(mixtral, fj.DropExperts(keep=1.0), key=KEY, calibration=[batch])
    assert bit_equal(mixtral, same) and same.config == mixtral.config
    assert report.before == report.after
    assert [row.facts["kept_score"] for row in report.rows] == pytest.approx([1.0] * 3)


def test_other_mlps_stay_and_may_have_their_own_method(models):
    """Qwen2-MoE has dense layers and a shared expert beside its experts."""
    model, drop = models["qwen2-moe"], fj.DropExperts(keep=2, score="magnitude")
    fewer, report = fj.compress(model, drop, key=KEY)
    assert [row.site for row in report.rows] == ["layers.1.mlp.experts"]
    assert fewer.layers[1].mlp.experts.stack == (2,)
    assert compressed(fewer, model) == ("layers.1.mlp.experts.",)  # what `fj.tune` trains
    assert bit_equal(fewer.layers[1].mlp.shared, model.layers[1].mlp.shared)
    assert bit_equal(fewer.layers[0], model.layers[0])
    plan = {site.path: fj.Prune(width=8) for site in fj.sites(model)}
    both, _ = fj.compress(model, {**plan, "layers.1.mlp.experts": drop}, key=KEY)
    assert [site.mlp.width for site in fj.sites(both)] == [8, 16, 8, 8, 8]
    assert both.layers[1].mlp.router.out_features == 2


def test_experts_that_are_fused_are_dropped_too(mixtral, tmp_path):
    batch = [tiny.batch("mixtral")]
    fused, _ = fj.compress(mixtral, fj.Fusion(width=6), key=KEY)
    fewer, report = fj.compress(fused, fj.DropExperts(keep=2), key=KEY, calibration=batch)
    for site, row in zip(fj.sites(fewer), report.rows, strict=True):
        want = jax.tree.map(lambda x, r=row: x[jnp.array(r.experts)], fused)
        old = next(s.mlp for s in fj.sites(want) if s.path == site.path)
        assert bit_equal(site.mlp, old)
    again = fj.load(fj.save(fewer, tmp_path / "a"))
    assert bit_equal(fewer, again)
    np.testing.assert_array_equal(logits(fewer, "mixtral"), logits(again, "mixtral"))


@pytest.mark.full
def test_masks_of_what_stays_refer_to_the_dense_model(mixtral, tmp_path):
    fewer, _ = fj.compress(mixtral, fj.DropExperts(score="magnitude"), key=KEY)
    masked, _ = fj.compress(fewer, fj.MaskPrune(keep=0.5), key=KEY)
    again = fj.load(fj.save_masks(masked, tmp_path / "masks"))
    assert bit_equal(masked, again) and again.config.num_experts == 2


def test_a_budget_is_a_number_of_experts(mixtral):
    method = fj.DropExperts(score="magnitude")
    for share, count in ((0.5, 2), (0.74, 2), (0.75, 3)):
        fewer, report = fj.compress(mixtral, method, key=KEY, budget=share)
        assert fewer.config.num_experts == count
        assert report.method["keep"] == count
    with pytest.raises(fj.InputError, match=r"a budget of 0\.1 leaves none of 4 experts"):
        fj.compress(mixtral, method, key=KEY, budget=0.1)


WITHOUT_TEXT = {"score": "magnitude"}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ({}, {}, "score 'reap' needs calibration: texts, or 'random'"),
        (WITHOUT_TEXT, {"calibration": "random"}, "score 'magnitude' takes no calibration"),
        ({"keep": 5, **WITHOUT_TEXT}, {}, "keep 5 is above the number of experts, 4"),
        ({"keep": 0.25, **WITHOUT_TEXT}, {}, "each position to 2 experts, so that at least 2 must "
         "stay; DropExperts would keep 1 of 4"),
        (WITHOUT_TEXT, {"layers": [0, 2]}, "layers.1.mlp.experts: experts are dropped in all"),
        ({}, {"calibration": {f"layers.{i}.mlp.experts": np.ones((4, 5, 16), np.float32) for i in
         range(3)}}, "score 'reap' needs calibration text or tokens"),
    ],
)  # fmt: skip
def test_bad_arguments(method, options, message, mixtral):
    with pytest.raises(fj.InputError, match=message):
        fj.compress(mixtral, fj.DropExperts(**method), key=KEY, **options)


def test_what_has_no_mixtures_is_told_so(models, tmp_path):
    drop = fj.DropExperts(score="magnitude")
    mlp = fj.Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
    with pytest.raises(fj.InputError, match="for mixtures of experts with a router, and Mlp has"):
        fj.compress(mlp, drop, key=KEY)
    with pytest.raises(fj.InputError, match=r"layers\.0\.mlp: DropExperts is for the experts"):
        fj.compress(models["qwen2-moe"], drop, key=KEY, layers=".*")
    many = fj.experts(partial(fj.Mlp, 4, 8, act="relu"), 3, rngs=nnx.Rngs(0))
    with pytest.raises(fj.InputError, match="the model: DropExperts is for experts with a router"):
        fj.compress(many, drop, key=KEY, layers=0)
    for subs, message in ((many.sub_mlps(), "only for the sites"), (mlp.sub_mlps(), "mixture")):
        with pytest.raises(fj.InputError, match=message):
            fj.compress_mlp(subs, drop, key=KEY)
    folder = folder_of("mixtral", tmp_path / "m")
    with pytest.raises(fj.InputError, match="DropExperts needs the whole model in memory"):
        fj.compress_files(folder, tmp_path / "out", drop, key=KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_methods_by_site_agree(models, mixtral):
    paths = [site.path for site in fj.sites(mixtral)]
    plan = dict.fromkeys(paths, fj.DropExperts(keep=2, score="magnitude"))
    plan[paths[1]] = fj.DropExperts(keep=3, score="magnitude")
    with pytest.raises(fj.InputError, match=r"keep 2 experts and layers\.1\.mlp\.experts 3; a"):
        fj.compress(mixtral, plan, key=KEY)
    del plan[paths[1]]
    with pytest.raises(fj.InputError, match=r"layers\.1\.mlp\.experts: experts are dropped in all"):
        fj.compress(mixtral, plan, key=KEY)
    qwen, batch = models["qwen2-moe"], [tiny.batch("qwen2-moe")]
    plan = {"layers.0.mlp": fj.Fusion(), "layers.1.mlp.experts": fj.DropExperts()}
    with pytest.raises(fj.InputError, match="drop them first, then compress the result with"):
        fj.compress(qwen, plan, key=KEY, calibration=batch)


def test_use_is_counted_on_text_alone(mixtral, monkeypatch):
    """Fits get random tokens besides; they would say nothing of how text is routed."""
    monkeypatch.setattr(sources, "_tokenizer", lambda model: None)
    monkeypatch.setattr(sources, "batches", lambda *_, **__: [tiny.batch("mixtral")])
    monkeypatch.setattr(sources, "scrambled", lambda *_: pytest.fail("random tokens"))
    _, report = fj.compress(mixtral, fj.DropExperts(), key=KEY, calibration=["a text"])
    assert (
        report.calibration == f"{tiny.batch('mixtral')['attention_mask'].sum()} positions of text"
    )


def test_options_are_checked():
    for options, message in (
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": 1.5}, r"must be in \(0, 1\]"),
        ({"score": "repa"}, "did you mean 'reap'"),
        ({"keeps": 2}, "no option 'keeps'; did you mean 'keep'"),
    ):
        with pytest.raises(fj.InputError, match=message), unchecked():
            fj.DropExperts(**options)


def test_the_command(tmp_path, capsys):
    folder, out = str(folder_of("mixtral", tmp_path / "m")), str(tmp_path / "out")
    method = ["drop-experts", "--keep", "2", "--score", "magnitude"]
    assert main(["compress", folder, out, *method]) == 0
    assert "kept_score" in capsys.readouterr().out
    assert fj.load(out).config.num_experts == 2
    assert main(["export", out, str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_local_experts"] == 2
    assert main(["compress", folder, str(tmp_path / "b"), *method, "--stream"]) == 1
    assert "without --stream" in capsys.readouterr().err


@pytest.mark.full
def test_training_resumes(mixtral, tmp_path):
    fewer, _ = fj.compress(mixtral, fj.DropExperts(score="magnitude"), key=KEY)
    fewer = fj.load(fj.save(fewer, tmp_path / "a"))
    data = fj.PlainText(np.tile(np.arange(5, 20, dtype=np.int32), 20), context=8)
    config = fj.TrainConfig(
        max_steps=4, epochs=9, batch_size=4, dropout=False, router_balance=0.01, checkpoint_every=2
    )
    whole = fj.finetune(fewer, data, config, key=KEY)
    stop = dataclasses.replace(config, max_steps=2)
    more = dataclasses.replace(config, resume_with=("max_steps",))
    for each in (stop, more):
        resumed = fj.finetune(fewer, data, each, key=KEY, folder=tmp_path / "run")
    assert resumed.step == whole.step == 4
    assert resumed.model.config.num_experts == 2
    best = fj.load(tmp_path / "run" / "last")
    assert bit_equal(best, resumed.model)


REFITTED = [s for s in UnitScore.__args__ if s not in (*ON_GRADIENTS, *ON_UPSTREAM)]


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("score", [*REFITTED, "member"])
def test_each_expert_is_refitted_at_its_own_positions(score, mixtral, monkeypatch):
    """Each comes nearer to what it said there, and is what it would be alone."""
    monkeypatch.setattr(sample, "OWN_POSITIONS", 0)
    ids = np.random.default_rng(0).integers(3, 61, (8, 32), np.int32)
    text = [{"input_ids": ids}]
    seen = fj.calibrate(mixtral, text, key=KEY, layers=0)
    (inputs,), experts = map(jnp.asarray, seen.values()), fj.sites(mixtral)[0].mlp
    own = np.asarray((inputs != 0).any(-1))
    assert own.sum(1).min() > 24

    def method(refit):
        if score == "member":
            return fj.Fusion(width=12, represent="member", refit=refit, match=False)
        return fj.Prune(width=12, score=score, refit=refit)

    def narrowed(refit):
        made = method(refit)
        given = {"calibration": seen} if made.takes_calibration else {}
        smaller, _ = fj.compress(mixtral, made, key=KEY, layers=0, **given)
        return fj.sites(smaller)[0].mlp.plain()

    def errors(smaller):
        lost = np.asarray(experts(inputs) - smaller(inputs))
        return (np.square(lost).sum(-1) * own).sum(1)

    refitted = narrowed(True)
    assert (errors(refitted) < 0.9 * errors(narrowed(False))).all()
    one = fj.GatedMlp(16, 24, act="silu", use_bias=False, rngs=nnx.Rngs(0))
    for e in range(4):
        one.load_sub_mlps(jax.tree.map(lambda a, e=e: a[e], experts.sub_mlps()), None)
        rows = inputs[e][own[e]]
        alone, _ = fj.compress(one, method(True), key=KEY, calibration={"": rows})
        want = alone(rows)
        got = jax.tree.map(lambda a, e=e: a[e], refitted)(rows)
        np.testing.assert_allclose(got, want, atol=2e-3 * float(jnp.abs(want).max()))
