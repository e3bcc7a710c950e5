"""Closed-form MLP kernels against brute force, and the identities of fused MLPs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax
from fusion_jax import FusedGatedMlp, FusedMlp, GatedMlp, Mlp
from fusion_jax.nn.fused import Factors, factors
from fusion_jax.nn.submlps import ClampedSwish
from ntk.errors import InputError
from ntk.mlp import MlpWeights, full_kernel, mlp_weights, traced_kernel, upstream_kernel
from tests.helpers import unchecked

D, P, C, OUT = 3, 12, 5, 4
LABELS = jnp.array([0, 1, 2, 3, 4, 0, 0, 0, 1, 1, 2, 2])
SIZES = jnp.bincount(LABELS, length=C)
ACTS = ["gelu", "gelu_new", "relu", "silu", "tanh"]
SCALINGS = ["adam", "sgd", "folded"]
SECOND = {"sgd": lambda x: x, "adam": jnp.sign}


def randomised(module, dtype, fitted=False):
    """Weights and biases that are all random, and the sizes of `LABELS` where there are sizes."""
    rng = np.random.default_rng(0)
    state = nnx.state(module, nnx.Param)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, dtype), state)
    nnx.update(module, state)
    if hasattr(module, "sizes"):
        sizes = SIZES.astype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
        around = factors(sizes, module.scaling)
        if fitted:
            around = [jnp.asarray(x, sizes.dtype) for x in np.exp(rng.normal(size=(3, C)))]
        values = zip(("sizes", "labels", *Factors._fields), (sizes, LABELS, *around), strict=True)
        for name, value in values:
            getattr(module, name).set_value(value)
    return module


def make(gated, scaling, act="gelu", use_bias=True, dtype=jnp.float64):
    common = {"act": act, "use_bias": use_bias, "rngs": nnx.Rngs(0), "param_dtype": dtype}
    if scaling is None:
        return randomised((GatedMlp if gated else Mlp)(D, P, OUT, **common), dtype)
    cls = FusedGatedMlp if gated else FusedMlp
    fitted = scaling == "fitted"
    how = {"original_width": P, "scaling": "adam" if fitted else scaling}
    return randomised(cls(D, C, OUT, **how, **common), dtype, fitted)


def inputs(n, *shape, seed, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, *shape)), dtype)


def jacobians(module, f, *inputs):
    """Gradients (n, o, params) of f(module, *inputs[i]) by all trainable parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def of_all(params, rest, *inputs):
        def of_one(*one):
            return jax.jacobian(lambda p: f(nnx.merge(graph, p, rest), *one))(params)

        return jax.tree.leaves(jax.vmap(of_one)(*inputs))

    leaves = of_all(params, rest, *inputs)
    return jnp.concatenate([g.reshape(*leaves[0].shape[:2], -1) for g in leaves], -1)


def brute(module, x, z):
    j = jacobians(module, lambda m, a: m(a[None])[0], jnp.concatenate([x, z]))
    j, k = j[: len(x)], j[len(x) :]
    return {n: jnp.einsum("ako,blo->abkl", j, f(k)) for n, f in SECOND.items()}


def brute_upstream(module, x, gx, z, gz):
    def scalar(m, a, g):
        return (m(a.reshape(-1, D)) * g.reshape(-1, OUT)).sum()[None]

    j = jacobians(module, scalar, jnp.concatenate([x, z]), jnp.concatenate([gx, gz]))[:, 0]
    j, k = j[: len(x)], j[len(x) :]
    return {n: j @ f(k).T for n, f in SECOND.items()}


def error(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


CASES = [
    (gated, scaling, act, bias)
    for gated in (False, True)
    for scaling in (None, "sgd", "fitted")
    for act, bias in ([(a, True) for a in ACTS] if scaling is None else [("gelu", True)])
] + [(False, "sgd", "gelu", False), (True, "adam", "silu", False)]


@pytest.mark.full(quick=4)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("gated", "scaling", "act", "bias"), CASES)
def test_equal_to_brute_force(gated, scaling, act, bias):
    module = make(gated, scaling, act, bias)
    mlp = mlp_weights(module)
    x, z = inputs(3, D, seed=1), inputs(2, D, seed=2)
    both = jnp.concatenate([x, z])
    for kind, want in brute(module, both, both).items():
        for second, columns in ((z, slice(3, 5)), (None, slice(3))):
            full = full_kernel(mlp, x, second, kind=kind)
            assert full.dtype == jnp.float64
            assert error(full, want[:3, columns]) < 1e-12
            traced = jnp.einsum("abkk->ab", want[:3, columns])
            assert error(traced_kernel(mlp, x, second, kind=kind), traced) < 1e-12


@pytest.mark.full(quick=2)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaling", [None, "fitted"])
def test_upstream_equal_to_brute_force(gated, scaling, shape, monkeypatch):
    # Small blocks, which do not divide the width.
    monkeypatch.setattr("ntk.mlp._BLOCK", 4 * (6 + 7 + 16) * 5)
    module = make(gated, scaling)
    mlp = mlp_weights(module)
    x, gx = inputs(3, *shape, D, seed=1), inputs(3, *shape, OUT, seed=2)
    z, gz = inputs(3, *shape, D, seed=3), inputs(3, *shape, OUT, seed=4)
    for kind, want in brute_upstream(module, x, gx, z, gz).items():
        assert error(upstream_kernel(mlp, x, gx, z, gz, kind=kind), want) < 1e-12
    for kind, want in brute_upstream(module, x, gx, x, gx).items():
        assert error(upstream_kernel(mlp, x, gx, kind=kind), want) < 1e-12


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_float32(kind, dtype):
    module = make(False, "adam", dtype=dtype)
    x = inputs(3, D, seed=1, dtype=jnp.float32)
    got = full_kernel(mlp_weights(module), x, kind=kind)
    assert got.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), mlp_weights(module))
        assert (
            error(got.astype(jnp.float64), full_kernel(wide, x.astype(jnp.float64), kind=kind))
            < 1e-5
        )


