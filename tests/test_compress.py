"""compress: choice of sites, guarantees, reports, and the conformance of every method."""

import functools
import gc
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.checkpoint import load
from fusion_jax.cli.demo import bit_equal
from fusion_jax.compression import mlps
from fusion_jax.compression.batching import Problems, batch_size, working_bytes
from fusion_jax.methods.registry import METHODS, method_from_json
from fusion_jax.nn.programs import KEPT, RENEWED, few_programs
from fusion_jax.nn.site import select_sites
from tests import tiny
from tests.helpers import OPTIONS, inputs, make, method, methods, unchecked

PATHS = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.checkpoint(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture(scope="module")
def compressed(model):
    """Compresses two of three layers by a method, once for all tests of it."""
    return functools.cache(
        lambda name: fj.compress(model, method(name), layers=[0, 2], key=jax.random.key(0))
    )


def output(model):
    return model(**tiny.batch("bert")).last_hidden_state


def test_every_method_is_in_the_suite():
    assert OPTIONS.keys() == METHODS.keys()


@pytest.mark.full(quick=2)
@methods
def test_original_is_not_changed(name, model, key):
    before = jax.tree.map(jnp.copy, nnx.clone(model))
    smaller, _ = fj.compress(model, method(name), key=key)
    assert bit_equal(before, model)
    assert [s.mlp.width for s in fj.sites(model)] == [48] * 3
    assert not np.allclose(output(model), output(smaller))


@methods
def test_artefact_loads_back_equal(name, compressed, tmp_path):
    smaller, report = compressed(name)
    again = fj.load(fj.save(smaller, tmp_path / "a", report=report))
    assert bit_equal(smaller, again)
    assert (output(smaller) == output(again)).all()
    assert again.provenance.history == smaller.provenance.history
    assert json.loads((tmp_path / "a/report.json").read_text()) == report.to_json()


@methods
def test_export_gives_the_same_outputs(name, compressed, tmp_path):
    smaller, _ = compressed(name)
    exported = fj.load(fj.export_hf(smaller, tmp_path / "hf"))
    assert {type(site.mlp) for site in fj.sites(exported)} == {fj.Mlp}
    np.testing.assert_allclose(output(exported), output(smaller), atol=1e-4)


def test_arrays_of_numpy_are_taken(key):
    subs, x = make(fj.Mlp).sub_mlps(), np.random.default_rng(0).normal(size=(40, 5))
    given = jax.tree.map(np.asarray, subs), x.astype(np.float32)
    solve = functools.partial(fj.compress_mlp, method=fj.Fusion(width=12), key=key, act="gelu")
    with unchecked():
        first = solve(given[0], calibration=given[1])
    second = solve(subs, calibration=jnp.asarray(given[1]))
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)
    given[1][3, 2] = np.nan
    with unchecked(), pytest.raises(fj.InputError, match="NaN"):
        solve(given[0], calibration=given[1])


