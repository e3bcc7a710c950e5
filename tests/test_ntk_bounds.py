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
from ntk import activations
from ntk.bounds import a_priori as apriori
from ntk.bounds.balls import EVALUATION, ball_units
from ntk.bounds.certificates import certify
from ntk.bounds.changes import fit_sketch, kernel_change, output_change, pair, uniform_bound
from ntk.bounds.jensen import wide_norms
from ntk.bounds.pairs import Pair
from ntk.errors import InputError
from ntk.mlp import MlpWeights, traced_kernel
from ntk.units import units

ACTS = list(activations.FUNCTIONS)


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
def test_kernel_bounds_hold(shape, seed, scale, **how):
    site = make(seed, **shape, **how)
    x, g = inputs(seed, N, 3, scale), inputs(seed + 1, N, shape.get("o", 4), 1.0)
    constants = apriori.constants(site)
    for kind in ("sgd", "adam"):
        for gx in (None, g):
            change = partial(kernel_change, site, x, gx=gx, kind=kind)
            measured = change(grade="measured")
            data = change(directions=2)
            prior = change(grade="a priori", constants=constants)
            assert not violated(data, measured)
            assert not violated(prior, measured)
            # The interval holds the change, not only its size.
            off = jnp.abs(data.mid - measured.mid)
            assert bool((off <= data.radius + measured.radius).all())
            assert data.spectral >= np.linalg.norm(measured.mid, 2) * (1 - 1e-9) - 1e-9
            if gx is None:
                radius = float(jnp.linalg.norm(x, axis=1).max())
                uniform = uniform_bound(constants, radius, kind=kind)
                assert bool((jnp.abs(measured.mid) - measured.radius <= uniform).all())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
@many
@drawn
def test_output_bounds_hold(shape, seed, scale, **how):
    site = make(seed, **shape, **how)
    x = inputs(seed, N, 3, scale)
    measured = output_change(site, x, grade="measured")
    slack = 1e-12 * (1 + float(jnp.abs(units(site.original, x).hidden).max())) * how["size"] * 10
    for grade in ("a priori", "data"):
        assert bool((measured <= output_change(site, x, grade=grade) + slack).all())


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