@pytest.mark.full(quick=3)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("gated", "act"),
    [(False, "gelu"), (False, "relu"), (True, "silu"), (True, ClampedSwish(1.5, 0.5))],
)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_matching_scaling_keeps_the_wide_copys_kernel_and_no_other_does(kind, gated, act):
    x, gx = inputs(5, D, seed=1), inputs(5, OUT, seed=2)
    xs, gs = inputs(3, 4, D, seed=3), inputs(3, 4, OUT, seed=4)
    for scaling in SCALINGS:
        fused = make(gated, scaling, act)
        mlp, copy = mlp_weights(fused), mlp_weights(fused.wide_copy())
        errors = [
            error(traced_kernel(mlp, x, kind=kind), traced_kernel(copy, x, kind=kind)),
            error(full_kernel(mlp, x, kind=kind), full_kernel(copy, x, kind=kind)),
            error(upstream_kernel(mlp, x, gx, kind=kind), upstream_kernel(copy, x, gx, kind=kind)),
            error(
                upstream_kernel(mlp, xs, gs, kind=kind), upstream_kernel(copy, xs, gs, kind=kind)
            ),
        ]
        if scaling == kind:
            assert max(errors) < 1e-12
        else:
            assert min(errors) > 0.01


def test_kernels_work_under_jit_and_are_differentiable():
    mlp = mlp_weights(make(False, None, dtype=jnp.float32))
    x = inputs(3, D, seed=1, dtype=jnp.float32)
    compiled = jax.jit(partial(traced_kernel, kind="sgd"))(mlp, x)
    assert jnp.allclose(compiled, traced_kernel(mlp, x), rtol=1e-5)
    fused = mlp_weights(make(False, "sgd", dtype=jnp.float32))
    assert jax.jit(lambda a: traced_kernel(fused, a))(x).shape == (3, 3)
    grad = jax.grad(lambda a: traced_kernel(mlp, a).sum())(x)
    assert grad.shape == x.shape
    assert bool(jnp.isfinite(grad).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": jnp.ones((2, 3, 4))}, "up must be"),
        ({"down": jnp.ones((5, 4))}, "down must be"),
        ({"gate": jnp.ones((5, 3))}, "gate must be"),
        ({"up_bias": jnp.ones(5)}, "up_bias must be"),
        ({"gate_bias": jnp.ones(P)}, "but gate is not"),
        ({"middle": jnp.ones(P)}, "but gate is not"),
        ({"outer": jnp.ones(5)}, "outer must be"),
        ({"inner": jnp.zeros(P)}, "inner must be positive"),
        ({"act": "gelo"}, "did you mean 'gelu'"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    fields = {"up": jnp.ones((P, 3)), "down": jnp.ones((P, 4)), "act": "gelu", **change}
    x = jnp.ones((2, 3))
    with pytest.raises(InputError, match=message):
        traced_kernel(MlpWeights(**fields), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, g: traced_kernel(m, x[:, :2]), "x must end in the MLP's 3"),
        (lambda m, x, g: traced_kernel(m, x, x[:0]), "z must end in"),
        (lambda m, x, g: traced_kernel(m, x, kind="sdg"), "did you mean 'sgd'"),
        (lambda m, x, g: traced_kernel(m, x * jnp.nan), "NaN"),
        (lambda m, x, g: upstream_kernel(m, x, g[:1]), "gx must be"),
        (lambda m, x, g: upstream_kernel(m, x, g, x), "go together"),
        (lambda m, x, g: mlp_weights(object()), "no up"),
    ],
)
def test_input_that_cannot_be_used(call, message):
    mlp = MlpWeights(up=jnp.ones((P, 3)), down=jnp.ones((P, OUT)), act="gelu")
    with unchecked(), pytest.raises(InputError, match=message):
        call(mlp, jnp.ones((2, 3)), jnp.ones((2, OUT)))


def test_nan_weights_are_an_error():
    mlp = MlpWeights(up=jnp.full((P, 3), jnp.nan), down=jnp.ones((P, OUT)), act="relu")
    with pytest.raises(InputError, match="NaN"):
        traced_kernel(mlp, jnp.ones((2, 3)))


def test_modules_that_are_fused_read_like_fusion_jax_writes_them(key):
    mlp = Mlp(6, 24, act="gelu", rngs=nnx.Rngs(0))
    smaller, _ = fusion_jax.compress(mlp, fusion_jax.Fusion(width=8, scaling="sgd"), key=key)
    weights = mlp_weights(smaller)
    assert weights.width == 8
    assert weights.outer is not None
    assert jnp.allclose(jnp.square(weights.outer), smaller.sizes[...])
    assert jnp.allclose(weights.inner, 1 / weights.outer)
