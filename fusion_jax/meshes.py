"""Lets functions of models run on meshes with explicit axes, JAX's default.

Where axes are explicit, every operation must say how its result is split. The models, methods and
kernels of this library do not say it: they run on the same devices with axes of the type Auto, and
their results are put back on the caller's mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import PyTree

P = ParamSpec("P")
R = TypeVar("R")


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns a mesh of the same devices whose axes are all left to the compiler."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_auto_axes(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of models and arrays be called where meshes have explicit axes.

    Args:
        function: Takes and returns modules, arrays, and dicts, tuples and dataclasses of them.

    Returns:
        The function. Arrays that it returns unchanged are the caller's own; new arrays on a mesh
        are on the caller's mesh.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",))  # explicit
        >>> x = jax.device_put(jax.numpy.ones(4), NamedSharding(mesh, jax.P("data")))
        >>> on_auto_axes(lambda x: x.reshape(2, 2) @ x.reshape(2, 2))(x).sharding.mesh == mesh
        True
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [*args, *kwargs.values()]
        arrays = [x for value in given for x in _arrays(value)]
        if any(isinstance(x, Tracer) for x in arrays):
            return function(*args, **kwargs)
        # Arrays outside of traced functions have meshes of devices.
        meshes: set[Any] = {
            x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)
        }
        context = None
        if _explicit(jax.sharding.get_abstract_mesh()):
            context = jax.sharding.get_mesh()
            meshes.add(context)
        back = {auto_mesh(mesh): mesh for mesh in meshes if _explicit(mesh)}
        if not back:
            return function(*args, **kwargs)
        forth = {mesh: twin for twin, mesh in back.items()}
        theirs: dict[int, tuple[jax.Array, jax.Array]] = {}

        def enter(x: jax.Array) -> jax.Array:
            new = _moved(x, forth)
            theirs[id(new)] = new, x  # both, so that no other array gets this id
            return new

        def leave(x: jax.Array) -> jax.Array:
            return theirs[id(x)][1] if id(x) in theirs else _moved(x, back)

        args, kwargs = _mapped(enter, args), _mapped(enter, kwargs)  # type: ignore[assignment]
        with jax.set_mesh(auto_mesh(context)) if context is not None else contextlib.nullcontext():
            result = function(*args, **kwargs)
        return _mapped(leave, result)

    return call


def _explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _moved(x: jax.Array, meshes: dict[Mesh, Mesh]) -> jax.Array:
    """Returns an array on the mesh that replaces its own, or itself if no mesh does."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh not in meshes:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _moved(jax.random.key_data(x), meshes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # The same buffers: `jax.device_put` does not take meshes of several processes.
    place = NamedSharding(meshes[sharding.mesh], sharding.spec)
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, place, parts)


def _arrays(tree: PyTree) -> Iterator[jax.Array]:
    found: list[jax.Array] = []
    _mapped(lambda x: found.append(x) or x, tree)
    yield from found


def _mapped(change: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """Returns a tree with its arrays changed; a tree without arrays is returned itself.

    Lists stay as they are: they may hold a million texts.
    """
    if isinstance(tree, jax.Array):
        return change(tree)
    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        old, structure = jax.tree.flatten(state)
        new = [_mapped(change, x) for x in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return tree
        return nnx.merge(graph, jax.tree.unflatten(structure, new))
    if isinstance(tree, jax.tree_util.Partial):
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [_mapped(change, x) for x in leaves])
    if isinstance(tree, dict):
        return {name: _mapped(change, x) for name, x in tree.items()}
    if isinstance(tree, tuple):
        new = [_mapped(change, x) for x in tree]
        if all(a is b for a, b in zip(tree, new, strict=True)):
            return tree
        return type(tree)(*new) if hasattr(tree, "_fields") else tuple(new)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        if not tree.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return tree  # the caller may rely on its identity
        fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
        new = {name: _mapped(change, x) for name, x in fields.items()}
        if all(fields[name] is x for name, x in new.items()):
            return tree
        return dataclasses.replace(tree, **new)
    return tree
