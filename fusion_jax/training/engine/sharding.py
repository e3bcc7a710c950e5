"""Places arrays on the caller's mesh (``jax.set_mesh``).

The names of the mesh's axes say what is split: batches over "data" and "fsdp", parameters and
moments over "fsdp", the widths of MLPs over "model". The compiler inserts the communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, PyTree

from fusion_jax.errors import InputError, nearest
from fusion_jax.meshes import auto_mesh

TreeT = TypeVar("TreeT")
AXES = ("data", "fsdp", "model")


def copied(x: Array) -> Array:
    """Returns a copy; `jnp.array` would compile a program for each shape.

    Arrays on devices of other processes take such a program.
    """
    return jax.device_put(x, may_alias=False) if x.is_fully_addressable else jnp.array(x)


class Placement:
    """Where parameters and batches are placed; on one device if the caller has not set a mesh.

    Args:
        widths: The axis of the width in the variables of MLPs, by path.

    Raises:
        InputError: The mesh has an axis of another name.
    """

    def __init__(self, widths: Mapping[str, int] = MappingProxyType({})):
        mesh = jax.sharding.get_mesh()
        self._widths = widths
        self.mesh = None
        if mesh.empty:
            return
        for name in mesh.axis_names:
            if name not in AXES:
                raise InputError(f"the mesh has an axis {name!r}{nearest(str(name), AXES)}")
        self.mesh = auto_mesh(mesh)

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which jitted functions see the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def batch_shards(self) -> int:
        """The number of parts that a batch is split into."""
        sizes = {} if self.mesh is None else self.mesh.shape
        return sizes.get("data", 1) * sizes.get("fsdp", 1)

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises `InputError` if a batch's parts cannot be split evenly."""
        if batch_size % (accumulate * self.batch_shards):
            raise InputError(
                f"batch_size {batch_size} is not a multiple of {accumulate * self.batch_shards}: "
                f"{accumulate} accumulated parts on {self.batch_shards} shards of the mesh"
            )

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns how a variable is split.

        Args:
            path: The path of the variable.
            shape: The shape of the variable.

        Returns:
            The name of the mesh's axis, or None, for each axis of the array.
        """
        assert self.mesh is not None
        spec: list[str | None] = [None] * len(shape)
        sizes = self.mesh.shape
        if path in self._widths and "model" in sizes:
            axis = self._widths[path] % len(shape)
            if shape[axis] % sizes["model"] == 0:
                spec[axis] = "model"
        if "fsdp" in sizes and len(shape) > 1:
            free = [i for i, name in enumerate(spec) if not name and not shape[i] % sizes["fsdp"]]
            if free:
                spec[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*spec)

    def shardings(self, arrays: Mapping[str, Array]) -> PyTree:
        """Returns the shardings of variables by path; None without a mesh."""
        if self.mesh is None:
            return None
        return {
            path: NamedSharding(self.mesh, self.spec(path, x.shape)) for path, x in arrays.items()
        }

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of arrays that are whole on every device; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def own(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Returns placed copies of variables, so that the caller's arrays are never donated.

        Empties the dict, so that float32 copies made for training are not in memory twice.
        """
        shardings = self.shardings(arrays)
        found = {}
        for path in list(arrays):
            x = arrays.pop(path)
            found[path] = copied(x) if shardings is None else _put(np.asarray(x), shardings[path])
        return found

    def everywhere(self, tree: TreeT) -> TreeT:
        """Returns a pytree of arrays that are whole on every device."""
        whole = self.replicated
        if whole is None:
            return tree
        return jax.tree.map(lambda x: _put(np.asarray(x), whole), tree)

    def placed(self, tree: TreeT) -> TreeT:
        """Returns a pytree on the mesh; arrays not yet on a mesh become whole on every device."""
        whole = self.replicated
        if whole is None:
            return tree
        return jax.tree.map(
            lambda x: (
                x
                if isinstance(x, Array) and isinstance(x.sharding, NamedSharding)
                else _put(np.asarray(x), whole)
            ),
            tree,
        )

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Returns a batch on the devices; each process moves the rows of its own devices only."""
        if self.mesh is None:
            return {name: jnp.asarray(x) for name, x in batch.items()}
        names = tuple(name for name in ("data", "fsdp") if name in self.mesh.shape)
        sharding = NamedSharding(self.mesh, PartitionSpec(names or None))
        return {name: _put(x, sharding) for name, x in batch.items()}

    def gathered(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Returns variables that are whole on every device, so that any process can write them."""
        whole = self.replicated
        return dict(arrays) if whole is None else _gather(whole)(dict(arrays))


@lru_cache
def _gather(sharding: NamedSharding) -> Wrapped:
    return jax.jit(lambda x: x, out_shardings=sharding)


def _put(x: np.ndarray, sharding: NamedSharding) -> Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
