"""Holds the inputs of an MLP on calibration text.

Axis letters in shapes: d inputs, o outputs, t positions, e experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusion_jax.nn.dtypes import wide

POSITIONS = 4096
"""The number of positions that units are compared at: more cost time and change little."""


class Calibration(NamedTuple):
    """The inputs and target outputs of an MLP, at positions of calibration text in random order.

    Args:
        inputs: The inputs, (t, d), possibly stacked.
        outputs: The target outputs without the output bias, (t, o); None for the MLP's own.
        weights: The weight of each position, (t,); None for equal weights.
        upstream: The gradients of a loss of the model with respect to the outputs, (t, o), for
            methods that weigh units by them; None if no method does.
    """

    inputs: Float[Array, "*s t d"]
    outputs: Float[Array, "*s t o"] | None = None
    weights: Float[Array, "*s t"] | None = None
    upstream: Float[Array, "*s t o"] | None = None

    def head(self, positions: int) -> Calibration:
        """Returns the first positions, at most the given number; they are a random sample."""
        return Calibration(
            self.inputs[..., :positions, :],
            None if self.outputs is None else self.outputs[..., :positions, :],
            None if self.weights is None else self.weights[..., :positions],
            None if self.upstream is None else self.upstream[..., :positions, :],
        )

    def root_weights(self) -> Float[Array, "*s t"]:
        """Returns the square roots of the weights, scaled to a sum of squares of 1."""
        shape, dtype = self.inputs.shape[:-1], wide(self.inputs).dtype
        weights = jnp.ones(shape, dtype) if self.weights is None else wide(self.weights)
        total = weights.sum(-1, keepdims=True)
        return jnp.sqrt(weights / jnp.where(total > 0, total, 1))


class Routing(NamedTuple):
    """How a router uses the experts of a mixture on calibration text.

    Args:
        counts: The number of positions that go to each expert.
        sizes: The mean over these positions of the length of what the expert adds to the output of
            the mixture: its own output times its weight there; 0 for an expert without positions.
    """

    counts: Int[Array, " e"]
    sizes: Float[Array, " e"]
