"""Certified bounds: never violated, whatever the MLP, the clusters and the inputs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_jax.nn.fused import factors
from ntk.bounds import (
    Pair,
    certify,
    fit_sketch,
    kernel_change,
    output_change,
    pair,
    uniform_bound,
    weight_norms,
)
from ntk.bounds.balls import ball_units
from ntk.bounds.pairs import prepare_pair
from ntk.bounds.stand_ins import stand_ins, stood_in_units
from ntk.errors import InputError
from ntk.mlp import MlpWeights, traced_kernel
from ntk.units import hidden_units
from tests.helpers import unchecked


def make(
    seed, *, act="gelu", p=12, c=5, d=3, o=4, scaling="sgd", gated=False, bias=True, empty=0,
    spread=0.3, offset=0.0, size=1.0, dtype=jnp.float64,
):  # fmt: skip
    """A random MLP near c centres, and its fused version; centroids off the means by ``offset``."""
    rng = np.random.default_rng(seed)
    full = c - empty
    labels = np.concatenate([np.arange(full), rng.integers(0, full, p - full)])
    sizes = np.bincount(labels, minlength=c).clip(1).astype(float)

    def rows(n):
        centres = rng.normal(size=(c, n)) * size
        x = centres[labels] + spread * size * rng.normal(size=(p, n))
        mean = np.zeros((c, n))
        np.add.at(mean, labels, x)
        return x, mean / sizes[:, None] + offset * rng.normal(size=(c, n))

    drawn = {"up": rows(d), "down": rows(o)}
    if bias:
        drawn["up_bias"] = tuple(a[:, 0] for a in rows(1))
    if gated:
        drawn["gate"] = rows(d)
        if bias:
            drawn["gate_bias"] = tuple(a[:, 0] for a in rows(1))
    around = np.exp(rng.normal(size=(3, c)) / 2)
    if scaling != "fitted":
        around = [np.asarray(f) for f in factors(jnp.asarray(sizes), scaling)]
    outer, inner, middle = around
    by = {"down": sizes / outer, "up": 1 / (middle if gated else inner), "gate": 1 / inner}
    fused = {k: (v.T * by[k.removesuffix("_bias")]).T for k, (_, v) in drawn.items()}
    fused |= {"outer": outer, "inner": inner} | ({"middle": middle} if gated else {})
    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    return Pair(
        MlpWeights(**cast({k: v for k, (v, _) in drawn.items()}), act=act, out_bias=bias),
        MlpWeights(**cast(fused), act=act, out_bias=bias),
        jnp.asarray(labels),
    )


def inputs(seed, n, d, scale, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)) * scale, dtype)


SHAPES = [
    # Few, as each is compiled.
    {"act": "gelu"},
    {"act": "relu", "bias": False, "empty": 1},
    {"act": "tanh", "c": 11},
    {"act": "silu", "gated": True},
]


def named(shape):
    return "-".join(map(str, shape.values()))


drawn = given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 10.0]),
    offset=st.sampled_from([0.0, 0.0, 0.1]),
    size=st.sampled_from([0.03, 0.5, 1.0, 5.0]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    scaling=st.sampled_from(["sgd", "adam", "folded", "fitted"]),
)
# Every pair of N inputs, every kernel: 4 shapes x 18 examples x 4 kernels x 36 = 10,368.
many = settings(
    max_examples=18, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
N = 6


def violated(change, measured):
    """Whether a bound is below what is measured, beyond what the measurement may be off by."""
    least = np.abs(np.asarray(measured.mid, np.float64)) - np.asarray(measured.radius, np.float64)
    return bool((least > np.asarray(change.bound, np.float64)).any())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
@many
@drawn
@pytest.mark.full(quick=1)
def test_kernel_bounds_hold(shape, seed, scale, **how):
    site = make(seed, **shape, **how)
    x, g = inputs(seed, N, 3, scale), inputs(seed + 1, N, shape.get("o", 4), 1.0)
    norms = weight_norms(site)
    for kind in ("sgd", "adam"):
        for gx in (None, g):
            change = partial(kernel_change, site, x, gx=gx, kind=kind)
            measured = change(grade="measured")
            data = change(directions=2)
            prior = change(grade="a priori")
            assert not violated(data, measured)
            assert not violated(prior, measured)
            # The interval holds the change, not only its size.
            off = jnp.abs(data.mid - measured.mid)
            assert bool((off <= data.radius + measured.radius).all())
            assert data.spectral >= np.linalg.norm(measured.mid, 2) * (1 - 1e-9) - 1e-9
            if gx is None:
                radius = float(jnp.linalg.norm(x, axis=1).max())
                uniform = uniform_bound(norms, radius, kind=kind)
                assert bool((jnp.abs(measured.mid) - measured.radius <= uniform).all())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
@many
@drawn
@pytest.mark.full(quick=1)
def test_output_bounds_hold(shape, seed, scale, **how):
    site = make(seed, **shape, **how)
    x = inputs(seed, N, 3, scale)
    measured = output_change(site, x, grade="measured")
    slack = (
        1e-12 * (1 + float(jnp.abs(hidden_units(site.original, x).hidden).max())) * how["size"] * 10
    )
    for grade in ("a priori", "data"):
        assert bool((measured <= output_change(site, x, grade=grade) + slack).all())


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES[::2], ids=named)
@settings(many, max_examples=10)
@drawn
def test_bounds_hold_in_float32(shape, seed, scale, **how):
    site = make(seed, **shape, **how, dtype=jnp.float32)
    x = inputs(seed, N, 3, scale, jnp.float32)
    with jax.enable_x64(True):
        double = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, (site, x)
        )
        exact = {k: kernel_change(*double, kind=k, grade="measured") for k in ("sgd", "adam")}
    for kind in ("sgd", "adam"):
        measured = kernel_change(site, x, kind=kind, grade="measured")
        for grade in ("data", "a priori"):
            change = kernel_change(
                site, x, kind=kind, grade=grade, directions=2 if grade == "data" else 64
            )
            assert change.mid.dtype == jnp.float32
            assert not violated(change, measured)
            assert not violated(change, exact[kind])


def test_a_bound_of_an_unchanged_mlp_is_rounding():
    with jax.enable_x64(True):
        site = make(0, act="gelu", p=8, c=8, d=3, o=2, scaling="sgd", spread=0.0)
        x = inputs(1, 5, 3, 1.0)
        size = float(jnp.linalg.norm(traced_kernel(site.original, x)))
        assert kernel_change(site, x).frobenius < 1e-10 * size
        assert uniform_bound(site, 5.0) < 1e-6 * size


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_more_directions_are_tighter_and_end_in_the_measurement():
    site = make(0, act="gelu", p=40, c=10, d=6, o=4, scaling="sgd")
    x = inputs(1, 30, 6, 1.0)
    measured = kernel_change(site, x, grade="measured")
    bounds = [kernel_change(site, x, directions=k).frobenius for k in (0, 4, 16, 40)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(measured.frobenius, rel=1e-6)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_a_sketch_fits_other_inputs():
    site = make(0, act="gelu", p=40, c=10, d=6, o=4, scaling="sgd")
    x = inputs(1, 300, 6, 1.0)
    sketch = fit_sketch(site, x[:280], directions=16)
    measured = kernel_change(site, x[280:], grade="measured")
    change = kernel_change(site, x[280:], sketch=sketch)
    assert not violated(change, measured)
    assert change.frobenius < kernel_change(site, x[280:], directions=0).frobenius


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_the_change_of_outputs_and_of_sgd_kernels_is_of_second_order():
    """Halving the distance of rows from their centroids divides the bounds by four."""
    x = inputs(1, 5, 3, 1.0)
    sites = [
        make(0, act="gelu", p=12, c=4, d=3, o=2, scaling="sgd", spread=s) for s in (2e-3, 1e-3)
    ]
    for bound in (
        lambda s: output_change(s, x).max(),
        lambda s: output_change(s, x, grade="a priori").max(),
        lambda s: kernel_change(s, x, directions=0).bound.max(),
        lambda s: kernel_change(s, x, grade="a priori").bound.max(),
        lambda s: uniform_bound(s, 2.0),
    ):
        assert float(bound(sites[0]) / bound(sites[1])) == pytest.approx(4, rel=0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_balls_hold_the_units(shape):
    site = make(0, **shape)
    x = inputs(1, N, 3, 1.0)
    small = jax.tree.map(lambda a: a.astype(jnp.float32).astype(jnp.float64), (site, x))
    for mlp in (small[0].original, small[0].fused):
        exact = jax.jit(hidden_units)(mlp, small[1])
        single = jax.tree.map(lambda a: a.astype(jnp.float32), (mlp, small[1]))
        hidden, slopes = jax.jit(ball_units)(*single)
        pairs = zip((hidden, *slopes), (exact.hidden, *exact.slopes), strict=True)
        for ball, want in pairs:
            value, error, sign = (a.astype(jnp.float64) for a in ball[:3])
            assert bool((jnp.abs(value - want) <= error).all())
            assert bool(((jnp.sign(want) == sign) | ball.doubtful).all())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_the_smaller_mlp_need_not_be_run(shape):
    """Its units follow from the original's where its rows are means or units, also scaled."""
    means = make(3, **shape, scaling="adam")
    away = make(3, **shape, scaling="adam", offset=0.1)
    sites = [(means, True), (away, False)]
    first = np.unique(np.asarray(means.labels), return_index=True)[1]
    if len(first) == means.fused.width:  # no cluster is empty
        kept = jax.tree.map(lambda a: a[first], means.original)
        fields = ("up", "up_bias") if kept.up_bias is not None else ("up",)
        scaled = {name: 0.7 * getattr(kept, name) for name in fields}
        sites.append((means._replace(fused=replace(kept, **scaled)), True))
    x = inputs(1, N, 3, 1.0)
    for site, follows in sites:
        site, _, _ = prepare_pair(site, x)
        hidden, slopes = jax.jit(stood_in_units)(site, x, stand_ins(site))
        exact = jax.jit(hidden_units)(site.fused, x)
        for ball, want in zip((hidden, *slopes), (exact.hidden, *exact.slopes), strict=True):
            assert bool((jnp.abs(ball.value - want) <= ball.error).all())
            assert bool(((jnp.sign(want) == ball.sign) | ball.doubtful).all())
            if site.original.act != "relu":  # its slopes jump
                assert bool(ball.error.max() < 1e-9) == follows


