"""The base of all engines: the task, the plan of its blocks, and the memory that a plan needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.stages import Wrapped
from jaxtyping import Array, PyTree

from ntk.engines.contraction import KernelArray
from ntk.engines.structure import Program


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelTask:
    """A kernel to compute, without the values of parameters and inputs.

    Args:
        program: The function of one example; its outputs are in order (r, s), as in
            `ntk.engines.contraction`.
        leaves: Shapes and dtypes of the parameters.
        kept: The number r of outputs that are not summed over.
        n1: The number of examples of the first argument.
        n2: The number of examples of the second argument.
        same: Whether both arguments are the same.
        sign: Whether the second gradient is replaced by its sign.
        dtype: The dtype of the kernel.
        shards: The number of devices that the examples are sharded over.
    """

    program: Program
    leaves: Sequence[jax.ShapeDtypeStruct]
    kept: int
    n1: int
    n2: int
    same: bool
    sign: bool
    dtype: np.dtype
    shards: int

    @property
    def symmetric(self) -> bool:
        """Whether the kernel is symmetric."""
        return self.same and not self.sign

    def block(self, rows: int, columns: int) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of the kernel of two blocks of examples."""
        return jax.ShapeDtypeStruct((rows, self.kept, columns, self.kept), self.dtype)


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The sizes of the blocks that a kernel is computed in.

    Args:
        rows: Examples of the first argument in a block.
        columns: Examples of the second argument in a block.
    """

    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """The number of groups that the parameters are divided into."""
        return 1


PlanT = TypeVar("PlanT", bound=BlockPlan)
SideT = TypeVar("SideT")
"""What an engine needs of a block of examples."""

Values = tuple[Sequence[Array], Sequence[Array]]
"""The parameters and the constants of a program."""

Examples = Sequence[Array]
"""The arrays of the inputs, or of a block of them."""

Abstract = Sequence[jax.ShapeDtypeStruct]
"""Shapes and dtypes of the arrays of a block."""


class Engine(ABC, Generic[PlanT, SideT]):
    """A way to compute the kernel of a task block by block.

    In all methods, ``values`` are the parameters and the program's constants, and ``group`` is the
    number of a group of parameters.
    """

    def __init__(self, task: KernelTask):
        self.task = task

    @abstractmethod
    def plan(self, max_block: int, budget: float) -> PlanT:
        """Returns a plan for a budget of memory beside parameters, inputs and result.

        Args:
            max_block: The largest number of examples in a block.
            budget: The memory in bytes that the plan may need, by an estimate. If every plan needs
                more, the smallest plan is returned.
        """

    @abstractmethod
    def memory(self, plan: PlanT, values: Values, blocks: tuple[Abstract, Abstract]) -> int:
        """Returns the bytes that a plan needs beside parameters, inputs and result.

        ``blocks`` are shapes and dtypes of a block of each argument; the compiler counts the bytes.
        """

    @abstractmethod
    def prepare(self, plan: PlanT, group: int, values: Values, block: Examples) -> SideT:
        """Returns what `add` needs of a block of examples."""

    def steps(self, plan: PlanT, group: int) -> int:
        """Returns how often `add` calls ``advance``."""
        return 1

    @abstractmethod
    def add(
        self,
        plan: PlanT,
        group: int,
        total: KernelArray,
        sides: tuple[SideT, SideT | None],
        advance: Callable[[], None],
    ) -> KernelArray:
        """Returns a total plus the part of a group of parameters in the kernel of two blocks.

        ``sides`` are the two blocks as `prepare` returns them, None for the second if it is the
        first; ``advance`` is called after every step.
        """


class OneCallEngine(Engine[PlanT, tuple[Values, Examples]]):
    """Base of engines that compute the kernel of two blocks in one call of a jitted function."""

    _add: Wrapped

    @abstractmethod
    def _arguments(
        self,
        plan: PlanT,
        total: KernelArray | jax.ShapeDtypeStruct,
        values: Values,
        first: Examples | Abstract,
        second: Examples | Abstract | None,
    ) -> tuple:
        """Returns the arguments of the function; the second block is None if it is the first."""

    def prepare(
        self, plan: PlanT, group: int, values: Values, block: Examples
    ) -> tuple[Values, Examples]:
        """Returns what `add` needs of a block of examples: the block itself."""
        return values, block

    def add(
        self,
        plan: PlanT,
        group: int,
        total: KernelArray,
        sides: tuple[tuple[Values, Examples], tuple[Values, Examples] | None],
        advance: Callable[[], None],
    ) -> KernelArray:
        """Returns a total plus the kernel of two blocks."""
        (values, first), (_, second) = sides[0], sides[1] or (None, None)
        with self._explained():
            total = self._add(*self._arguments(plan, total, values, first, second))
        total = jax.block_until_ready(total)
        advance()
        return total

    def memory(self, plan: PlanT, values: Values, blocks: tuple[Abstract, Abstract]) -> int:
        """Returns the bytes that a plan needs beside parameters, inputs and result."""
        second = None if self.task.same and plan.rows >= self.task.n1 else blocks[1]
        total = self.task.block(plan.rows, plan.columns)
        with self._explained():
            arguments = self._arguments(plan, total, values, blocks[0], second)
            return temporary_bytes(self._add, *arguments) + nbytes(total)

    def _explained(self) -> AbstractContextManager[None]:
        """Returns a context that explains errors of the function."""
        return nullcontext()


def cut(n: int, max_block: int, chunk: int, shards: int) -> tuple[int, int]:
    """Cuts examples into equal blocks and a block into equal chunks.

    Args:
        n: The number of examples.
        max_block: The largest number of examples in a block.
        chunk: The largest number of examples in a chunk.
        shards: A chunk's size is a multiple of this.

    Returns:
        The sizes of a block and of a chunk; larger than asked for if ``shards`` requires it.

    Example:
        >>> cut(10, 6, 2, 1), cut(7, 100, 100, 1), cut(7, 100, 3, 4)
        ((6, 2), (7, 7), (8, 4))
    """

    def rounded(size: int) -> int:
        return -(-size // shards) * shards

    block = -(-n // -(-n // min(n, max_block)))
    chunk = min(chunk, block)
    # A somewhat smaller chunk is better than padding the last one.
    even = [c for c in range(chunk, chunk // 2, -1) if block % c == 0]
    chunk = rounded(even[0] if even else -(-block // -(-block // chunk)))
    return -(-block // chunk) * chunk, chunk


def map_chunks(
    function: Callable[[PyTree], PyTree], xs: PyTree, chunk: int, shards: int = 1
) -> PyTree:
    """Applies a batched function to chunks of a batch, one after the other.

    Args:
        function: Takes and returns pytrees of arrays with the batch on the first axis.
        xs: The batch.
        chunk: The size of a chunk; the last one is padded.
        shards: The number of devices that the batch is sharded over; each has a part of every
            chunk.

    Returns:
        The results for the batch.

    Example:
        >>> map_chunks(lambda x: x + 1, jnp.arange(5), 2).tolist()
        [1, 2, 3, 4, 5]
    """
    n = jax.tree.leaves(xs)[0].shape[0]
    if chunk >= n:
        return function(xs)
    steps = -(-n // chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, steps * chunk - n), *((0, 0),) * (x.ndim - 1)))
        x = x.reshape(shards, steps, chunk // shards, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(steps, chunk, *x.shape[3:])

    def joined(x: Array) -> Array:
        x = x.reshape(steps, shards, chunk // shards, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(steps * chunk, *x.shape[3:])[:n]

    return jax.tree.map(joined, lax.map(function, jax.tree.map(split, xs)))


def nbytes(tree: PyTree) -> int:
    """Returns the bytes of the arrays of a pytree, which may be abstract."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def temporary_bytes(function: Wrapped, *arguments: PyTree) -> int:
    """Returns the bytes that a jitted function needs while it runs, beside arguments and results.

    Args:
        function: The jitted function; a later call with the same shapes does not compile it again.
        *arguments: Its arguments, possibly abstract.

    Returns:
        The bytes according to the compiler; 0 if it does not say.
    """
    analysis = function.lower(*arguments).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes
