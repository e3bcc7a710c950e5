"""What the engines share: the task, the plan of its blocks, and the memory that a plan needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntk.engines.contraction import Kernel
from ntk.engines.structure import Program


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A kernel to compute, without the values of parameters and inputs.

    Args:
        program: The function of one example; its outputs are in order (r, s), see `contract`.
        leaves: Shapes and dtypes of the parameters.
        kept: The number r of outputs that stay.
        n1: Examples of the first argument.
        n2: Examples of the second.
        same: Whether they are the same.
        sign: Whether the second gradient is replaced by its sign.
        dtype: The dtype of the kernel.
        shards: Over how many devices the examples are laid.
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
    def mirrored(self) -> bool:
        """Whether the kernel is symmetric."""
        return self.same and not self.sign

    def block(self, rows: int, columns: int) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the kernel of two blocks of examples."""
        return jax.ShapeDtypeStruct((rows, self.kept, columns, self.kept), self.dtype)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many examples a block has.

    Args:
        rows: Of the first argument.
        columns: Of the second.
    """

    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """How many groups the parameters are taken in."""
        return 1


class Engine(ABC):
    """A way to compute the kernel of a task block by block.

    Args:
        task: What to compute.
    """

    def __init__(self, task: Task):
        self.task = task

    @abstractmethod
    def plan(self, most: int, budget: float) -> Any:
        """A plan that is estimated to need some bytes beside parameters, inputs and result.

        Args:
            most: Most examples in a block.
            budget: The bytes; if they cannot be met, the plan is the smallest there is.

        Returns:
            The plan.
        """

    @abstractmethod
    def memory(self, plan: Any, values: Any, blocks: tuple[Any, Any]) -> int:
        """Bytes that a plan needs beside parameters, inputs and result.

        Args:
            plan: The plan.
            values: The parameters and the program's constants.
            blocks: Shapes and dtypes of a block of either argument.

        Returns:
            The bytes, by what the compiler says.
        """

    def side(self, plan: Any, group: int, values: Any, block: Any) -> Any:
        """What a block of examples brings to a kernel: here, all there is.

        Args:
            plan: The plan.
            group: The number of the group of parameters.
            values: The parameters and the program's constants.
            block: The arrays of the examples.

        Returns:
            What `add` takes.
        """
        return values, block

    def steps(self, plan: Any, group: int) -> int:
        """How often `add` advances."""
        return 1

    @abstractmethod
    def add(
        self,
        plan: Any,
        group: int,
        total: Kernel,
        sides: tuple[Any, Any],
        advance: Callable[[], None],
    ) -> Kernel:
        """Adds what a group of parameters gives to the kernel of two blocks.

        Args:
            plan: The plan.
            group: The number of the group.
            total: What it is added to.
            sides: The two blocks; None for the second if it is the first.
            advance: Called after every step.

        Returns:
            The sum.
        """


def cut(n: int, most: int, chunk: int, shards: int) -> tuple[int, int]:
    """Cuts examples into equal blocks and a block into equal chunks.

    Args:
        n: The number of examples.
        most: Most examples in a block.
        chunk: Most examples in a chunk.
        shards: What the size of a chunk is to be a multiple of.

    Returns:
        The sizes of a block and of a chunk; more than asked for, if ``shards`` wants it.

    Example:
        >>> cut(10, 6, 2, 1), cut(7, 100, 100, 1), cut(7, 100, 3, 4)
        ((6, 2), (7, 7), (8, 4))
    """

    def rounded(size: int) -> int:
        return -(-size // shards) * shards

    block = -(-n // -(-n // min(n, most)))
    chunk = min(chunk, block)
    # A somewhat smaller chunk is better than to fill up the last one.
    even = [c for c in range(chunk, chunk // 2, -1) if block % c == 0]
    chunk = rounded(even[0] if even else -(-block // -(-block // chunk)))
    return -(-block // chunk) * chunk, chunk


def mapped(function: Callable[[Any], Any], xs: Any, chunk: int, shards: int = 1) -> Any:
    """Applies a batched function to chunks of a batch, one after the other.

    Args:
        function: Takes and returns pytrees of arrays with the batch on the first axis.
        xs: The batch.
        chunk: The size of a chunk; the last one is padded.
        shards: Over how many devices the batch is laid; each takes part in every chunk.

    Returns:
        The results for the batch.

    Example:
        >>> mapped(lambda x: x + 1, jnp.arange(5), 2).tolist()
        [1, 2, 3, 4, 5]
    """
    n = jax.tree.leaves(xs)[0].shape[0]
    if chunk >= n:
        return function(xs)
    steps = -(-n // chunk)

    def split(x: Any) -> Any:
        x = jnp.pad(x, ((0, steps * chunk - n), *((0, 0),) * (x.ndim - 1)))
        x = x.reshape(shards, steps, chunk // shards, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(steps, chunk, *x.shape[3:])

    def joined(x: Any) -> Any:
        x = x.reshape(steps, shards, chunk // shards, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(steps * chunk, *x.shape[3:])[:n]

    return jax.tree.map(joined, lax.map(function, jax.tree.map(split, xs)))


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a pytree, which may be abstract."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def temporary(function: Any, *arguments: Any) -> int:
    """Bytes that a jitted function needs while it runs, beside its arguments and results.

    Args:
        function: The jitted function; a later call with the same shapes compiles nothing anew.
        *arguments: What it is called with, possibly abstract.

    Returns:
        What the compiler says; 0 where it says nothing.
    """
    analysis = function.lower(*arguments).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes
