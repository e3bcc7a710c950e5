"""Layouts of matrix product operators: into which factors and bonds a matrix is split."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fusion_jax.errors import InputError


class Layout(NamedTuple):
    """How a matrix is split into cores.

    Args:
        inputs: i_1 ... i_m; their product is at least the rows, which are filled up with zeros.
        outputs: j_1 ... j_m, likewise for the columns.
        bonds: b_1 ... b_{m-1}.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of the cores."""
        ends = (1, *self.bonds, 1)
        return list(zip(ends, self.inputs, self.outputs, ends[1:], strict=False))

    @property
    def params(self) -> int:
        """The numbers in all cores."""
        return sum(math.prod(shape) for shape in self.shapes)

    def capped(self, bond: int) -> Layout:
        """The layout with no bond above a number."""
        return self._replace(bonds=tuple(min(b, bond) for b in self.bonds))


def full_bonds(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[int, ...]:
    """The bonds at which every matrix is represented exactly.

    Args:
        inputs: i_1 ... i_m.
        outputs: j_1 ... j_m.

    Returns:
        ``b_k = min(prod_{l<=k} i_l j_l, prod_{l>k} i_l j_l)``.

    References:
        MPOP (Liu et al., ACL 2021), equation 2.

    Example:
        >>> full_bonds((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
        (12, 192, 384, 16)
    """
    sizes = [i * j for i, j in zip(inputs, outputs, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


@lru_cache
def balanced(n: int, parts: int) -> tuple[int, ...]:
    """Factors of about the same size whose product is n, or a little more where n has none.

    Args:
        n: What to factorise.
        parts: How many factors.

    Returns:
        The factors of the smallest number from n on of which the largest factor is at most twice
        the geometric mean, rounded up; the largest in the middle.

    Example:
        >>> balanced(768, 5), balanced(3072, 5), balanced(7, 2)
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (4, 2))
    """
    most = math.ceil(2 * n ** (1 / parts))
    while (factors := _factors(n, parts)) is None or max(factors) > most:
        n += 1
    ordered: list[int] = []
    for i, factor in enumerate(sorted(factors, reverse=True)):
        ordered = [*ordered, factor] if i % 2 else [factor, *ordered]
    return tuple(ordered)


def _factors(n: int, parts: int) -> list[int] | None:
    """Factors of which the largest is as small as can be; None if a prime is too large."""
    if parts == 1:
        return [n]
    best = None
    for first in range(1, math.floor(n ** (1 / parts) + 1e-9) + 1):
        if n % first == 0:
            rest = _factors(n // first, parts - 1)
            assert rest is not None
            found = [first, *rest]
            if best is None or (max(found), sum(found)) < (max(best), sum(best)):
                best = found
    return best


def chain(d: int, o: int, parts: int) -> Layout:
    """The layout that adds parameters: two outer cores, and square matrices between them.

    Args:
        d: Rows.
        o: Columns.
        parts: Cores, at least 2.

    Returns:
        A layout at full bonds in which all inner factors are 1.

    References:
        OPF (Gao et al., ACL 2023), section 4.1: 768 x 3072 as (32, 1, ..., 24) x (64, 1, ..., 48).

    Example:
        >>> chain(768, 3072, 4).shapes
        [(1, 32, 64, 1152), (1152, 1, 1, 1152), (1152, 1, 1, 1152), (1152, 24, 48, 1)]
    """
    (a, b), (c, e) = balanced(d, 2), balanced(o, 2)
    ones = (1,) * (parts - 2)
    inputs, outputs = (max(a, b), *ones, min(a, b)), (max(c, e), *ones, min(c, e))
    return Layout(inputs, outputs, full_bonds(inputs, outputs))


def layout_of(d: int, o: int, parts: int, *, share: float | None = None) -> Layout:
    """A balanced layout of a matrix.

    Args:
        d: Rows.
        o: Columns.
        parts: Cores.
        share: The most parameters, as a share of the matrix's; None for full bonds.

    Returns:
        The layout, whose bonds have one limit, the largest that keeps to the share.

    Raises:
        InputError: Even bonds of 1 are above the share.
    """
    inputs, outputs = balanced(d, parts), balanced(o, parts)
    orders = [Layout(inputs, j, full_bonds(inputs, j)) for j in (outputs, outputs[::-1])]
    full = min(orders, key=lambda layout: layout.params)
    return full if share is None else within_share(full, d, o, share)


def within_share(full: Layout, d: int, o: int, share: float) -> Layout:
    """A layout with the largest limit on its bonds that keeps to a share of parameters.

    Args:
        full: The layout at full bonds.
        d: Rows of the matrix.
        o: Columns.
        share: The most parameters, as a share of the matrix's.

    Returns:
        The layout with smaller bonds.

    Raises:
        InputError: Even bonds of 1 are above the share.

    Example:
        >>> within_share(Layout((2, 3), (2, 2), (4,)), 6, 4, 0.9).bonds
        (2,)
    """
    limit = share * d * o
    most = bisect.bisect_right(
        range(1, max(full.bonds, default=1) + 1), limit, key=lambda bond: full.capped(bond).params
    )
    if not most:
        raise InputError(
            f"{len(full.inputs)} cores of a {d} x {o} matrix have at least "
            f"{full.capped(1).params} parameters; a share of {share:g} allows {limit:.0f}"
        )
    return full.capped(most)
