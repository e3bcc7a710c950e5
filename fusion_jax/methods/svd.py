"""Implements the truncated singular value decomposition of an MLP's matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution, check_size
from fusion_jax.methods.factored import Factored, FactoredFacts, relative_error
from fusion_jax.mpo.cores import signed_svd
from fusion_jax.nn.linear_forms import LowRank


@dataclass(frozen=True, kw_only=True)
class Svd(Factored):
    """Replaces each matrix by the nearest product of two narrow matrices.

    Each of the two has the square roots of the singular values.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 5.1. The text keeps 768 singular values,
        more parameters than before; the code keeps 153 (`Svd.paper`), a quarter of the parameters.

    Example:
        >>> Svd(rank=0.25).spec(768, 3072), Svd.paper().rank
        ({'rank': 153}, 153)
    """

    name: ClassVar[str] = "svd"

    rank: int | float = 0.25
    """The number of singular values to keep, or a share of each matrix's parameters."""

    form = LowRank

    def __post_init__(self):
        # Up to 2: exact forms may have more parameters than the matrix.
        check_size("rank", self.rank, 2)

    @classmethod
    def paper(cls) -> Svd:
        """Returns the method of the published code for RoBERTa-base: rank 153."""
        return cls(rank=153)

    def spec(self, d: int, o: int) -> dict[str, object]:
        """Returns the rank."""
        most = min(d, o)
        if isinstance(self.rank, float):
            rank = int(self.rank * d * o / (d + o) + 1e-6)
            if rank < 1:
                raise InputError(
                    f"a share of {self.rank:g} of a {d} x {o} matrix's parameters is less than "
                    "rank 1 has"
                )
            return {"rank": min(most, rank)}
        if self.rank > most:
            raise InputError(f"rank {self.rank} is above that of a {d} x {o} matrix, {most}")
        return {"rank": self.rank}

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """Returns the two factors of the nearest matrices of low rank."""
        parts = {}
        for name, matrix in matrices.items():
            rank = self.spec(*matrix.shape)["rank"]
            left, values, right = signed_svd(matrix)
            root = jnp.sqrt(values[:rank])
            parts[name] = left[:, :rank] * root[None], root[:, None] * right[:rank]
        made = [
            (matrices[name], jnp.matmul(a, b, precision="highest"))
            for name, (a, b) in parts.items()
        ]
        return Solution(parts, FactoredFacts(relative_error(made)))

    def _sized(self, share: float) -> Svd:
        return dataclasses.replace(self, rank=share)
