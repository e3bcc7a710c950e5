"""Runs an engine over blocks of examples: fits them to a memory limit, places them on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_mesh
from jaxtyping import Array, PyTree

from ntk.engines.base import Engine, Examples, PlanT, SideT, Values
from ntk.engines.contraction import KernelArray
from ntk.progress import show_progress


def caller_mesh(arrays: PyTree) -> Mesh | None:
    """Returns the mesh that the caller works on.

    Returns:
        The mesh of the first array on several devices; otherwise that of `jax.set_mesh`; None if
        there is none.
    """
    for x in jax.tree.leaves(arrays):
        if _on_mesh(x) and x.sharding.mesh.size > 1:
            return x.sharding.mesh
    ambient = get_mesh()
    return None if ambient.empty else ambient


@contextmanager
def automatic_mesh(mesh: Mesh | None) -> Iterator[Callable[[PyTree], PyTree]]:
    """Sets the same mesh with axes of type Auto, on which the compiler shards the results.

    With explicit axes, a function would have to state the sharding of each of its results.

    Yields:
        A function that puts a pytree of arrays on that mesh without moving them.
    """
    if mesh is None:
        yield lambda tree: tree
        return
    same = Mesh(mesh.devices, mesh.axis_names, (AxisType.Auto,) * len(mesh.axis_names))
    with jax.set_mesh(same):
        yield lambda tree: jax.tree.map(partial(put_on_mesh, mesh=same), tree)


def put_on_mesh(x: Array, mesh: Mesh | None) -> Array:
    """Returns an array on a mesh with its own sharding; unchanged if there is no mesh."""
    if mesh is None:
        return x
    spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))


def _on_mesh(x: Array) -> bool:
    return isinstance(x.sharding, NamedSharding)


def count_shards(inputs: Sequence[Array]) -> int:
    """Returns the number of devices that the examples are sharded over."""
    sharding = inputs[0].sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return 1
    (first, *_) = sharding.spec
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def largest_plan(
    engine: Engine[PlanT, SideT],
    values: Values,
    inputs: tuple[Examples, Examples],
    max_block: int,
    limit: int,
) -> tuple[PlanT, int]:
    """Returns the largest plan that an engine finds for a memory limit, and the bytes it needs.

    If even the smallest plan needs more than the limit, it is that plan. The ``inputs`` are the
    arrays of both arguments; a block has at most ``max_block`` examples.
    """
    task = engine.task

    def needed(plan: PlanT) -> int:
        # Asking the compiler takes longer than a small kernel.
        key = (type(engine), plan, task.n1, task.kept, task.same, task.sign, task.shards)
        if key not in task.program.plan_bytes:
            blocks = (_abstract(inputs[0], plan.rows), _abstract(inputs[1], plan.columns))
            task.program.plan_bytes[key] = engine.memory(plan, values, blocks)
        return task.program.plan_bytes[key]

    smallest = engine.plan(1, 1.0)
    budget = float(limit)
    plan = engine.plan(max_block, budget)
    need = needed(plan)
    while need > limit and plan != smallest:
        budget = max(1.0, budget * min(0.7, max(0.2, 0.9 * limit / need)))
        new = engine.plan(max_block, budget)
        if new != plan:
            plan, need = new, needed(new)
    return plan, need


def compute_blocks(
    engine: Engine[PlanT, SideT],
    plan: PlanT,
    values: Values,
    inputs: tuple[Examples, Examples],
    progress: bool | None,
) -> KernelArray:
    """Computes a kernel (n, r, m, r) block by block, from the arrays of both arguments."""
    task = engine.task
    rows, columns = -(-task.n1 // plan.rows), -(-task.n2 // plan.columns)
    blocks: dict[tuple[int, int], KernelArray] = {}
    order = list(_snake(rows, columns, task.symmetric))
    total = sum(engine.steps(plan, group) for group in range(plan.groups)) * len(order)
    with show_progress("Kernel", total, progress, first="compiling") as advance:
        for group in range(plan.groups):
            first = second = None
            at = (-1, -1)
            for i, j in order:
                # The old side is freed before the new one is made.
                if i != at[0]:
                    first = None
                    first = engine.prepare(plan, group, values, _block(inputs[0], i, plan.rows))
                alone = task.same and i == j
                if not alone and (j != at[1] or second is None):
                    second = None
                    second = engine.prepare(plan, group, values, _block(inputs[1], j, plan.columns))
                at = (i, j)
                assert first is not None
                start = blocks.get((i, j))
                if start is None:
                    shape = task.block(plan.rows, plan.columns)
                    start = jnp.zeros(shape.shape, shape.dtype)
                sides = (first, None if alone else second)
                step = f"block {i * columns + j + 1} of {rows * columns}"
                blocks[i, j] = engine.add(plan, group, start, sides, lambda s=step: advance(s))
    return _assembled(blocks, rows, columns, task.symmetric)[: task.n1, :, : task.n2]


def _snake(rows: int, columns: int, upper: bool) -> Iterator[tuple[int, int]]:
    """Yields pairs of blocks row by row, to and fro: a row begins where the last one ended."""
    for i in range(rows):
        row = range(i if upper else 0, columns)
        yield from ((i, j) for j in (reversed(row) if i % 2 else row))


def _assembled(
    blocks: dict[tuple[int, int], KernelArray], rows: int, columns: int, symmetric: bool
) -> Array:
    if symmetric:
        for (i, j), block in list(blocks.items()):
            flipped = block.transpose(2, 3, 0, 1)
            blocks[j, i] = (block + flipped) / 2 if i == j else flipped
    if rows == columns == 1:
        return blocks[0, 0]
    return jnp.concatenate(
        [jnp.concatenate([blocks[i, j] for j in range(columns)], 2) for i in range(rows)]
    )


def _abstract(inputs: Sequence[Array], size: int) -> list[jax.ShapeDtypeStruct]:
    def shape(x: Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if _on_mesh(x) else None
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)

    return [shape(x) for x in inputs]


def _block(inputs: Sequence[Array], index: int, size: int) -> list[Array]:
    """Returns the arrays of one block of examples; the last is padded with the last example."""

    def part(x: Array) -> Array:
        if size == x.shape[0]:
            return x
        chosen = np.minimum(np.arange(index * size, (index + 1) * size), x.shape[0] - 1)
        taken = jnp.take(x, jnp.asarray(chosen), axis=0)
        return jax.device_put(taken, x.sharding) if _on_mesh(x) else taken

    return [part(x) for x in inputs]
