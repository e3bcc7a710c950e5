"""Implements MLP Fusion: clusters the sub-MLPs and keeps centroids and cluster sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.clustering.engine import Init, Refine, kmeans
from fusion_jax.clustering.labels import sum_by_label
from fusion_jax.errors import InputError
from fusion_jax.methods.base import (
    Method,
    ModelNeeds,
    Solution,
    check_choice,
    check_width,
    kept_width,
    width_within,
)
from fusion_jax.methods.geometry import Metric, points
from fusion_jax.methods.least_squares import matched, refitted, refitted_selection
from fusion_jax.methods.scores import kept_units
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.fused import Factors, FusedGatedMlp, FusedMlp, Scaling, factors, stored_rows
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.submlps import SubMLPs
from fusion_jax.nn.uneven_experts import widths_by_use
from ntk.activations import Activation


class FusionParts(NamedTuple):
    """The solution of `Fusion`.

    Args:
        rows: The c rows that the fused MLP stores, in float32 or float64.
        factors: The fixed factors around them, each (c,).
        sizes: (c,) cluster sizes.
        labels: (p,) the cluster of each sub-MLP.
    """

    rows: SubMLPs
    factors: Factors
    sizes: Float[Array, "*s c"]
    labels: Int[Array, "*s p"]


class FusionFacts(NamedTuple):
    """The facts of a site that `Fusion` reports.

    Args:
        inertia: The share of the points' sum of squares, about their mean, that stays inside
            clusters, in the geometry of the clustering; for members, the share of the units'
            squares on the text that the members do not explain one by one.
        raw_inertia: The same share for the weights themselves, the paper's geometry.
        singletons: The number of clusters with one sub-MLP.
        largest: The number of sub-MLPs in the largest cluster.
        steps: Lloyd iterations plus moves of single points, of the best start.
        converged: Whether nothing was left to improve at the end.
    """

    inertia: Float[Array, "*s"]
    raw_inertia: Float[Array, "*s"]
    singletons: Int[Array, "*s"]
    largest: Int[Array, "*s"]
    steps: Int[Array, "*s"]
    converged: Bool[Array, "*s"]


_OF_MEANS = ("metric", "init", "refine", "n_init", "max_iters", "tol")
"""The options of the clustering whose means stand for clusters."""


class _Clusters(NamedTuple):
    """Clusters of sub-MLPs.

    Args:
        labels: (p,) the cluster of each sub-MLP.
        sizes: (c,) cluster sizes.
        loads: (c,) how many times its own activity each unit left stands for; for means the sizes.
        effective: The units left, with sizes in their output weights.
        facts: The facts to report.
    """

    labels: Int[Array, " p"]
    sizes: Float[Array, " c"]
    loads: Float[Array, " c"]
    effective: SubMLPs
    facts: FusionFacts


def _default(name: str) -> object:
    """Returns the default of an option of `Fusion`."""
    return Fusion.__dataclass_fields__[name].default


@jax.jit
def _averaged(subs: SubMLPs, labels: Array, sizes: Array) -> tuple[SubMLPs, Array]:
    """Returns centroids, with sizes in the output weights, and the share of inertia inside."""
    rows = subs.rows()
    sizes = sizes.astype(rows.dtype)
    centroids = sum_by_label(rows, labels, sizes.shape[0]) / jnp.maximum(sizes, 1)[:, None]
    effective = subs.with_rows(centroids)
    inside = jnp.square(rows - centroids[labels]).sum()
    total = jnp.square(rows - rows.mean(0, keepdims=True)).sum()
    share = jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 0)
    return effective._replace(down=effective.down * sizes[:, None]), share


@dataclass(frozen=True, kw_only=True)
class Fusion(Method):
    """MLP Fusion: k-means on the sub-MLPs; centroids and Frozen cluster sizes remain.

    Without calibration this is the published method with a better clustering. With calibration,
    the sub-MLPs that explain the others best stand for clusters, output weights are refitted, and
    the kernel is matched; each of these can be switched off.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 4.2.

    Example:
        >>> Fusion(width=0.25).to_json()["method"], Fusion.paper(width=0.25).init
        ('fusion', 'k-means++')
    """

    name: ClassVar[str] = "fusion"

    width: int | float = 0.25
    """Hidden units to keep: an int, or a fraction of the MLP's width."""
    scaling: Scaling = "adam"
    """Which kernel is kept: Adam's (the paper), SGD's, or none with sizes folded into weights."""
    metric: Metric | Literal["auto"] = "auto"
    """The geometry of the clustering: weights (raw, the paper), first-order effects (sensitivity),
    or behavior at calibration inputs (function); auto is function with calibration, else raw."""
    represent: Literal["auto", "mean", "member"] = "auto"
    """What stands for a cluster: the mean of its sub-MLPs (mean, the paper); or with calibration
    one of them (member). Members are chosen by `Prune`'s score ``"relative"``; each other sub-MLP
    joins the one that explains most of it. Auto is member with calibration, unless the geometry or
    an option of the clustering is given, which are for means."""
    refit: bool = True
    """With calibration: fit output weights to the original's outputs by ridge regression."""
    match: bool = True
    """With calibration: choose fixed factors that bring the kernel nearest to the original's."""
    sequential: bool = False
    """With calibration: fit each site in the model whose earlier sites are already fused."""
    by_use: float = 0.0
    """With calibration text: the widths of a layer's experts grow with this power of how often the
    router uses each, with the same mean; 0 gives equal widths, 1 widths in proportion to use."""
    ridge: float = 0.01
    """Strength of refit's regression, relative to the mean square of the hidden units."""
    init: Init = "auto"
    """How the clustering starts."""
    refine: Refine = "auto"
    """How the clustering improves its start."""
    round_to: int = 1
    """Round fractions of a width up to a multiple of this (128 suits TPUs)."""
    n_init: int = 1
    """The number of random starts of the clustering, of which the best is kept."""
    max_iters: int = 300
    """The largest number of Lloyd iterations, and of rounds of single-point moves, per start."""
    tol: float = 0.0
    """Stop when an iteration lowers the inertia by at most this fraction."""

    modules: ClassVar[tuple[type[Mlp], ...]] = (FusedMlp, FusedGatedMlp)

    @property
    def takes_calibration(self) -> bool:
        """Always: the geometry, refitting and matching can use it."""
        return True

    @property
    def model_needs(self) -> ModelNeeds:
        """The options that look beyond one MLP."""
        return ModelNeeds(
            earlier_sites="sequential" if self.sequential else None,
            expert_use="by_use" if self.by_use else None,
        )

    def expert_groups(self, width: int, use: Sequence[float]) -> list[tuple[Method, list[int]]]:
        """Groups the experts of a layer by width; the widths follow the router's use."""
        mean = kept_width(self.width, width, self.round_to)
        groups = widths_by_use(use, mean, self.by_use, original=width, round_to=self.round_to)
        return [(dataclasses.replace(self, width=w), members) for w, members in groups.items()]

    def __post_init__(self):
        for name, choices in (
            ("scaling", get_args(Scaling)),
            ("metric", ("auto", *get_args(Metric))),
            ("represent", ("auto", "mean", "member")),
            ("init", get_args(Init)),
            ("refine", get_args(Refine)),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("round_to", "n_init", "max_iters"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.tol < 0:
            raise InputError(f"tol must be at least 0; got {self.tol}")
        if not self.ridge > 0:
            raise InputError(f"ridge must be above 0; got {self.ridge}")
        given = [name for name in _OF_MEANS if getattr(self, name) != _default(name)]
        if self.represent == "member" and given:
            raise InputError(
                f"{' and '.join(given)} are for represent='mean'; members are not clustered, but "
                "chosen by outputs"
            )
        if self.by_use < 0:
            raise InputError(f"by_use must be at least 0; got {self.by_use}")
        check_width(self.width)

    @property
    def of_members(self) -> bool:
        """Whether units stand for clusters where there is calibration; without it, means do."""
        if self.represent == "auto":
            return all(getattr(self, name) == _default(name) for name in _OF_MEANS)
        return self.represent == "member"

    @classmethod
    def paper(cls, *, width: int | float = 0.25, scaling: Scaling = "adam") -> Fusion:
        """Returns the published method: raw weights, k-means++ and Lloyd, best of 30 starts.

        Args:
            width: As for `Fusion`.
            scaling: As for `Fusion`; the paper uses ``"adam"``.

        Returns:
            The method; calibration has no influence on it.
        """
        return cls(
            width=width,
            scaling=scaling,
            metric="raw",
            refit=False,
            match=False,
            init="k-means++",
            refine="lloyd",
            n_init=30,
            tol=1e-4,
        )

    def within(self, subs: SubMLPs, share: float) -> Fusion:
        """Returns the method with the largest width within a share; Frozen sizes do not count."""
        return dataclasses.replace(self, width=width_within(subs, share, self.round_to))

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the width is above the MLP's own, or calibration is missing."""
        kept_width(self.width, subs.width, self.round_to)
        if not calibrated and self.by_use:
            raise InputError(
                "by_use needs calibration text, which shows how the router uses experts"
            )
        if not calibrated and self.sequential:
            raise InputError("sequential needs calibration text or tokens")
        if not calibrated and self.represent == "member":
            raise InputError(
                "represent 'member' needs calibration: texts, or 'random' if there are none"
            )
        if not calibrated and self.metric not in ("auto", "raw"):
            raise InputError(
                f"metric {self.metric!r} needs calibration: texts, or 'random' if there are none"
            )

    def solve(
        self,
        subs: SubMLPs,
        *,
        key: Key[Array, ""],
        act: Activation | None = None,
        calibration: Calibration | None = None,
    ) -> Solution:
        """Clusters the sub-MLPs of one MLP, and fits the result to calibration inputs.

        Args:
            subs: The p sub-MLPs.
            key: Random key of the clustering's starts.
            act: The activation; needed with calibration.
            calibration: The inputs of the MLP, or None.

        Returns:
            `FusionParts` and `FusionFacts`.
        """
        if calibration is not None and self.of_members:
            assert act is not None
            found = self._members(subs, calibration, act)
        else:
            found = self._means(subs, key, calibration, act)
        labels, sizes, loads, effective, facts = found
        around = factors(loads, self.scaling)
        if calibration is not None and self.match:
            assert act is not None
            around = matched(effective, subs, labels, loads, calibration, act, self.scaling)
        parts = FusionParts(stored_rows(effective, around), around, sizes, labels)
        return Solution(parts, facts)

    def _means(
        self,
        subs: SubMLPs,
        key: Key[Array, ""],
        calibration: Calibration | None,
        act: Activation | None,
    ) -> _Clusters:
        """Clusters the sub-MLPs; the means stand for the clusters, refitted where there is text."""
        metric = self.metric
        if metric == "auto":
            metric = "raw" if calibration is None else "function"
        result = kmeans(
            points(metric, subs, calibration, act or ""),
            kept_width(self.width, subs.width, self.round_to),
            key=key,
            init=self.init,
            refine=self.refine,
            n_init=self.n_init,
            max_iters=self.max_iters,
            tol=self.tol,
        )
        labels, sizes = result.labels, result.sizes
        effective, raw_inertia = _averaged(subs, labels, sizes)
        if self.refit and calibration is not None:
            assert act is not None
            effective = refitted(effective, subs, calibration, act, self.ridge)
        facts = FusionFacts(
            inertia=result.inertia_fraction,
            raw_inertia=raw_inertia,
            singletons=(sizes == 1).sum(),
            largest=sizes.max().astype(jnp.int32),
            steps=result.iterations + result.moves,
            converged=result.converged,
        )
        return _Clusters(labels, sizes, sizes, effective, facts)

    def _members(self, subs: SubMLPs, calibration: Calibration, act: Activation) -> _Clusters:
        """Chooses some sub-MLPs, and gives each of the others to the one that explains it best.

        With G the mean of ``h h^T`` over positions, each divided by its length, unit j explains
        ``G_ij^2 / G_jj`` of the ``G_ii`` of unit i.
        """
        count = kept_width(self.width, subs.width, self.round_to)
        given = calibration.outputs is not None
        chosen, _, compared, gram = kept_units(
            "relative",
            subs,
            count,
            act=act,
            calibration=calibration,
            ridge=self.ridge,
            gram=self.refit and not given,
        )
        assert compared is not None
        own = jnp.diagonal(compared)
        known = jnp.where(own[chosen] > 0, own[chosen], 1)
        explained = jnp.square(compared[:, chosen]) / known[None]
        labels = jnp.argmax(explained, axis=1).at[chosen].set(jnp.arange(count)).astype(jnp.int32)
        sizes = jnp.bincount(labels, length=count).astype(compared.dtype)
        total = jnp.where(own.sum() > 0, own.sum(), 1)
        missed = own.sum() - jnp.take_along_axis(explained, labels[:, None], axis=1).sum()
        facts = FusionFacts(
            inertia=missed / total,
            raw_inertia=_averaged(subs, labels, sizes)[1],
            singletons=(sizes == 1).sum(),
            largest=sizes.max().astype(jnp.int32),
            steps=jnp.int32(subs.width - count),
            converged=jnp.array(True),
        )
        left = jax.tree.map(lambda x: wide(x)[chosen], subs)
        if gram is not None:
            left = refitted_selection(subs, chosen, gram, self.ridge)
        elif self.refit:
            left = refitted(left, subs, calibration, act, self.ridge)
        # A large unit that stands for many small ones stands for little more than itself.
        activity = own if self.scaling == "sgd" else jnp.sqrt(own)
        whole = sum_by_label(activity, labels, count)
        loads = jnp.where(own[chosen] > 0, whole / jnp.where(own > 0, activity, 1)[chosen], 1)
        return _Clusters(labels, sizes, loads, left, facts)

    def build(self, mlp: Mlp, solution: Solution) -> FusedMlp | FusedGatedMlp:
        """Returns the fused MLP of a solution, in the dtype of the original."""
        parts: FusionParts = solution.parts
        new = mlp.abstract(
            FusedGatedMlp if isinstance(mlp, GatedMlp) else FusedMlp,
            parts.rows.width,
            original_width=mlp.width,
            scaling=self.scaling,
        )
        new.load_fused(parts.rows, parts.factors, parts.sizes, parts.labels, mlp.out_bias())
        return new
