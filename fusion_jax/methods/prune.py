"""Implements structured pruning: the most important hidden units stay, the others go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution, check_choice
from fusion_jax.methods.least_squares import refitted, refitted_selection
from fusion_jax.methods.narrower import Narrower
from fusion_jax.methods.scores import (
    ON_GRADIENTS,
    ON_INPUTS,
    ON_UPSTREAM,
    UnitScore,
    kept_units,
)
from fusion_jax.nn.submlps import SubMLPs
from ntk.activations import Activation


class PruneFacts(NamedTuple):
    """The facts of a site that `Prune` and `Sketch` report.

    Args:
        kept_importance: The scores of the units that stay unmixed, as a share of all scores.
    """

    kept_importance: Float[Array, "*s"]


@dataclass(frozen=True, kw_only=True)
class Prune(Narrower):
    """Keeps the hidden units with the largest scores; all weights of one unit stay or go together.

    With ``refit``, output weights are then fitted to the original's outputs on calibration text.
    On real models that is worth more than the choice of the score.

    References:
        The scores: see `fusion_jax.methods.scores.unit_scores`. ``refit`` after any of them is
        GRAIL (CPAL 2026).

    Example:
        >>> Prune(width=0.25, score="activation", refit=True).to_json()["score"]
        'activation'
    """

    name: ClassVar[str] = "prune"

    score: UnitScore = "magnitude"
    """The importance of a unit: ``"magnitude"`` by weights alone; ``"hidden"``, ``"activation"``,
    ``"wanda"``, ``"fluctuation"``, ``"leverage"``, ``"obs"``, ``"relative"`` and ``"fisher"`` on
    calibration text;
    ``"gradient"`` and ``"saliency"`` by a loss's gradients."""
    refit: bool = False
    """With calibration: fit output weights to the original's outputs by ridge regression."""
    ridge: float = 0.01
    """Strength of the regression, relative to the mean square of the hidden units."""

    @property
    def takes_calibration(self) -> bool:
        """Whether units are scored, or output weights fitted, on text."""
        return self.refit or self.score in ON_INPUTS

    @property
    def takes_upstream(self) -> bool:
        """Whether units are scored by upstream gradients."""
        return self.score in ON_UPSTREAM

    @property
    def takes_gradients(self) -> bool:
        """Whether units are scored by a loss's gradients."""
        return self.score in ON_GRADIENTS

    def __post_init__(self):
        super().__post_init__()
        check_choice("score", self.score, get_args(UnitScore))
        if not self.ridge > 0:
            raise InputError(f"ridge must be above 0; got {self.ridge}")

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the width is above the MLP's own, or calibration is missing."""
        super().check(subs)
        if self.takes_calibration and not calibrated:
            which = f"score {self.score!r}" if self.score in ON_INPUTS else "refit"
            raise InputError(f"{which} needs calibration: texts, or 'random' if there are none")

    def solve(
        self,
        subs: SubMLPs,
        *,
        key: Key[Array, ""],
        act: Activation | None = None,
        calibration: Calibration | None = None,
        gradients: SubMLPs | None = None,
    ) -> Solution:
        """Keeps some sub-MLPs of one MLP, in their order."""
        chosen, score, _, gram = kept_units(
            self.score,
            subs,
            self.kept(subs),
            act=act,
            calibration=calibration,
            gradients=gradients,
            ridge=self.ridge,
            gram=self.refit,
        )
        facts = PruneFacts(score[chosen].sum() / jnp.maximum(score.sum(), 1e-30))
        left = jax.tree.map(lambda x: x[chosen], subs)
        if self.refit:
            assert calibration is not None and act is not None
            if gram is not None and calibration.outputs is None:
                left = refitted_selection(subs, chosen, gram, self.ridge)
            else:
                left = refitted(left, subs, calibration, act, self.ridge)
        return Solution(left, facts)
