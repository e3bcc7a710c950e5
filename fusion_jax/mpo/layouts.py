"""Layouts of matrix product operators: the factors and bonds that a matrix is split into."""

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
        inputs: i_1 ... i_m. If their product exceeds the number of rows, zeros pad the rows.
        outputs: j_1 ... j_m. If their product exceeds the number of columns, zeros pad the columns.
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
        """The number of parameters in all cores."""
        return sum(math.prod(shape) for shape in self.shapes)

    def capped(self, bond: int) -> Layout:
        """Returns the layout with every larger bond reduced to ``bond``."""
        return self._replace(bonds=tuple(min(b, bond) for b in self.bonds))


def full_bonds(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[int, ...]:
    """Returns the bonds at which every matrix is represented exactly.

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
    """Returns factors of similar size whose product is n or, if n has none, a little more.

    The largest is in the middle. Their product is the smallest number from n on that has factors of
    at most twice their geometric mean (rounded up).

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
    """Returns the factors with the smallest maximum; None if a prime factor is too large."""
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
    """Returns a layout that adds parameters: two outer cores with square matrices between them.

    The ``parts``, at least 2, have full bonds, and all inner factors are 1.

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


def layout_of(d: int, o: int, parts: int) -> Layout:
    """Returns a layout of a (d, o) matrix at full bonds, with ``parts`` factors of similar size."""
    inputs, outputs = balanced(d, parts), balanced(o, parts)
    orders = [Layout(inputs, j, full_bonds(inputs, j)) for j in (outputs, outputs[::-1])]
    return min(orders, key=lambda layout: layout.params)


def within_share(full: Layout, d: int, o: int, share: float) -> Layout:
    """Returns a layout with smaller bonds that keeps to a share of the parameters.

    Args:
        full: The layout at full bonds.
        d: The number of rows of the matrix.
        o: The number of columns.
        share: The largest number of parameters, as a share of those of the matrix.

    Returns:
        The layout, with all bonds cut at the same limit: the largest that keeps to the share.

    Raises:
        InputError: Bonds of 1 already exceed the share.

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
