"""Implements the Clustering baseline: centroids times square roots of cluster sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Key

from fusion_jax.methods.base import Solution
from fusion_jax.methods.fusion import Fusion
from fusion_jax.methods.narrower import Narrower
from fusion_jax.nn.submlps import SubMLPs


@dataclass(frozen=True, kw_only=True)
class Clustering(Narrower):
    """The paper's Clustering baseline: a plain MLP of centroids times sqrt(cluster size).

    Input weights, biases and output weights are all multiplied by sqrt(n_c), without a division
    inside the activation. The function is therefore the fused MLP's only for activations with
    s(a z) = a s(z), such as ReLU. In a gated MLP only the parts outside the activation are scaled.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), appendix A.4.

    Example:
        >>> Clustering(width=0.5).to_json()["method"]
        'clustering'
    """

    name: ClassVar[str] = "clustering"
    scales_units: ClassVar[bool] = True

    n_init: int = 1
    """The number of random starts of the clustering, of which the best is kept."""
    max_iters: int = 300
    """The largest number of Lloyd iterations per start."""
    tol: float = 0.0
    """Stop when an iteration lowers the inertia by at most this fraction."""

    def __post_init__(self):
        self._fusion()

    def _fusion(self) -> Fusion:
        return Fusion(
            width=self.width,
            round_to=self.round_to,
            n_init=self.n_init,
            max_iters=self.max_iters,
            tol=self.tol,
        )

    def solve(self, subs: SubMLPs, *, key: Key[Array, ""]) -> Solution:
        """Clusters the rows of one MLP; ``parts`` are the sub-MLPs of the narrower one."""
        solution = self._fusion().solve(subs, key=key)
        sizes = solution.parts.sizes
        root = sizes**0.5
        # Fusion's default scaling stores the centroids themselves.
        rows = solution.parts.rows.scaled(down=root, up=root, gate=jnp.ones_like(root))
        return Solution(rows, solution.facts)
