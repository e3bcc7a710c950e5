"""MLP Fusion: clusters the sub-MLPs and keeps the centroids and the cluster sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.kmeans import kmeans
from fusion_jax.methods.base import Method, Solution, check_width, kept_width
from fusion_jax.mlp import (
    FusedGatedMlp,
    FusedMlp,
    GatedMlp,
    Mlp,
    Scaling,
    SubMLPs,
    scale_centroids,
)


class FusionParts(NamedTuple):
    """What `Fusion` finds.

    Args:
        rows: The c rows that the fused MLP stores, in float32 or float64: centroids, times what
            the scaling asks for.
        sizes: (c,) cluster sizes.
        labels: (p,) the cluster of each sub-MLP.
    """

    rows: SubMLPs
    sizes: Float[Array, "*s c"]
    labels: Int[Array, "*s p"]


class FusionFacts(NamedTuple):
    """What `Fusion` reports of a site.

    Args:
        inertia: The share of the rows' sum of squares that stays inside clusters.
        iterations: Lloyd iterations of the best start.
        converged: Whether they ended by themselves.
        empty: Empty clusters.
    """

    inertia: Float[Array, "*s"]
    iterations: Int[Array, "*s"]
    converged: Bool[Array, "*s"]
    empty: Int[Array, "*s"]


@dataclass(frozen=True, kw_only=True)
class Fusion(Method):
    """MLP Fusion: k-means on the sub-MLPs; centroids and Frozen cluster sizes remain.

    Args:
        width: Hidden units to keep: an int, or a fraction of the MLP's width.
        scaling: Which kernel is kept: that of Adam (the paper), of SGD, or none with the sizes
            folded into the output weights.
        round_to: Fractions of a width are rounded up to a multiple of this (128 suits TPUs).
        n_init: Starts of the clustering, of which the best is kept.
        max_iters: Most Lloyd iterations per start.
        tol: Stop when an iteration gains no more than this fraction of the inertia.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 4.2.

    Example:
        >>> Fusion(width=0.25).to_json()["method"]
        'fusion'
    """

    width: int | float = 0.25
    """Hidden units to keep: an int, or a fraction of the MLP's width."""
    scaling: Scaling = "adam"
    """Which kernel is kept: Adam's (the paper), SGD's, or none with sizes folded into weights."""
    round_to: int = 1
    """Round fractions of a width up to a multiple of this (128 suits TPUs)."""
    n_init: int = 10
    """Starts of the clustering; the best is kept."""
    max_iters: int = 300
    """Most Lloyd iterations per start."""
    tol: float = 0.0
    """Stop when an iteration gains no more than this fraction of the inertia."""

    modules: ClassVar[tuple[type[Mlp], ...]] = (FusedMlp, FusedGatedMlp)

    def __post_init__(self):
        if self.scaling not in get_args(Scaling):
            raise InputError(
                f"scaling must be one of {', '.join(get_args(Scaling))}; got {self.scaling!r}"
            )
        for name in ("round_to", "n_init", "max_iters"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.tol < 0:
            raise InputError(f"tol must be at least 0; got {self.tol}")
        check_width(self.width)

    def check(self, subs: SubMLPs) -> None:
        """Raises `InputError` if the width is above that of the MLP."""
        kept_width(self.width, subs.width, self.round_to)

    def solve(self, subs: SubMLPs, *, key: Key[Array, ""]) -> Solution:
        """Clusters the rows of one MLP.

        Args:
            subs: Its p sub-MLPs.
            key: Random key of the clustering's starts.

        Returns:
            `FusionParts` and the facts of the clustering.
        """
        result = kmeans(
            subs.rows(),
            kept_width(self.width, subs.width, self.round_to),
            key=key,
            n_init=self.n_init,
            max_iters=self.max_iters,
            tol=self.tol,
        )
        rows = scale_centroids(subs.with_rows(result.centroids), result.sizes, self.scaling)
        facts = FusionFacts(
            inertia=result.inertia_fraction,
            iterations=result.iterations,
            converged=result.converged,
            empty=(result.sizes == 0).sum(),
        )
        return Solution(FusionParts(rows, result.sizes, result.labels), facts)

    def build(self, mlp: Mlp, solution: Solution) -> FusedMlp | FusedGatedMlp:
        """The fused MLP of a solution, in the dtype of the original."""
        parts: FusionParts = solution.parts
        new = mlp.abstract(
            FusedGatedMlp if isinstance(mlp, GatedMlp) else FusedMlp,
            parts.rows.width,
            original_width=mlp.width,
            scaling=self.scaling,
        )
        new.load_fused(parts.rows, parts.sizes, parts.labels, mlp.out_bias())
        return new
