"""Unstructured pruning: single weights become 0 and stay 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.errors import InputError
from fusion_jax.forms import Masked
from fusion_jax.methods.base import Solution
from fusion_jax.methods.factored import Factored, relative_error
from fusion_jax.topk import top_mask


class MaskFacts(NamedTuple):
    """What `MaskPrune` reports of a site.

    Args:
        error: The Frobenius norm of what was lost of all matrices, relative to theirs.
        kept: The share of the weights that is kept.
    """

    error: Float[Array, "*s"]
    kept: Float[Array, "*s"]


@dataclass(frozen=True, kw_only=True)
class MaskPrune(Factored):
    """Keeps the weights of largest magnitude in the matrices of an MLP taken together.

    The matrices stay as large as they were: a mask saves neither time nor memory here, only bits in
    a file that packs it. For one limit over
    all MLPs of a model, see `globally`.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 5.1: a quarter of the weights is kept.

    Example:
        >>> MaskPrune(keep=0.25).to_json()
        {'method': 'mask-prune', 'keep': 0.25}
    """

    keep: float = 0.25
    """The share of the weights to keep."""

    form = Masked

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be in (0, 1]; got {self.keep}")

    def spec(self, d: int, o: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def factor(self, matrices: Mapping[str, Float[Array, "_ _"]]) -> Solution:
        """The matrices and their masks."""
        flat = jnp.concatenate([jnp.abs(matrix).reshape(-1) for matrix in matrices.values()])
        keep = jnp.int32(max(1, round(self.keep * flat.size)))
        mask = top_mask(flat, keep)
        parts, start = {}, 0
        for name, matrix in matrices.items():
            own = mask[start : start + matrix.size].reshape(matrix.shape)
            parts[name] = jnp.where(own, matrix, 0), own
            start += matrix.size
        made = [(matrices[name], kernel) for name, (kernel, _) in parts.items()]
        facts = MaskFacts(relative_error(made), mask.mean(dtype=flat.dtype))
        return Solution(parts, facts)

    def _sized(self, share: float) -> MaskPrune:
        return dataclasses.replace(self, keep=share)
