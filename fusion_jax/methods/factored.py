"""What methods share that keep an MLP's width and put its matrices into another form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method, Solution
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import AnyLinear, LinearForm, check_plain
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs


class FactoredFacts(NamedTuple):
    """What methods on matrices report of a site.

    Args:
        error: The Frobenius norm of what was lost of all matrices, relative to theirs.
    """

    error: Float[Array, "*s"]


def matrices_of(subs: SubMLPs) -> dict[str, Float[Array, "d o"]]:
    """The matrices of an MLP by the names of its layers, in float32 or float64.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)))
        >>> {name: matrix.shape for name, matrix in matrices_of(subs).items()}
        {'up': (3, 8), 'down': (8, 2)}
    """
    found = {} if subs.gate is None else {"gate": wide(subs.gate).mT}
    return {**found, "up": wide(subs.up).mT, "down": wide(subs.down)}


def relative_error(pairs: list[tuple[Array, Array]]) -> Float[Array, ""]:
    """The norm of the differences of pairs of arrays, relative to that of the first ones."""
    lost = jnp.stack([jnp.square(a - b).sum() for a, b in pairs]).sum()
    whole = jnp.stack([jnp.square(a).sum() for a, _ in pairs]).sum()
    return jnp.sqrt(lost / jnp.where(whole > 0, whole, 1))


class Factored(Method):
    """Base of methods that put matrices into another form, one after the other.

    They take any MLP, fused ones too, and any other linear layer (`compress_matrices`).
    """

    form: ClassVar[type[LinearForm]]
    """The form."""
    any_mlp: ClassVar[bool] = True

    def spec(self, d: int, o: int) -> dict[str, Any]:
        """What the form of a matrix of d inputs and o outputs takes besides.

        Raises:
            InputError: There is none with what was asked for.
        """
        raise NotImplementedError

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """The arrays of the forms of matrices that are compressed together: those of one MLP.

        Args:
            matrices: (d, o) each, by name.

        Returns:
            Under ``parts`` the arrays by name, and facts.
        """
        raise NotImplementedError

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if a matrix cannot have the form (looks at shapes only)."""
        for d, o in _shapes(subs):
            self.spec(d, o)

    def solve(
        self,
        subs: SubMLPs,
        *,
        key: Key[Array, ""],
        act: str | None = None,
        calibration: Calibration | None = None,
    ) -> Solution:
        """Puts the matrices of one MLP into their form."""
        return _factor(self, matrices_of(subs))

    def formed(self, linear: AnyLinear, arrays: tuple[Array, ...]) -> Any:
        """The layer in its form.

        Args:
            linear: The layer, which is left as it is.
            arrays: What its matrix is made of now.

        Returns:
            The new layer, in the dtype of the old and with its bias.
        """
        spec = self.spec(linear.in_features, linear.out_features)
        new = self.form.abstract(linear, **spec)
        new.load(arrays, None if linear.bias is None else linear.bias[...])
        return new

    def build(self, mlp: Mlp, solution: Solution) -> Any:
        """The MLP with its matrices in their form."""
        self.verify(solution)
        new: Any = nnx.clone(mlp)
        for name, arrays in solution.parts.items():
            linear = getattr(new, name)
            check_plain(linear, name)
            setattr(new, name, self.formed(linear, arrays))
        return new

    def within(self, subs: SubMLPs, share: float) -> Factored:
        """The method with the size at which so much of an MLP's parameters is left.

        Biases stay, so that the matrices get what is left for them.
        """
        weights = sum(d * o for d, o in _shapes(subs))
        biases = sum(x.shape[-1] for x in (subs.up_bias, subs.gate_bias) if x is not None)
        left = (share * (weights + biases) - biases) / weights
        if left <= 0:
            raise InputError(f"a budget of {share:g} is less than the biases alone")
        return self._sized(left)

    def _sized(self, share: float) -> Factored:
        """The method that keeps this share of the parameters of matrices."""
        raise NotImplementedError


@partial(jax.jit, static_argnames="method")
def _factor(method: Factored, matrices: dict[str, Array]) -> Solution:
    return method.factor(matrices)


def _shapes(subs: SubMLPs) -> list[tuple[int, int]]:
    d, p, o = subs.up.shape[-1], subs.width, subs.down.shape[-1]
    return [(d, p)] * (1 if subs.gate is None else 2) + [(p, o)]
