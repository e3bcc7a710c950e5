"""Structured pruning: the most important hidden units stay as they are, the others go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError, nearest
from fusion_jax.methods.base import Solution
from fusion_jax.methods.narrower import Narrower
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.submlps import SubMLPs, responses

Score = Literal["magnitude", "activation", "gradient"]


class PruneFacts(NamedTuple):
    """What `Prune` reports of a site.

    Args:
        kept_importance: The share of the units' scores in those that stay.
    """

    kept_importance: Float[Array, "*s"]


def importance(subs: SubMLPs) -> Float[Array, " p"]:
    """``|(w_i, b_i)| |v_i|`` of each sub-MLP, biases included; with a gate, all input weights.

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

    ``"magnitude"`` scores unit i by ``|(w_i, b_i)| |v_i|``, ``"activation"`` by the root mean
    square of what it adds to the output at calibration inputs, ``rms(h_i) |v_i|``, and
    ``"gradient"`` by how much a loss changes without it to first order, ``|<dL/dv_i, v_i>|``. Rows
    and columns of one unit stay or go together.

    Example:
        >>> Prune(width=0.25).to_json()["score"]
        'magnitude'
    """

    name: ClassVar[str] = "prune"

    score: Score = "magnitude"
    """What makes a unit important; ``"activation"`` needs calibration, ``"gradient"``
    a loss's gradients."""

    @property
    def calibrated(self) -> bool:
        """Whether units are scored by what they add to outputs."""
        return self.score == "activation"

    @property
    def graded(self) -> bool:
        """Whether units are scored by a loss's gradients."""
        return self.score == "gradient"

    def __post_init__(self):
        super().__post_init__()
        choices = get_args(Score)
        if self.score not in choices:
            hint = nearest(str(self.score), choices)
            raise InputError(f"score must be one of {', '.join(choices)}; got {self.score!r}{hint}")

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the width is above that of the MLP, or calibration is missing."""
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
        act: str | None = None,
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
            # Experts that no batch reached have none.
            score = jnp.where(slope.max() > 0, slope, score.astype(slope.dtype))
        chosen = jnp.sort(jax.lax.top_k(score, self.kept(subs))[1])
        facts = PruneFacts(score[chosen].sum() / jnp.maximum(score.sum(), 1e-30))
        return Solution(jax.tree.map(lambda x: x[chosen], subs), facts)