@pytest.mark.full
@methods
@pytest.mark.parametrize("kind", [fj.Mlp, fj.GatedMlp])
def test_stack_equals_loop(name, kind, key):
    mlps = [make(kind, width=32, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(m.sub_mlps() for m in mlps))
    together = fj.compress_mlp(stacked, method(name), key=key)
    keys = jax.random.split(key, 3)
    solve = jax.jit(lambda s, k: method(name).solve(s, key=k))
    vmapped = jax.jit(jax.vmap(solve))(stacked, keys)
    for i, mlp in enumerate(mlps):
        alone = solve(mlp.sub_mlps(), keys[i])
        for a, b, c in zip(*map(jax.tree.leaves, (alone, together, vmapped)), strict=True):
            np.testing.assert_allclose(a, b[i], atol=1e-5)
            np.testing.assert_allclose(a, c[i], atol=1e-5)


@methods
@pytest.mark.full(quick=3)
def test_jit_equals_eager(name, key):
    subs = make(fj.Mlp).sub_mlps()
    eager = method(name).solve(subs, key=key)
    jitted = jax.jit(lambda s, k: method(name).solve(s, key=k))(subs, key)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.full(quick=2)
@methods
@pytest.mark.parametrize(("kind", "bias"), [(fj.Mlp, True), (fj.GatedMlp, False)])
def test_bfloat16_keeps_its_dtype(name, kind, bias, key):
    mlp = make(kind, dtype=jnp.bfloat16, bias=bias)
    smaller, _ = fj.compress(mlp, method(name), key=key)
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(smaller, nnx.Param))} == {"bfloat16"}
    assert smaller(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


@methods
def test_json_reads_back(name):
    fields = json.loads(json.dumps(method(name).to_json()))
    assert method_from_json(fields) == method(name)


@methods
def test_unknown_option_names_the_nearest(name):
    option = next(iter(OPTIONS[name]))
    with pytest.raises(fj.InputError, match=rf"no option '{option}s'; did you mean '{option}'\?"):
        METHODS[name](**{f"{option}s": 3})
    with pytest.raises(fj.InputError, match="did you mean"):
        method_from_json({"method": name + "x"})


@methods
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_weights_name_the_site(name, value, model, key):
    broken = nnx.clone(model)
    kernel = broken.layers[1].mlp.down.kernel
    kernel.set_value(kernel[...].at[3, 4].set(value))
    with pytest.raises(fj.InputError, match=r"NaN or infinite weights in layers\.1\.mlp$"):
        fj.compress(broken, method(name), key=key)
    with pytest.raises(fj.InputError, match="NaN or infinite"):
        fj.compress_mlp(broken.layers[1].mlp.sub_mlps(), method(name), key=key)
    # Only the chosen sites count.
    fj.compress(broken, method(name), layers=0, key=key)


@pytest.mark.parametrize("name", [name for name in METHODS if "width" in OPTIONS[name]])
@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0, r"width must be at least 1; got 0"),
        (49, r"layers\.0\.mlp: width 49 is above the MLP's own, 48"),
        (0.0, r"must be in \(0, 1\]"),
        (1.5, r"must be in \(0, 1\]"),
        (-0.5, r"must be in \(0, 1\]"),
        (True, "must be an int or a fraction"),
    ],
)
def test_bad_width(name, width, message, model, key):
    with pytest.raises(fj.InputError, match=message):
        fj.compress(model, METHODS[name](width=width), key=key)


@pytest.mark.full(quick=2)
@methods
@pytest.mark.parametrize("kind", [fj.Mlp, fj.GatedMlp])
def test_budget(name, kind, key):
    mlp = kind(24, 32, act="gelu", rngs=nnx.Rngs(0))
    subs = jax.eval_shape(mlp.sub_mlps)
    total = sum(x.size for x in jax.tree.leaves(subs))
    for share in (0.5, 0.25):
        smaller, _ = fj.compress(mlp, method(name), key=key, budget=share)
        arrays = nnx.to_flat_state(nnx.state(smaller))
        kept = sum(
            np.count_nonzero(v.get_value()) for path, v in arrays if isinstance(v, nnx.Param)
        ) - np.count_nonzero(smaller.out_bias())
        # One more unit, rank or bond would be too many; in a small matrix, a bond is large.
        assert (0.45 if name == "mpo" else 0.8) * share * total < kept <= share * total
    for share, message in ((0.0, r"must be in \(0, 1\]"), (0.001, "budget|share")):
        with pytest.raises(fj.InputError, match=message):
            fj.compress(mlp, method(name), key=key, budget=share)


@methods
def test_sites_do_not_depend_on_each_other(name, model, key):
    alone, _ = fj.compress(model, method(name), layers=2, key=key)
    together, _ = fj.compress(model, method(name), key=key)
    assert bit_equal(alone.layers[2].mlp, together.layers[2].mlp)


@methods
@pytest.mark.full(quick=3)
def test_sharded_equals_unsharded(name, key):
    subs = jax.tree.map(
        lambda *x: jnp.stack(x), *(make(fj.Mlp, width=32, seed=s).sub_mlps() for s in range(8))
    )
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    sharded = jax.device_put(subs, sharding)
    a = fj.compress_mlp(subs, method(name), key=key)
    b = fj.compress_mlp(sharded, method(name), key=key)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "an accelerator"])
