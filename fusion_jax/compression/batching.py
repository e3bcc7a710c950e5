"""Runs a method on stacked MLPs: one after the other, side by side, or spread over a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from fusion_jax.calibration.data import POSITIONS, Calibration
from fusion_jax.clustering.engine import GRAM_BYTES
from fusion_jax.methods.base import Method, Solution
from fusion_jax.nn.dtypes import wide_dtype
from fusion_jax.nn.submlps import SubMLPs

Problems = tuple[SubMLPs, Key[Array, "..."], Calibration | None, SubMLPs | None]
"""Sub-MLPs, keys, calibration and gradients, stacked along the axes of the keys."""
TreeT = TypeVar("TreeT")

_MEMORY = 8 * 2**30
"""Bytes to work in on a device that does not say how many it has."""


def solve(method: Method, act: str | None, problems: Problems) -> Solution:
    """Solves problems that are stacked along the axes of the keys, in one call."""
    stack = problems[1].shape
    flat: Problems = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), problems)
    solutions = _solve_flat(method, act, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), solutions)


def unstacked(tree: TreeT, count: int) -> Iterator[TreeT]:
    """The parts of stacked trees, each made when it is asked for."""
    return (jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def batch_size(count: int, each: int, memory: int) -> int:
    """How many of some problems to solve side by side.

    Args:
        count: The problems.
        each: Bytes that one works in.
        memory: Bytes there are.

    Returns:
        1 to ``count``; a divisor of it if one is near, as another size for the rest would have to
        be compiled, too.

    Example:
        >>> batch_size(8, 7, 30), batch_size(60, 1, 16), batch_size(7, 1, 4), batch_size(7, 9, 4)
        (4, 15, 4, 1)
    """
    most = min(count, max(1, memory // each))
    divisor = max(size for size in range(1, most + 1) if count % size == 0)
    return divisor if 2 * divisor > most else most


def working_bytes(method: Method, problems: Problems) -> int:
    """About how many bytes one of stacked problems works in: rather too many than too few."""
    subs, _, calibration, _ = problems
    count, p = subs.up.shape[:2]
    units = weights = sum(x.size for x in jax.tree.leaves(subs)) // count
    seen = 0
    if calibration is not None:
        _, t, d = calibration.inputs.shape
        values = (2 if subs.gate is None else 3) * min(t, POSITIONS) * p
        units = p * subs.down.shape[-1] + values
        seen = t * d + values
    itemsize = jnp.dtype(wide_dtype(subs.up)).itemsize
    pairs = min(p * p, GRAM_BYTES // itemsize)
    starts = getattr(method, "n_init", 1)
    return itemsize * (2 * weights + 3 * units + 3 * seen + (3 + 2 * starts) * pairs)


def memory() -> int:
    """Half of what is free on a device: the rest is for what comes back, and gaps."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _MEMORY
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2


def _solve_flat(method: Method, act: str | None, problems: Problems) -> Solution:
    """Solves stacked problems; where the stack is sharded over a mesh, each device its own."""
    on_cpu = jax.default_backend() == "cpu"
    sharding = problems[0].up.sharding
    count = problems[1].shape[0]
    if isinstance(sharding, NamedSharding) and sharding.spec and sharding.spec[0] is not None:
        spec = PartitionSpec(sharding.spec[0])
        problems = jax.device_put(problems, NamedSharding(sharding.mesh, spec))
        count = problems[1].sharding.shard_shape(problems[1].shape)[0]
        batch = _batch(method, problems, count)
        return _solve_on_mesh(method, act, batch, sharding.mesh, spec, problems)
    if not on_cpu:
        return _solve_batch(method, act, _batch(method, problems, count), problems)
    # One after the other on a CPU, as batching gains nothing and the slowest would decide; and in
    # the programs that a method is made of, many of which other methods share: less to compile.
    each = unstacked(problems, count)
    return jax.tree.map(
        lambda *x: jnp.stack(x), *[_solve_one(method, act, problem) for problem in each]
    )


def _batch(method: Method, problems: Problems, count: int) -> int | None:
    if jax.default_backend() == "cpu":
        return None
    return batch_size(count, working_bytes(method, problems), memory())


def _solve_one(method: Method, act: str | None, problem: Problems) -> Solution:
    subs, key, calibration, gradients = problem
    more: Any = {"gradients": gradients} if method.graded else {}
    return method.solve(subs, key=key, act=act, calibration=calibration, **more)


@partial(jax.jit, static_argnames=("method", "act", "batch"))
def _solve_batch(
    method: Method, act: str | None, batch: int | None, problems: Problems
) -> Solution:
    return lax.map(partial(_solve_one, method, act), problems, batch_size=batch)


@partial(jax.jit, static_argnames=("method", "act", "batch", "mesh", "spec"))
def _solve_on_mesh(
    method: Method,
    act: str | None,
    batch: int | None,
    mesh: Any,
    spec: PartitionSpec,
    problems: Problems,
) -> Solution:
    local = partial(_solve_batch, method, act, batch)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    return mapped(problems)
