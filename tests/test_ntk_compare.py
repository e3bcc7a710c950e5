"""Comparing kernels, and what their difference means for training."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntk.comparison import apart_bound, compare
from ntk.errors import InputError


def kernel(seed, n, rank=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, rank or 2 * n))
    return x @ x.T


def test_the_same_kernel():
    k = kernel(0, 6)
    result = compare(k, k, targets=np.arange(6.0))
    assert (result.frobenius, result.spectral) == (0, 0)
    assert result.alignment == pytest.approx(1)
    assert result.symmetric
    assert np.array_equal(result.spectra[0], result.spectra[1])
    assert not result.training.apart.any()


def test_known_values():
    result = compare(np.diag([3.0, 1.0]), np.diag([3.0, 2.0]))
    assert result.frobenius == pytest.approx(1 / np.sqrt(10))
    assert result.spectral == pytest.approx(1 / 3)
    assert result.spectra.tolist() == [[3, 1], [3, 2]]
    p = np.array([0.75, 0.25])
    assert result.effective_ranks[0] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert result.training is None


def test_a_rank_one_kernel_has_effective_rank_one():
    k = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert compare(k, np.eye(3)).effective_ranks == pytest.approx((1, 3))


def test_alignment_ignores_scale_and_constant_features():
    k = kernel(0, 6)
    assert compare(k, 3 * k + 7).alignment == pytest.approx(1)
    assert compare(k, kernel(1, 6)).alignment < 0.9


def test_float32_and_jax_arrays():
    k = jnp.asarray(kernel(0, 5), jnp.float32)
    assert compare(k, k * 1.5).frobenius == pytest.approx(0.5)


def test_outputs_count_as_examples():
    a, b = kernel(0, 6), kernel(1, 6)
    four = [k.reshape(3, 2, 3, 2).transpose(0, 2, 1, 3) for k in (a, b)]
    flat, blocks = compare(a, b), compare(*four)
    assert blocks.frobenius == pytest.approx(flat.frobenius)
    assert np.allclose(blocks.spectra, flat.spectra)
    y = np.arange(6.0)
    one = compare(a, b, targets=y).training
    two = compare(*four, targets=y.reshape(3, 2)).training
    assert two.outputs.shape == (2, 33, 3, 2)
    assert np.allclose(one.outputs, two.outputs.reshape(one.outputs.shape))


def test_flow_solves_its_equation():
    k, k2 = kernel(0, 4), kernel(1, 4)
    y, start = np.array([1.0, -1.0, 2.0, 0.0]), np.array([0.5, 0.0, 0.0, 1.0])
    times = np.array([0.0, 0.1, 0.1 + 1e-6])
    training = compare(k, k2, targets=y, outputs=start, times=times).training
    assert training.dynamics == "gradient flow"
    for f, matrix in zip(training.outputs, (k, k2), strict=True):
        assert np.allclose(f[0], start)
        assert np.allclose((f[2] - f[1]) / 1e-6, matrix @ (y - f[1]), rtol=1e-4, atol=1e-4)


def test_descent_takes_its_steps():
    k, k2 = kernel(0, 4), kernel(1, 4)
    y = np.array([1.0, -1.0, 2.0, 0.0])
    rate = 0.5 / max(np.linalg.norm(k, 2), np.linalg.norm(k2, 2))
    training = compare(k, k2, targets=y, learning_rate=rate, steps=7).training
    assert training.dynamics == "gradient descent"
    assert np.allclose(training.times, rate * np.arange(8))
    f = np.zeros(4)
    for step in range(8):
        assert np.allclose(training.outputs[0, step], f)
        f = f + rate * k @ (y - f)


@pytest.mark.parametrize("rate", [None, 0.01])
def test_outputs_part_no_faster_than_the_kernels_allow(rate):
    k = kernel(0, 8)
    k2 = k + 0.3 * kernel(1, 8)
    rate = None if rate is None else rate / np.linalg.norm(k2, 2)
    training = compare(k, k2, targets=np.ones(8), learning_rate=rate).training
    bound = apart_bound(np.linalg.norm(k - k2, 2), training.times)
    assert (training.apart <= bound + 1e-12).all()
    assert training.apart.max() > 0


def test_kernels_that_are_not_symmetric():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 40))
    k, k2 = g @ np.sign(g).T, (g + 0.1) @ np.sign(g + 0.1).T
    y = rng.normal(size=5)
    result = compare(k, k2, targets=y)
    assert not result.symmetric
    assert np.allclose(result.spectra[0], np.linalg.svd(k, compute_uv=False))
    training = result.training
    assert training.dynamics == "sign descent"
    assert training.outputs.shape == (2, 51, 5)
    rate = training.times[1]
    f = np.zeros(5)
    for step in range(10):
        assert np.allclose(training.outputs[0, step], f)
        f = f + rate * k[:, step % 5] * np.sign((y - f)[step % 5])
    assert training.losses[0, -1] < 1
    assert "singular value 1" in str(result)
    assert "sign descent" in str(result)


GOOD = kernel(0, 3)
SKEW = np.triu(GOOD)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD, kernel(0, 4)), {}, "shapes"),
        ((GOOD[:2], GOOD[:2]), {}, r"must be \(n, n\)"),
        ((GOOD[None], GOOD[None]), {}, r"must be \(n, n\)"),
        ((GOOD * np.nan, GOOD), {}, "kernel holds NaN"),
        ((GOOD, GOOD + np.inf), {}, "kernel2 holds NaN"),
        ((0 * GOOD, GOOD), {}, "kernel is zero"),
        ((GOOD, GOOD), {"times": [1.0]}, "need targets"),
        ((GOOD, GOOD), {"targets": np.ones(4)}, "targets must be"),
        ((GOOD, GOOD), {"targets": np.ones(3) * np.nan}, "targets hold NaN"),
        ((GOOD, GOOD), {"targets": np.ones(3), "outputs": np.ones(2)}, "outputs must be"),
        ((GOOD, GOOD), {"targets": np.ones(3), "outputs": np.ones(3)}, "nothing to train"),
        ((GOOD, GOOD), {"targets": np.ones(3), "times": [-1.0]}, "times must be"),
        ((GOOD, GOOD), {"targets": np.ones(3), "steps": 3}, "need a learning_rate"),
        ((GOOD, GOOD), {"targets": np.ones(3), "learning_rate": -1.0}, "must be positive"),
        ((GOOD, GOOD), {"targets": np.ones(3), "learning_rate": 1e9}, "diverges"),
        ((GOOD, GOOD), {"targets": np.ones(3), "learning_rate": 0.1, "steps": 0}, "at least 1"),
        (
            (GOOD, GOOD),
            {"targets": np.ones(3), "learning_rate": 0.1, "times": [1.0]},
            "times are for",
        ),
        ((GOOD, -GOOD), {"targets": np.ones(3)}, "negative eigenvalue"),
        ((SKEW, SKEW), {"targets": np.ones(3), "times": [1.0]}, "times are for"),
        (
            (np.ones((1, 1, 3, 3)) * SKEW,) * 2,
            {"targets": np.ones((1, 3))},
            "one output",
        ),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(InputError, match=message):
        compare(*arguments, **options)
