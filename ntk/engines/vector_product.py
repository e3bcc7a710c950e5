"""Kernels from products of the kernel with vectors, without any Jacobian.

A column of the kernel, for one example z and one output, is the directional derivative of f at the
other examples along the gradient g(z), or along sign g(z) for the Adam kernel. Memory holds a few
gradients at a time. Right where outputs are many and the network is cheap for its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ntk.engines.base import Engine, Plan, Task, cut, mapped, nbytes, temporary
from ntk.engines.contraction import Kernel
from ntk.engines.structure import Program


@dataclass(frozen=True, kw_only=True)
class VectorPlan(Plan):
    """How the work is cut.

    Args:
        seeds: Columns that are computed at once.
    """

    seeds: int


class VectorEngine(Engine):
    """Kernels from kernel-vector products; see the module.

    Args:
        task: What to compute.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        self._add = task.program.jitted(_added, static=3)

    def flops(self) -> float:
        """About how many operations the kernel costs."""
        n1, n2, outputs = self.task.n1, self.task.n2, self.task.program.outputs
        # One pass forward and two back for a gradient, two forward for a derivative along it.
        return 1.0 * self.task.program.flops() * (n1 + n2 * (1 + 2 * outputs + 2 * outputs * n1))

    def plan(self, most: int, budget: float) -> VectorPlan:
        """A plan for some bytes, half of them for gradients."""
        task = self.task
        transient = task.program.bytes()
        largest = max(1, min(most, int(budget / 4 / transient)))
        (rows, _), (columns, _) = (cut(n, largest, n, task.shards) for n in (task.n1, task.n2))
        gradient = nbytes(task.leaves) + rows * transient
        return VectorPlan(
            rows=rows, columns=columns, seeds=max(1, min(task.kept, int(budget / 2 / gradient)))
        )

    def add(
        self,
        plan: VectorPlan,
        group: int,
        total: Kernel,
        sides: tuple[Any, Any],
        advance: Callable[[], None],
    ) -> Kernel:
        """Adds the kernel of two blocks."""
        (values, first), (_, second) = sides[0], sides[1] or sides[0]
        total = self._add(*self._static(plan), total, *values, first, second)
        total = jax.block_until_ready(total)
        advance()
        return total

    def _static(self, plan: VectorPlan) -> tuple[int, int, bool]:
        return plan.seeds, self.task.kept, self.task.sign

    def memory(self, plan: VectorPlan, values: Any, blocks: tuple[Any, Any]) -> int:
        """Bytes that a plan needs beside parameters, inputs and result."""
        total = self.task.block(plan.rows, plan.columns)
        return temporary(self._add, *self._static(plan), total, *values, *blocks) + nbytes(total)


def _added(
    program: Program,
    seeds: int,
    kept: int,
    sign: bool,
    total: Kernel,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
) -> Kernel:
    """Adds the kernel of two blocks of examples."""
    summed = program.outputs // kept

    def batch(leaves: Any) -> Float[Array, "n o"]:
        return jax.vmap(lambda example: program(leaves, constants, example)[0])(first)

    _, along = jax.linearize(batch, leaves)

    def columns(example: Any) -> Float[Array, "q n r"]:
        out, pull = jax.vjp(lambda leaves: program(leaves, constants, example)[0], leaves)

        def column(q: Array) -> Float[Array, "n r"]:
            def add(s: Array, total: Array) -> Array:
                (g,) = pull(jnp.zeros_like(out).at[q * summed + s].set(1))
                g = jax.tree.map(jnp.sign, g) if sign else g
                return total + along(g).reshape(-1, kept, summed)[:, :, s].astype(total.dtype)

            return lax.fori_loop(0, summed, add, jnp.zeros(total.shape[:2], total.dtype))

        return mapped(jax.vmap(column), jnp.arange(kept), seeds)

    return total + lax.map(columns, second).transpose(2, 3, 0, 1)
