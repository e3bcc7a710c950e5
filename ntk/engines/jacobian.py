"""Kernels from per-example gradients, kept as factors where a product or look-up made them.

For every block of examples one backward pass gives, for every output, the factors (X, D) of the
gradients of matrices and tables (see `structure`) and the gradients of all other parameters in
full. Two blocks then meet parameter by parameter (see `contract`), by what costs less:
<X X'^T, D D'^T> over pairs of positions, or the gradients X^T D, formed in slices and multiplied.
Where even the factors do not fit, parameters are taken in groups, and the backward pass is repeated
for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ntk.engines.base import Engine, Plan, Task, cut, mapped, nbytes, temporary
from ntk.engines.contraction import Factors, How, Kernel, add_factored, add_full
from ntk.engines.structure import Program, Use

# Forming a gradient is bound by memory: it costs about so many times what its multiply-adds say.
_FORMING = 3
# A block should have at least so many gradients, for a matrix product to be fast.
_GRADIENTS = 64


@dataclass(frozen=True)
class Factored:
    """A parameter whose gradients stay factors."""

    leaf: int
    uses: tuple[Use, ...]

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
        """How many numbers the factors of one example have."""
        e, t, a, b = self.sizes
        return e * t * ((1 if self.lookup else a) + outputs * b)


@dataclass(frozen=True)
class Full:
    """A range of a parameter, flattened, whose gradients are formed in full."""

    leaf: int
    start: int
    stop: int

    def numbers(self, outputs: int) -> int:
        """How many numbers the gradients of one example have."""
        return outputs * (self.stop - self.start)


Term = Factored | Full


class Side(NamedTuple):
    """What a block of examples brings to a kernel."""

    inputs: dict[Any, Shaped[Array, "n ..."]]
    cotangents: dict[int, Float[Array, "n r s e t b"]]
    full: Float[Array, "n r sp"]


@dataclass(frozen=True, kw_only=True)
class JacobianPlan(Plan):
    """How the work is cut.

    Args:
        terms: The parameters, group by group.
        chunk: Examples that are differentiated at once.
        seeds: Outputs that are differentiated at once.
        piece: Bytes of an intermediate result.
    """

    terms: tuple[tuple[Term, ...], ...]
    chunk: int
    seeds: int
    piece: int

    @property
    def groups(self) -> int:
        """The number of groups of parameters."""
        return len(self.terms)


class JacobianEngine(Engine):
    """Kernels from per-example gradients; see the module.

    Args:
        task: What to compute.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        program = task.program
        self.terms: list[Term] = []
        for leaf, aval in enumerate(task.leaves):
            if leaf in program.idle:
                continue
            full = Full(leaf, 0, math.prod(aval.shape))
            factored = Factored(leaf, program.uses.get(leaf, ()))
            cheap = factored.uses and self._numbers(factored) < self._numbers(full)
            self.terms.append(factored if cheap else full)
        self._side = program.jitted(_side, static=3)

    def _numbers(self, term: Term) -> int:
        return term.numbers(self.task.program.outputs)

    def flops(self) -> float:
        """About how many operations the kernel costs."""
        outputs = self.task.program.outputs
        n1, n2, same = self.task.n1, self.task.n2, self.task.same
        total = 1.0 * (n1 if same else n1 + n2) * (1 + outputs) * self.task.program.flops()
        for term in self.terms:
            if isinstance(term, Factored):
                total += min(self._costs(term, n1, n2, same))
            else:
                total += 2 * n1 * n2 * self.task.kept * self._numbers(term)
        return total

    def _costs(self, term: Factored, n1: int, n2: int, same: bool) -> tuple[float, float]:
        """Operations by products of positions, and by forming gradients."""
        e, t, a, b = term.sizes
        outputs, kept = self.task.program.outputs, self.task.kept
        grams = 2 * n1 * n2 * e * t * t * ((0 if term.lookup else a) + kept * outputs * b)
        examples = n1 if same else n1 + n2
        rows = min(a, examples * t) if term.lookup else a
        forming = 2 * _FORMING * examples * outputs * e * t * rows * b
        contraction = 2 * n1 * n2 * kept * outputs * e * rows * b
        return math.inf if self.task.sign else float(grams), float(forming + contraction)

    def plan(self, most: int, budget: float) -> JacobianPlan:
        """A plan for some bytes, half of them for two blocks' gradients."""
        task = self.task
        outputs = task.program.outputs
        room = budget / 2 / task.dtype.itemsize
        longest = max(task.n1, task.n2)
        wanted = max(1, min(longest, most, _GRADIENTS // outputs))
        # The same examples on both sides need only one side, if they are in one block.
        groups = self._groups(room / longest)
        alone = task.same and longest <= (most if len(groups) == 1 else min(most, 2 * wanted))
        if alone and longest * self._heaviest(groups) <= room:
            largest = longest
        else:
            groups = self._groups(room / 2 / wanted)
            largest = max(1, min(most, longest, int(room / 2 / self._heaviest(groups))))
        transient = task.program.bytes()
        chunk = max(1, min(largest, int(budget / 4 / (transient * (1 + outputs / 2)))))
        seeds = outputs
        if chunk == 1:
            seeds = max(1, min(outputs, int(budget / 2 / transient)))
        rows, chunk = cut(task.n1, largest, chunk, task.shards)
        columns, chunk = cut(task.n2, largest, chunk, task.shards)
        return JacobianPlan(
            rows=rows,
            columns=columns,
            terms=groups,
            chunk=chunk,
            seeds=seeds,
            piece=int(min(budget / 8, _piece())),
        )

    def _heaviest(self, groups: tuple[tuple[Term, ...], ...]) -> int:
        return max(1, *(sum(map(self._numbers, group)) for group in groups))

    def _groups(self, capacity: float) -> tuple[tuple[Term, ...], ...]:
        """Groups of parameters with at most so many numbers per example, as far as possible."""
        groups: list[tuple[Term, ...]] = [()]
        left = capacity
        for term in self.terms:
            for piece in self._pieces(term, capacity):
                left -= self._numbers(piece)
                if left < 0 and groups[-1]:
                    groups.append(())
                    left = capacity - self._numbers(piece)
                groups[-1] = (*groups[-1], piece)
        return tuple(groups)

    def _pieces(self, term: Term, capacity: float) -> Sequence[Term]:
        if isinstance(term, Factored):
            return [term]
        # While a part is taken the gradient of all of it is there: small parts gain little.
        most = max(int(capacity / self.task.program.outputs), -(-term.stop // 16))
        return [
            Full(term.leaf, start, min(start + most, term.stop))
            for start in range(0, term.stop, most)
        ]

    def side(self, plan: JacobianPlan, group: int, values: Any, block: Any) -> Side:
        """The gradients, or their factors, of a block of examples."""
        return self._side(*self._cuts(plan, group), *values, block)

    def _cuts(self, plan: JacobianPlan, group: int) -> tuple[_Cuts, Any, int]:
        cuts = _Cuts(plan.terms[group], plan.chunk, plan.seeds, self.task.shards)
        return cuts, self.task.dtype, self.task.kept

    def add(
        self,
        plan: JacobianPlan,
        group: int,
        total: Kernel,
        sides: tuple[Side, Side | None],
        advance: Callable[[], None],
    ) -> Kernel:
        """Adds what a group of parameters gives to the kernel of two blocks."""
        for function, static, *factors in self._calls(plan, group, sides):
            total = jax.block_until_ready(function(static, total, *factors))
            advance()
        return total

    def steps(self, plan: JacobianPlan, group: int) -> int:
        """How often `add` advances."""
        factored = [term for term in plan.terms[group] if isinstance(term, Factored)]
        return len(factored) + (len(factored) < len(plan.terms[group]))

    def _calls(
        self, plan: JacobianPlan, group: int, sides: tuple[Side, Side | None]
    ) -> list[tuple[Any, ...]]:
        """The functions that add to a kernel, with their arguments but for the total."""
        calls: list[tuple[Any, ...]] = []
        given = [side for side in sides if side is not None]
        for term in plan.terms[group]:
            if not isinstance(term, Factored):
                continue
            factors = [Factors(s.inputs[_key(term)], s.cotangents[term.leaf]) for s in given]
            sizes = [f.cotangents.shape[0] for f in factors]
            grams, forming = self._costs(term, sizes[0], sizes[-1], same=len(sizes) == 1)
            how = How(
                sign=self.task.sign,
                grams=grams <= forming,
                height=term.sizes[2] if term.lookup else None,
                piece=plan.piece,
            )
            calls.append((add_factored, how, *factors))
        if any(isinstance(term, Full) for term in plan.terms[group]):
            calls.append((add_full, self.task.sign, given[0].full, given[-1].full))
        return calls

    def memory(self, plan: JacobianPlan, values: Any, blocks: tuple[Any, Any]) -> int:
        """Bytes that a plan needs beside parameters, inputs and result."""
        alone = self.task.same and plan.rows >= self.task.n1
        total = self.task.block(plan.rows, plan.columns)
        peak = 0
        for group in range(plan.groups):
            static = self._cuts(plan, group)
            made = [jax.eval_shape(partial(self._side, *static), *values, x) for x in blocks]
            sides = (made[0], None if alone else made[1])
            steps = [temporary(self._side, *static, *values, x) for x in blocks]
            steps += [
                temporary(function, first, total, *factors) + nbytes(total)
                for function, first, *factors in self._calls(plan, group, sides)
            ]
            peak = max(peak, nbytes(sides) + max(steps))
        return peak


class _Cuts(NamedTuple):
    """What a plan says of one group of parameters."""

    terms: tuple[Term, ...]
    chunk: int
    seeds: int
    shards: int


def _side(
    program: Program,
    cuts: _Cuts,
    dtype: np.dtype,
    kept: int,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    examples: Sequence[Array],
) -> Side:
    """The gradients, or their factors, of a block of examples."""
    factored = [term for term in cuts.terms if isinstance(term, Factored)]
    full = [term for term in cuts.terms if isinstance(term, Full)]

    def one(example: Sequence[Array]) -> Side:
        def function(taps: dict[int, Array], free: dict[int, Array]) -> Any:
            current = [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            return program(current, constants, example, taps)

        taps = {use.op: program.tap(use) for term in factored for use in term.uses}
        free = {term.leaf: leaves[term.leaf] for term in full}
        out, pull, met = jax.vjp(function, taps, free, has_aux=True)

        def gradients(seed: Array) -> tuple[dict[int, Array], Array]:
            at_taps, at_free = pull(seed)

            def cotangent(term: Factored) -> Array:
                parts = [use.cotangent(at_taps[use.op]) for use in term.uses]
                return jnp.concatenate(parts, axis=1).astype(dtype)

            flat = [at_free[t.leaf].ravel()[t.start : t.stop].astype(dtype) for t in full]
            return (
                {term.leaf: cotangent(term) for term in factored},
                jnp.concatenate([jnp.zeros(0, dtype), *flat]),
            )

        def inputs(term: Factored) -> Array:
            parts = [use.inputs(met[use.op]) for use in term.uses]
            if term.lookup:
                return jnp.concatenate(parts)
            return jnp.concatenate(parts, axis=1).astype(dtype)

        summed = program.outputs // kept
        basis = jnp.eye(program.outputs, dtype=out.dtype)
        cotangents, flat = mapped(jax.vmap(gradients), basis, cuts.seeds)
        return Side(
            {_key(term): inputs(term) for term in factored},
            {leaf: d.reshape(kept, summed, *d.shape[1:]) for leaf, d in cotangents.items()},
            flat.reshape(kept, summed * flat.shape[1]),
        )

    return mapped(jax.vmap(one), examples, cuts.chunk, cuts.shards)


def _key(term: Factored) -> tuple[Any, ...]:
    """Parameters with the same key meet the same inputs."""
    return tuple((use.other, use.perm, use.shape[:3], use.clipped) for use in term.uses)


def _piece() -> int:
    """What a CPU's cache holds; accelerators want larger pieces."""
    return (8 if jax.default_backend() == "cpu" else 256) * 2**20
