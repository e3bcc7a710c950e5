"""The kernel engines against brute force, and what they promise."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ntk
from ntk import empirical
from ntk.engines.base import KernelTask
from ntk.engines.blocks import largest_plan
from ntk.engines.jacobian import FactoredTerm, JacobianEngine
from tests.helpers import unchecked
from tests.ntk_models import MODELS, contracted, jacobian, mlp, reference, relative


@pytest.mark.full(quick=3)
@pytest.mark.parametrize("engine", ["jacobian", "vector-product"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_equal_brute_force(name, engine, x64):
    f, params, (x1, x2), (j1, j2) = reference(name)
    last = (-1,) if j1.ndim > 2 else ()
    cases = [("sgd", x2, last), ("adam", None, last)]
    if name in ("mlp", "module"):  # the others take long to compile
        cases += [("sgd", None, ()), ("adam", x2, ())]
    for kind, other, axes in cases:
        got = ntk.kernel(f, params, x1, other, kind=kind, trace_axes=axes, engine=engine)
        want = contracted(j1, j1 if other is None else j2, kind, axes)
        assert got.dtype == "float64"
        assert relative(got, want) < 1e-10


def test_pairs_of_many_outputs_are_computed_once(x64):
    """With many outputs one half of a symmetric product is computed, and the other mirrored."""
    draw = np.random.default_rng(0)
    params = {"w": jnp.asarray(draw.normal(size=(3, 350))), "b": jnp.zeros((1, 350))}
    x = jnp.asarray(draw.normal(size=(3, 3)))

    def f(params, x):
        return jnp.tanh(x @ params["w"] + params["b"])

    got = ntk.kernel(f, params, x, engine="jacobian")
    j = jacobian(f, params, x)
    assert relative(got, contracted(j, j)) < 1e-10


@pytest.mark.parametrize("axes", [1, (2, 1), (-2,)])
def test_trace_axes_may_be_any_and_are_summed(axes, x64):
    f, params, (x1, _), (j1, _) = reference("module")
    got = ntk.kernel(f, params, x1, trace_axes=axes)
    want = contracted(j1, j1, trace_axes=(axes,) if isinstance(axes, int) else axes)
    assert relative(got, want) < 1e-10


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mlp", "zoo"])
@pytest.mark.full(quick=2)
def test_float32(name, kind):
    f, params, inputs = MODELS[name](jnp.float32)
    x = inputs(4, jax.random.key(0))
    j = jacobian(f, params, x)
    for engine in ("jacobian", "vector-product"):
        got = ntk.kernel(f, params, x, kind=kind, engine=engine)
        assert got.dtype == "float32"
        assert relative(got, contracted(j, j, kind)) < 1e-5


def test_bfloat16_parameters_are_summed_in_float32():
    def f(p, x):
        return (x @ p).astype(jnp.float32)

    params = jnp.full((1024, 1), 1.0, jnp.bfloat16)
    x = jnp.full((2, 1024), 1.0, jnp.bfloat16)
    got = ntk.kernel(f, params, x)
    # A sum in bfloat16 would stop at 256.
    assert got.dtype == "float32"
    np.testing.assert_array_equal(got, np.full((2, 2, 1, 1), 1024.0))


def test_symmetric_and_positive_semi_definite():
    f, params, inputs = MODELS["mlp"](jnp.float32)
    k = ntk.kernel(f, params, inputs(40, jax.random.key(3)), block_size=16)
    matrix = np.asarray(k).transpose(0, 2, 1, 3).reshape(120, 120)
    np.testing.assert_array_equal(matrix, matrix.T)
    values = np.linalg.eigvalsh(matrix.astype(np.float64))
    # More gradients than parameters: many eigenvalues are 0 but for rounding.
    assert values[0] > -1e-6 * values[-1]


@pytest.mark.parametrize("engine", ["jacobian", "vector-product", "neural-tangents"])
@pytest.mark.full(quick=1)
def test_independent_of_blocks(engine, x64):
    f, params, inputs = mlp(jnp.float64)
    x1, x2 = inputs(7, jax.random.key(1)), inputs(5, jax.random.key(2))
    for kind in ("sgd",) if engine == "neural-tangents" else ("sgd", "adam"):
        for other in (None, x2):
            whole = ntk.kernel(f, params, x1, other, kind=kind, engine=engine)
            for size in (1, 3):
                got = ntk.kernel(f, params, x1, other, kind=kind, engine=engine, block_size=size)
                assert relative(got, np.asarray(whole)) < 1e-13


def task(f, params, x, kind="sgd", n=None):
    """The task of a kernel, its values and inputs, as `ntk.kernel` makes them."""
    leaves, arrays = jax.tree.leaves(params), jax.tree.leaves(x)
    traced = empirical._traced(f, params, leaves, x, arrays, ())
    made = KernelTask(
        program=traced.program,
        leaves=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        kept=int(np.prod(traced.kept)),
        n1=arrays[0].shape[0],
        n2=arrays[0].shape[0],
        same=True,
        sign=kind == "adam",
        dtype=leaves[0].dtype,
        shards=1,
    )
    return made, (leaves, traced.program.constants), (arrays, arrays)


def layers():
    """A function with a table, matrices, and a stack whose gradients do not stay factors."""
    k = jax.random.split(jax.random.key(0), 5)
    params = {
        "table": jax.random.normal(k[0], (50, 32)),
        "w": [jax.random.normal(k[1], (32, 48)) / 6, jax.random.normal(k[2], (48, 32)) / 6],
        "stack": jax.random.normal(k[3], (10, 32, 4)) / 6,
        "scale": jnp.ones((1, 1, 32)),
    }

    def f(p, ids):
        x = jnp.tanh((p["table"][ids] * p["scale"]) @ p["w"][0])
        return (jnp.tanh(x @ p["w"][1]) @ p["stack"].sum(0)).sum(1)

    return f, params, jax.random.randint(k[4], (8, 3), 0, 50)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.full(quick=1)
def test_memory_limit_is_kept(kind, x64):
    f, params, x = layers()
    made, values, inputs = task(f, params, x, kind)
    want = np.asarray(ntk.kernel(f, params, x, kind=kind, engine="jacobian"))
    plans = []
    for limit in (400_000, 60_000):
        plan, need = largest_plan(JacobianEngine(made), values, inputs, 8, limit)
        assert need <= limit
        plans.append(plan)
        got = ntk.kernel(f, params, x, kind=kind, engine="jacobian", memory_limit=limit)
        assert relative(got, want) < 1e-12
    # Blocks over examples, and over parameters.
    assert plans[1].rows < plans[0].rows == 8
    assert plans[1].groups > plans[0].groups > 1


def test_memory_limit_too_small_says_what_is_needed(x64):
    f, params, (x, _), _ = reference("mlp")
    with pytest.raises(ntk.InputError, match="too small for one example") as error:
        ntk.kernel(f, params, x, memory_limit=100)
    needed = int(re.search(r"needs ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert ntk.kernel(f, params, x, memory_limit=needed).shape == (5, 5, 3, 3)


def test_gradients_stay_factors():
    f, params, x = layers()
    made, *_ = task(f, params, x)
    kept = [term.leaf for term in JacobianEngine(made).terms if isinstance(term, FactoredTerm)]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(paths[i], simple=True, separator=".") for i in kept]
    assert names == ["table", "w.0", "w.1"]


@pytest.mark.parametrize("engine", ["jacobian", "vector-product", "neural-tangents"])
def test_gradients_stay_factors_in_branches(engine, key, x64):
    def f(w, x):
        branches = [lambda x, s=s: jnp.tanh((s * x) @ w / s) for s in (1.0, 2.0, 4.0)]
        return jax.lax.switch(((x > 0).sum() % 3).astype(jnp.int32), branches, x)

    w, x = jax.random.normal(key, (40, 30)) / 6, jax.random.normal(key, (5, 40))
    made, *_ = task(f, w, x)
    assert [type(term) for term in JacobianEngine(made).terms] == [FactoredTerm]
    j = jacobian(f, w, x)
    assert relative(ntk.kernel(f, w, x, engine=engine), contracted(j, j)) < 1e-12


def branches_with_poles():
    """Branches that are not taken divide by zero, before and after products with parameters.

    One predicate is a constant, one depends on a parameter, and one on the example.
    """
    k = jax.random.split(jax.random.key(5), 3)
    params = {"w": jax.random.normal(k[0], (6, 4)), "zero": jnp.zeros(2)}
    constant = jnp.int32(1)

    def f(p, x):
        w, zero = p["w"], p["zero"][0]
        branches = [lambda h: h / zero, lambda h: jnp.tanh(h), lambda h: jnp.log(zero) * h]
        x = jax.lax.switch(constant, branches, x)

        def inner(h):  # the inputs of the first product are infinite
            return jax.lax.cond(zero > 0, lambda h: (h / zero) @ w, lambda h: h @ w, h)

        poles = lambda h: jnp.log(0 * inner(h)) + jnp.sqrt(zero)  # noqa: E731
        return jax.lax.cond(x.sum() > 1e9, poles, lambda h: inner(jnp.sin(h)), x)

    return f, params, jax.random.normal(k[1], (3, 6))


@pytest.mark.parametrize("engine", ["jacobian", "vector-product", "neural-tangents"])
def test_branches_that_are_not_taken_have_no_gradients(engine, x64):
    f, params, x = branches_with_poles()
    params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    one = jax.vmap(lambda x: jax.jacrev(lambda p: f(p, x[None])[0])(params))(x)
    j = np.concatenate([np.asarray(a).reshape(3, 4, -1) for a in jax.tree.leaves(one)], -1)
    assert np.isfinite(j).all()
    for kind in ("sgd",) if engine == "neural-tangents" else ("sgd", "adam"):
        got = ntk.kernel(f, params, x, kind=kind, engine=engine)
        assert relative(got, contracted(j, j, kind)) < 1e-12
    if engine == "jacobian":
        made, *_ = task(f, params, x)
        assert any(isinstance(term, FactoredTerm) for term in JacobianEngine(made).terms)
    if engine == "neural-tangents":
        with pytest.raises(ntk.InputError, match="computes every branch"):
            ntk.kernel(f, params, x, engine=engine, implementation="structured-derivatives")


def test_parameter_that_does_not_matter():
    np.testing.assert_array_equal(ntk.kernel(lambda p, x: x, W, X), np.zeros((4, 4, 2, 2)))


@pytest.mark.full
def test_auto_counts(x64):
    f, params, (x, _), _ = reference("bert")
    made, *_ = task(f, params, x)
    first, second = empirical._engines("auto", None, made)
    assert isinstance(first, JacobianEngine)
    assert first.flops() < second.flops()

    # Many outputs, and parameters that no single product uses: vector products are cheaper.
    def chain(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0] @ jnp.ones((8, 200))

    made, *_ = task(chain, jnp.ones((2, 8, 8)), jnp.ones((3, 8)))
    assert not isinstance(empirical._engines("auto", None, made)[0], JacobianEngine)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.full
def test_mesh(axis_type):
    f, params, inputs = MODELS["zoo"](jnp.float32)
    x1, x2 = inputs(16, jax.random.key(0)), inputs(8, jax.random.key(1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    for engine in ("jacobian", "vector-product"):
        for kind, other in (("sgd", None), ("adam", x2)):
            want = np.asarray(ntk.kernel(f, params, x1, other, kind=kind, engine=engine))
            with jax.set_mesh(mesh):
                on_mesh = jax.device_put((x1, other), sharded)
                got = ntk.kernel(f, params, *on_mesh, kind=kind, engine=engine)
                assert got.sharding.mesh == mesh
                assert relative(got, want) < 1e-5
    blocks = ntk.kernel(f, params, jax.device_put(x1, sharded), block_size=8)
    assert relative(blocks, np.asarray(ntk.kernel(f, params, x1))) < 1e-5


def test_mesh_with_parameters_that_do_not_count():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    model = nnx.Sequential(*[nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(i)) for i in (1, 2)])
    want = np.asarray(ntk.kernel(*ntk.functional(model, wrt=r"layers\.0\..*"), x))
    with jax.set_mesh(mesh):
        model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
        f, params = ntk.functional(model, wrt=r"layers\.0\..*")
        got = ntk.kernel(f, params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert relative(got, want) < 1e-5


def test_traced_once_and_forgotten_with_the_function():
    traces = []

    def f(p, x):
        traces.append(1)
        return x @ p

    x = jnp.ones((3, 2))
    first = ntk.kernel(f, jnp.ones((2, 1)), x)
    count = len(traces)
    np.testing.assert_array_equal(ntk.kernel(f, 2 * jnp.ones((2, 1)), x), first)
    ntk.kernel(f, jnp.ones((2, 1)), x, kind="adam", block_size=2)
    assert len(traces) == count
    before = len(empirical._TRACED)
    del f
    gc.collect()
    assert len(empirical._TRACED) == before - 1


def test_callable_that_cannot_be_referenced_weakly():
    class Slotted:
        __slots__ = ()

        def __call__(self, p, x):
            return x @ p

    assert ntk.kernel(Slotted(), jnp.ones((2, 1)), jnp.ones((3, 2))).shape == (3, 3, 1, 1)


def test_progress(capsys):
    f, params, inputs = MODELS["mlp"](jnp.float32)
    x = inputs(4, jax.random.key(0))
    ntk.kernel(f, params, x, block_size=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "Kernel: tracing the function ...",
        "Kernel: choosing an engine and its blocks ...",
    ]
    assert re.match(r"Kernel: 0/\d+ compiling", lines[2])
    done, total = re.match(r"Kernel: (\d+)/(\d+) block 4 of 4", lines[-1]).groups()
    assert done == total
    ntk.kernel(f, params, x)
    assert capsys.readouterr().err == ""


W = jnp.ones((2, 3))
X = jnp.ones((4, 2))


def linear(p, x):
    return x @ p


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((lambda p, x: (x @ p,), W, X), {}, "must return one array; it returns a tuple"),
        ((lambda p, x: {"a": x @ p}, W, X), {}, "returns a dict"),
        ((lambda p, x: None, W, X), {}, "returns a NoneType"),
        ((lambda p, x: (x @ p).sum(), W, X), {}, r"examples on its first axis.*shape \(\)"),
        ((lambda p, x: (x @ p).astype(int), W, X), {}, "floating-point numbers; it returns int32"),
        ((lambda p, x: x[:, :1] * p.sum() * x.shape[0], W, X), {}, None),
        ((lambda p, x: jnp.ones((x.shape[0], x.shape[0])) * p.sum(), W, X), {}, "its own example"),
        ((linear, W.at[0, 0].set(jnp.nan), X), {}, "NaN or infinite values in parameter params"),
        ((lambda p, x: x @ p["a"], {"a": W / 0}, X), {}, "infinite values in parameter a"),
        ((linear, W.astype(int), X), {}, "only floating-point parameters have real gradients"),
        ((linear, {}, X), {}, "no parameter is chosen"),
        ((linear, W, ()), {}, "x1 holds no array"),
        ((linear, W, (X, X[:2])), {}, "the same number of them; got shapes"),
        ((linear, W, jnp.ones((0, 2))), {}, "at least one"),
        ((linear, W, jnp.asarray(1.0)), {}, "examples on its first axis"),
        ((linear, W, X, X[:, :1]), {}, "x1 and x2 must have .* the same shapes"),
        ((linear, W, X, X.astype(int)), {}, "must have the same dtypes"),
        ((linear, W, X, (X,)), {}, "x1 and x2 differ in structure"),
        ((linear, W, X), {"kind": "sdg"}, "unknown kind 'sdg'; did you mean 'sgd'"),
        ((linear, W, X), {"engine": "jacobien"}, "did you mean 'jacobian'"),
        ((linear, W, X), {"implementation": "structured-derivatives"}, "engine='neural-tangents'"),
        ((linear, W, X), {"trace_axes": 2}, "it has 2 axes, got 2"),
        ((linear, W, X), {"trace_axes": 0}, "other than the first"),
        ((linear, W, X), {"trace_axes": (1, -1)}, "twice"),
        ((linear, W, X), {"block_size": 0}, "block_size must be at least 1"),
        ((linear, W, X), {"memory_limit": -5}, "memory_limit must be at least 1"),
        (
            (linear, W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)),
            {"engine": "vector-product"},
            "would sum in bfloat16",
        ),
    ],
)
def test_input_errors(arguments, options, message):
    if message is None:  # depends on the batch in value only, which no one can see
        ntk.kernel(*arguments, **options)
        return
    with unchecked(), pytest.raises(ntk.InputError, match=message):
        ntk.kernel(*arguments, **options)


def test_not_under_jit():
    with pytest.raises(ntk.InputError, match=r"under jax\.jit"):
        jax.jit(lambda p: ntk.kernel(linear, p, X))(W)
