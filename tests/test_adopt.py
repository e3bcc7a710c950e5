"""Other people's modules: adopted, compressed, calibrated, trained, saved and released."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import fusion_jax as fj
import ntk
from fusion_jax.nn.watching import products
from fusion_jax.training import TrainConfig
from fusion_jax.training.engine.losses import Total
from fusion_jax.training.tasks.base import Prepared

KEY = jax.random.key(0)
D, P = 6, 12
X = jax.random.normal(jax.random.key(1), (2, 3, D))


def linear(i, o, rngs, **more):
    """With a bias that is not zero."""
    return nnx.Linear(i, o, rngs=rngs, bias_init=nnx.initializers.normal(0.5), **more)


class Plain(nnx.Module):
    def __init__(self, rngs, act=jax.nn.gelu, dtype=None):
        self.fc1, self.fc2 = linear(D, P, rngs, dtype=dtype), linear(P, D, rngs, dtype=dtype)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return self.fc2(self.dropout(self.act(self.fc1(x)))) * 0.5


class Gated(nnx.Module):
    """One bias of three."""

    def __init__(self, rngs):
        self.up_proj = linear(D, P, rngs)
        self.gate_proj = linear(D, P, rngs, use_bias=False)
        self.down_proj = linear(P, D, rngs, use_bias=False)

    def block(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))

    def __call__(self, x):
        return nnx.remat(self.block.__func__)(self, x)


class Arrays(nnx.Module):
    """Parameters as arrays, one of them transposed; the activation is on the second."""

    def __init__(self, rngs):
        draw = nnx.initializers.normal(0.4)
        self.w1, self.w3, self.w2 = (nnx.Param(draw(rngs.params(), (D, P))) for _ in range(3))

    def __call__(self, x):
        h = (x @ self.w1[...]) * jax.nn.softplus(x @ self.w3.get_value())
        return jnp.einsum("...p,dp->...d", h, self.w2[...])


class Sums(nnx.Module):
    def __init__(self, rngs):
        bias = nnx.initializers.normal(0.5)
        self.wi = nnx.Einsum("btd,pd->btp", (P, D), (P,), rngs=rngs, bias_init=bias)
        self.wo = nnx.Einsum("btp,pd->btd", (P, D), rngs=rngs)

    def __call__(self, x):
        return self.wo(jnp.tanh(self.wi(x)))


class Matrix(nnx.Module):
    """A linear layer of their own, which adds zeros where it has no bias."""

    def __init__(self, i, o, rngs):
        self.w = nnx.Param(nnx.initializers.normal(0.4)(rngs.params(), (i, o)))
        self.zeros = nnx.data(jnp.zeros(o))

    def __call__(self, x, *, scale):
        return jnp.matmul(x, self.w[...]) * scale + self.zeros[None, None]


class OwnLayers(nnx.Module):
    def __init__(self, rngs):
        self.c_fc, self.c_proj = Matrix(D, P, rngs), Matrix(P, D, rngs)

    def __call__(self, x):
        return self.c_proj(jax.nn.relu(self.c_fc(x, scale=1)), scale=2)


class SideBySide(nnx.Module):
    def __init__(self, rngs):
        self.wi, self.wo = linear(D, 2 * P, rngs), linear(P, D, rngs)

    def __call__(self, x):
        up, gate = jnp.split(self.wi(x), 2, axis=-1)
        return self.wo(up * nnx.gelu(gate, approximate=False))


def in_a_row(rngs):
    return nnx.Sequential(
        linear(D, P, rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs), linear(P, D, rngs)
    )


KINDS = {
    "plain": Plain,
    "gated": Gated,
    "arrays": Arrays,
    "einsum": Sums,
    "side-by-side": SideBySide,
    "sequential": in_a_row,
    "own-layers": OwnLayers,
}
ACTS = {
    "plain": "gelu_new",
    "gated": "silu",
    "arrays": "softplus",
    "einsum": "tanh",
    "side-by-side": "gelu",
    "sequential": "relu",
    "own-layers": "relu",
}


class Net(nnx.Module):
    def __init__(self, make, rngs):
        self.blocks = nnx.List([make(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def same(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b))


def unchecked(function):
    """A function without the checks of types that only tests have."""
    return inspect.unwrap(function)


@pytest.fixture(params=KINDS, ids=str, scope="module")
def pair(request):
    """A model, and the same model adopted."""
    model = Net(KINDS[request.param], nnx.Rngs(0))
    return request.param, model, fj.adopt(model)


def test_outputs_stay_and_the_given_model_too(pair):
    kind, model, adopted = pair
    assert same(nnx.clone(adopted)(X), nnx.clone(model)(X))  # with dropout
    run = jax.jit(lambda model, x: nnx.clone(model)(x))
    assert same(run(adopted, X), run(model, X))
    assert not fj.sites(model)
    assert len(fj.sites(adopted)) == 2
    assert {each.act for each in fj.adoptions(adopted)} == {ACTS[kind]}
    assert {each.sizes for each in fj.adoptions(adopted)} == {(D, P, D)}


def test_release_is_the_inverse(pair):
    _, model, adopted = pair
    released = fj.release(adopted)
    graph, state = nnx.split(released)
    want, arrays = nnx.split(model)
    assert graph == want
    assert jax.tree.all(jax.tree.map(same, jax.tree.leaves(state), jax.tree.leaves(arrays)))
    assert fj.sites(adopted)  # which is not changed


def by_hand(kind, mlp, x):
    """The module of a kind with the rows of our MLP, in float64."""
    rows = jax.tree.map(lambda a: np.asarray(a, np.float64), mlp.sub_mlps())
    bias = mlp.out_bias()
    acts = {"softplus": lambda z: np.logaddexp(z, 0), "tanh": np.tanh}
    named = ACTS[kind]
    act = acts.get(named) or (lambda z: np.asarray(fj.nn.submlps.ACTIVATIONS[named](z)))
    z = [
        x @ w.T + (0 if b is None else b)
        for w, b in ((rows.gate, rows.gate_bias), (rows.up, rows.up_bias))
        if w is not None
    ]
    h = act(z[0]) * (z[1] if len(z) == 2 else 1)
    y = h @ rows.down + (0 if bias is None else np.asarray(bias, np.float64))
    return {"plain": 0.5, "own-layers": 2}.get(kind, 1) * y


def test_compressed_and_released(pair, x64):
    kind, _, adopted = pair
    smaller, report = fj.compress(adopted, fj.Prune(width=5), key=KEY)
    assert [row.width_after for row in report.rows] == [5, 5]
    smaller.eval()
    want = np.asarray(X, np.float64)
    for site in fj.sites(smaller):
        want = want + by_hand(kind, site.mlp, want)
    np.testing.assert_allclose(smaller(X), want, rtol=2e-5, atol=2e-5)
    released = fj.release(smaller)
    assert same(released(X), smaller(X))
    modules = [type(module) for _, module in nnx.iter_modules(released)]
    assert not any(cls.__module__.startswith("fusion_jax") for cls in modules)
    assert modules == [type(m) for _, m in nnx.iter_modules(Net(KINDS[kind], nnx.Rngs(0)))]


@pytest.mark.parametrize("scaling", ["adam", "sgd"])
@pytest.mark.parametrize("kind", [Plain, pytest.param(Arrays, marks=pytest.mark.full)])
def test_fused_factors_are_in_the_original_code(kind, scaling):
    """The class's own code computes the function of our fused module."""
    adopted = fj.adopt(kind(nnx.Rngs(0)))
    fused, _ = fj.compress(adopted, fj.Fusion(width=4, scaling=scaling), key=KEY)
    fused.eval()
    scale = 0.5 if kind is Plain else 1.0
    np.testing.assert_allclose(fused(X), scale * fused.adopted(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fj.release(fused)(X), fused(X), rtol=1e-5, atol=1e-6)
    assert isinstance(fused.adopted, fj.FusedMlp | fj.FusedGatedMlp)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.ffn = nnx.RMSNorm(D, rngs=rngs), Gated(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.ffn(self.norm(x)))


class Stacked(nnx.Module):
    """Layers by nnx.vmap and nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


@pytest.fixture(scope="module")
def stacked():
    model = Stacked(nnx.Rngs(0))
    model.eval()
    return model, fj.adopt(model)


def test_a_stack_of_layers(stacked):
    model, adopted = stacked
    assert same(adopted(X), model(X))
    (found,) = fj.adoptions(adopted)
    assert (found.path, found.stack, found.layers["gate"]) == ("layers.ffn", (3,), "gate_proj")
    smaller, report = fj.compress(adopted, fj.Prune(width=5), key=KEY)
    assert report.rows[0].params_after == 3 * (3 * 5 * D + 5)
    assert smaller.layers.ffn.gate_proj.kernel.shape == (3, D, 5)
    assert same(fj.release(smaller)(X), smaller(X))


@pytest.mark.full
def test_a_loop_that_does_not_split_cluster_sizes():
    class Loop(Stacked):
        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, nnx.RngState: 0, ...: None})

            @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
            def run(x, layer):
                return layer(x)

            return run(x, self.layers)

    adopted = fj.adopt(Loop(nnx.Rngs(0)))
    fused, _ = fj.compress(adopted, fj.Fusion(width=4), key=KEY)
    with pytest.raises(fj.InputError, match=r"give nnx.StateAxes the same axis"):
        fused(X)


def test_calibration_of_a_stack(stacked):
    model, adopted = stacked
    seen = fj.calibrate(adopted, [X], key=KEY)["layers.ffn.adopted"]
    graph, state = nnx.split(model.layers)
    x = X
    for i in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i] if v.ndim else v, state))
        want = layer.norm(x).reshape(-1, D)
        np.testing.assert_allclose(np.sort(seen[i], 0), np.sort(want, 0), rtol=1e-5, atol=1e-6)
        x = layer(x)
    method = fj.Prune(width=5, score="activation")
    _, report = fj.compress(adopted, method, key=KEY, calibration=[X])
    assert report.calibration == "6 positions of the given batches"
    with pytest.raises(fj.InputError, match="by_use is for experts; this is a stack of layers"):
        fj.compress(adopted, fj.Fusion(by_use=0.5), key=KEY, calibration=[X])


@pytest.mark.full
def test_kernel_of_a_stack(stacked):
    f, params = ntk.functional(stacked[1], wrt=r".*adopted.*", outputs=lambda y: y[:, 0, 0])
    jacobian = jax.jacobian(f)(params, X)
    rows = jnp.concatenate([j.reshape(2, -1) for j in jax.tree.leaves(jacobian)], axis=1)
    kernel = ntk.kernel(f, params, X)
    np.testing.assert_allclose(kernel, rows @ rows.T, rtol=1e-4)
    training = nnx.clone(stacked[1])
    training.train()
    f, params = ntk.functional(training)
    with pytest.raises(fj.InputError, match=r"call model.eval\(\)"):
        ntk.kernel(f, params, X)


@pytest.mark.full
def test_their_own_training_loop(stacked):
    smaller, _ = fj.compress(stacked[1], fj.Prune(width=5), key=KEY)
    optimizer = nnx.Optimizer(smaller, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: jnp.square(model(X)).mean())(model)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            optimizer.update(model, gradient)
        return value

    before = jax.tree.map(jnp.array, nnx.state(smaller, nnx.Param))
    values = [float(step(smaller, optimizer)) for _ in range(3)]
    assert values[2] < values[1] < values[0]
    moved = jax.tree.map(lambda a, b: not same(a, b), before, nnx.state(smaller, nnx.Param))
    assert all(jax.tree.leaves(moved))


class Numbers:
    """Batches of a task of its own."""

    def __len__(self):
        return 2

    def __call__(self, step):
        return {"x": np.asarray(X), "row": np.zeros(2, np.int32)}

    def names(self, step):
        return ["a", "b"]


class Squares:
    def prepare(self, model, config, *, key):
        def loss(model, batch, key):
            return Total(jnp.square(model(batch["x"])).sum(), jnp.float32(2))

        return Prepared(Numbers(), loss)

    def inputs(self, model, config, *, key):
        return Numbers()


@pytest.mark.full
def test_finetune(tmp_path):
    """Also: modules that keep their random keys have other masks in every step."""
    smaller, _ = fj.compress(fj.adopt(Plain(nnx.Rngs(0))), fj.Prune(width=5), key=KEY)
    smaller.train()
    config = TrainConfig(epochs=2, batch_size=2, learning_rate=1e-9, log_every=1)
    fit = fj.finetune(smaller, Squares(), config, key=KEY, folder=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)}
    assert len(losses) == 4
    restored = fj.load_into(fj.adopt(Plain(nnx.Rngs(1))), tmp_path / "run" / "last")
    assert same(restored.adopted.up.kernel[...], fit.model.adopted.up.kernel[...])


class Mixed(nnx.Module):
    """An MLP of ours beside one of others, whose dropout depends on an argument."""

    def __init__(self, rngs):
        self.ours = fj.Mlp(D, P, act="relu", rngs=rngs)
        self.theirs = Switched(rngs)

    def __call__(self, x, deterministic=True):
        return self.theirs(self.ours(x), deterministic=deterministic)


class Switched(nnx.Module):
    def __init__(self, rngs):
        self.lin1, self.lin2 = linear(D, P, rngs), linear(P, D, rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic=False):
        h = self.dropout(nnx.relu(self.lin1(x)), deterministic=deterministic)
        return self.lin2(h)


def test_beside_an_mlp_of_ours():
    model = Mixed(nnx.Rngs(0))
    adopted = fj.adopt(model)
    assert [site.path for site in fj.sites(adopted)] == ["ours", "theirs.adopted"]
    seen = fj.calibrate(adopted, [X], key=KEY)
    x = X.reshape(-1, D)
    for path, want in (("ours", x), ("theirs.adopted", model.ours(x))):
        np.testing.assert_allclose(np.sort(seen[path], 0), np.sort(want, 0), rtol=1e-5, atol=1e-6)
    fused, _ = fj.compress(adopted, fj.Fusion(width=4), key=KEY)
    plain = fj.plain(fused)
    np.testing.assert_allclose(plain(X), fused(X), rtol=1e-5, atol=1e-6)
    released = fj.release(fused)
    assert type(released.theirs) is Switched
    assert isinstance(released.ours, fj.FusedMlp)  # which was not adopted


@pytest.mark.full
def test_arrays_on_a_mesh():
    model = Plain(nnx.Rngs(0))
    mesh = jax.make_mesh((4,), ("model",))
    place = jax.NamedSharding(mesh, jax.P(None, "model"))
    model.fc1.kernel.set_value(jax.device_put(model.fc1.kernel[...], place))
    model.fc1.kernel.set_metadata("axes", ("in", "hidden"))  # as for sharding
    adopted = fj.adopt(model)
    smaller, _ = fj.compress(adopted, fj.Prune(width=4), key=KEY)
    for network in (adopted, smaller, fj.release(smaller)):
        assert network.fc1.kernel.get_metadata("axes") == ("in", "hidden")
    assert adopted.adopted.up.kernel.get_value().sharding == place
    assert fj.release(adopted).fc1.kernel.get_value().sharding == place
    model.eval()
    adopted.eval()
    assert same(adopted(X), model(X))


# What is refused


class Residual(Plain):
    """Uses the hidden units twice."""

    def __call__(self, x):
        h = self.act(self.fc1(x))
        return self.fc2(h) + h.mean(-1, keepdims=True)


class FixedWidth(Plain):
    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)).reshape(*x.shape[:-1], P))


class Scaled(Plain):
    def __call__(self, x):
        return self.fc2(self.act(x @ (2 * self.fc1.kernel[...])))


class Unused(Plain):
    def __call__(self, x):
        return self.fc2(self.act(x @ jnp.ones((D, P))))


class Softmax(Plain):
    def __call__(self, x):
        return self.fc2(jax.nn.softmax(self.fc1(x)))


class WithContext(Plain):
    def __call__(self, x, context):
        return super().__call__(x) + context


class NoBias(nnx.Module):
    def __init__(self, rngs):
        self.w, self.v = nnx.Param(jnp.ones((D, P))), nnx.Param(jnp.ones((P, D)))
        self.b = nnx.Param(jnp.ones(P))

    def __call__(self, x):
        h = x @ self.w[...] + self.b[...][None, None]
        return jax.nn.relu(h) @ self.v[...]


FFN = fj.MlpSpec(up="fc1", down="fc2")
GATED = fj.MlpSpec(up="up_proj", gate="gate_proj", down="down_proj")


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (Plain, dataclasses.replace(FFN, act="gelu"), "are those of 'gelu_new'"),
        (Plain, dataclasses.replace(FFN, act="relu"), r"act 'relu' is wrong: .* 'gelu_new'"),
        (Plain, dataclasses.replace(FFN, act="rellu"), "act 'rellu' is wrong"),
        (Plain, fj.MlpSpec(up="fc2", down="fc1"), r"\(\.\.\., 12\)"),
        (Gated, fj.MlpSpec(up="gate_proj", gate="up_proj", down="down_proj"), "gate='gate_proj'"),
        (Gated, fj.MlpSpec(up="up_proj", down="down_proj"), "no known activation fits"),
        (Residual, FFN, "uses the hidden units for something else"),
        (FixedWidth, FFN, "does not run with another number of hidden units"),
        (Scaled, FFN, "scales or reshapes the matrix of fc1"),
        (Unused, FFN, "no product of vectors with fc1 is seen"),
        (Softmax, FFN, "no known activation fits"),
        (WithContext, FFN, r"cannot be called with one array .* give a batch"),
        (NoBias, fj.MlpSpec(up="w", down="v"), "no known activation fits"),
        (Plain, fj.MlpSpec(up="fc3", down="fc2"), "no module has the layers fc3, fc2"),
        (Plain, fj.MlpSpec(up="fc1", down="x.fc2"), "must be attributes of one module"),
    ],
)
def test_a_wrong_spec_is_refused(kind, spec, message):
    with pytest.raises(fj.InputError, match=message):
        fj.adopt(kind(nnx.Rngs(0)), {"": spec})


def test_what_specs_can_say():
    bias = fj.MlpSpec(up="w", down="v", up_bias="b", act=jax.nn.relu)
    adopted = fj.adopt(NoBias(nnx.Rngs(0)), {"": bias})
    assert same(adopted(X), NoBias(nnx.Rngs(0))(X))
    assert fj.release(fj.compress(adopted, fj.Prune(width=5), key=KEY)[0]).b.shape == (5,)
    context = WithContext(nnx.Rngs(0))
    adopted = fj.adopt(context, {"": FFN}, batch=(X, jnp.float32(1)))
    assert fj.adopt(context, batch={"x": X, "context": jnp.float32(1)}).adopted.width == P
    context.eval()
    assert same(adopted.adopted.up.kernel[...], context.fc1.kernel[...])
    net = Net(Plain, nnx.Rngs(0))
    one = fj.adopt(net, {"blocks.*1": dataclasses.replace(FFN, act="gelu_new")})
    assert [each.path for each in fj.adoptions(one)] == ["blocks.1"]
    assert len(fj.sites(fj.adopt(one))) == 2  # the other one too
    assert len(fj.sites(fj.adopt(net, {"*": FFN}))) == 2
    assert "blocks.1" in str(fj.adoptions(one))
    assert "gelu_new" in str(fj.adoptions(one))


def test_what_cannot_be_adopted():
    net = Net(Plain, nnx.Rngs(0))
    for model, specs, message in (
        (net, {}, "not be empty"),
        (net, {"blocks.9": FFN}, "matches no module with fc1, fc2"),
        (net, {"blocks.*": FFN, ".*1": FFN}, "two specs choose blocks.1"),
        (net, {"blocks.*": "fc1"}, "must be a fusion_jax.MlpSpec"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), None, "names that are known"),
        (Net(Softmax, nnx.Rngs(0)), None, "blocks.0: no known activation"),
        (nnx.eval_shape(lambda: net), None, "no arrays yet"),
        (linen.Dense(3), None, "from_linen"),
    ):
        with pytest.raises(fj.InputError, match=message):
            unchecked(fj.adopt)(model, specs)
    with pytest.raises(fj.InputError, match="does not run on the batch, which must be"):
        fj.adopt(net, batch={"y": X})
    with pytest.raises(fj.InputError, match=r"no module that fusion_jax.adopt adopted"):
        fj.release(net)


@pytest.mark.parametrize(
    ("act", "name"), [(nnx.gelu, "gelu_new"), (lambda x: nnx.gelu(x, approximate=False), "gelu")]
)
def test_similar_activations_in_low_precision(act, name):
    model = Plain(nnx.Rngs(0), act=act, dtype=jnp.bfloat16)
    assert fj.adoptions(fj.adopt(model))[0].act == name
    smaller, _ = fj.compress(fj.adopt(model), fj.Prune(width=5), key=KEY)
    smaller.eval()
    assert smaller(X).dtype == jnp.bfloat16  # computes as the model did


# Files


def test_saved_and_loaded_into(tmp_path):
    smaller, report = fj.compress(fj.adopt(Stacked(nnx.Rngs(0))), fj.Prune(width=5), key=KEY)
    fj.save(smaller, tmp_path / "a", report=report)
    fresh = fj.adopt(Stacked(nnx.Rngs(1)))
    for model in (fresh, nnx.eval_shape(lambda: fresh), smaller):
        restored = fj.load_into(model, tmp_path / "a")
        graphs = [nnx.graphdef(each) for each in (restored, smaller)]
        assert graphs[0] == graphs[1]
        arrays = [jax.tree.leaves(nnx.state(each)) for each in (restored, smaller)]
        for a, b in zip(*arrays, strict=True):
            assert a.dtype == b.dtype
            assert same(a, b)
    for model, message in (
        (Stacked(nnx.Rngs(0)), "layers.ffn is adopted as .* in the file, nothing in the model"),
        (fj.adopt(Net(Plain, nnx.Rngs(0))), r"blocks.0 is adopted as nothing in the file, \(up"),
        (3, "must be a Flax NNX module"),
    ):
        with pytest.raises(fj.InputError, match=message):
            unchecked(fj.load_into)(model, tmp_path / "a")
    with pytest.raises(fj.InputError, match=r"Stacked that did not come from .*load_into"):
        fj.load(tmp_path / "a")
    with pytest.raises(fj.InputError, match="no such folder"):
        fj.load_into(fresh, tmp_path / "b")


def test_any_module_is_saved_in_any_form(tmp_path):
    """A function as the activation, and matrices in other forms."""

    def make(seed, act=jax.nn.softplus, **more):
        return nnx.List([fj.Mlp(D, P, act=act, rngs=nnx.Rngs(seed), **more) for _ in range(2)])

    model = make(0)
    smaller, _ = fj.compress(model, fj.Prune(width=5), key=KEY, layers=[0])
    smaller, _ = fj.compress(smaller, fj.Svd(rank=2), key=KEY, layers=[1])
    fj.save(smaller, tmp_path / "a")
    restored = fj.load_into(make(1), tmp_path / "a")
    for a, b in zip(restored, smaller, strict=True):
        assert same(a(X), b(X))
    assert "softplus" in (tmp_path / "a" / "fusion.json").read_text()
    for other, message in (
        (make(0, act="gelu"), r"0 has the activation softplus in the file, gelu in the model"),
        (make(0, use_bias=False), r"0.down.bias is not in the model"),
        (make(0, param_dtype=jnp.bfloat16), "0.down.bias is float32 in the file, bfloat16 in"),
        (nnx.List([*make(0), make(0)[0]]), "2 has the activation nothing in the file"),
    ):
        with pytest.raises(fj.InputError, match=message):
            fj.load_into(other, tmp_path / "a")
    strange = nnx.List([nnx.Param(jnp.zeros(2, jnp.complex64))])
    with pytest.raises(fj.InputError, match=r"0 \(complex64\)"):
        fj.save(strange, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    fields = json.loads((tmp_path / "a" / "fusion.json").read_text())
    for change in ({"kind": "x"}, {"format": 9}, {"sites": []}, {"forms": {"1.up": {"form": "x"}}}):
        (tmp_path / "a" / "fusion.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(fj.InputError):
            fj.load_into(make(1), tmp_path / "a")


# Calibration with arguments of any kind


class Images(nnx.Module):
    """Takes images and a flag; the second block sees fewer positions than the first."""

    def __init__(self, rngs):
        self.first, self.second = Plain(rngs), Plain(rngs)

    def __call__(self, images, scale=None, flag=False):
        x = images if scale is None else images * scale
        x = self.first(x)
        return self.second(x[:, ::2] if flag else x[:, ::4])


@pytest.mark.full
def test_calibration_with_any_arguments():
    model = Images(nnx.Rngs(0))
    adopted = fj.adopt(model, batch=jnp.ones((1, 4, 4, D)))
    images = jax.random.normal(jax.random.key(2), (2, 4, 4, D))
    scale = jnp.float32(2)
    for batch, factor, rows in (
        (images, 1, 1),
        ((images, scale), 2, 1),
        ((images, None), 1, 1),
        ({"images": images, "flag": True}, 1, 2),
    ):
        seen = fj.calibrate(adopted, [batch, batch], key=KEY)
        first, second = seen["first.adopted"], seen["second.adopted"]
        assert first.shape == (2 * 2 * 4 * 4, D)
        assert second.shape == (2 * 2 * 4 * rows, D)
        want = np.sort(factor * np.repeat(images.reshape(-1, D), 2, 0), 0)
        np.testing.assert_array_equal(np.sort(first, 0), want)


def test_calibration_says_what_it_takes():
    adopted = fj.adopt(Plain(nnx.Rngs(0)))
    form = "a list: of strings, or of batches of the model's arguments"
    for texts, message in (
        (X, form),
        (3, form),
        ([3], f"{form}.* one of the batches is a int"),
        ([{"x": 3.0}], form),
        ([{"y": X}], "does not run on batch 0 .* a mapping of its keyword arguments"),
        ([X, X[..., :2]], "does not run on batch 1"),
        ({"": X}, "inputs by site already"),
        (["a text"], "give a list of batches of the model's arguments"),
    ):
        with pytest.raises(fj.InputError, match=message):
            unchecked(fj.calibrate)(adopted, texts, key=KEY)
    with pytest.raises(fj.InputError, match=r"batches of the model's arguments go into a list"):
        fj.compress(adopted, fj.Fusion(), key=KEY, calibration={"x": X})


# Linen


class LinenNet(linen.Module):
    width: int = P

    @linen.compact
    def __call__(self, x, train=False):
        for i in range(2):
            h = linen.Dense(self.width, name=f"up{i}")(linen.LayerNorm()(x))
            h = linen.Dropout(0.5, deterministic=not train)(linen.gelu(h))
            x = x + linen.Dense(D, use_bias=False, name=f"down{i}")(h)
        return x


def test_linen(tmp_path):
    net, dropout = LinenNet(), {"dropout": jax.random.key(3)}
    variables = net.init(jax.random.key(1), X)
    model = fj.from_linen(net, variables)
    specs = {"params": fj.MlpSpec(up="up0", down="down0", act="gelu_new")}
    adopted = fj.adopt(model, specs, batch=X)
    assert same(adopted(X), net.apply(variables, X))
    want = net.apply(variables, X, train=True, rngs=dropout)
    assert same(adopted(X, train=True, rngs=dropout), want)
    smaller, _ = fj.compress(adopted, fj.Prune(width=5), key=KEY, calibration=None)
    arrays = fj.release(smaller).variables()
    assert arrays["params"]["up0"]["kernel"].shape == (D, 5)
    assert arrays["params"]["up1"]["kernel"].shape == (D, P)
    kept = jax.tree.map(same, arrays["params"]["up1"], variables["params"]["up1"])
    assert jax.tree.all(kept)
    fj.save(smaller, tmp_path / "a")
    restored = fj.load_into(adopted, tmp_path / "a")
    assert same(restored(X), smaller(X))
    for args, message in (((model, variables), "a Flax Linen module"), ((net, {}), "module.init")):
        with pytest.raises(fj.InputError, match=message):
            fj.from_linen(*args)


@pytest.mark.full
def test_linen_of_the_new_width_runs_alone():
    class One(linen.Module):
        width: int = P

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width)(x)
            return linen.Dense(D)(linen.relu(x))

    adopted = fj.adopt(fj.from_linen(One(), One().init(KEY, X)), batch=X)
    smaller, _ = fj.compress(adopted, fj.Prune(width=5), key=KEY)
    assert same(One(5).apply(smaller.variables(), X), smaller(X))


# Activations that are functions


def test_functions_as_activations():
    mlp = fj.GatedMlp(D, P, act=jax.nn.softplus, rngs=nnx.Rngs(0))
    rows = mlp.sub_mlps()
    x = X.reshape(-1, D)
    want = (jnp.logaddexp(x @ rows.gate.T, 0) * (x @ rows.up.T)) @ rows.down
    np.testing.assert_allclose(mlp(x), want, rtol=1e-5, atol=1e-6)
    method = fj.Prune(width=5, score="activation")
    smaller, _ = fj.compress(mlp, method, key=KEY, calibration={"": x})
    assert smaller.act is jax.nn.softplus
    solution = fj.compress_mlp(rows, method, key=KEY, act=jax.nn.softplus, calibration=x)
    assert same(solution.parts.up, smaller.sub_mlps().up)
    with pytest.raises(fj.InputError, match=r"unknown activation 'softplus'.* or a function"):
        fj.Mlp(D, P, act="softplus", rngs=nnx.Rngs(0))


def test_closed_forms_with_a_function(monkeypatch):
    """Blocks of units are padded: s(0) is not 0."""
    monkeypatch.setattr(ntk.mlp, "_BLOCK", 300)
    mlp = fj.Mlp(D, P, act=jax.nn.softplus, rngs=nnx.Rngs(0))
    weights = ntk.mlp.mlp_weights(mlp)
    kernel = ntk.mlp.upstream_kernel(weights, X, jnp.ones((2, 3, D)))
    f, params = ntk.functional(mlp, outputs=lambda y: y.sum((1, 2)))
    np.testing.assert_allclose(kernel, ntk.kernel(f, params, X), rtol=1e-4)


def test_bounds_need_a_name():
    mlp = fj.Mlp(D, P, act=jax.nn.softplus, rngs=nnx.Rngs(0))
    fused, _ = fj.compress(mlp, fj.Fusion(width=4), key=KEY)
    with pytest.raises(fj.InputError, match=r"bounds need the name .* got the function softplus"):
        ntk.bounds.pair(mlp, fused)


# What runs a module and watches it


def test_products_inside_of_calls_and_loops():
    w = jax.random.normal(jax.random.key(4), (3, D, P))
    v = jax.random.normal(jax.random.key(5), (P, D))
    x = X[0]

    @jax.jit
    def f(weights):
        def layer(x, w):
            h = jax.checkpoint(lambda x: jax.nn.relu(x @ w.astype(jnp.float32)))(x)
            return jnp.einsum("tp,dp->td", h, weights["v"].T), None

        return jax.lax.scan(layer, x, weights["w"])[0]

    out, seen = products(f, {"w": w, "v": v, "unused": v})
    np.testing.assert_allclose(out, f({"w": w, "v": v}), rtol=1e-6)
    assert set(seen) == {"w", "v"}
    (first,), (second,) = seen["w"], seen["v"]
    want = x
    for i in range(3):
        np.testing.assert_allclose(first.inputs[i], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(first.outputs[i], want @ w[i], rtol=1e-5, atol=1e-5)
        hidden = jax.nn.relu(want @ w[i])
        np.testing.assert_allclose(second.inputs[i], hidden, rtol=1e-5, atol=1e-5)
        want = hidden @ v
    assert same(first.matrix, w)
    assert all(same(matrix, v) for matrix in second.matrix)