@pytest.mark.full
def test_sites_that_go_together(backend, key, monkeypatch):
    """MLPs of one shape with the same number of positions: two calls for three MLPs."""
    model = nnx.List([make(fj.Mlp, width=16, seed=seed) for seed in range(3)])
    d = model[0].d_in
    seen = {str(i): np.asarray(inputs(d, n)) for i, n in enumerate((20, 30, 20))}
    alone, _ = fj.compress(model, fj.Fusion(width=4), key=key, calibration=seen)
    calls, solve = [], mlps.solve_stacked
    monkeypatch.setattr(
        mlps, "solve_stacked", lambda *a: calls.append(a[2].keys.shape) or solve(*a)
    )
    monkeypatch.setattr(mlps, "_mlps_per_call", lambda: 16)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    together, report = fj.compress(model, fj.Fusion(width=4), key=key, calibration=seen)
    assert calls == [(2,), ()]
    assert [row.site for row in report.rows] == ["0", "2", "1"]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a(inputs(d)), b(inputs(d)), atol=1e-4)


@pytest.mark.parametrize(("room", "shapes"), [(9, [(4,)]), (5, [(2,), (2,)]), (0, [()] * 4)])
def test_no_more_sites_go_together_than_fit(room, shapes, key, monkeypatch):
    """Their weights are copied into the call, and the results need as much."""
    model = nnx.List([make(fj.Mlp, width=16, seed=seed) for seed in range(4)])
    size = sum(x.nbytes for x in jax.tree.leaves(model[0].sub_mlps()))
    calls, solve = [], mlps.solve_stacked
    monkeypatch.setattr(
        mlps, "solve_stacked", lambda *a: calls.append(a[2].keys.shape) or solve(*a)
    )
    monkeypatch.setattr(mlps, "_mlps_per_call", lambda: 16)
    monkeypatch.setattr(mlps, "working_memory", lambda: room * size)
    fj.compress(model, fj.Prune(width=4), key=key)
    assert calls == shapes


@pytest.mark.parametrize(
    ("count", "each", "memory", "size"),
    [
        (8, 10, 1000, 8),  # all fit
        (8, 10, 79, 4),  # 7 and 1 would be two programs
        (7, 10, 45, 4),  # a prime number of them: 4 and 3
        (128, 10, 500, 32),
        (60, 10, 160, 15),
        (3, 10, 5, 1),  # at least one
        (1, 10, 5, 1),
    ],
)
def test_as_many_problems_at_once_as_fit(count, each, memory, size):
    assert batch_size(count, each, memory) == size


def test_working_bytes_grow_with_what_is_needed(key):
    def needed(count=2, width=32, positions=0, **options):
        subs = [make(fj.Mlp, width=width).sub_mlps()] * count
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *subs)
        seen = fj.Calibration(jnp.zeros((count, positions, subs[0].up.shape[1])))
        problems = Problems(stacked, jax.random.split(key, count), seen if positions else None)
        return working_bytes(fj.Fusion(width=4, **options), problems)

    assert needed() == needed(count=5) < needed(width=64)
    assert needed(positions=10) < needed(positions=100)
    assert needed(n_init=30) > 30 * 2 * 4 * 32**2


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        ([0, -1], [0, 2]),
        (range(1, 3), [1, 2]),
        (slice(-2, None), [1, 2]),
        (r"layers\.[01]\.mlp", [0, 1]),
        (lambda site: site.index == 1, [1]),
    ],
)
def test_layers(layers, expected, model, key):
    smaller, report = fj.compress(model, fj.Fusion(width=12), layers=layers, key=key)
    assert [i for i, s in enumerate(fj.sites(smaller)) if s.mlp.width == 12] == expected
    assert [row.site for row in report.rows] == [PATHS[i] for i in expected]


@pytest.mark.parametrize("layers", [r"layers\.1", "mlp", 3, -4, [0, 3], [], lambda site: False])
def test_layers_that_match_nothing_list_the_sites(layers, model, key):
    with pytest.raises(fj.InputError, match=r"0: layers\.0\.mlp, 1: layers\.1\.mlp"):
        fj.compress(model, fj.Fusion(width=12), layers=layers, key=key)


def test_layers_that_are_no_pattern(model, key):
    with pytest.raises(fj.InputError, match="is not a regular expression"):
        fj.compress(model, fj.Fusion(width=12), layers="layers.[", key=key)


def test_model_without_mlps(key):
    with pytest.raises(fj.InputError, match="no MLP"):
        fj.compress(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), fj.Fusion(width=1), key=key)


def test_layers_count_sites_of_the_model_where_methods_are_given_by_site(model, key):
    methods = {path: fj.Fusion(width=12) for path in PATHS[1:]}
    _, report = fj.compress(model, methods, layers=1, key=key)
    assert [row.site for row in report.rows] == PATHS[1:2]
    with pytest.raises(fj.InputError, match="layers 0 matches no site that is given a method"):
        fj.compress(model, methods, layers=0, key=key)


