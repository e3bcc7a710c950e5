"""The base of methods that keep an MLP's width and put its matrices into another form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method, Solution
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import AnyLinear, LinearForm, check_plain
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs


class FactoredFacts(NamedTuple):
    """The facts of a site for methods that work on matrices.

    Args:
        error: The Frobenius norm of the change of all matrices, relative to their own norm.
    """

    error: Float[Array, "*s"]


def matrices_of(subs: SubMLPs) -> dict[str, Float[Array, "d o"]]:
    """Returns the matrices of an MLP by the names of its layers, in float32 or float64.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)))
        >>> {name: matrix.shape for name, matrix in matrices_of(subs).items()}
        {'up': (3, 8), 'down': (8, 2)}
    """
    found = {} if subs.gate is None else {"gate": wide(subs.gate).mT}
    return {**found, "up": wide(subs.up).mT, "down": wide(subs.down)}


def relative_error(pairs: list[tuple[Array, Array]]) -> Float[Array, ""]:
    """Returns the norm of the differences of pairs, relative to the norm of the first arrays."""
    lost = jnp.stack([jnp.square(a - b).sum() for a, b in pairs]).sum()
    whole = jnp.stack([jnp.square(a).sum() for a, _ in pairs]).sum()
    return jnp.sqrt(lost / jnp.where(whole > 0, whole, 1))


class Factored(Method):
    """Base of methods that put each matrix into another form.

    They take any MLP, fused ones too, and any other linear layer (`compress_matrices`).
    """

    form: ClassVar[type[LinearForm]]
    """The form."""
    accepts_compressed: ClassVar[bool] = True

    def spec(self, d: int, o: int) -> dict[str, object]:
        """Returns the arguments that the form of a (d, o) matrix needs besides its sizes.

        Raises:
            InputError: No form of this matrix fits the method's options.
        """
        raise NotImplementedError

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """Returns the arrays of the forms of matrices that are compressed together.

        Args:
            matrices: (d, o) each, by name; those of one MLP.

        Returns:
            The arrays by name as ``parts``, and the facts.
        """
        raise NotImplementedError

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if a matrix cannot have the form; only shapes matter."""
        for d, o in _shapes(subs):
            self.spec(d, o)

    def solve(self, subs: SubMLPs, *, key: Key[Array, ""]) -> Solution:
        """Puts the matrices of one MLP into their form."""
        return _factor(self, matrices_of(subs))

    def formed(self, linear: AnyLinear, arrays: tuple[Array, ...]) -> LinearForm:
        """Returns a layer in the form.

        Args:
            linear: The layer, which is not changed.
            arrays: The arrays of the form.

        Returns:
            The new layer, with the dtype and the bias of the old one.
        """
        spec = self.spec(linear.in_features, linear.out_features)
        return self.form.replacing(linear, arrays, **spec)

    def build(self, mlp: Mlp, solution: Solution) -> Mlp:
        """Returns the MLP with its matrices in the form."""
        self.verify(solution)
        new = nnx.clone(mlp)
        for name, arrays in solution.parts.items():
            linear = getattr(new, name)
            check_plain(linear, name)
            setattr(new, name, self.formed(linear, arrays))
        return new

    def within(self, subs: SubMLPs, share: float) -> Factored:
        """Returns the method with the largest size within a share of an MLP's parameters.

        Biases stay as they are, and the matrices get the rest of the budget.
        """
        weights = sum(d * o for d, o in _shapes(subs))
        biases = sum(x.shape[-1] for x in (subs.up_bias, subs.gate_bias) if x is not None)
        left = (share * (weights + biases) - biases) / weights
        if left <= 0:
            raise InputError(f"a budget of {share:g} is less than the biases alone")
        return self._sized(left)

    def _sized(self, share: float) -> Factored:
        """Returns the method that keeps this share of the matrices' parameters."""
        raise NotImplementedError


@partial(jax.jit, static_argnames="method")
def _factor(method: Factored, matrices: dict[str, Array]) -> Solution:
    return method.factor(matrices)


def _shapes(subs: SubMLPs) -> list[tuple[int, int]]:
    d, p, o = subs.up.shape[-1], subs.width, subs.down.shape[-1]
    return [(d, p)] * (1 if subs.gate is None else 2) + [(p, o)]
