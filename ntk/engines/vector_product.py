"""Kernels from products of the kernel with vectors, without any Jacobian.

A column of the kernel, for one example z and one output, is the directional derivative of f at the
other examples along the gradient g(z), or along sign g(z) for the Adam kernel. Memory holds a few
gradients at a time. This suits many outputs of a network that is cheap for its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ntk.engines.base import (
    Abstract,
    BlockPlan,
    Examples,
    KernelTask,
    OneCallEngine,
    Values,
    cut,
    map_chunks,
    nbytes,
)
from ntk.engines.contraction import KernelArray
from ntk.engines.structure import Program


@dataclass(frozen=True, kw_only=True)
class VectorPlan(BlockPlan):
    """The sizes of the blocks, and how many columns are computed at once.

    Args:
        seeds: Columns of the kernel that are computed at once.
    """

    seeds: int


class VectorEngine(OneCallEngine[VectorPlan]):
    """Computes kernels from kernel-vector products; see the module."""

    def __init__(self, task: KernelTask):
        super().__init__(task)
        self._add = task.program.jitted(_added, static=3)

    def flops(self) -> float:
        """Returns an estimate of the number of operations."""
        n1, n2, outputs = self.task.n1, self.task.n2, self.task.program.outputs
        # One pass forward and two back for a gradient, two forward for a derivative along it.
        return 1.0 * self.task.program.flops() * (n1 + n2 * (1 + 2 * outputs + 2 * outputs * n1))

    def plan(self, max_block: int, budget: float) -> VectorPlan:
        """Returns a plan for a budget in bytes, half of which is for gradients."""
        task = self.task
        transient = task.program.bytes()
        largest = max(1, min(max_block, int(budget / 4 / transient)))
        (rows, _), (columns, _) = (cut(n, largest, n, task.shards) for n in (task.n1, task.n2))
        gradient = nbytes(task.leaves) + rows * transient
        return VectorPlan(
            rows=rows, columns=columns, seeds=max(1, min(task.kept, int(budget / 2 / gradient)))
        )

    def _arguments(
        self,
        plan: VectorPlan,
        total: KernelArray | jax.ShapeDtypeStruct,
        values: Values,
        first: Examples | Abstract,
        second: Examples | Abstract | None,
    ) -> tuple:
        static = plan.seeds, self.task.kept, self.task.sign
        return *static, total, *values, first, first if second is None else second


def _added(
    program: Program,
    seeds: int,
    kept: int,
    sign: bool,
    total: KernelArray,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
) -> KernelArray:
    """Returns a total plus the kernel of two blocks of examples."""
    summed = program.outputs // kept

    def batch(leaves: Sequence[Array]) -> Float[Array, "n o"]:
        one = partial(program, leaves, constants, gates=False)
        return jax.vmap(lambda example: one(example)[0])(first)

    _, along = jax.linearize(batch, leaves)

    def columns(example: Sequence[Array]) -> Float[Array, "q n r"]:
        out, pull = jax.vjp(lambda leaves: program(leaves, constants, example)[0], leaves)

        def column(q: Array) -> Float[Array, "n r"]:
            def add(s: Array, total: Array) -> Array:
                (g,) = pull(jnp.zeros_like(out).at[q * summed + s].set(1))
                g = jax.tree.map(jnp.sign, g) if sign else g
                return total + along(g).reshape(-1, kept, summed)[:, :, s].astype(total.dtype)

            return lax.fori_loop(0, summed, add, jnp.zeros(total.shape[:2], total.dtype))

        return map_chunks(jax.vmap(column), jnp.arange(kept), seeds)

    return total + lax.map(columns, second).transpose(2, 3, 0, 1)
