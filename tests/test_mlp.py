"""Laws of MLPs and of their fused forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import fusion_jax as fj
from fusion_jax.nn.submlps import ACTIVATIONS, ClampedSwish, activation
from tests.helpers import inputs, make

SCALINGS = ["adam", "sgd", "folded"]
KINDS = [fj.Mlp, fj.GatedMlp]
kinds = pytest.mark.parametrize("kind", KINDS)
scalings = pytest.mark.parametrize("scaling", SCALINGS)


def fuse(mlp, width, scaling="adam", seed=0, **options):
    method = fj.Fusion(width=width, scaling=scaling, **options)
    return fj.compress(mlp, method, key=jax.random.key(seed))[0]


def with_duplicates(kind, distinct, copies, dtype=jnp.float32):
    """An MLP whose sub-MLPs are `distinct` ones, each several times, in mixed order."""
    few = make(kind, width=distinct, dtype=dtype)
    order = np.random.RandomState(0).permutation(np.repeat(np.arange(distinct), copies))
    mlp = few.abstract(kind, distinct * copies)
    mlp.load_sub_mlps(jax.tree.map(lambda x: x[order], few.sub_mlps()), few.out_bias())
    return mlp


@kinds
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_sum_of_its_sub_mlps(kind, act, bias):
    mlp, x = make(kind, act=act, bias=bias), inputs()
    s, subs = activation(act), mlp.sub_mlps()
    total = np.zeros((11, 3)) if not bias else np.tile(mlp.down.bias[...][None], (11, 1))
    for i in range(mlp.width):
        up = x @ subs.up[i] + (subs.up_bias[i] if bias else 0)
        if kind is fj.GatedMlp:
            h = s(x @ subs.gate[i] + (subs.gate_bias[i] if bias else 0)) * up
        else:
            h = s(up)
        total = total + np.outer(h, subs.down[i])
    np.testing.assert_allclose(mlp(x), total, atol=2e-5)


@pytest.mark.full(quick=1)
@scalings
def test_a_clamped_unit_is_fused_as_any_other(scaling):
    """Limits and the 1 that is added to ``up`` belong to the unit, not to its rows."""
    act = ClampedSwish(alpha=1.5, limit=0.4)
    mlp, x = make(fj.GatedMlp, act=act), inputs()
    subs = jax.tree.map(np.asarray, mlp.sub_mlps())
    up = np.clip(np.asarray(x) @ subs.up.T + subs.up_bias, -0.4, 0.4) + 1
    gate = np.minimum(np.asarray(x) @ subs.gate.T + subs.gate_bias, 0.4)
    want = (up * gate / (1 + np.exp(-1.5 * gate))) @ subs.down + np.asarray(mlp.out_bias())
    np.testing.assert_allclose(mlp(x), want, atol=1e-5)
    fused = fuse(mlp, 7, scaling)
    np.testing.assert_allclose(fused(x), fused.wide_copy()(x), atol=1e-5)
    np.testing.assert_allclose(fused(x), fused.plain()(x), atol=1e-5)
    with pytest.raises(fj.InputError, match="not linear outside the activation, which Clustering"):
        fj.compress(mlp, fj.Clustering(width=7), key=jax.random.key(0))
    copies = with_duplicates(fj.GatedMlp, 7, 3)
    copies.act = act
    np.testing.assert_allclose(fuse(copies, 7, scaling)(x), copies(x), atol=1e-5)


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_rows_read_back(kind, bias):
    subs = make(kind, bias=bias).sub_mlps()
    back = subs.with_rows(subs.rows())
    assert jax.tree.structure(back) == jax.tree.structure(subs)
    assert all((a == b).all() for a, b in zip(back, subs, strict=True) if b is not None)


def test_rows_of_the_paper():
    subs = fj.SubMLPs(
        up=jnp.array([[1.0, 2.0]]), up_bias=jnp.array([3.0]), down=jnp.array([[4.0, 5.0]])
    )
    assert subs.rows().tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.full(quick=2)
@kinds
@scalings
def test_function_is_the_wide_copys(kind, scaling):
    fused, x = fuse(make(kind), 7, scaling), inputs()
    np.testing.assert_allclose(fused(x), fused.wide_copy()(x), atol=1e-5)
    np.testing.assert_allclose(fused(x), fused.plain()(x), atol=1e-5)


@kinds
@scalings
@pytest.mark.full(quick=1)
def test_function_is_the_wide_copys_in_float64(kind, scaling, x64):
    fused, x = fuse(make(kind, dtype=jnp.float64), 7, scaling), inputs(dtype=jnp.float64)
    assert fused(x).dtype == jnp.float64
    np.testing.assert_allclose(fused(x), fused.wide_copy()(x), atol=1e-12)
    np.testing.assert_allclose(fused(x), fused.plain()(x), atol=1e-12)


@kinds
@scalings
def test_centroids_do_not_depend_on_scaling(kind, scaling):
    mlp = make(kind)
    fused = fuse(mlp, 7, scaling)
    rows, labels = np.asarray(mlp.sub_mlps().rows()), np.asarray(fused.labels[...])
    means = np.stack([rows[labels == c].mean(0) for c in range(7)])
    np.testing.assert_allclose(fused.centroids().rows(), means, atol=1e-6)
    assert fused.sizes[...].tolist() == np.bincount(labels, minlength=7).tolist()


@pytest.mark.full(quick=1)
@kinds
@scalings
def test_full_width_is_the_same_mlp(kind, scaling):
    mlp, x = make(kind), inputs()
    fused = fuse(mlp, mlp.width, scaling)

    def gradients(m):
        graph, params, rest = nnx.split(m, nnx.Param, ...)
        return jax.grad(lambda p: jnp.square(nnx.merge(graph, p, rest)(x)).sum())(params)

    assert (fused(x) == mlp(x)).all()
    ours, theirs = (dict(nnx.to_flat_state(gradients(m))) for m in (fused, mlp))
    assert ours.keys() == theirs.keys()
    for path, g in theirs.items():
        np.testing.assert_allclose(ours[path].get_value(), g.get_value(), rtol=1e-6)


@pytest.mark.full(quick=1)
@kinds
@scalings
def test_duplicates_fuse_exactly(kind, scaling):
    mlp, x = with_duplicates(kind, 6, 5), inputs()
    fused = fuse(mlp, 6, scaling)
    assert fused.sizes[...].tolist() == [5] * 6
    np.testing.assert_allclose(fused(x), mlp(x), atol=2e-5)


@pytest.mark.full
@kinds
def test_order_of_units_changes_nothing(kind):
    mlp, x = make(kind, width=64), inputs()
    want = fuse(mlp, 9)(x)
    for seed in range(5):
        order = np.random.RandomState(seed).permutation(64)
        shuffled = mlp.abstract(kind, 64)
        shuffled.load_sub_mlps(
            jax.tree.map(lambda a, order=order: a[order], mlp.sub_mlps()), mlp.out_bias()
        )
        # The order of sums changes with it, and outputs are up to 10.
        np.testing.assert_allclose(fuse(shuffled, 9)(x), want, atol=1e-5)


@pytest.mark.full(quick=3)
@kinds
@scalings
def test_sizes_and_labels_are_frozen(kind, scaling):
    fused = fuse(make(kind), 7, scaling)
    trained = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(fused, nnx.Param))}
    frozen = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(fused, fj.Frozen))}
    assert trained == {"kernel", "bias"}
    assert frozen == {"sizes", "labels", "outer", "inner", "middle"}


@scalings
def test_training_with_weight_decay_leaves_frozen_bits(scaling):
    fused, x = fuse(make(fj.Mlp), 7, scaling), inputs()
    graph, params, rest = nnx.split(fused, nnx.Param, ...)
    optimizer = optax.adamw(0.1, weight_decay=0.5)

    def loss(p):
        return jnp.square(nnx.merge(graph, p, rest)(x)).sum()

    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float32
        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    trained = nnx.merge(graph, optax.apply_updates(params, updates), rest)
    assert (trained.sizes[...] == fused.sizes[...]).all()
    assert (trained.labels[...] == fused.labels[...]).all()
    assert not (trained.up.kernel[...] == fused.up.kernel[...]).any()


@kinds
@scalings
@pytest.mark.parametrize("width", [7, 24])
def test_padding_with_zero_units_changes_nothing(kind, scaling, width):
    fused, x = fuse(make(kind), 7, scaling), inputs()
    padded = fused.padded(width)
    assert padded.width == width
    assert (padded.sub_mlps().rows()[7:] == 0).all()
    assert (padded.sub_mlps().rows()[:7] == fused.plain().sub_mlps().rows()).all()
    np.testing.assert_allclose(padded(x), fused.plain()(x), atol=1e-6)


@pytest.mark.full(quick=1)
@kinds
@scalings
def test_bfloat16_keeps_its_dtype(kind, scaling):
    mlp = make(kind, dtype=jnp.bfloat16)
    fused = fuse(mlp, 7, scaling)
    assert fused(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(fused, nnx.Param))} == {"bfloat16"}
    assert fused.plain().dtype == fused.wide_copy().dtype == jnp.bfloat16


def test_large_sizes_are_exact_in_bfloat16():
    mlp = with_duplicates(fj.Mlp, 2, 257, dtype=jnp.bfloat16)
    assert fuse(mlp, 2).sizes[...].tolist() == [257, 257]


@kinds
@scalings
def test_jit_equals_eager(kind, scaling):
    fused, x = fuse(make(kind), 7, scaling), inputs()
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(fused, x), fused(x), atol=1e-6)


def test_unknown_activation_names_the_nearest():
    with pytest.raises(fj.InputError, match="'gelu_neww'; did you mean 'gelu_new'"):
        make(fj.Mlp, act="gelu_neww")


@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([(20, 6), (9, 8), (3, 1)]),  # each compiles anew
    kind=st.sampled_from(KINDS),
    scaling=st.sampled_from(SCALINGS),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 99),
)
@pytest.mark.full
def test_fused_equals_wide_copy_whatever_the_mlp(shape, kind, scaling, act, seed):
    width, keep = shape
    mlp = make(kind, width=width, act=act, seed=seed)
    fused, x = fuse(mlp, keep, scaling), inputs()
    np.testing.assert_allclose(fused(x), fused.wide_copy()(x), atol=1e-4)
    assert fused.sizes[...].sum() == width
    assert (fused.sizes[...] >= 1).all()


@pytest.mark.full(quick=1)
@kinds
@scalings
def test_experts_are_fused_each_on_its_own(kind, scaling, key):
    """In one call, and equal to fusing them one by one; saved and padded they stay a stack."""
    single = [make(kind, seed=seed) for seed in range(3)]
    stack = fj.experts(partial(kind, 5, 24, 3, act="gelu"), 3, rngs=nnx.Rngs(0))
    subs = jax.tree.map(lambda *x: jnp.stack(x), *(mlp.sub_mlps() for mlp in single))
    stack.load_sub_mlps(subs, jnp.stack([mlp.out_bias() for mlp in single]))
    x = jax.random.normal(key, (3, 11, 5))
    np.testing.assert_allclose(stack(x), [m(v) for m, v in zip(single, x, strict=True)], atol=1e-5)

    fused, _ = fj.compress(stack, fj.Fusion(width=7, scaling=scaling), key=key)
    assert fused.stack == (3,)
    assert fused.sizes[...].sum(-1).tolist() == [24] * 3
    keys = jax.random.split(jax.random.fold_in(key, 0), 3)
    for e, mlp in enumerate(single):
        alone = fj.Fusion(width=7, scaling=scaling).solve(mlp.sub_mlps(), key=keys[e]).parts
        np.testing.assert_allclose(fused.sub_mlps().rows()[e], alone.rows.rows(), atol=1e-5)
        assert (fused.labels[...][e] == alone.labels).all()
    for other in (fused.plain(), fused.wide_copy(), fused.padded(24)):
        np.testing.assert_allclose(other(x), fused(x), atol=1e-5)
