"""Computes hidden units with a bound on the rounding error of every number: value and radius.

A bound that holds for real numbers, and for kernels measured in the same precision, has to include
the distance of computed values from exact ones. The analysis is the usual one: an inner product of
k terms, summed in any order, is off by at most gamma_k = k u / (1 - k u) times the inner product of
absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), with unit
roundoff u. Here `gamma` is k times the machine epsilon 2 u, which leaves a factor of two for the
few operations around each product. Activations are assumed to be computed to within
64 eps (1 + |z|); the tests measure at most 20, for the slope of the tanh form of GELU in float64.

A result below the smallest normal number, `tiny`, may be computed as zero, and so may an operand.
Each operation adds `tiny` to its error for that, times what the operand is multiplied with. Only a
product with a true zero has no error. Norms are scaled before they are squared. What overflows is
infinite or NaN in the end, which is an error.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from ntk.activations import FUNCTIONS, Activation, canonical, curvature, slope, slope_zero
from ntk.arrays import row_norms
from ntk.units import MlpWeights, linear_values

EVALUATION = 64.0
"""Error of a computed activation or slope at z, in units of eps (1 + |z|)."""

OUTWARD = 1 + 1e-6
"""Bounds computed in float64 on the host are multiplied by this, which is far above their rounding
error."""


class Ball(NamedTuple):
    """Numbers and their signs, with bounds on their errors; each (n, p).

    Args:
        value: Computed numbers.
        error: Bounds on their errors.
        sign: Signs.
        doubtful: Where the exact sign may differ from ``sign``.
        lost: Where the sign of the computed number may differ although the exact sign is known:
            far from zero an activation underflows, or cancels to zero.
    """

    value: Float[Array, "n p"]
    error: Float[Array, "n p"]
    sign: Float[Array, "n p"]
    doubtful: Bool[Array, "n p"]
    lost: Bool[Array, "n p"]

    def times(self, other: Ball) -> Ball:
        """Returns the products.

        (a + e)(b + f) - a b = a f + b e + e f, plus one rounding.
        """
        a, b = jnp.abs(self.value), jnp.abs(other.value)
        eps = jnp.finfo(a.dtype).eps
        error = a * other.error + b * self.error + self.error * other.error + eps * a * b
        return Ball(
            self.value * other.value,
            jnp.where(self.zero() | other.zero(), 0, error + 8 * tiny(a.dtype)),
            self.sign * other.sign,
            self.doubtful | other.doubtful,
            self.lost | other.lost,
        )

    def scaled(self, factor: Float[Array, "1 p"], rounding: float | None = None) -> Ball:
        """Returns the products with positive factors of relative error at most ``rounding``."""
        if rounding is None:
            rounding = gamma(8, factor.dtype)
        most = jnp.abs(self.value) + self.error
        error = factor * (self.error + rounding * most) + 4 * tiny(factor.dtype) * (1 + most)
        return self._replace(value=factor * self.value, error=jnp.where(self.zero(), 0, error))

    def zero(self) -> Array:
        """Returns where the exact number is zero."""
        return (self.value == 0) & (self.error == 0)

    def signs(self) -> tuple[Ball, Array]:
        """Returns the signs as numbers, and bounds on the errors of signs of computed numbers."""
        zero = jnp.zeros_like(self.doubtful)
        small = jnp.abs(self.value) < 2**10 * tiny(self.value.dtype)
        lost = self.doubtful | self.lost | (small & (self.sign != 0))
        error = 2 * self.doubtful.astype(self.sign.dtype)
        return Ball(self.sign, error, self.sign, zero, zero), 2 * lost.astype(error.dtype)


class Enclosure(NamedTuple):
    """An interval for each pair of inputs: the exact value is within ``radius`` of ``mid``."""

    mid: Float[Array, "n m"]
    radius: Float[Array, "n m"]


def gamma(terms: int, dtype: DTypeLike) -> float:
    """Returns the relative error of a sum of this many products, with a factor of two to spare.

    Example:
        >>> gamma(1000, jnp.float32) < 2e-4
        True
    """
    return terms * float(jnp.finfo(dtype).eps)


def tiny(dtype: DTypeLike) -> float:
    """Returns the smallest normal number of a dtype.

    Example:
        >>> tiny(jnp.float32) == 2**-126
        True
    """
    return float(jnp.finfo(dtype).tiny)


def _holds_number(x: Shaped[Array, "n k"]) -> Bool[Array, " n"]:
    """Returns which rows are not all zeros; subnormal numbers, which may compare as zero, count."""
    bits = lax.bitcast_convert_type(x, jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    return (bits << 1 != 0).any(-1)  # without the sign


def ball_products(x: Float[Array, "n k"], rows: Float[Array, "p k"], bias: Array | None) -> Ball:
    """Returns inner products of exact vectors, plus a bias for each column.

    The error is gamma (|x| |row| + |bias|), by Cauchy-Schwarz.
    """
    value = linear_values(rows, bias, x)
    size, length = row_norms(rows)[None], row_norms(x)[:, None]
    lost = (x.shape[1] + 8) * tiny(x.dtype) * (1 + size + length)
    error = gamma(x.shape[1] + 4, x.dtype) * length * size + lost
    error = jnp.where(_holds_number(x)[:, None] & _holds_number(rows)[None], error, 0)
    if bias is not None:
        more = gamma(x.shape[1] + 4, x.dtype) * jnp.abs(bias) + 8 * tiny(x.dtype)
        error = error + jnp.where(_holds_number(bias[:, None]), more, 0)[None]
    return uncertain(value, error)


def uncertain(value: Float[Array, "n p"], error: Float[Array, "n p"]) -> Ball:
    """Returns numbers with bounds on their errors, with the signs that follow from the two."""
    return Ball(value, error, jnp.sign(value), _near(value, error), jnp.zeros_like(value, bool))


def _near(value: Array, error: Array) -> Array:
    """Returns where the sign is in doubt; a zero without error (a row of zeros) is certain."""
    return (jnp.abs(value) <= error) & (error > 0)


def ball_units(mlp: MlpWeights, x: Float[Array, "n d"]) -> tuple[Ball, tuple[Ball, ...]]:
    """Returns the values of `ntk.units.hidden_units` with error bounds.

    Args:
        mlp: The weights.
        x: Inputs, (n, d).

    Returns:
        H, and the derivatives of H in the order of ``mlp.maps``.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 1)), act="relu")
        >>> hidden, (slopes,) = ball_units(mlp, jnp.array([[2.0]]))
        >>> hidden.value.item(), slopes.value.item(), hidden.error.item() < 1e-5
        (2.0, 1.0, True)
    """
    maps = [ball_products(x, kernel, bias) for kernel, bias in mlp.maps]
    _, *inside = _factors(mlp, x.dtype)
    return scaled_units(mlp, *(z.scaled(f) for z, f in zip(maps, inside, strict=False)))


def scaled_units(mlp: MlpWeights, z: Ball, up: Ball | None = None) -> tuple[Ball, tuple[Ball, ...]]:
    """Returns hidden units and their derivatives from the values of the linear maps.

    Args:
        mlp: The weights, of which only the factors and the activation are used.
        z: The activation's arguments, with the factor ``inner``.
        up: The linear values of a gated MLP, with the factor ``middle``.
    """
    outer, inner, middle = _factors(mlp, z.value.dtype)
    s, a = _activation(mlp.act, z)
    if up is None:
        return s.scaled(outer), (a.scaled(outer * inner),)
    return s.times(up).scaled(outer), (
        a.times(up).scaled(outer * inner),
        s.scaled(outer * middle),
    )


def _factors(mlp: MlpWeights, dtype: DTypeLike) -> list[Array]:
    """Returns outer, inner and middle, each (1, p)."""
    one = jnp.ones(mlp.width, dtype)
    factors = (one if f is None else f for f in (mlp.outer, mlp.inner, mlp.middle))
    return [f.astype(dtype)[None] for f in factors]


def _activation(act: Activation, z: Ball) -> tuple[Ball, Ball]:
    """Returns an activation and its slope at uncertain points."""
    name = canonical(act)
    s, a = jax.jvp(FUNCTIONS[name], (z.value,), (jnp.ones_like(z.value),))
    near = _near(z.value, z.error)
    never = jnp.zeros_like(near)
    if name == "relu":
        # Where the sign of z is certain, the slope is exact, and below zero s is too.
        s_error = jnp.where(z.value < -z.error, 0.0, z.error)
        return Ball(s, s_error, a, near, never), Ball(a, near.astype(a.dtype), a, near, never)
    evaluation = EVALUATION * jnp.finfo(s.dtype).eps * (1 + jnp.abs(z.value))
    s_error = slope(name) * z.error + evaluation
    a_error = curvature(name) * z.error + evaluation
    low, high = slope_zero(name)
    above = jnp.where(z.value > high, 1.0, -1.0).astype(a.dtype)
    turning = (z.value + z.error >= low) & (z.value - z.error <= high)
    # In the exact GELU and in SiLU nothing cancels except near the zero of the slope, so that only
    # underflow loses a sign.
    relative = name in ("gelu", "silu")
    s_lost = never if relative else jnp.abs(s) <= s_error
    a_lost = (jnp.abs(a) <= a_error) & ~(relative & (z.value < -2))
    return Ball(s, s_error, jnp.sign(z.value), near, s_lost), Ball(
        a, a_error, above, turning, a_lost
    )