def test_mapping_without_methods(model, key):
    with pytest.raises(fj.InputError, match="no site is given a method"):
        fj.compress(model, {}, key=key)


def test_fused_mlp_is_not_fused_again(model, key):
    smaller, _ = fj.compress(model, fj.Fusion(width=12), layers=0, key=key)
    with pytest.raises(fj.InputError, match=r"layers\.0\.mlp: is a FusedMlp already"):
        fj.compress(smaller, fj.Fusion(width=6), key=key)
    fj.compress(smaller, fj.Fusion(width=6), layers=[1, 2], key=key)


def test_sites_are_in_the_order_of_layers():
    layers = nnx.List([make(fj.Mlp, width=2) for _ in range(12)])
    assert [site.path for site in fj.sites(layers)] == [str(i) for i in range(12)]


def test_a_fraction_is_rounded_up(model, key):
    smaller, _ = fj.compress(model, fj.Fusion(width=0.25, round_to=8), key=key)
    assert {site.mlp.width for site in fj.sites(smaller)} == {16}


@pytest.mark.parametrize("name", [n for n in METHODS if "round_to" in METHODS[n]().to_json()])
def test_a_budget_is_rounded_down(name):
    subs = jax.eval_shape(make(fj.Mlp, width=48).sub_mlps)

    def within(share, round_to):
        return METHODS[name](round_to=round_to).within(subs, share).width

    assert [within(0.5, 8), within(0.49, 8), within(0.99, 32), within(0.5, 1)] == [24, 16, 32, 24]
    assert within(1.0, 32) == 48
    with pytest.raises(fj.InputError, match="none of 48 hidden units in steps of 32"):
        within(0.5, 32)


def test_report_tells_what_changed(model, key):
    smaller, report = fj.compress(model, fj.Fusion(width=12), layers=[1, 2], key=key)
    lost = 2 * (48 - 12) * (32 + 1 + 32)
    assert report.before.params - report.after.params == lost
    assert report.after.params == sum(
        x.size for x in jax.tree.leaves(nnx.state(smaller, nnx.Param))
    )
    assert report.before.mlp_flops == 3 * 2 * 48 * 64
    assert report.after.mlp_flops == 2 * 48 * 64 + 2 * 2 * 12 * 64
    for row in report.rows:
        assert (row.width_before, row.width_after) == (48, 12)
        assert 0 < row.facts["inertia"] < 1
        assert 0 <= row.facts["singletons"] < 12 and 4 <= row.facts["largest"] <= 37
        assert row.facts["converged"] is True
    text = str(report)
    for word in ("layers.1.mlp", "48 -> 12", "inertia", "steps", "MLP parameters", "seconds"):
        assert word in text
    json.dumps(report.to_json())


def test_progress_in_plain_lines(model, key, capsys):
    fj.compress(model, fj.Fusion(width=12), key=key, progress=True)
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Compressing: 0/3 compiling (")
    assert last.startswith(f"Compressing: 3/3 {PATHS[-1]} (")
    assert len(between) <= 2  # of sites that take seconds
    fj.compress(model, fj.Fusion(width=12), key=key)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down": jnp.ones((7, 3))}, "down has shape"),
        ({"up_bias": jnp.ones(7)}, "up_bias has shape"),
        ({"gate": jnp.ones((8, 4))}, "gate has shape"),
        ({"gate_bias": jnp.ones(8)}, "gate is not"),
        ({"up": jnp.ones((0, 3))}, "not empty"),
    ],
)
def test_sub_mlps_that_do_not_fit(fields, message, key):
    subs = fj.SubMLPs(**{"up": jnp.ones((8, 3)), "down": jnp.ones((8, 3)), **fields})
    with pytest.raises(fj.InputError, match=message):
        fj.compress_mlp(subs, fj.Fusion(width=2), key=key)


@pytest.mark.full
def test_clustering_is_exact_for_relu_only(key):
    x = inputs()
    for act, exact in (("relu", True), ("gelu", False)):
        mlp = make(fj.Mlp, act=act)
        wide = fj.compress(mlp, fj.Fusion(width=7), key=key)[0].wide_copy()
        clustered, _ = fj.compress(mlp, METHODS["clustering"](width=7), key=key)
        assert np.allclose(clustered(x), wide(x), atol=1e-4) == exact