@pytest.mark.usefixtures("x64")
def test_more_directions_are_tighter_and_end_in_the_measurement():
    site = make(0, act="gelu", p=40, c=10, d=6, o=4, scaling="sgd")
    x = inputs(1, 30, 6, 1.0)
    measured = kernel_change(site, x, grade="measured")
    bounds = [kernel_change(site, x, directions=k).frobenius for k in (0, 4, 16, 40)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(measured.frobenius, rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_sketch_fits_other_inputs():
    site = make(0, act="gelu", p=40, c=10, d=6, o=4, scaling="sgd")
    x = inputs(1, 300, 6, 1.0)
    sketch = fit_sketch(site, x[:280], directions=16)
    measured = kernel_change(site, x[280:], grade="measured")
    change = kernel_change(site, x[280:], sketch=sketch)
    assert not violated(change, measured)
    assert change.frobenius < kernel_change(site, x[280:], directions=0).frobenius


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
        exact = units(mlp, small[1])
        single = jax.tree.map(lambda a: a.astype(jnp.float32), (mlp, small[1]))
        hidden, slopes = ball_units(*single)
        pairs = zip((hidden, *slopes), (exact.hidden, *exact.slopes), strict=True)
        for ball, want in pairs:
            value, error, sign = (a.astype(jnp.float64) for a in ball[:3])
            assert bool((jnp.abs(value - want) <= error).all())
            assert bool(((jnp.sign(want) == sign) | ball.doubtful).all())


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_activations_are_computed_as_well_as_assumed(name, dtype):
    """Half the error that the bounds allow."""
    with jax.enable_x64(True):
        z = jnp.concatenate([jnp.linspace(-30, 30, 60001), jnp.linspace(-1, 1, 20001)])
        z = z.astype(dtype)
        s, a = jax.jvp(activations.FUNCTIONS[name], (z,), (jnp.ones_like(z),))
        want, slope = reference(name, np.asarray(z, np.longdouble))
        unit = float(jnp.finfo(dtype).eps) * (1 + np.abs(np.asarray(z, np.float64)))
        for got, exact in ((s, want), (a, slope)):
            error = np.abs(np.asarray(got, np.longdouble) - exact) / unit
            assert float(error.max()) < EVALUATION / 2


def reference(name, z):
    """Activation and slope in extended precision."""
    from scipy.special import ndtr

    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if name == "tanh":
        t = np.tanh(z)
        return t, 1 - t * t
    if name == "gelu":
        cdf = ndtr(z.astype(np.float64))
        return z * cdf, cdf + z * np.exp(-z * z / 2) / np.sqrt(2 * np.longdouble(np.pi))
    w, dw = z, np.ones_like(z)
    if name == "gelu_tanh":
        root = np.sqrt(2 / np.longdouble(np.pi))
        c = np.longdouble("0.044715")
        w, dw = 2 * root * (z + c * z**3), 2 * root * (1 + 3 * c * z**2)
    sigma = 1 / (1 + np.exp(-w))
    return z * sigma, sigma + z * sigma * (1 - sigma) * dw


class Interval:
    """Arrays of intervals, rounded outward far more than float64 does."""

    def __init__(self, low, high):
        width = 1e-14 * (1 + np.maximum(np.abs(low), np.abs(high)))
        self.low, self.high = low - width, high + width

    def __add__(self, other):
        other = other if isinstance(other, Interval) else Interval(other, other)
        return Interval(self.low + other.low, self.high + other.high)

    def __mul__(self, other):
        other = other if isinstance(other, Interval) else Interval(other, other)
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(np.minimum.reduce(ends), np.maximum.reduce(ends))

    __radd__, __rmul__ = __add__, __mul__

    def rising(self, f):
        return Interval(f(self.low), f(self.high))


def derivatives(name, z):
    """An activation and three derivatives on intervals: tanh, or z r(z) with a distribution r."""
    from scipy.special import expit, ndtr

    if name == "tanh":
        t = z.rising(np.tanh)
        u = 1.0 + -1.0 * (t * t)
        return t, u, -2.0 * t * u, u * (6.0 * t * t + -2.0)
    square = (z * z).rising(lambda a: np.maximum(a, 0))
    if name == "gelu":
        phi = (-0.5 * square).rising(lambda a: np.exp(a) / np.sqrt(2 * np.pi))
        cdf = z.rising(ndtr)
        return z * cdf, cdf + z * phi, (2.0 + -1.0 * square) * phi, z * (square + -4.0) * phi

    def constant(a):
        return Interval(np.full_like(z.low, a), np.full_like(z.low, a))

    if name == "silu":
        w1, w2, w3 = constant(1.0), constant(0.0), constant(0.0)
        sigma = z.rising(expit)
    else:
        root, c = 2 * np.sqrt(2 / np.pi), 0.044715
        w1, w2, w3 = root * (1.0 + 3 * c * square), 6 * root * c * z, constant(6 * root * c)
        sigma = z.rising(lambda a: expit(root * (a + c * a**3)))
    # r = sigma(w(z)) by the chain rule.
    s1 = sigma * (1.0 + -1.0 * sigma)
    s2 = s1 * (1.0 + -2.0 * sigma)
    s3 = s1 * (1.0 + -6.0 * s1)
    r1, r2 = s1 * w1, s2 * w1 * w1 + s1 * w2
    r3 = s3 * w1 * w1 * w1 + 3.0 * s2 * w1 * w2 + s1 * w3
    return z * sigma, sigma + z * r1, 2.0 * r1 + z * r2, 3.0 * r2 + z * r3


def below(f, bound, low=-12.0, high=12.0):
    """Whether bisection can enclose |f| below a bound everywhere."""
    edges = np.linspace(low, high, 2001)
    low, high = edges[:-1], edges[1:]
    for _ in range(24):
        value = f(Interval(low, high))
        unsure = np.maximum(np.abs(value.low), np.abs(value.high)) > bound
        low, high = low[unsure], high[unsure]
        if not low.size:
            return True
        middle = (low + high) / 2
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    return False


def largest(f, low=-12.0, high=12.0):
    """A lower bound on the supremum of |f|, from a grid."""
    z = np.linspace(low, high, 24001)
    value = f(Interval(z, z))
    return np.minimum(np.abs(value.low), np.abs(value.high)).max()


@pytest.mark.parametrize("name", [name for name in ACTS if name != "relu"])
def test_constants_are_above_every_value(name):
    """On [-12, 12]; beyond, s' is within 1e-3 of a limit, and the rest below that and falling."""
    for bound, f in (
        (activations.slope(name), lambda z: derivatives(name, z)[1]),
        (activations.slope_spread(name) / 2, lambda z: derivatives(name, z)[1] + -0.5),
        (activations.curvature(name), lambda z: derivatives(name, z)[2]),
        (activations.jerk(name), lambda z: derivatives(name, z)[3]),
    ):
        assert below(f, bound * (1 + 1e-9))
        assert largest(f) > bound * (1 - 1e-4)


def at_most_zero(f, low, high):
    """Whether bisection can show that a function of intervals is not above zero."""
    return below(lambda z: Interval(np.zeros_like(z.low), np.maximum(f(z), 0)), 1e-12, low, high)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_slopes_are_below_a_line_and_squares_are_convex(name):
    """What `ntk.jensen` rests on; beyond 12, s' is within 1e-3 of a limit."""
    k, a = activations.steepness(name)
    floor = (activations.slope(name) - 1) ** 2

    def above_line(z):
        s1 = derivatives(name, z)[1]
        return (s1 * s1).high - np.maximum(floor, k + a * z.low)

    def concave(z):
        s, s1, s2, _ = derivatives(name, z)
        return -(s1 * s1 + s * s2).low

    assert at_most_zero(above_line, -12, 12)
    assert at_most_zero(concave, 0, 12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_the_wide_copy_is_no_larger_than_what_the_original_says(shape):
    site = make(3, **shape, scaling="adam", offset=0.1)
    x = inputs(1, N, 3, 1.0)
    plain = replace(site.fused, outer=None, inner=None, middle=None)
    wide = jax.tree.map(lambda a: a[site.labels], plain)
    at = units(wide, x)
    offsets = tuple(jnp.asarray(m.offset) for m in apriori.constants(site).maps)
    for power in (1, 2):
        size = jnp.linalg.norm(wide.down, ord=power, axis=1)[None]
        bounds = wide_norms(site.original, x, offsets, size, power=power)
        for feature, bound in zip([at.hidden, *(c * size for c in at.slopes)], bounds, strict=True):
            assert bool((jnp.linalg.norm(feature, ord=power, axis=1) <= bound).all())


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_the_gap_to_relu_is_above_every_value(name):
    gap = activations.relu_gap(name)
    assert below(lambda z: derivatives(name, z)[0], gap, -12, 0)
    assert largest(lambda z: derivatives(name, z)[0], -12, 0) > gap * (1 - 1e-4)
    ends = np.array(activations.slope_zero(name))
    slopes = derivatives(name, Interval(ends, ends))[1]
    assert slopes.high[0] < 0 < slopes.low[1]


@pytest.mark.parametrize("name", ACTS)
def test_an_activation_is_no_longer_than_its_argument(name):
    z = np.concatenate([np.linspace(-20, 20, 100001), np.linspace(-1e-3, 1e-3, 1001)])
    s = reference(name, z)[0]
    assert (np.abs(s) <= activations.secant(name) * np.abs(z) + 1e-15).all()
    assert (np.abs(s) <= activations.ceiling(name)).all()
    assert reference(name, np.zeros(1))[0] == 0


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
        (lambda s, x: kernel_change(s, x, gz=jnp.ones((2, 2))), "gx is not"),
        (lambda s, x: kernel_change(s, x, x, gx=jnp.ones((2, 2))), "go together"),
        (lambda s, x: kernel_change(s, x, directions=-1), "directions"),
        (lambda s, x: kernel_change(s, x, grade="measured", sketch=()), "sketch is for"),
        (lambda s, x: kernel_change(s, x, constants=apriori.constants(s)), "constants is for"),
        (lambda s, x: output_change(s, x, grade="prior"), "did you mean 'a priori'"),
        (lambda s, x: uniform_bound(s, -1.0), "radius"),
        (lambda s, x: pair(object(), object()), "no labels"),
    ],
)
def test_input_that_cannot_be_used(call, message):
    with pytest.raises(InputError, match=message):
        call(good(), jnp.ones((2, 3)))


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
