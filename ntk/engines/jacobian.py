"""Kernels from per-example gradients, kept as factors where a product or look-up made them.

For every block of examples one backward pass gives, for every output, the factors (X, D) of the
gradients of matrices and tables (see `ntk.engines.structure`) and the full gradients of all other
parameters. Two blocks are then contracted parameter by parameter (see `ntk.engines.contraction`),
in the cheaper of two ways: <X X'^T, D D'^T> over pairs of positions, or the gradients X^T D, formed
in slices and multiplied. If even the factors do not fit into memory, parameters are divided into
groups, and the backward pass is repeated for each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped
from jaxtyping import Array, Float, Shaped

from ntk.engines.base import (
    Abstract,
    BlockPlan,
    Engine,
    Examples,
    KernelTask,
    Values,
    cut,
    map_chunks,
    nbytes,
    temporary_bytes,
)
from ntk.engines.contraction import (
    Contraction,
    GradientFactors,
    KernelArray,
    add_factored,
    add_full,
)
from ntk.engines.structure import ParameterUse, Program

# Forming a gradient is bound by memory: it costs this many times more than its operations say.
_FORMING = 3
# The number of gradients in a block from which on a matrix product is fast.
_GRADIENTS = 64


@dataclass(frozen=True)
class FactoredTerm:
    """A parameter whose gradients stay factors."""

    leaf: int
    uses: tuple[ParameterUse, ...]

    @property
    def lookup(self) -> bool:
        """Whether the parameter is a table."""
        return self.uses[0].lookup

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes (e, t, a, b) of all its uses together."""
        e, _, a, b = self.uses[0].shape
        return e, sum(use.shape[1] for use in self.uses), a, b

    def numbers(self, outputs: int) -> int:
        """Returns how many numbers the factors of one example have."""
        e, t, a, b = self.sizes
        return e * t * ((1 if self.lookup else a) + outputs * b)


@dataclass(frozen=True)
class FullTerm:
    """A range of a flattened parameter whose gradients are formed in full."""

    leaf: int
    start: int
    stop: int

    def numbers(self, outputs: int) -> int:
        """Returns how many numbers the gradients of one example have."""
        return outputs * (self.stop - self.start)


Term = FactoredTerm | FullTerm


class BlockGradients(NamedTuple):
    """The gradients of a block of examples with respect to a group of parameters.

    Args:
        inputs: The factors X, by what the parameters are multiplied with (see `_key`).
        cotangents: The factors D, by the number of the parameter.
        full: The gradients in full of all other parameters, joined.
    """

    inputs: dict[Hashable, Shaped[Array, "n ..."]]
    cotangents: dict[int, Float[Array, "n r s e t b"]]
    full: Float[Array, "n r sp"]


@dataclass(frozen=True, kw_only=True)
class JacobianPlan(BlockPlan):
    """The sizes of the blocks, the groups of parameters, and how much is computed at once.

    Args:
        terms: The parameters, group by group.
        chunk: Examples that are differentiated at once.
        seeds: Outputs that are differentiated at once.
        piece_bytes: Bytes of an intermediate result.
    """

    terms: tuple[tuple[Term, ...], ...]
    chunk: int
    seeds: int
    piece_bytes: int

    @property
    def groups(self) -> int:
        """The number of groups of parameters."""
        return len(self.terms)


