"""Replaces the matrices of an MLP by matrix product operators."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax import mpo
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.methods.base import Solution, check_size
from fusion_jax.methods.factored import Factored, relative_error


class MpoFacts(NamedTuple):
    """The facts of a site that `MPO` reports.

    Args:
        error: The Frobenius norm of the change of all matrices, relative to their own norm.
        bound: An upper bound of the error, from the singular values that were cut off.
        entropy: The largest entanglement entropy of a bond, in nats, mean over matrices.
        excess: The largest amount by which a matrix's error is above its bound, see `mpo.excess`.
    """

    error: Float[Array, "*s"]
    bound: Float[Array, "*s"]
    entropy: Float[Array, "*s"]
    excess: Float[Array, "*s"]


@dataclass(frozen=True, kw_only=True)
class MPO(Factored):
    """Writes each matrix as a chain of small tensors: exactly at full bonds, else nearly.

    References:
        MPOP (Liu et al., ACL 2021), section 3.

    Example:
        >>> MPO(bond=None).spec(768, 3072)["inputs"]
        (3, 4, 4, 4, 4)
    """

    name: ClassVar[str] = "mpo"

    bond: int | float | None = 0.25
    """The largest bond as an int, or a share of each matrix's parameters; None for no limit."""
    cores: int = 5
    """The number of tensors in a chain."""
    inputs: Sequence[int] | None = None
    """The factor of the rows for each tensor; by default they are chosen. For matrices that fit
    better the other way round, inputs and outputs are swapped."""
    outputs: Sequence[int] | None = None
    """The factor of the columns for each tensor; given together with ``inputs``."""

    form = mpo.Mpo

    def __post_init__(self):
        if self.bond is not None:
            check_size("bond", self.bond, 2)
        try:
            object.__setattr__(self, "cores", operator.index(self.cores))
        except TypeError:
            raise InputError(f"cores must be an int; got {self.cores!r}") from None
        check_at_least(1, cores=self.cores)
        if (self.inputs is None) != (self.outputs is None):
            raise InputError("inputs and outputs are given together or not at all")
        for name in ("inputs", "outputs"):
            factors = getattr(self, name)
            if factors is None:
                continue
            try:
                # Lists, as JSON has, cannot be hashed, which `jit` needs.
                factors = tuple(operator.index(n) for n in factors)
            except TypeError:
                raise InputError(f"{name} must be whole numbers; got {factors!r}") from None
            object.__setattr__(self, name, factors)
            if len(factors) != self.cores or any(n < 1 for n in factors):
                raise InputError(
                    f"{name} must be {self.cores} factors from 1 on, as many as there are cores; "
                    f"got {list(factors)}"
                )

    def layout(self, d: int, o: int) -> mpo.Layout:
        """Returns how a matrix of d rows and o columns is split."""
        full = self._full(d, o)
        if isinstance(self.bond, float):
            return mpo.within_share(full, d, o, self.bond)
        return full if self.bond is None else full.capped(self.bond)

    def _full(self, d: int, o: int) -> mpo.Layout:
        if self.inputs is None or self.outputs is None:
            return mpo.layout_of(d, o, self.cores)
        given = tuple(self.inputs), tuple(self.outputs)
        rows, columns = min(
            (given, given[::-1]), key=lambda pair: _misfit(pair[0], d) + _misfit(pair[1], o)
        )
        if _misfit(rows, d) + _misfit(columns, o) == math.inf:
            raise InputError(
                f"factors of {math.prod(self.inputs)} and {math.prod(self.outputs)} do not fit a "
                f"{d} x {o} matrix, either way round: each must be its size, or less than twice it"
            )
        return mpo.Layout(rows, columns, mpo.full_bonds(rows, columns))

    def spec(self, d: int, o: int) -> dict[str, object]:
        """Returns the factors and bonds."""
        return self.layout(d, o)._asdict()

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """Returns the cores of each matrix."""
        trains = {
            name: mpo.decompose(matrix, self.layout(*matrix.shape))
            for name, matrix in matrices.items()
        }
        made = [
            (matrix, mpo.contract(trains[name].cores, (matrix.shape[0], matrix.shape[1])))
            for name, matrix in matrices.items()
        ]
        bounds = jnp.stack([train.bound for train in trains.values()])
        whole = jnp.stack([jnp.square(matrix).sum() for matrix in matrices.values()]).sum()
        entropy = [mpo.entropies(t.spectra).max() for t in trains.values() if t.spectra]
        facts = MpoFacts(
            relative_error(made),
            jnp.sqrt(jnp.square(bounds).sum() / jnp.where(whole > 0, whole, 1)),
            jnp.stack(entropy).mean() if entropy else jnp.zeros((), whole.dtype),
            jnp.stack([mpo.excess(matrices[name], t) for name, t in trains.items()]).max(),
        )
        return Solution({name: train.cores for name, train in trains.items()}, facts)

    def verify(self, solution: Solution) -> None:
        """Raises `ArithmeticError` if a matrix's error is above its bound by more than rounding."""
        mpo.check_bound(solution.facts.excess)

    def to_json(self) -> dict[str, object]:
        """Returns the configuration as JSON values: factors as lists."""
        fields = super().to_json()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def _sized(self, share: float) -> MPO:
        return dataclasses.replace(self, bond=share)


def _misfit(factors: Sequence[int], size: int) -> float:
    """Returns how far factors exceed a size, as a share; infinite if below, or at least twice."""
    above = math.prod(factors) / size - 1
    return above if 0 <= above < 1 else math.inf
