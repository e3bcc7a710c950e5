"""Implements dropping whole experts of a mixture, with their outputs of the router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusion_jax.calibration.data import Routing
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method, ModelNeeds, check_choice, check_size
from fusion_jax.methods.scores import importance
from fusion_jax.nn.submlps import SubMLPs

ExpertScore = Literal["reap", "total", "frequency", "magnitude"]


class ExpertFacts(NamedTuple):
    """The facts of a mixture that `DropExperts` reports.

    Args:
        experts: The number of experts that stay.
        kept_score: The scores of the experts that stay, as a share of all scores.
    """

    experts: Int[Array, ""]
    kept_score: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class DropExperts(Method):
    """Drops whole experts of every mixture, and the outputs of the router that lead to them.

    The softmax and the choice of the best experts then run over those that stay, which do not
    change. Every mixture of a model keeps the same number, as configurations have one. Every group
    of experts does too, where a router chooses groups first. Shared experts and the MLPs of other
    layers stay as they are.

    References:
        ``"reap"``: REAP the Experts (arXiv 2510.13999), equation 9.

    Example:
        >>> DropExperts(keep=0.5).kept_count(8), DropExperts(keep=6).kept_count(8)
        (4, 6)
    """

    name: ClassVar[str] = "drop-experts"
    accepts_compressed: ClassVar[bool] = True

    keep: int | float = 0.5
    """Experts to keep in each mixture: an int, or a fraction of them."""
    score: ExpertScore = "reap"
    """The importance of an expert: on calibration text the length of what it adds to the output, as
    a mean (reap) or a sum (total) over the positions that the router sends to it, or the number of
    these positions (frequency); or the sum of |w_i| |v_i| over its hidden units, by weights alone
    (magnitude)."""

    def __post_init__(self):
        check_size("keep", self.keep, 1)
        check_choice("score", self.score, get_args(ExpertScore))

    @property
    def takes_calibration(self) -> bool:
        """Whether experts are scored on text."""
        return self.score != "magnitude"

    @property
    def model_needs(self) -> ModelNeeds:
        """The router, and how it uses the experts."""
        use = f"score {self.score!r}" if self.takes_calibration else None
        return ModelNeeds(expert_use=use, router=type(self).__name__)

    def kept_count(self, count: int) -> int:
        """Returns how many of the experts of a mixture stay."""
        return self.keep if isinstance(self.keep, int) else max(1, round(self.keep * count))

    def within(self, subs: SubMLPs, share: float) -> DropExperts:
        """Returns the method that keeps as many experts as a share of the parameters allows."""
        count = int(share * len(subs.up) + 1e-9)
        if count < 1:
            raise InputError(f"a budget of {share:g} leaves none of {len(subs.up)} experts")
        return dataclasses.replace(self, keep=count)

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if there are fewer experts, or calibration is missing."""
        if len(subs.up.shape) != 3:
            raise InputError("DropExperts is for the experts of a mixture")
        if self.kept_count(len(subs.up)) > len(subs.up):
            raise InputError(f"keep {self.keep} is above the number of experts, {len(subs.up)}")
        if self.takes_calibration and not calibrated:
            raise InputError(
                f"score {self.score!r} needs calibration: texts, or 'random' if there are none"
            )

    def kept_experts(
        self, subs: SubMLPs, routing: Routing | None, groups: int = 1
    ) -> tuple[list[int], ExpertFacts]:
        """Returns the experts with the largest scores of each group, in their order.

        Of equal ones, the first stay.
        """
        scores = self.scores(subs, routing)
        count = self.kept_count(len(scores))
        order = jnp.argsort(-scores.reshape(groups, -1), axis=1, stable=True)[:, : count // groups]
        first = jnp.arange(groups, dtype=order.dtype) * (len(scores) // groups)
        kept = jnp.sort((order + first[:, None]).reshape(-1))
        share = scores[kept].sum() / jnp.maximum(scores.sum(), 1e-30)
        return kept.tolist(), ExpertFacts(jnp.int32(count), share)

    def scores(self, subs: SubMLPs, routing: Routing | None) -> Float[Array, " e"]:
        """Returns the score of each expert."""
        if self.score == "magnitude":
            return jax.vmap(importance)(subs).sum(-1)
        assert routing is not None
        counts = routing.counts.astype(routing.sizes.dtype)
        return {"reap": routing.sizes, "total": counts * routing.sizes, "frequency": counts}[
            self.score
        ]
