"""The compiler's numbers are right, also with a version that has to be kept from wrong ones."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk.compiler import avoid_wrong_numbers


def test_a_version_with_wrong_numbers_is_kept_from_them(monkeypatch):
    used = "jax._src.xla_bridge.backends_are_initialized"
    monkeypatch.setenv("XLA_FLAGS", "--other")
    avoid_wrong_numbers("0.10.1")
    assert os.environ["XLA_FLAGS"] == "--other"
    monkeypatch.setattr(used, lambda: True)
    with pytest.warns(UserWarning, match=r"jaxlib 0\.10\.2 returns wrong numbers on CPUs"):
        avoid_wrong_numbers("0.10.2")
    monkeypatch.setattr(used, lambda: False)
    for _ in range(2):
        avoid_wrong_numbers("0.10.2")
        assert os.environ["XLA_FLAGS"] == "--other --xla_cpu_experimental_ynn_fusion_type="


def test_compiled_gradients_of_a_norm_equal_those_of_single_operations():
    """The Jacobian of a layer norm and a matrix: with jaxlib 0.10.2 it was off by half."""
    rng = np.random.default_rng(0)
    matrix, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 512), (3, 16)))

    def normed(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) @ matrix

    jacobian = jax.jacrev(normed)
    np.testing.assert_allclose(jax.jit(jacobian)(x), jacobian(x), atol=1e-5)


def test_compiled_sums_of_products_equal_those_of_single_operations():
    x = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769.0))

    def squares(x):
        return jax.vmap(lambda row: jnp.square(jnp.eye(3) @ row).sum())(x)

    np.testing.assert_array_equal(jax.jit(squares)(x), squares(x))