def test_methods_may_differ_in_what_they_take(key):
    model = nnx.List([make(fj.Mlp, width=16, seed=seed) for seed in range(3)])
    slopes = {
        f"{i}.{name}": x * 0 + 1
        for i in range(3)
        for name, x in (
            (".".join(map(str, path)), v.get_value())
            for path, v in nnx.to_flat_state(nnx.state(model[i]))
        )
    }
    seen = {str(i): np.asarray(inputs(model[0].d_in, 20)) for i in range(3)}
    plan = {"0": fj.Fusion(width=4), "1": fj.Svd(rank=2), "2": fj.Prune(width=4, score="gradient")}
    smaller, _ = fj.compress(model, plan, key=key, calibration=seen, gradients=slopes)
    for i, options in enumerate(({"calibration": seen}, {}, {"gradients": slopes})):
        alone, _ = fj.compress(model, plan[str(i)], layers=i, key=key, **options)
        assert bit_equal(smaller[i], alone[i])
    with pytest.raises(fj.InputError, match="takes no calibration"):
        fj.compress(model, {"0": fj.Svd(rank=2), "1": fj.Prune(width=4)}, key=key, calibration=seen)


def test_keys_of_the_old_kind_and_none(key):
    mlp = make(fj.Mlp, width=16)
    with unchecked():
        old, _ = fj.compress(mlp, fj.Sketch(width=4), key=jax.random.PRNGKey(0))
        assert bit_equal(old, fj.compress(mlp, fj.Sketch(width=4), key=key)[0])
        for wrong in (0, jax.random.split(key)):
            with pytest.raises(fj.InputError, match="one random key"):
                fj.compress(mlp, fj.Sketch(width=4), key=wrong)
        for wrong in ("svd", fj.Svd):
            with pytest.raises(fj.InputError, match="an object such as"):
                fj.compress(mlp, wrong, key=key)
            with pytest.raises(fj.InputError, match="an object such as"):
                fj.compress_matrices(mlp, wrong, matrices="up")
    subs = mlp.sub_mlps()
    slopes = jax.tree.map(lambda x: x[:3], subs)
    with pytest.raises(fj.InputError, match="gradients do not have the shapes"):
        fj.compress_mlp(subs, fj.Prune(score="gradient", width=4), key=key, gradients=slopes)
    assert len(select_sites(fj.sites(nnx.List([mlp, mlp])), np.int64(0))) == 1
    with pytest.raises(fj.InputError, match="no MLP True"):
        select_sites(fj.sites(mlp), True)


MAPS = Path("/proc/self/maps")


@pytest.mark.full
@pytest.mark.skipif(not MAPS.exists(), reason="memory maps are counted on Linux")
def test_programs_of_many_widths_do_not_stay(key, monkeypatch):
    """A process has 65,530 memory maps; each width took hundreds, and XLA crashed at the end."""
    jax.clear_caches()
    gc.collect()
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # lets go of everything now and then
    mlp = make(fj.Mlp, width=32)
    counts = []
    for width in range(2, 2 + KEPT + 8):
        fj.compress(mlp, fj.Prune(width=width), key=key)
        gc.collect()
        counts.append(MAPS.read_bytes().count(b"\n"))
    assert counts[-1] - counts[-8] < 7 * 10
    assert counts[KEPT] - counts[0] > 7 * 10  # they are counted


def test_programs_are_kept_and_let_go(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    times = few_programs(lambda factor: jax.jit(lambda x: factor * x))
    first = weakref.ref(times(0))
    assert times(0) is first() and times(0)(3) == 0
    for factor in range(1, KEPT + 1):
        times(factor)
    gc.collect()
    assert first() is None
    for factor in range(RENEWED):
        times(factor + 99)
    assert len(cleared) in (1, 2)


def test_a_result_that_is_not_finite_is_refused(key):
    """Weights that are finite, whose squares are not."""
    mlp = make(fj.Mlp, width=24)
    seen = jnp.full((9, 5), 1e38)
    with pytest.raises(fj.InputError, match=r"the model: the result holds NaN or infinite numbers"):
        fj.compress(mlp, fj.Fusion(width=12, represent="mean"), key=key, calibration={"": seen})
