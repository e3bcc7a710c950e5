"""Methods on experts, and methods one after another: saved, loaded, trained and exported."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.training import lightweight, lottery
from tests import glue, tiny
from tests.helpers import PRUNING_CONFIG as CONFIG
from tests.helpers import flat, method, methods, moved, run, with_words

MIXTURES = {"mixtral": r"layers\.0\..*", "switch": r"encoder\..*experts"}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    def made(family):
        head = dict(tiny.GENERATIVE)[family]
        return fj.load(
            tiny.checkpoint(tmp_path_factory.mktemp("mixture") / family, family, head), head=head
        )

    return {family: made(family) for family in MIXTURES}


def on_rows(mlp, rows=5):
    """Returns the outputs of experts at a few rows each."""
    x = jax.random.normal(jax.random.key(1), (*mlp.stack, rows, mlp.d_in), jnp.float32)
    return np.asarray(mlp(x))


@pytest.mark.full(quick=3)
@methods
@pytest.mark.parametrize("family", MIXTURES)
def test_every_method_takes_experts(name, family, mixtures, key, tmp_path):
    model = mixtures[family]
    layers = MIXTURES[family]
    smaller, report = fj.compress(model, method(name), layers=layers, key=key, budget=0.5)
    (row,) = report.rows
    place = [site.path for site in fj.sites(model)].index(row.site)
    before, after = (fj.sites(m)[place].mlp for m in (model, smaller))
    assert after.stack == before.stack != ()
    again = fj.load(fj.save(smaller, tmp_path / "artefact", report=report))
    assert bit_equal(smaller, again)
    head = dict(tiny.GENERATIVE)[family]
    exported = fj.load(fj.export_hf(smaller, tmp_path / "hf"), head=head)
    dense = fj.sites(exported)[place].mlp
    assert type(dense) is type(before)
    want = on_rows(after)
    assert np.abs(want - on_rows(before)).max() > 1e-3
    np.testing.assert_allclose(on_rows(dense), want, atol=1e-4)
    for path, (_, x) in flat(exported).items():
        if not path.startswith(row.site):
            np.testing.assert_array_equal(x, flat(model)[path][1], err_msg=path)


def test_lottery_tickets_of_experts(mixtures):
    model, layers = mixtures["mixtral"], MIXTURES["mixtral"]
    ticket = lottery(model, lambda m, folder: m, keep=0.25, rounds=2, layers=layers).model
    (site,) = (s for s in fj.sites(ticket) if s.path == "layers.0.mlp.experts")
    masks = [np.asarray(layer.mask[...]) for layer in site.mlp.linears().values()]
    assert sum(mask.sum() for mask in masks) == sum(mask.size for mask in masks) // 4
    weights = [np.abs(np.asarray(layer.kernel[...])) for layer in site.mlp.linears().values()]
    kept, gone = (np.concatenate([w[m == on] for w, m in zip(weights, masks, strict=True)])
                  for on in (True, False))  # fmt: skip
    assert kept.min() >= gone.max()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return with_words(folder / "bert"), glue.sst2(folder / "SST-2")


@pytest.fixture(scope="module")
def data(places):
    return fj.load_task("sst2", places[1])


@pytest.fixture(scope="module")
def fused(places, tmp_path_factory):
    """A fused model with label words, loaded from where it was saved."""
    model = fj.load(places[0], head="classification", label_words=("w3", "w50"))
    smaller, _ = fj.compress(model, fj.Fusion(width=16), key=jax.random.key(0))
    return fj.load(fj.save(smaller, tmp_path_factory.mktemp("fused") / "artefact"))


@partial(jax.jit)
def logits(model):
    return run(model, **tiny.batch("bert")).logits


@pytest.mark.full
def test_a_fused_model_is_pruned_statically(fused, data, key, tmp_path):
    smp = fj.StaticPruning(keep=0.5, allocation="L", ramp=6)
    folder = tmp_path / "run"
    fit = fj.static_prune(fused, data, CONFIG, smp, key=key, folder=folder, progress=False)
    masked = find_forms(fit.model)
    rows = [path for path in masked if ".mlp." in path]
    assert rows and all(tuple(masked[p].kernel.shape) in {(32, 16), (16, 32)} for p in rows)
    for path in rows:
        mask, kernel = np.asarray(masked[path].mask[...]), np.asarray(masked[path].kernel[...])
        assert abs(mask.mean() - 0.5) <= 1 / mask.size
        name = f"{path}.kernel"
        np.testing.assert_array_equal(kernel, np.where(mask, flat(fused)[name][1], 0))
    again = fj.load(folder / "last")
    assert bit_equal(fit.model, again)
    # One bit per weight: the file refers to the fused model, which was saved before.
    stored = safetensors.numpy.load_file(folder / "last" / "model.safetensors")
    assert all(name.endswith(".mask") for name in stored)
    bits = sum(form.mask[...].size for form in masked.values())
    assert sum(x.nbytes for x in stored.values()) == bits / 8
    exported = fj.load(fj.export_hf(again, tmp_path / "hf"), head="classification")
    np.testing.assert_allclose(logits(exported), logits(fit.model), atol=1e-4)


@pytest.mark.full
def test_a_fused_model_is_tuned_lightly(fused, data, key, tmp_path):
    chained, _ = fj.compress(fused, fj.MPO(bond=None, cores=3), key=key)
    np.testing.assert_allclose(logits(chained), logits(fused), atol=1e-4)
    light = lightweight(chained)
    config = dataclasses.replace(CONFIG, max_steps=2, learning_rate=1e-3)
    fit = fj.finetune(light, data, config, key=key, folder=tmp_path / "run", progress=False)
    changed = moved(light, fit.model)
    frozen = {f"{path}.cores.{form.frozen[0]}" for path, form in find_forms(light).items()}
    cores = {path for path in changed if ".cores." in path}
    assert len(frozen) == 4 and len(cores) == 8 and not cores & frozen
    assert not any("sizes" in path for path in changed)
    again = fj.load(tmp_path / "run" / "last")
    assert bit_equal(fit.model, again)
    exported = fj.load(fj.export_hf(again, tmp_path / "hf"), head="classification")
    assert not find_forms(exported)
    np.testing.assert_allclose(logits(exported), logits(fit.model), atol=1e-4)
