"""Implements the MMD baseline: few points distributed like the sub-MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution, check_choice
from fusion_jax.methods.narrower import Narrower
from fusion_jax.nn.submlps import SubMLPs

FactorPlace = Literal["outputs", "everywhere"]
_KERNEL_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The widths of the kernels, relative to the mean squared distance of two points."""


class MmdFacts(NamedTuple):
    """The facts of a site that `MMD` reports.

    Args:
        start: The squared discrepancy of the random points that optimization starts with.
        end: The squared discrepancy of the final points.
    """

    start: Float[Array, "*s"]
    end: Float[Array, "*s"]


def _squares(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * product, 0)


def _kernel(a: Array, b: Array, scale: Array) -> Array:
    squares = _squares(a, b)
    return sum(jnp.exp(-squares / (scale * width)) for width in _KERNEL_WIDTHS)  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("count", "steps", "rate"))
def _matched(
    rows: Float[Array, "p row"], key: Array, count: int, steps: int, rate: float
) -> tuple[Array, Array, Array]:
    """Returns points that match rows, and the discrepancy at the start and at the end."""
    size = jnp.sqrt(jnp.square(rows).mean())
    rows = rows / jnp.where(size > 0, size, 1)
    mean = _squares(rows, rows).sum() / (rows.shape[0] * max(rows.shape[0] - 1, 1))
    scale = jnp.where(mean > 0, mean, 1)

    constant = _kernel(rows, rows, scale).mean()

    def discrepancy(points: Array) -> Array:
        across = _kernel(points, rows, scale).mean()
        return _kernel(points, points, scale).mean() - 2 * across + constant

    schedule = optax.cosine_decay_schedule(rate, steps)
    tx = optax.adam(schedule)
    start = jax.random.choice(key, rows, (count,), replace=False)

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        points, moments, best, least = state
        value, gradient = jax.value_and_grad(discrepancy)(points)
        better = value < least
        best, least = jnp.where(better, points, best), jnp.where(better, value, least)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, moments = tx.update(gradient, moments)
            points = optax.apply_updates(points, updates)
        return (points, moments, best, least), None

    first = discrepancy(start)
    (points, _, best, least), _ = lax.scan(
        step, (start, tx.init(start), start, first), None, length=steps
    )
    last = discrepancy(points)  # type: ignore[arg-type]
    best = jnp.where(last < least, points, best)
    return best * size, first, jnp.minimum(last, least)


@dataclass(frozen=True, kw_only=True)
class MMD(Narrower):
    """The paper's MMD baseline: k points whose uniform measure is nearest to that of the p rows.

    Nearest means the smallest maximum mean discrepancy with a sum of five Gaussian kernels, which
    Adam minimizes from random rows. The output is multiplied by p / k, here in the output weights.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), equation 10. The published code multiplies input
        weights, biases and output weights by sqrt(p / k) each, ``outside="everywhere"``, which with
        GELU is another function; it also doubles the output bias, which is left out here. Its
        kernels are Laplacian: their cusps at the rows hold points that start there.

    Example:
        >>> MMD(width=0.25).to_json()["steps"]
        300
    """

    name: ClassVar[str] = "mmd"

    outside: FactorPlace = "outputs"
    """Where p / k goes: into the output weights, or its root into all weights (published code)."""
    steps: int = 300
    """Steps of Adam."""
    learning_rate: float = 0.03
    """Adam's learning rate at the start, relative to the root mean square of the weights."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("outside", self.outside, get_args(FactorPlace))
        if self.steps < 1 or not self.learning_rate > 0:
            raise InputError(
                f"steps must be at least 1 and learning_rate above 0; got {self.steps} and "
                f"{self.learning_rate}"
            )

    def solve(self, subs: SubMLPs, *, key: Key[Array, ""]) -> Solution:
        """Finds the sub-MLPs of the narrower MLP."""
        width = self.kept(subs)
        rows, start, end = _matched(subs.rows(), key, width, self.steps, self.learning_rate)
        found, factor = subs.with_rows(rows), subs.width / width
        one = jnp.ones(width, rows.dtype)
        if self.outside == "outputs":
            found = found.scaled(down=factor * one, up=one, gate=one)
        else:
            root = factor**0.5 * one
            found = found.scaled(down=root, up=root, gate=root)
        return Solution(found, MmdFacts(start, end))