def exact_kernel(mlp, x, kind):
    """A traced kernel in long doubles, whose exponents reach 1e4932; outer is the only factor."""
    wide = lambda a: np.asarray(a).astype(np.longdouble)  # noqa: E731
    x, v = wide(x), wide(mlp.down)
    z = x @ wide(mlp.up).T + (0 if mlp.up_bias is None else wide(mlp.up_bias))
    h, c = (np.tanh(z), 1 - np.tanh(z) ** 2) if mlp.act == "tanh" else (np.maximum(z, 0), z > 0)
    outer = 1 if mlp.outer is None else wide(mlp.outer)
    h, c = h * outer, c * outer
    second = np.sign if kind == "adam" else lambda a: a
    inner = x @ second(x).T + (mlp.up_bias is not None)
    slopes = (c * (v * second(v)).sum(1)) @ second(c).T
    return v.shape[1] * (h @ second(h).T + int(mlp.out_bias)) + inner * slopes


@pytest.mark.full(quick=4)
@pytest.mark.skipif(np.finfo(np.longdouble).maxexp < 16000, reason="no long doubles here")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("dtype", "shape", "x", "w", "v"),
    [
        (jnp.float32, {"act": "tanh", "bias": False}, 1e-20, 1e20, 1.0),
        (jnp.float32, {"act": "relu", "bias": False}, 1e-12, 1e-12, 1e-12),
        (jnp.float32, {"act": "relu", "bias": False}, 1e15, 1e-15, 1e-25),
        (jnp.float64, {"act": "tanh", "bias": False}, 1e-160, 1e160, 1.0),
        (jnp.float64, {"act": "relu", "bias": False}, 1e-160, 1e-160, 1e-160),
        (jnp.float64, {"act": "tanh"}, 1e-160, 1e160, 1e-160),
    ],
)
def test_bounds_hold_where_squares_under_or_overflow(dtype, shape, x, w, v, kind):
    with jax.enable_x64(dtype == jnp.float64):
        both = make(3, scaling="adam", dtype=dtype, **shape)
        rows = {"up": w, "down": v, "up_bias": 1.0, "outer": 1.0}

        def scaled(mlp):
            parts = {k: getattr(mlp, k) for k in rows}
            sizes = {k: a for k, a in parts.items() if a is not None}
            wide = {k: np.asarray(a, np.float64) * rows[k] for k, a in sizes.items()}
            cast = {k: jnp.asarray(a, dtype) for k, a in wide.items()}
            return MlpWeights(**cast, act=mlp.act, out_bias=mlp.out_bias)

        both = Pair(scaled(both.original), scaled(both.fused), both.labels)
        at = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)) * x, dtype)
        change = exact_kernel(both.original, at, kind) - exact_kernel(both.fused, at, kind)
        for grade in ("a priori", "data", "measured"):
            found = kernel_change(both, at, kind=kind, grade=grade)
            wrong = np.abs(np.asarray(found.mid).astype(np.longdouble) - change)
            assert (wrong <= np.asarray(found.radius).astype(np.longdouble)).all(), grade
        radius = float(np.sqrt(np.square(np.asarray(at).astype(np.longdouble)).sum(1)).max())
        assert uniform_bound(both, radius * (1 + 1e-6), kind=kind) >= np.abs(change).max()
        if shape == {"act": "tanh", "bias": False}:  # all features are of ordinary size
            assert float(found.bound.max()) <= 2 * np.abs(change).max()


