"""Runs a method on many MLPs: one after another, side by side, or spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Key

from fusion_jax.calibration.data import POSITIONS, Calibration
from fusion_jax.clustering.engine import GRAM_BYTES
from fusion_jax.compression.checks import all_finite
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method, Solution
from fusion_jax.nn.dtypes import wide_dtype
from fusion_jax.nn.programs import few_programs, quick_options
from fusion_jax.nn.submlps import SubMLPs
from ntk.activations import Activation

TreeT = TypeVar("TreeT")

_MEMORY = 8 * 2**30
"""The bytes to work in on a device that does not report its memory."""


class Problems(NamedTuple):
    """MLPs to compress, stacked along the axes of the keys.

    Args:
        subs: Their sub-MLPs.
        keys: A random key for each.
        calibration: Their calibration, or None.
        gradients: The gradients of a loss, laid out as the sub-MLPs, or None.
    """

    subs: SubMLPs
    keys: Key[Array, "*s"]
    calibration: Calibration | None = None
    gradients: SubMLPs | None = None


def solve_stacked(method: Method, act: Activation | None, problems: Problems) -> Solution:
    """Returns the solutions of stacked problems, stacked in the same way; one call solves all.

    Raises:
        InputError: A solution holds NaN or infinite numbers.
    """
    stack = problems.keys.shape
    if not stack:
        solutions, finite = _program(method, act)(problems)
    else:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), problems)
        solutions, finite = _solve_along_one_axis(method, act, flat)
        if len(stack) > 1:
            solutions = jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), solutions)
    if not np.asarray(finite).all():
        raise InputError(
            "the result holds NaN or infinite numbers: the weights, or the inputs of the "
            "calibration, are too large for their dtype"
        )
    return solutions


def unstacked(tree: TreeT, count: int) -> Iterator[TreeT]:
    """Yields the parts of stacked trees, each made when it is asked for."""
    return (jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def batch_size(count: int, each: int, memory: int) -> int:
    """Returns how many of some problems to solve side by side.

    Args:
        count: The number of problems.
        each: The bytes that one problem needs.
        memory: The bytes available.

    Returns:
        1 to ``count``; a divisor of it if one is near, because a smaller last batch would be
        compiled on its own.

    Example:
        >>> batch_size(8, 7, 30), batch_size(60, 1, 16), batch_size(7, 1, 4), batch_size(7, 9, 4)
        (4, 15, 4, 1)
    """
    most = min(count, max(1, memory // each))
    divisor = max(size for size in range(1, most + 1) if count % size == 0)
    return divisor if 2 * divisor > most else most


def working_bytes(method: Method, problems: Problems) -> int:
    """Estimates the bytes that one of the stacked problems needs; rather too many than too few."""
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


def working_memory() -> int:
    """Returns half of the free bytes of a device: results and gaps take the other half."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _MEMORY
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2


def _solve_along_one_axis(
    method: Method, act: Activation | None, problems: Problems
) -> tuple[Solution, Array]:
    """Solves problems stacked along one axis; each device of a mesh solves those that it holds.

    Returns:
        The solutions, and whether each is finite.
    """
    sharding = problems.subs.up.sharding
    count = problems.keys.shape[0]
    if isinstance(sharding, NamedSharding) and sharding.spec and sharding.spec[0] is not None:
        spec = PartitionSpec(sharding.spec[0])
        problems = jax.device_put(problems, NamedSharding(sharding.mesh, spec))
        count = problems.keys.sharding.shard_shape(problems.keys.shape)[0]
        batch = _batch(method, problems, count)
        return _program_for_all(method, act, batch, sharding.mesh, spec)(problems)
    if jax.default_backend() != "cpu":
        return _program_for_all(method, act, _batch(method, problems, count))(problems)
    # On a CPU a batch gains nothing and takes as long as its slowest problem. Stacked by numpy,
    # since JAX would compile that for every width.
    solve = _program(method, act)
    each = [solve(problem) for problem in unstacked(problems, count)]
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *each)


def _batch(method: Method, problems: Problems, count: int) -> int | None:
    if jax.default_backend() == "cpu":
        return None
    return batch_size(count, working_bytes(method, problems), working_memory())


@few_programs
def _program(
    method: Method, act: Activation | None
) -> Callable[[Problems], tuple[Solution, Array]]:
    """Returns the compiled function from one problem to its solution, and whether it is finite."""
    return _quickly(partial(_solve_one, method, act))


@few_programs
def _program_for_all(
    method: Method,
    act: Activation | None,
    batch: int | None,
    mesh: Mesh | AbstractMesh | None = None,
    spec: PartitionSpec | None = None,
) -> Callable[[Problems], tuple[Solution, Array]]:
    """Returns `_program` for problems along one axis, some of them side by side."""

    def solve(problems: Problems) -> tuple[Solution, Array]:
        return lax.map(partial(_solve_one, method, act), problems, batch_size=batch)

    if mesh is None:
        return _quickly(solve)
    return _quickly(
        jax.shard_map(solve, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    )


def _quickly(solve: Callable[[Problems], tuple[Solution, Array]]) -> Wrapped:
    """Returns a compiled function: a first call spends most of its time on compiling it."""
    return jax.jit(solve, compiler_options=quick_options(jax.default_backend()))


def _solve_one(method: Method, act: Activation | None, problem: Problems) -> tuple[Solution, Array]:
    subs, key, calibration, gradients = problem
    solve: Callable[..., Solution] = method.solve
    if method.takes_gradients:
        solve = partial(solve, gradients=gradients)
    if method.takes_calibration:
        solve = partial(solve, act=act, calibration=calibration)
    solution = solve(subs, key=key)
    return solution, jnp.asarray(all_finite(solution))
