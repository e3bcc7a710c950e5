"""Implements structured pruning: the most important hidden units stay, the others go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution, check_choice
from fusion_jax.methods.narrower import Narrower
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.submlps import SubMLPs, responses
from ntk.activations import Activation

UnitScore = Literal["magnitude", "activation", "gradient"]


class PruneFacts(NamedTuple):
    """The facts of a site that `Prune` and `Sketch` report.

    Args:
        kept_importance: The scores of the units that stay unmixed, as a share of all scores.
    """

    kept_importance: Float[Array, "*s"]


def importance(subs: SubMLPs) -> Float[Array, " p"]:
    """Returns ``|(w_i, b_i)| |v_i|`` of each sub-MLP; with a gate, w_i has all input weights.

    Example:
        >>> importance(SubMLPs(up=jnp.array([[3.0, 4.0]]), down=jnp.array([[2.0]]))).tolist()
        [10.0]
    """
    rows, outputs = subs.rows(), subs.down.shape[-1]
    inner, outer = rows[:, :-outputs], rows[:, -outputs:]
    return jnp.linalg.norm(inner, axis=-1) * jnp.linalg.norm(outer, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Prune(Narrower):
    """Keeps the hidden units with the largest scores.

    ``"magnitude"`` scores unit i by ``|(w_i, b_i)| |v_i|``; ``"activation"`` by the root mean
    square of its contribution to the output at calibration inputs, ``rms(h_i) |v_i|``; and
    ``"gradient"`` by the first-order change of a loss without it, ``|<dL/dv_i, v_i>|``. All weights
    of one unit stay or go together.

    Example:
        >>> Prune(width=0.25).to_json()["score"]
        'magnitude'
    """

    name: ClassVar[str] = "prune"

    score: UnitScore = "magnitude"
    """The importance of a unit; ``"activation"`` needs calibration, ``"gradient"`` a loss's
    gradients."""

    @property
    def takes_calibration(self) -> bool:
        """Whether units are scored by their contribution to outputs."""
        return self.score == "activation"

    @property
    def takes_gradients(self) -> bool:
        """Whether units are scored by a loss's gradients."""
        return self.score == "gradient"

    def __post_init__(self):
        super().__post_init__()
        check_choice("score", self.score, get_args(UnitScore))

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the width is above the MLP's own, or calibration is missing."""
        super().check(subs)
        if self.score == "activation" and not calibrated:
            raise InputError(
                "score 'activation' needs calibration: texts, or 'random' if there are none"
            )

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
        score = importance(subs)
        if self.score == "activation":
            assert act is not None
            assert calibration is not None
            hidden = responses(subs, calibration.inputs, act).hidden
            rms = jnp.linalg.norm(calibration.root_weights()[:, None] * hidden, axis=0)
            score = rms * jnp.linalg.norm(subs.down.astype(rms.dtype), axis=-1)
        elif self.score == "gradient":
            assert gradients is not None
            slope = jnp.abs((wide(gradients.down) * wide(subs.down)).sum(-1))
            # Experts that no batch reached have no gradients: they are scored by magnitude.
            score = jnp.where(slope.max() > 0, slope, score.astype(slope.dtype))
        chosen = jnp.sort(jax.lax.top_k(score, self.kept(subs))[1])
        facts = PruneFacts(score[chosen].sum() / jnp.maximum(score.sum(), 1e-30))
        return Solution(jax.tree.map(lambda x: x[chosen], subs), facts)
