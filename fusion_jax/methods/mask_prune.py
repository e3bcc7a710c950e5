"""Implements unstructured pruning: single weights become 0 and stay 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution, check_choice
from fusion_jax.methods.factored import Factored, matrices_of, relative_error
from fusion_jax.nn.linear_forms import Masked
from fusion_jax.nn.masking import count_of, top_mask, top_masks
from fusion_jax.nn.site import gradients_of, select_sites, sites
from fusion_jax.nn.submlps import SubMLPs
from ntk.selection import Selection


class MaskFacts(NamedTuple):
    """The facts of a site that `MaskPrune` reports.

    Args:
        error: The Frobenius norm of the change of all matrices, relative to their own norm.
        kept: The share of the weights that is kept.
    """

    error: Float[Array, "*s"]
    kept: Float[Array, "*s"]


WeightScore = Literal["magnitude", "gradient"]


@dataclass(frozen=True, kw_only=True)
class MaskPrune(Factored):
    """Keeps the weights with the largest scores in the matrices of an MLP taken together.

    The score of a weight is its magnitude, or the first-order change of a loss without it,
    ``|dL/dw w|``. The matrices keep their size: a mask saves no time, only bytes in a file that
    packs it. For one limit over all MLPs of a model see `with_global_limit`.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 5.1: a quarter of the weights is kept.

    Example:
        >>> MaskPrune(keep=0.25).to_json()
        {'method': 'mask-prune', 'keep': 0.25, 'score': 'magnitude'}
    """

    name: ClassVar[str] = "mask-prune"

    keep: float = 0.25
    """The share of the weights to keep."""
    score: WeightScore = "magnitude"
    """The importance of a weight; ``"gradient"`` needs a loss's gradients."""

    form = Masked

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be in (0, 1]; got {self.keep}")
        check_choice("score", self.score, get_args(WeightScore))

    @property
    def takes_gradients(self) -> bool:
        """Whether weights are scored by a loss's gradients."""
        return self.score == "gradient"

    def spec(self, d: int, o: int) -> dict[str, object]:
        """Returns no arguments."""
        return {}

    def solve(
        self, subs: SubMLPs, *, key: Key[Array, ""], gradients: SubMLPs | None = None
    ) -> Solution:
        """Masks the matrices of one MLP."""
        matrices, scores = matrices_of(subs), self.scores(subs, gradients)
        if self.takes_gradients:
            # Experts that no batch reached have no gradients: they are scored by magnitude.
            reached = jnp.stack([score.max() for score in scores.values()]).max() > 0
            scores = {n: jnp.where(reached, scores[n], jnp.abs(m)) for n, m in matrices.items()}
        return self._masked(matrices, scores)

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """Returns the matrices and their masks, by magnitude."""
        if self.takes_gradients:
            raise InputError("score 'gradient' is for MLPs: see fusion_jax.compress")
        return self._masked(matrices, {name: jnp.abs(m) for name, m in matrices.items()})

    def scores(self, subs: SubMLPs, gradients: SubMLPs | None) -> dict[str, Float[Array, "_ _"]]:
        """Returns the score of each weight of an MLP, by the names of its layers."""
        found = matrices_of(subs)
        if self.score == "magnitude":
            return {name: jnp.abs(matrix) for name, matrix in found.items()}
        assert gradients is not None
        slopes = matrices_of(gradients)
        return {name: jnp.abs(matrix * slopes[name]) for name, matrix in found.items()}

    def _masked(self, matrices: Mapping[str, Array], scores: Mapping[str, Array]) -> Solution:
        names = tuple(matrices)
        keep = jnp.int32(count_of(self.keep, sum(x.size for x in matrices.values())))
        made, facts = _masked([matrices[n] for n in names], [scores[n] for n in names], keep)
        return Solution(dict(zip(names, made, strict=True)), facts)

    def _sized(self, share: float) -> MaskPrune:
        return dataclasses.replace(self, keep=share)


@jax.jit
def _masked(
    matrices: list[Array], scores: list[Array], keep: Int[Array, ""]
) -> tuple[list[tuple[Array, Array]], MaskFacts]:
    flat = jnp.concatenate([x.reshape(-1) for x in scores])
    mask = top_mask(flat, keep)
    parts, start = [], 0
    for matrix in matrices:
        own = mask[start : start + matrix.size].reshape(matrix.shape)
        parts.append((jnp.where(own, matrix, 0), own))
        start += matrix.size
    made = [(matrix, kernel) for matrix, (kernel, _) in zip(matrices, parts, strict=True)]
    return parts, MaskFacts(relative_error(made), mask.mean(dtype=flat.dtype))


def with_global_limit(
    model: nnx.Module,
    method: MaskPrune,
    *,
    layers: Selection = None,
    gradients: Mapping[str, Array] | None = None,
) -> dict[str, MaskPrune]:
    """Returns a method for each MLP, so that one limit of the scores holds in all MLPs.

    Args:
        model: The model.
        method: The method, whose ``keep`` is the share of the weights of all MLPs together.
        layers: Which MLPs, see `fusion_jax.nn.site.select_sites`.
        gradients: As for `fusion_jax.compress`.

    Returns:
        Methods by site path, for `fusion_jax.compress`; each keeps at least one weight.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> pair = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(i)) for i in range(2)])
        >>> chosen = with_global_limit(pair, MaskPrune(keep=0.25))
        >>> round(sum(m.keep for m in chosen.values()) / 2, 3)
        0.25
    """
    method.check_given(calibration=False, gradients=gradients is not None)
    scores = {}
    for site in select_sites(sites(model), layers):
        if site.mlp.stack:
            raise InputError(
                f"{site.path}: experts share no limit; compress them with one keep each"
            )
        slopes = None if gradients is None else gradients_of(site, gradients)
        found = method.scores(site.mlp.sub_mlps(), slopes)
        scores[site.path] = np.concatenate([np.asarray(x).reshape(-1) for x in found.values()])
    masks = top_masks(list(scores.values()), method.keep)
    return {
        path: dataclasses.replace(method, keep=max(1, int(mask.sum())) / mask.size)
        for path, mask in zip(scores, masks, strict=True)
    }
