"""Meshes with explicit axes, JAX's default: everything works there as on one device."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.training import (
    fit,
    importance_by_removal,
    lightweight,
    lottery,
    mean_gradients,
    mean_loss,
    overparameterize,
    squeeze,
)
from fusion_jax.training.engine import losses

CONFIG = fj.TrainConfig(
    max_steps=2, epochs=99, batch_size=4, learning_rate=1e-2, compute_dtype="float32"
)
EXACT = fj.MPO(bond=None, cores=3)
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([fj.Mlp(8, 16, act="gelu", rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Named(NamedTuple):
    x: jax.Array


class Numbers:
    """Three batches of four rows."""

    batch_size = 4

    def __len__(self):
        return 3

    def __call__(self, step):
        x = np.random.RandomState(step % 3).randn(4, 8).astype(np.float32)
        return {"x": x, "y": x[:, ::-1] ** 2}

    def names(self, step):
        return []


def loss(model, batch, key):
    error = jnp.square(model(batch["x"]) - batch["y"])
    return losses.Total(error.sum(), jnp.float32(error.size))


def mesh_of(kind, shape=(2,), names=("data",)):
    return jax.make_mesh(shape, names, (KINDS[kind],) * len(names))


def put(model, mesh, width=None):
    """Returns a copy of a model on a mesh, with the width of its MLPs split over an axis."""
    new = nnx.clone(model)
    specs = {"up.kernel": (None, width), "up.bias": (width,), "down.kernel": (width, None)}
    for path, variable in nnx.to_flat_state(nnx.state(new)):
        spec = specs.get(".".join(map(str, path[-2:])), ())
        place = NamedSharding(mesh, PartitionSpec(*spec))
        variable.set_value(jax.device_put(variable.get_value(), place))
    return new


def assert_close(a, b):
    for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def at_home(model):
    """Returns a copy of a model on one device."""
    new = nnx.clone(model)
    nnx.update(new, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), nnx.state(new)))
    return new


def on(model, mesh):
    """Returns whether all arrays of a model are on a mesh."""
    return {x.sharding.mesh for x in jax.tree.leaves(nnx.state(model))} == {mesh}


def trained(model, **more):
    return fit(model, Numbers(), loss, CONFIG, key=jax.random.key(0), **more)


@pytest.mark.full
def test_training_and_all_that_follows():
    """One step after another inside ``jax.set_mesh``, as in the documentation."""

    def run():
        source = Numbers()
        dense = fit(Model(), source, loss, CONFIG, key=jax.random.key(0)).model
        yield dense
        yield np.asarray(dense(jnp.asarray(source(0)["x"])))
        yield mean_loss(dense, source, loss)
        yield list(importance_by_removal(dense, source, loss, matrices=".*up").values())
        yield fj.plain(overparameterize(dense, ["layers.0.up"], cores=3))
        chains, _ = fj.compress_matrices(dense, EXACT, matrices=".*", progress=False)
        light = fit(lightweight(chains), source, loss, CONFIG, key=jax.random.key(0)).model
        squeezed = squeeze(
            light,
            lambda model, folder: model,
            lambda model: mean_loss(model, source, loss, batches=2),
            tolerance=9.0,
            rounds=1,
            progress=False,
        )
        assert len(squeezed.cuts) == 1
        yield fj.plain(squeezed.model)
        yield lottery(dense, lambda model, folder: model, keep=0.5, rounds=1, progress=False).model
        slopes = mean_gradients(dense, source, loss)
        pruned = fj.Prune(score="gradient")
        key = jax.random.key(0)
        yield fj.compress(dense, pruned, budget=0.5, key=key, gradients=slopes, progress=False)[0]

    alone = list(run())
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        ours = list(run())
    assert on(ours[0], mesh)
    for a, b in zip(alone, ours, strict=True):
        if isinstance(a, nnx.Module):
            assert_close(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-4)


@pytest.mark.parametrize("name", ["fusion", "mask-prune", "mpo"])
@pytest.mark.full
def test_methods_where_widths_are_split(name, key):
    model = Model()
    mesh = mesh_of("explicit", names=("model",))
    split = put(model, mesh, "model")
    options = {"layers": 0, "budget": 0.5, "key": key, "progress": False}
    alone, _ = fj.compress(model, fj.METHODS[name](), **options)
    ours, _ = fj.compress(split, fj.METHODS[name](), **options)
    assert on(ours, mesh)
    # The last bits of sums may differ.
    np.testing.assert_allclose(at_home(ours)(jnp.ones(8)), alone(jnp.ones(8)), atol=1e-4)
    kept = ours.layers[1].up.kernel.get_value()
    assert kept is split.layers[1].up.kernel.get_value()


def test_matrices_that_are_split():
    mesh = mesh_of("explicit", names=("model",))
    split = put(Model(), mesh, "model")
    for model in (
        fj.compress_matrices(split, EXACT, matrices=".*", progress=False)[0],
        overparameterize(split, ["layers.0.up"], cores=3),
    ):
        assert find_forms(model) and on(model, mesh)
        assert_close(fj.plain(model), Model())


def test_only_what_is_new_is_moved():
    mesh = mesh_of("explicit")
    explicit = put(Model(), mesh)
    seen = []

    @on_auto_axes
    def change(model, more, *, others):
        arrays = [*jax.tree.leaves(nnx.state(model)), *jax.tree.leaves(more), others[0].x]
        seen.extend(x.sharding.mesh.axis_types for x in arrays)
        model.layers[0].up.bias[...] += 1
        return model, {**more, "b": more["a"] + 1}, others

    row = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("data")))
    inner = jax.tree_util.Partial(lambda x: x, row)
    before = jnp.array(explicit.layers[0].up.bias[...])
    model, more, others = change(explicit, {"a": row}, others=(Named(row), "text", inner))
    assert set(seen) == {(AxisType.Auto,)}
    assert more["a"] is row and others[0].x is row and others[2].args[0] is row
    assert more["b"].sharding == row.sharding
    assert on(model, mesh)
    np.testing.assert_allclose(model.layers[0].up.bias[...], before + 1)
    np.testing.assert_array_equal(explicit.layers[0].up.bias[...], before)  # the caller's


def test_nothing_is_done_where_no_axis_is_explicit():
    found = []
    same = on_auto_axes(lambda x: found.append(x) or x)
    things = SimpleNamespace(), Model(), jnp.ones(3), {"a": [1]}
    for thing in things:
        assert same(thing) is thing and found[-1] is thing
    with jax.set_mesh(mesh_of("auto")):
        assert same(things) is things
    with jax.set_mesh(mesh_of("explicit")):
        jax.jit(on_auto_axes(lambda x: x + 1))(jnp.ones(4))
        assert bit_equal(same(things[1]), things[1])
