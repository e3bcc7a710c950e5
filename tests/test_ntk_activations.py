"""The constants of activations: above every value, by interval arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk import activations
from ntk.bounds.balls import EVALUATION

ACTS = activations.PROVEN


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


def test_activations_without_proven_constants():
    """As transformers defines them; bounds say that they do not know them."""
    z = jnp.array([-2.0, -0.5, 0.0, 1.5])
    sigmoid = 1 / (1 + np.exp(-1.702 * np.asarray(z)))
    np.testing.assert_allclose(activations.FUNCTIONS["quick_gelu"](z), z * sigmoid, rtol=1e-6)
    assert activations.FUNCTIONS["relu2"](z).tolist() == [0, 0, 0, 2.25]
    for constant in (activations.slope, activations.secant, activations.ceiling):
        with pytest.raises(ValueError, match="no bounds for the activation relu2, only for gelu"):
            constant("relu2")
