"""Multiplies with a matrix that is a chain of cores, in the cheapest order.

Axis letters in shapes: d inputs, o outputs, n positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import opt_einsum
from jaxtyping import Array, Float, Int

from fusion_jax.mpo.layouts import Layout
from fusion_jax.nn.dtypes import wide

WRITE = 128
"""The cost of writing a number of an intermediate result, in multiply-adds. Without it, orders with
many small products would win, which are slow."""


class ContractionPlan(NamedTuple):
    """The order in which a product is computed.

    Args:
        subscripts: The subscripts for ``einsum``: the input split into factors, and the cores.
        path: For each step the two operands that are multiplied.
        flops: Operations (two for each multiply-add) of this order.
        rebuild_flops: Operations of computing the matrix first and then multiplying with it.
        rebuilds: Whether this order computes the matrix first.
        cost: The cost of this order; see `plan`.
    """

    subscripts: str
    path: tuple[tuple[int, ...], ...]
    flops: int
    rebuild_flops: int
    rebuilds: bool
    cost: int


@lru_cache(maxsize=4096)
def plan(n: int, layout: Layout, *, transposed: bool = False) -> ContractionPlan:
    """Returns the cheapest order for the product of n rows with a chain of cores.

    The cost of an order is the number of its multiply-adds, plus `WRITE` for each number of a
    result. Dynamic programming finds the cheapest of all orders in which every step sums over a
    bond or a factor.

    Args:
        n: The number of rows of the input.
        layout: The shapes of the cores.
        transposed: Whether to multiply with the transposed matrix.

    Example:
        >>> small = Layout((32, 24), (64, 48), (8,))
        >>> plan(1, small).rebuilds, plan(1, small).flops < plan(1, small).rebuild_flops
        (False, True)
    """
    m = len(layout.inputs)
    symbol = opt_einsum.get_symbol
    rows, columns = [symbol(k) for k in range(m)], [symbol(m + k) for k in range(m)]
    bonds = [symbol(2 * m + k) for k in range(m + 1)]
    batch = symbol(3 * m + 1)
    cores = [f"{bonds[k]}{rows[k]}{columns[k]}{bonds[k + 1]}" for k in range(m)]
    # The ends of the chain and factors of 1 are left out: the input has no axes for them.
    drop = {bonds[0], bonds[m]}
    drop |= {s for s, size in zip(rows, layout.inputs, strict=True) if size == 1}
    drop |= {s for s, size in zip(columns, layout.outputs, strict=True) if size == 1}
    cores = ["".join(s for s in core if s not in drop) for core in cores]
    ins, outs = (columns, rows) if transposed else (rows, columns)
    source = batch + "".join(s for s in ins if s not in drop)
    target = batch + "".join(s for s in outs if s not in drop)
    subscripts = f"{source},{','.join(cores)}->{target}"
    sizes = {batch: n}
    sizes |= dict(zip(rows, layout.inputs, strict=True))
    sizes |= dict(zip(columns, layout.outputs, strict=True))
    sizes |= dict(zip(bonds, (1, *layout.bonds, 1), strict=True))
    shapes = [tuple(sizes[s] for s in term) for term in (source, *cores)]
    search = opt_einsum.DynamicProgramming(minimize=f"combo-{WRITE}")
    found, _ = opt_einsum.contract_path(subscripts, *shapes, shapes=True, optimize=search)
    path = tuple(tuple(pair) for pair in found)
    multiplies, cost = _path_cost([set(source), *map(set, cores)], path, set(target), sizes)
    rebuild = rebuilding(layout)
    entries = math.prod(layout.inputs) * math.prod(layout.outputs)
    last = n * (entries + WRITE * (math.prod(layout.inputs if transposed else layout.outputs)))
    # The costs are equal if the input comes last in the path.
    rebuilds = m > 1 and rebuild.cost + last <= cost
    rebuild_flops = 2 * (rebuild.multiplies + n * entries)
    return ContractionPlan(
        subscripts,
        path,
        rebuild_flops if rebuilds else 2 * multiplies,
        rebuild_flops,
        rebuilds,
        rebuild.cost + last if rebuilds else cost,
    )


def _path_cost(
    terms: list[set[str]],
    path: Sequence[tuple[int, ...]],
    target: set[str],
    sizes: Mapping[str, int],
) -> tuple[int, int]:
    """Returns the multiply-adds of an order, and its cost."""
    terms, multiplies, written = list(terms), 0, 0
    for pair in path:
        both: set[str] = set().union(*(terms.pop(i) for i in sorted(pair, reverse=True)))
        left = both & target.union(*terms)
        multiplies += math.prod(sizes[s] for s in both)
        written += math.prod(sizes[s] for s in left)
        terms.append(left)
    return multiplies, multiplies + WRITE * written


class Rebuilding(NamedTuple):
    """The order in which the matrix of a chain of cores is computed.

    Args:
        tree: The index of a core, or the trees of two neighboring parts of the chain.
        multiplies: The number of multiply-adds.
        cost: The cost; see `plan`.
    """

    tree: int | tuple
    multiplies: int
    cost: int


@lru_cache(maxsize=4096)
def rebuilding(layout: Layout) -> Rebuilding:
    """Returns the cheapest order for computing the matrix of a chain of cores.

    Returns:
        The cheapest of all orders that multiply neighbors.

    Example:
        >>> rebuilding(Layout((2, 2, 2), (2, 2, 2), (2, 4))).tree
        (0, (1, 2))
    """
    m, ends = len(layout.inputs), (1, *layout.bonds, 1)
    sizes = [i * j for i, j in zip(layout.inputs, layout.outputs, strict=True)]
    best = {(k, k + 1): Rebuilding(k, 0, 0) for k in range(m)}
    for length in range(2, m + 1):
        for start in range(m - length + 1):
            stop, found = start + length, []
            for middle in range(start + 1, stop):
                first, second = best[start, middle], best[middle, stop]
                rows = ends[start] * math.prod(sizes[start:middle])
                columns = math.prod(sizes[middle:stop]) * ends[stop]
                multiplies = rows * ends[middle] * columns
                cost = multiplies + WRITE * rows * columns
                found.append(
                    Rebuilding(
                        (first.tree, second.tree),
                        first.multiplies + second.multiplies + multiplies,
                        first.cost + second.cost + cost,
                    )
                )
            best[start, stop] = min(found, key=lambda order: order.cost)
    return best[0, m]


def contract(cores: Sequence[Array], shape: tuple[int, int]) -> Float[Array, "d o"]:
    """Computes the matrix of a chain of cores, in the cheapest order.

    Args:
        cores: T_1 ... T_m.
        shape: The numbers of rows and columns, without padding.

    Returns:
        The matrix, computed in float32 or wider and rounded to the dtype of the cores.

    Example:
        >>> contract([jnp.ones((1, 2, 2, 3)), jnp.ones((3, 2, 1, 1))], (4, 2)).tolist()
        [[3.0, 3.0], [3.0, 3.0], [3.0, 3.0], [3.0, 3.0]]
    """

    def made(tree: int | tuple) -> Array:
        if isinstance(tree, int):
            return wide(cores[tree])
        return jnp.tensordot(made(tree[0]), made(tree[1]), 1, precision="highest")

    layout = _layout_of(cores)
    m = len(cores)
    factors = made(rebuilding(layout).tree)
    factors = factors.reshape(factors.shape[1:-1])
    factors = factors.transpose(*range(0, 2 * m, 2), *range(1, 2 * m, 2))
    whole = factors.reshape(math.prod(layout.inputs), math.prod(layout.outputs))
    return whole[: shape[0], : shape[1]].astype(cores[0].dtype)


def _layout_of(cores: Sequence[Array]) -> Layout:
    _, inputs, outputs, bonds = zip(*(core.shape for core in cores), strict=True)
    return Layout(inputs, outputs, bonds[:-1])


def product(
    x: Float[Array, "n d"], cores: Sequence[Array], columns: int, *, transposed: bool = False
) -> Float[Array, "n o"]:
    """Returns ``x W`` in the dtype of x for a chain of cores W, in the cheapest order.

    Args:
        x: (n, d) the rows.
        cores: T_1 ... T_m.
        columns: The number of columns of the result, without padding.
        transposed: Whether to return ``x W^T``.
    """
    layout = _layout_of(cores)
    found = plan(len(x), layout, transposed=transposed)
    if found.rebuilds:
        whole = contract(
            [core.astype(x.dtype) for core in cores],
            (columns, x.shape[1]) if transposed else (x.shape[1], columns),
        )
        return x @ (whole.T if transposed else whole)
    ins, outs = (layout.outputs, layout.inputs) if transposed else (layout.inputs, layout.outputs)
    x = jnp.pad(x, ((0, 0), (0, math.prod(ins) - x.shape[1])))
    operands = [x.reshape(len(x), *(i for i in ins if i > 1))]
    last = len(cores) - 1
    for k, core in enumerate(cores):
        b, i, j, c = core.shape
        kept = [*([b] if k else []), *(s for s in (i, j) if s > 1), *([c] if k < last else [])]
        operands.append(core.astype(x.dtype).reshape(kept))
    y = jnp.einsum(found.subscripts, *operands, optimize=list(found.path))
    return y.reshape(len(x), math.prod(outs))[:, :columns]


def rows(
    ids: Int[Array, " n"], cores: Sequence[Array], shape: tuple[int, int]
) -> Float[Array, "n o"]:
    """Returns rows of the matrix of a chain of cores, from the cores or from the whole matrix.

    Args:
        ids: (n,) the indices of the rows; negative ones count from the end.
        cores: T_1 ... T_m, of the same dtype.
        shape: The numbers of rows and columns of the matrix.

    Returns:
        The rows; NaN for an index out of range, as in plain embeddings.

    Example:
        >>> rows(jnp.array([1, 1]), [jnp.eye(4).reshape(1, 4, 4, 1)], (4, 3)).tolist()
        [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    layout = _layout_of(cores)
    ids = jnp.where(ids < 0, ids + shape[0], ids)
    in_range = ((ids >= 0) & (ids < shape[0]))[:, None]
    if not looks_up(len(ids), layout):
        return jnp.where(in_range, contract(cores, shape)[ids], jnp.nan)
    digits = jnp.unravel_index(ids, layout.inputs)
    made = cores[0][0][digits[0]]  # (n, j, b)
    for core, digit in zip(cores[1:], digits[1:], strict=True):
        made = jnp.einsum("nja,ankb->njkb", made, core[:, digit])
        n, j, k, b = made.shape
        made = made.reshape(n, j * k, b)
    return jnp.where(in_range, made[..., 0][:, : shape[1]], jnp.nan)


def looks_up(n: int, layout: Layout) -> bool:
    """Returns whether computing n rows core by core is cheaper than computing the whole matrix.

    The measure is the cost of `plan`; each number that is gathered also counts as written.

    Example:
        >>> layout = Layout((32, 24), (64, 48), (8,))
        >>> looks_up(1, layout), looks_up(10_000, layout)
        (True, False)
    """
    cost, width = 0, 1
    for before, _, j, after in layout.shapes:
        cost += n * before * j * after * (width + WRITE)
        width *= j
        cost += WRITE * n * width * after
    return cost < rebuilding(layout).cost + WRITE * n * width
