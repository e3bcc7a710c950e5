"""Matrix product operators: exactness, bounds, orders of contraction, and published sizes."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import fusion_jax as fj
from fusion_jax import mpo
from fusion_jax.methods.registry import method_from_json
from fusion_jax.mpo import Layout, full_bonds, products
from fusion_jax.nn.linear_forms import matrix_of
from fusion_jax.training.methods.squeezing import Cut, cheapest_cut, cut
from tests.helpers import unchecked

SMALL = Layout((2, 3, 2), (3, 2, 4), full_bonds((2, 3, 2), (3, 2, 4)))


def matrix(d, o, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (d, o), dtype)


def slow(cores):
    """The matrix by one sum over all indices, in numpy."""
    whole = np.asarray(cores[0], np.float64)
    for core in cores[1:]:
        whole = np.tensordot(whole, np.asarray(core, np.float64), axes=(-1, 0))
    m = len(cores)
    whole = whole.reshape(whole.shape[1:-1])
    whole = whole.transpose([*range(0, 2 * m, 2), *range(1, 2 * m, 2)])
    return whole.reshape(math.prod(c.shape[1] for c in cores), -1)


@pytest.mark.full(quick=1)
@pytest.mark.parametrize(
    ("d", "o", "layout"),
    [
        (12, 24, SMALL),
        (11, 23, SMALL),
        (24, 24, mpo.chain(24, 24, 5)),
        (30, 20, mpo.layout_of(30, 20, 3)),
        (13, 17, mpo.layout_of(13, 17, 4)),
        (7, 5, Layout((7,), (5,), ())),
    ],
)
def test_full_bonds_are_exact(d, o, layout):
    w = matrix(d, o)
    train = mpo.decompose(w, layout)
    assert [core.shape for core in train.cores] == layout.shapes
    np.testing.assert_allclose(mpo.contract(train.cores, (d, o)), w, atol=1e-5)
    np.testing.assert_allclose(slow(train.cores)[:d, :o], w, atol=1e-5)
    assert train.bound == 0
    with jax.enable_x64(True):
        w = matrix(d, o, dtype=jnp.float64)
        train = mpo.decompose(w, layout)
        np.testing.assert_allclose(mpo.contract(train.cores, (d, o)), w, atol=1e-12)


@pytest.mark.parametrize("bond", [1, 3, 8])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.full(quick=1)
def test_truncation_keeps_its_bound_and_is_near_the_best(bond, seed):
    layout = mpo.layout_of(24, 36, 4).capped(bond)
    w = matrix(24, 36, seed)
    train = mpo.decompose(w, layout)
    error = np.linalg.norm(mpo.contract(train.cores, w.shape) - w)
    assert error <= train.bound * (1 + 1e-5) + 1e-5
    # No matrix with these bonds is nearer than the best of the ranks at any one bond.
    least = max(
        np.sqrt(np.square(values[b:]).sum())
        for values, b in zip(train.spectra, layout.bonds, strict=True)
    )
    assert error >= least * (1 - 1e-5)


def test_spectra_are_those_of_the_unfoldings():
    w = matrix(12, 24)
    train = mpo.decompose(w, SMALL)
    axes = np.asarray(w).reshape(2, 3, 2, 3, 2, 4).transpose(0, 3, 1, 4, 2, 5)
    for k, values in enumerate(train.spectra, 1):
        unfolding = axes.reshape(math.prod(axes.shape[: 2 * k]), -1)
        expected = np.linalg.svd(unfolding, compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    shares = [np.asarray(v) / np.sum(v) for v in train.spectra]
    expected = [-(v * np.log(v)).sum() for v in shares]
    np.testing.assert_allclose(mpo.entropies(train.spectra), expected, rtol=1e-5)


def unfoldings(cores):
    """The singular values at each bond, by the whole matrix in float64."""
    sizes = [core.shape[1:3] for core in cores]
    m = len(sizes)
    axes = slow(cores).reshape(*(i for i, _ in sizes), *(j for _, j in sizes))
    axes = axes.transpose([axis for k in range(m) for axis in (k, m + k)])
    return [
        np.linalg.svd(axes.reshape(math.prod(axes.shape[: 2 * k]), -1), compute_uv=False)
        for k in range(1, m)
    ]


@pytest.mark.full
@pytest.mark.parametrize("bond", [5, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.float64, 1e-13)])
def test_spectra_need_no_matrix_and_no_gauge(bond, dtype, tolerance, x64):
    layout = mpo.layout_of(24, 36, 4)
    layout = layout if bond is None else layout.capped(bond)
    cores = list(mpo.decompose(matrix(24, 36, dtype=dtype), layout).cores)
    for k, b in enumerate(layout.bonds):
        change = (
            jnp.linalg.qr(matrix(b, b, k, dtype))[0] * jnp.linspace(0.1, 3, b, dtype=dtype)[None]
        )
        cores[k] = jnp.tensordot(cores[k], change, 1)
        cores[k + 1] = jnp.tensordot(jnp.linalg.inv(change), cores[k + 1], 1)
    found = jax.jit(mpo.spectra_of)(cores)
    for values, expected in zip(found, unfoldings(cores), strict=True):
        assert values.dtype == dtype
        size, atol = len(values), tolerance * expected[0]
        np.testing.assert_allclose(values, expected[:size], rtol=0, atol=atol)
        np.testing.assert_allclose(expected[size:], 0, atol=atol)


@pytest.mark.full
def test_the_estimate_of_a_cut_is_what_it_loses():
    layer = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
    chain, _ = fj.compress_matrices(nnx.List([layer]), fj.MPO(bond=None, cores=4), matrices="0")
    for bond in range(3):
        model = nnx.clone(chain)
        core = model[0].cores[bond]
        # Four decades, so that what is cut is small beside what stays.
        core.set_value(core[...] * jnp.logspace(0, -4, core.shape[-1])[None, None, None])
        chosen = cheapest_cut(model)
        assert chosen is not None
        before, after = (slow([c[...] for c in m[0].cores]) for m in (model, cut(model, chosen)))
        lost = np.linalg.norm(after - before)
        assert lost < 1e-3 * np.linalg.norm(before)
        np.testing.assert_allclose(chosen.estimate, lost, rtol=0.02)


@pytest.fixture
def spoil(monkeypatch):
    """Makes the decompositions of matrices of one shape, or of all chains, wrong."""
    decompose, recompressed = mpo.decompose, mpo.recompressed

    def wrong(train):
        return train._replace(cores=(1.5 * train.cores[0], *train.cores[1:]))

    def start(*shapes):
        jax.clear_caches()
        monkeypatch.setattr(
            mpo, "decompose", lambda w, layout: wrong(decompose(w, layout))
            if w.shape in shapes else decompose(w, layout)
        )  # fmt: skip
        monkeypatch.setattr(mpo, "recompressed", lambda *a: wrong(recompressed(*a)))

    yield start
    jax.clear_caches()


ABOVE = pytest.raises(ArithmeticError, match="the error of a decomposition is above its bound, by")


@pytest.mark.full
@pytest.mark.parametrize("bond", [3, None])
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_compressing_checks_each_matrix_by_its_own_bound(bond, shape, spoil, key):
    mlp = fj.Mlp(12, 24, act="relu", rngs=nnx.Rngs(0))
    # Of the error of both together, that of the one is nothing.
    mlp.down.kernel.set_value(1e-4 * mlp.down.kernel[...])
    _, report = fj.compress(mlp, fj.MPO(bond=bond, cores=3), key=key)
    assert 0 <= report.rows[0].facts["excess"] <= 1e-5
    spoil(shape)
    with ABOVE:
        fj.compress(mlp, fj.MPO(bond=bond, cores=3), key=key)
    with ABOVE:
        fj.compress_mlp(mlp.sub_mlps(), fj.MPO(bond=bond, cores=3), key=key)


def test_compressing_matrices_and_embeddings_checks_their_bounds(spoil):
    model = nnx.List([nnx.Linear(12, 24, rngs=nnx.Rngs(0)), nnx.Embed(20, 12, rngs=nnx.Rngs(0))])
    spoil((12, 24), (20, 12))
    for path in "01":
        with ABOVE:
            fj.compress_matrices(model, fj.MPO(bond=3, cores=3), matrices=path)


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2])
def test_cuts_check_their_bounds(count, spoil, key):
    mlp = fj.Mlp(12, 24, act="relu", rngs=nnx.Rngs(0))
    if count > 1:
        mlp = jax.tree.map(lambda x: jnp.stack([x] * count), mlp)
    chained, _ = fj.compress(mlp, fj.MPO(bond=4, cores=3), key=key)
    chosen = Cut("up", 0, 2, 0.0)
    assert cut(chained, chosen).up.layout.bonds[0] == 2
    spoil()
    with ABOVE:
        cut(chained, chosen)


@pytest.mark.full
def test_no_rows_at_all(key):
    mlp = fj.Mlp(12, 24, act="relu", rngs=nnx.Rngs(0))
    chained, _ = fj.compress(mlp, fj.MPO(bond=4, cores=3), key=key)
    assert chained(jnp.zeros((2, 0, 12))).shape == (2, 0, 12)
    embed = nnx.List([nnx.Embed(20, 12, rngs=nnx.Rngs(0))])
    table = fj.compress_matrices(embed, fj.MPO(bond=4, cores=3), matrices="0")[0][0]
    assert table(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, 12)
    assert table.attend(jnp.zeros((0, 12))).shape == (0, 20)


def test_bonds_are_balanced():
    train = mpo.decompose(matrix(12, 24), SMALL)
    for left, right in zip(train.cores[:-1], train.cores[1:], strict=True):
        a = np.linalg.norm(left.reshape(-1, left.shape[-1]), axis=0)
        b = np.linalg.norm(right.reshape(right.shape[0], -1), axis=1)
        assert (a / b).min() > 0.2 and (a / b).max() < 5


def test_low_rank_and_zero_matrices_are_finite():
    for w in (jnp.ones((12, 1)) @ jnp.ones((1, 24)), jnp.zeros((12, 24))):
        train = mpo.decompose(w, SMALL)
        np.testing.assert_allclose(mpo.contract(train.cores, w.shape), w, atol=1e-5)


@pytest.mark.full(quick=2)
@pytest.mark.parametrize(
    ("n", "bond", "transposed"),
    [
        (1, 1, True),
        (1, None, False),
        (7, 4, False),
        (7, None, True),
        (500, 1, False),
        (500, 4, True),
    ],
)
def test_products_equal_those_with_the_matrix(n, bond, transposed):
    layout = mpo.layout_of(30, 22, 3)
    layout = layout if bond is None else layout.capped(bond)
    cores = mpo.decompose(matrix(30, 22), layout).cores
    w = mpo.contract(cores, (30, 22))
    w = w.T if transposed else w
    x = matrix(n, w.shape[0], 1)
    y = mpo.product(x, cores, w.shape[1], transposed=transposed)
    np.testing.assert_allclose(y, x @ w, atol=1e-4)


def test_the_order_follows_the_batch():
    # One row never pays for the matrix; many rows do where the cores are large.
    full = mpo.layout_of(768, 768, 5)
    assert not mpo.plan(1, full).rebuilds
    assert mpo.plan(1, full).flops < mpo.plan(1, full).rebuild_flops
    assert mpo.plan(100_000, full).rebuilds
    small = full.capped(4)
    assert not mpo.plan(100_000, small).rebuilds
    assert mpo.plan(100_000, small).flops < 0.5 * mpo.plan(100_000, small).rebuild_flops


def least(layout, n, transposed):
    """The least cost of any order in which every step sums over something, by brute force."""
    m = len(layout.inputs)
    rows, columns, bonds = ([f"{name}{k}" for k in range(m + 1)] for name in "iob")
    sizes = dict(zip(bonds, (1, *layout.bonds, 1), strict=True)) | {"n": n}
    sizes |= dict(zip(rows, layout.inputs, strict=False))
    sizes |= dict(zip(columns, layout.outputs, strict=False))
    summed, kept = (columns, rows) if transposed else (rows, columns)
    target = {"n", *kept[:m]}
    cores = [frozenset((bonds[k], rows[k], columns[k], bonds[k + 1])) for k in range(m)]

    def cost(terms):
        if len(terms) == 1:
            return 0
        best = math.inf
        for a in range(len(terms)):
            for b in range(a):
                rest = [t for i, t in enumerate(terms) if i not in (a, b)]
                both = terms[a] | terms[b]
                own = both & target.union(*rest)
                if terms[a] & terms[b]:
                    size, written = (math.prod(sizes[s] for s in part) for part in (both, own))
                    best = min(best, size + mpo.WRITE * written + cost([*rest, own]))
        return best

    return cost([frozenset(("n", *summed[:m])), *cores])


def executed(f, *arguments):
    """The operations of all products that a function does."""

    def count(jaxpr):
        total = 0
        for step in jaxpr.eqns:
            if step.primitive.name == "dot_general":
                ((summed, _), _) = step.params["dimension_numbers"]
                inside = math.prod(step.invars[0].aval.shape[axis] for axis in summed)
                total += 2 * inside * step.outvars[0].aval.size
            total += sum(count(sub) for sub in jaxprs_in_params(step.params))
        return total

    return count(jax.make_jaxpr(f)(*arguments).jaxpr)


def random_layout(seed):
    rng = np.random.default_rng(seed)
    # From 2 on, so that an order without sums, which are not looked for, gains nothing.
    inputs, outputs = (tuple(rng.integers(2, 5, 5).tolist()) for _ in range(2))
    bonds = tuple(rng.integers(2, most + 1).item() for most in full_bonds(inputs, outputs))
    return Layout(inputs, outputs, bonds)


@pytest.mark.parametrize("n", [3, 200, 10_000])
@pytest.mark.parametrize("bond", [2, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_order_costs_less(n, bond, transposed):
    layout = Layout((4, 3, 2), (2, 3, 4), full_bonds((4, 3, 2), (2, 3, 4))).capped(bond)
    assert mpo.plan(n, layout, transposed=transposed).cost == least(layout, n, transposed)


LAYOUTS = [*map(random_layout, range(10)), mpo.chain(24, 32, 4), mpo.chain(48, 192, 11)]


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_what_is_executed_is_the_cheapest_order(layout):
    d, o = math.prod(layout.inputs), math.prod(layout.outputs)
    cores = [
        jax.random.normal(jax.random.key(k), shape) / math.sqrt(shape[-1])
        for k, shape in enumerate(layout.shapes)
    ]
    w = slow(cores)
    for n, transposed in ((2, False), (50, True), (10_000, False), (10_000, True)):
        found = mpo.plan(n, layout, transposed=transposed)
        if len(cores) < 6:
            assert found.cost == least(layout, n, transposed)
        x = jax.ShapeDtypeStruct((n, o if transposed else d), jnp.float32)
        product = partial(mpo.product, columns=d if transposed else o, transposed=transposed)
        assert executed(product, x, cores) == found.flops
    order = mpo.rebuilding(layout)
    assert executed(lambda cores: mpo.contract(cores, (d, o)), cores) == 2 * order.multiplies
    scale = np.abs(w).max()
    np.testing.assert_allclose(mpo.contract(cores, (d, o)) / scale, w / scale, atol=1e-5)


def test_many_rows_are_worth_the_matrix():
    # So that the test above sees both kinds of order.
    assert 6 <= sum(mpo.plan(10_000, layout).rebuilds for layout in LAYOUTS) < len(LAYOUTS)


def test_a_long_chain_is_rebuilt_from_its_smaller_end():
    # From the larger end it would cost 1.6 times as much.
    layout = mpo.chain(768, 3072, 11)
    small, large = 24 * 48, 32 * 64
    found = mpo.plan(2048, layout)
    assert found.rebuilds
    steps = 9 * 1152 * 1152 * small + 1152 * small * large
    assert found.flops == 2 * (steps + 2048 * 768 * 3072)


def largest(f, *arguments):
    """The entries of the largest array that a function makes."""

    def most(jaxpr):
        own = [v.aval.size for step in jaxpr.eqns for v in step.outvars]
        below = [most(sub) for step in jaxpr.eqns for sub in jaxprs_in_params(step.params)]
        return max(own + below, default=0)

    return most(jax.make_jaxpr(f)(*arguments).jaxpr)


TOKENS = mpo.layout_of(30522, 384, 5)


@pytest.mark.parametrize(
    ("layout", "shape", "looks_up"),
    [
        (TOKENS, (32, 64), False),
        (TOKENS, (1,), True),
        (TOKENS.capped(8), (16,), True),
        (TOKENS.capped(4), (32, 512), False),
    ],
)
def test_embeddings_take_the_cheaper_way(layout, shape, looks_up):
    embed = mpo.MpoEmbed(30522, 384, use_bias=False, param_dtype=jnp.float32, **layout._asdict())
    n, whole = math.prod(shape), math.prod(layout.inputs) * math.prod(layout.outputs)
    assert mpo.looks_up(n, layout) == looks_up
    made = largest(embed, jnp.zeros(shape, int))
    # Off the matrix, nothing is much larger than it; core by core, nothing is as large.
    assert made < whole if looks_up else whole <= made < 2 * whole


@pytest.mark.full
@pytest.mark.parametrize("bond", [3, None])
def test_both_ways_give_the_same_rows_and_gradients(bond, monkeypatch):
    layout = mpo.layout_of(50, 12, 3)
    layout = layout if bond is None else layout.capped(bond)
    cores = mpo.decompose(matrix(50, 12), layout).cores
    ids, weights = jnp.array([0, 49, 7, 7, 31]), matrix(5, 12, 1)

    def loss(cores):
        found = mpo.rows(ids, cores, (50, 12))
        return (weights * found).sum(), found

    results = []
    for way in (True, False):
        monkeypatch.setattr(products, "looks_up", lambda n, layout, way=way: way)
        results.append(jax.grad(loss, has_aux=True)(cores))
    (slopes, found), (other_slopes, other) = results
    np.testing.assert_allclose(found, slow(cores)[ids, :12], atol=1e-5)
    np.testing.assert_allclose(found, other, atol=1e-5)
    for a, b in zip(slopes, other_slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.full
def test_bfloat16_is_rounded_once():
    cores = mpo.decompose(matrix(48, 48), mpo.layout_of(48, 48, 5)).cores
    cores = [core.astype(jnp.bfloat16) for core in cores]
    w = mpo.contract(cores, (48, 48))
    assert w.dtype == jnp.bfloat16
    np.testing.assert_allclose(w.astype(jnp.float32), slow(cores), rtol=1.01 * 2**-8, atol=1e-6)


@pytest.mark.full
def test_a_zero_matrix_is_compressed_and_reported(key):
    mlp = fj.Mlp(12, 24, act="relu", rngs=nnx.Rngs(0))
    mlp.down.kernel.set_value(jnp.zeros((24, 12)))
    for bond in (None, 2):
        smaller, report = fj.compress(mlp, fj.MPO(bond=bond, cores=3), key=key)
        np.testing.assert_array_equal(matrix_of(smaller.down), 0)
        facts = report.rows[0].facts
        json.dumps(facts, allow_nan=False)
        up = mpo.decompose(mlp.up.kernel[...], fj.MPO(bond=bond, cores=3).layout(12, 24))
        np.testing.assert_allclose(facts["entropy"], mpo.entropies(up.spectra).max() / 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bonds", "params"),
    [
        ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2), (10, 200, 480, 12), 4_110_644),
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16), 2_544_016),
        ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4), (12, 192, 384, 16), 2_544_016),
        ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), (12, 192, 192, 12), 663_840),
    ],
)
def test_published_sizes(inputs, outputs, bonds, params):
    assert full_bonds(inputs, outputs) == bonds
    assert Layout(inputs, outputs, bonds).params == params


PAPER = {"inputs": (3, 4, 4, 4, 4), "outputs": (4, 4, 8, 6, 4)}


def test_factors_may_be_given():
    method = fj.MPO(bond=None, **PAPER)
    up, down = method.layout(768, 3072), method.layout(3072, 768)
    assert up == Layout(*PAPER.values(), (12, 192, 384, 16))
    assert down == Layout(up.outputs, up.inputs, up.bonds)
    assert fj.MPO(bond=100, **PAPER).layout(768, 3072) == up.capped(100)
    quarter = fj.MPO(**PAPER).layout(3072, 768)
    assert quarter.inputs == up.outputs
    more = down.capped(max(quarter.bonds) + 1)
    assert quarter.params <= 768 * 3072 / 4 < more.params
    again = method_from_json(json.loads(json.dumps(method.to_json())))
    assert again == method and hash(again) == hash(method)
    assert again.to_json() == json.loads(json.dumps(method.to_json()))


def test_an_mlp_is_exact_with_given_factors(key, tmp_path):
    mlp = fj.Mlp(11, 24, act="relu", rngs=nnx.Rngs(0))
    method = fj.MPO(bond=None, cores=3, inputs=(2, 3, 2), outputs=(3, 2, 4))
    chained, report = fj.compress(mlp, method, key=key)
    assert chained.up.layout.inputs == chained.down.layout.outputs == (2, 3, 2)
    assert report.method["inputs"] == [2, 3, 2]
    x = matrix(5, 11)
    np.testing.assert_allclose(chained(x), mlp(x), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": (3, 4, 4, 4, 4)}, "together or not at all"),
        ({"inputs": (24, 32), "outputs": (48, 64)}, r"inputs must be 5 factors .* got \[24, 32\]"),
        (PAPER | {"outputs": (64, 48)}, r"outputs must be 5 factors .* got \[64, 48\]"),
        (PAPER | {"inputs": (3, 4, 4, 4, 0)}, "inputs must be 5 factors from 1 on"),
    ],
)
def test_factors_that_are_none(fields, message):
    with pytest.raises(fj.InputError, match=message):
        fj.MPO(**fields)


@pytest.mark.parametrize(("d", "p"), [(13, 24), (12, 12), (6, 24)])
def test_factors_that_do_not_fit(d, p, key):
    mlp = fj.Mlp(d, p, act="relu", rngs=nnx.Rngs(0))
    method = fj.MPO(bond=None, cores=3, inputs=(2, 3, 2), outputs=(3, 2, 4))
    message = f"factors of 12 and 24 do not fit a {d} x {p} matrix, either way round: each must be"
    with pytest.raises(fj.InputError, match=message):
        fj.compress(mlp, method, key=key)


def test_of_two_ways_round_the_better_one_is_taken():
    method = fj.MPO(bond=None, cores=2, inputs=(4, 5), outputs=(4, 4))
    assert method.layout(16, 20).inputs == (4, 4) and method.layout(20, 16).inputs == (4, 5)
    assert method.layout(15, 19).outputs == (4, 5)


def test_published_chain():
    layout = mpo.chain(768, 3072, 11)
    assert layout.inputs == (32, *(1,) * 9, 24) and layout.outputs == (64, *(1,) * 9, 48)
    assert layout.params == 2048 * 1152 + 9 * 1152**2 + 1152 * 1152


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_a_share_is_used_up_and_not_more(share):
    layout = mpo.within_share(mpo.layout_of(96, 384, 5), 96, 384, share)
    assert layout.params <= share * 96 * 384
    wider = mpo.layout_of(96, 384, 5).capped(max(layout.bonds) + 1)
    assert wider.params > share * 96 * 384


@pytest.mark.parametrize("n", [1, 7, 97, 384, 768, 30522, 50257])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_balanced_factors(n, parts):
    factors = mpo.balanced(n, parts)
    assert len(factors) == parts
    assert n <= math.prod(factors) <= 1.2 * n + 2
    assert max(factors) <= math.ceil(2 * math.prod(factors) ** (1 / parts))


@pytest.mark.parametrize("count", [4, 1600])
@pytest.mark.full(quick=1)
def test_rows_that_are_not_there_are_nan_as_in_embeddings(count, key):
    embed = nnx.Embed(99, 24, rngs=nnx.Rngs(0))
    model = nnx.List([embed])
    chain, _ = fj.compress_matrices(model, fj.MPO(bond=None, cores=3), matrices="0")
    ids = jnp.resize(jnp.array([5, 99, 150, -1]), count)
    np.testing.assert_allclose(chain[0](ids), embed(ids), atol=1e-5)
    assert np.isnan(chain[0](ids)[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bond": 8.0}, "for a bond of 8 give an int"),
        ({"bond": float("inf")}, "must be in"),
        ({"cores": 2.5}, "cores must be an int"),
        ({"inputs": 16, "outputs": (4, 4), "cores": 2}, "inputs must be whole numbers"),
        ({"inputs": (4.0, 4.0), "outputs": (4, 4), "cores": 2}, "inputs must be whole numbers"),
        ({"inputs": "44", "outputs": (4, 4), "cores": 2}, "inputs must be whole numbers"),
    ],
)
def test_sizes_that_are_none(options, message):
    with unchecked(), pytest.raises(fj.InputError, match=message):
        fj.MPO(**options)


def test_factors_may_be_numpy_integers(key):
    with unchecked():
        method = fj.MPO(bond=None, cores=2, inputs=np.array([4, 8]), outputs=np.array([6, 8]))
    assert json.loads(json.dumps(method.to_json()))["inputs"] == [4, 8]