def test_a_uniform_bound_with_output_weights_of_zero():
    both = make(0, dtype=jnp.float32)
    none = lambda mlp: replace(mlp, down=jnp.zeros_like(mlp.down))  # noqa: E731
    both = Pair(none(both.original), none(both.fused), both.labels)
    for kind in ("sgd", "adam"):
        bound = uniform_bound(both, 2.0, kind=kind)
        change = kernel_change(both, inputs(0, 6, 3, 0.5, jnp.float32), kind=kind, grade="measured")
        assert np.abs(change.mid).max() <= bound < np.inf


def test_features_that_overflow_are_an_error():
    both = make(0, act="relu", dtype=jnp.float32)
    for grade in ("a priori", "data", "measured"):
        with pytest.raises(InputError, match="or overflow"):
            kernel_change(both, inputs(0, 4, 3, 1e38, jnp.float32), grade=grade)


def good():
    return make(0, act="gelu", p=6, c=3, d=3, o=2, scaling="sgd", dtype=jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(original=s.fused), "is a fused MLP itself"),
        (lambda s: s._replace(labels=s.labels[:-1]), "labels must be"),
        (lambda s: s._replace(labels=s.labels + 1), r"in \[0, 3\)"),
        (lambda s: s._replace(labels=s.labels - 1), r"in \[0, 3\)"),
        (lambda s: s._replace(original=replace(s.original, act="relu")), "differ in activation"),
        (lambda s: s._replace(original=replace(s.original, up_bias=None)), "input biases"),
        (lambda s: s._replace(original=replace(s.original, down=jnp.ones((6, 3)))), "in outputs"),
        (lambda s: s._replace(original=replace(s.original, out_bias=False)), "output bias"),
    ],
)
def test_pairs_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        kernel_change(change(good()), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: kernel_change(s, x, grade="prior"), "did you mean 'a priori'"),
        (lambda s, x: kernel_change(s, x, kind="sdg"), "did you mean 'sgd'"),
        (lambda s, x: kernel_change(s, x, gx=jnp.ones((2, 3))), "gx must be"),
        (lambda s, x: kernel_change(s, x * jnp.nan), "NaN"),
        (lambda s, x: kernel_change(s, x, gz=jnp.ones((2, 2))), "but gx is not"),
        (lambda s, x: kernel_change(s, x, x, gx=jnp.ones((2, 2))), "go together"),
        (lambda s, x: kernel_change(s, x, directions=-1), "directions"),
        (lambda s, x: kernel_change(s, x, grade="measured", sketch=()), "sketch is for"),
        (lambda s, x: output_change(s, x, grade="prior"), "did you mean 'a priori'"),
        (lambda s, x: uniform_bound(s, -1.0), "radius"),
        (lambda s, x: pair(object(), object()), "no labels"),
    ],
)
def test_input_that_cannot_be_used(call, message):
    with unchecked(), pytest.raises(InputError, match=message):
        call(good(), jnp.ones((2, 3)))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scaling", ["sgd", "adam", "folded"])
def test_a_certificate_says_what_changed(scaling):
    site = make(0, act="gelu", p=40, c=10, d=6, o=4, scaling=scaling)
    certificate = certify(site, inputs(1, 20, 6, 1.0), directions=4)
    assert certificate.violations() == 0
    assert [line.quantity for line in certificate.lines] == ["outputs", "SGD kernel", "Adam kernel"]
    for line in certificate.lines:
        assert 0 < line.measured < line.data < line.a_priori
    assert "SGD kernel" in str(certificate)