class JacobianEngine(Engine[JacobianPlan, BlockGradients]):
    """Computes kernels from per-example gradients; see the module."""

    def __init__(self, task: KernelTask):
        super().__init__(task)
        program = task.program
        self.terms: list[Term] = []
        for leaf, aval in enumerate(task.leaves):
            if leaf in program.unused:
                continue
            full = FullTerm(leaf, 0, math.prod(aval.shape))
            factored = FactoredTerm(leaf, program.uses.get(leaf, ()))
            cheap = factored.uses and self._numbers(factored) < self._numbers(full)
            self.terms.append(factored if cheap else full)
        self._gradients = program.jitted(_gradients, static=3)

    def _numbers(self, term: Term) -> int:
        return term.numbers(self.task.program.outputs)

    def flops(self) -> float:
        """Returns an estimate of the number of operations."""
        outputs = self.task.program.outputs
        n1, n2, same = self.task.n1, self.task.n2, self.task.same
        total = 1.0 * (n1 if same else n1 + n2) * (1 + outputs) * self.task.program.flops()
        for term in self.terms:
            if isinstance(term, FactoredTerm):
                total += min(self._costs(term, n1, n2, same))
            else:
                total += 2 * n1 * n2 * self.task.kept * self._numbers(term)
        return total

    def _costs(self, term: FactoredTerm, n1: int, n2: int, same: bool) -> tuple[float, float]:
        """Returns the operations by products of positions, and by forming gradients."""
        e, t, a, b = term.sizes
        outputs, kept = self.task.program.outputs, self.task.kept
        grams = 2 * n1 * n2 * e * t * t * ((0 if term.lookup else a) + kept * outputs * b)
        examples = n1 if same else n1 + n2
        rows = min(a, examples * t) if term.lookup else a
        forming = 2 * _FORMING * examples * outputs * e * t * rows * b
        contraction = 2 * n1 * n2 * kept * outputs * e * rows * b
        return math.inf if self.task.sign else float(grams), float(forming + contraction)

    def plan(self, max_block: int, budget: float) -> JacobianPlan:
        """Returns a plan for a budget in bytes, half of which is for two blocks' gradients."""
        task = self.task
        outputs = task.program.outputs
        room = budget / 2 / task.dtype.itemsize
        longest = max(task.n1, task.n2)
        wanted = max(1, min(longest, max_block, _GRADIENTS // outputs))
        # The same examples on both sides need only one side, if they are in one block.
        groups = self._groups(room / longest)
        fits = max_block if len(groups) == 1 else min(max_block, 2 * wanted)
        alone = task.same and longest <= fits
        if alone and longest * self._heaviest(groups) <= room:
            largest = longest
        else:
            groups = self._groups(room / 2 / wanted)
            largest = max(1, min(max_block, longest, int(room / 2 / self._heaviest(groups))))
        transient = task.program.bytes()
        chunk = max(1, min(largest, int(budget / 4 / (transient * (1 + outputs / 2)))))
        seeds = outputs
        if chunk == 1:
            seeds = max(1, min(outputs, int(budget / 2 / transient)))
        rows, chunk = cut(task.n1, largest, chunk, task.shards)
        columns, chunk = cut(task.n2, largest, chunk, task.shards)
        # What fits into a CPU's cache; for accelerators, more.
        cache = (8 if jax.default_backend() == "cpu" else 256) * 2**20
        return JacobianPlan(
            rows=rows,
            columns=columns,
            terms=groups,
            chunk=chunk,
            seeds=seeds,
            piece_bytes=int(min(budget / 8, cache)),
        )

    def _heaviest(self, groups: tuple[tuple[Term, ...], ...]) -> int:
        return max(1, *(sum(map(self._numbers, group)) for group in groups))

    def _groups(self, capacity: float) -> tuple[tuple[Term, ...], ...]:
        """Divides the parameters into groups of at most ``capacity`` numbers for one example."""
        groups: list[tuple[Term, ...]] = [()]
        left = capacity
        for term in self.terms:
            for part in self._split(term, capacity):
                left -= self._numbers(part)
                if left < 0 and groups[-1]:
                    groups.append(())
                    left = capacity - self._numbers(part)
                groups[-1] = (*groups[-1], part)
        return tuple(groups)

    def _split(self, term: Term, capacity: float) -> Sequence[Term]:
        if isinstance(term, FactoredTerm):
            return [term]
        # The gradient of the whole parameter exists while a part is used: small parts gain little.
        size = max(int(capacity / self.task.program.outputs), -(-term.stop // 16))
        return [
            FullTerm(term.leaf, start, min(start + size, term.stop))
            for start in range(0, term.stop, size)
        ]

    def prepare(
        self, plan: JacobianPlan, group: int, values: Values, block: Examples
    ) -> BlockGradients:
        """Returns the gradients, or their factors, of a block of examples."""
        return self._gradients(*self._static(plan, group), *values, block)

    def _static(self, plan: JacobianPlan, group: int) -> tuple[_GroupPlan, np.dtype, int]:
        of_group = _GroupPlan(plan.terms[group], plan.chunk, plan.seeds, self.task.shards)
        return of_group, self.task.dtype, self.task.kept

    def add(
        self,
        plan: JacobianPlan,
        group: int,
        total: KernelArray,
        sides: tuple[BlockGradients, BlockGradients | None],
        advance: Callable[[], None],
    ) -> KernelArray:
        """Returns a total plus the part of a group of parameters in the kernel of two blocks."""
        for function, how, gradients in self._calls(plan, group, sides):
            total = jax.block_until_ready(function(how, total, *gradients))
            advance()
        return total

    def steps(self, plan: JacobianPlan, group: int) -> int:
        """Returns how often `add` calls ``advance``."""
        factored = [term for term in plan.terms[group] if isinstance(term, FactoredTerm)]
        return len(factored) + (len(factored) < len(plan.terms[group]))

    def _calls(
        self, plan: JacobianPlan, group: int, sides: tuple[BlockGradients, BlockGradients | None]
    ) -> list[_Call]:
        """Returns the functions that add to a total, with all their other arguments."""
        calls = []
        given = [side for side in sides if side is not None]
        for term in plan.terms[group]:
            if not isinstance(term, FactoredTerm):
                continue
            key = _key(term)
            factors = [GradientFactors(s.inputs[key], s.cotangents[term.leaf]) for s in given]
            sizes = [f.cotangents.shape[0] for f in factors]
            grams, forming = self._costs(term, sizes[0], sizes[-1], same=len(sizes) == 1)
            how = Contraction(
                sign=self.task.sign,
                grams=grams <= forming,
                table_rows=term.sizes[2] if term.lookup else None,
                piece_bytes=plan.piece_bytes,
            )
            calls.append(_Call(add_factored, how, tuple(factors)))
        if any(isinstance(term, FullTerm) for term in plan.terms[group]):
            calls.append(_Call(add_full, self.task.sign, tuple(side.full for side in given)))
        return calls

    def memory(self, plan: JacobianPlan, values: Values, blocks: tuple[Abstract, Abstract]) -> int:
        """Returns the bytes that a plan needs beside parameters, inputs and result."""
        alone = self.task.same and plan.rows >= self.task.n1
        total = self.task.block(plan.rows, plan.columns)
        peak = 0
        for group in range(plan.groups):
            static = self._static(plan, group)
            made = [jax.eval_shape(partial(self._gradients, *static), *values, x) for x in blocks]
            sides = (made[0], None if alone else made[1])
            steps = [temporary_bytes(self._gradients, *static, *values, x) for x in blocks]
            steps += [
                temporary_bytes(function, how, total, *gradients) + nbytes(total)
                for function, how, gradients in self._calls(plan, group, sides)
            ]
            peak = max(peak, nbytes(sides) + max(steps))
        return peak


class _Call(NamedTuple):
    """A function that adds to a total, how it does, and the gradients that it takes."""

    function: Wrapped
    how: Contraction | bool
    gradients: tuple[GradientFactors | Array, ...]


class _GroupPlan(NamedTuple):
    """The part of a plan that concerns one group of parameters."""

    terms: tuple[Term, ...]
    chunk: int
    seeds: int
    shards: int


def _gradients(
    program: Program,
    plan: _GroupPlan,
    dtype: np.dtype,
    kept: int,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    examples: Sequence[Array],
) -> BlockGradients:
    """Returns the gradients, or their factors, of a block of examples."""
    factored = [term for term in plan.terms if isinstance(term, FactoredTerm)]
    full = [term for term in plan.terms if isinstance(term, FullTerm)]

    def of_example(example: Sequence[Array]) -> BlockGradients:

        def function(
            taps: dict[int, Array], free: dict[int, Array]
        ) -> tuple[Array, dict[int, Array]]:
            current = [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            return program(current, constants, example, taps)

        taps = {use.op: program.tap(use) for term in factored for use in term.uses}
        free = {term.leaf: leaves[term.leaf] for term in full}
        out, pull, operands = jax.vjp(function, taps, free, has_aux=True)

        def of_output(seed: Array) -> tuple[dict[int, Array], Array]:
            at_taps, at_free = pull(seed)

            def cotangent(term: FactoredTerm) -> Array:
                parts = [use.cotangent(at_taps[use.op]) for use in term.uses]
                return jnp.concatenate(parts, axis=1).astype(dtype)

            flat = [at_free[t.leaf].ravel()[t.start : t.stop].astype(dtype) for t in full]
            return (
                {term.leaf: cotangent(term) for term in factored},
                jnp.concatenate([jnp.zeros(0, dtype), *flat]),
            )

        def inputs(term: FactoredTerm) -> Array:
            parts = [use.inputs(operands[use.op]) for use in term.uses]
            if term.lookup:
                return jnp.concatenate(parts)
            return jnp.concatenate(parts, axis=1).astype(dtype)

        summed = program.outputs // kept
        basis = jnp.eye(program.outputs, dtype=out.dtype)
        cotangents, flat = map_chunks(jax.vmap(of_output), basis, plan.seeds)
        return BlockGradients(
            {_key(term): inputs(term) for term in factored},
            {leaf: d.reshape(kept, summed, *d.shape[1:]) for leaf, d in cotangents.items()},
            flat.reshape(kept, summed * flat.shape[1]),
        )

    return map_chunks(jax.vmap(of_example), examples, plan.chunk, plan.shards)


def _key(term: FactoredTerm) -> Hashable:
    """Returns a key that is the same for parameters that are multiplied with the same inputs."""
    return tuple((use.other, use.perm, use.shape[:3], use.clipped) for use in term.uses)
