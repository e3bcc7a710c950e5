"""What an MLP saw on calibration text.

Axis letters in shapes: d inputs, o outputs, t positions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.nn.dtypes import wide

POSITIONS = 4096
"""Positions that responses are compared at: beyond this, clusters change little and cost grows."""


class Calibration(NamedTuple):
    """What an MLP saw and should give, at positions of calibration text in random order.

    Args:
        inputs: Its inputs, (t, d), possibly stacked.
        outputs: What it should give there without its output bias, (t, o); None for what it gives.
        weights: How much each position counts, (t,); None for all the same.
    """

    inputs: Float[Array, "*s t d"]
    outputs: Float[Array, "*s t o"] | None = None
    weights: Float[Array, "*s t"] | None = None

    def head(self, positions: int) -> Calibration:
        """The first so many positions, which are a sample of all."""
        inputs, outputs, weights = self
        return Calibration(
            inputs[..., :positions, :],
            None if outputs is None else outputs[..., :positions, :],
            None if weights is None else weights[..., :positions],
        )

    def root_weights(self) -> Float[Array, "*s t"]:
        """Square roots of the weights, scaled to a sum of squares of 1."""
        shape, dtype = self.inputs.shape[:-1], wide(self.inputs).dtype
        weights = jnp.ones(shape, dtype) if self.weights is None else wide(self.weights)
        total = weights.sum(-1, keepdims=True)
        return jnp.sqrt(weights / jnp.where(total > 0, total, 1))
