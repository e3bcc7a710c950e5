"""Implements the Sketch baseline: random mixtures replace the hidden units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Solution
from fusion_jax.methods.narrower import Narrower
from fusion_jax.methods.prune import PruneFacts
from fusion_jax.methods.scores import importance
from fusion_jax.nn.submlps import SubMLPs


@dataclass(frozen=True, kw_only=True)
class Sketch(Narrower):
    """The paper's Sketch baseline, ``s(x W1 S + b1 S) S^T W2`` with a Gaussian S.

    The entries of S have mean square 1 / k: the expectation of S S^T is the identity, and with a
    linear activation the expected outputs would be right. A gated MLP's input matrices share S.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 5.1. The published code of GPT-2 and
        Switch keeps a third of the width, ``keep=1 / 3``.

    Example:
        >>> Sketch(width=768, keep=1 / 3).to_json()["method"]
        'sketch'
    """

    name: ClassVar[str] = "sketch"

    keep: float = 0.0
    """The share of the new width for the units with the largest |w_i| |v_i|, which stay unmixed."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.keep < 1:
            raise InputError(f"keep must be at least 0 and below 1; got {self.keep}")

    def solve(self, subs: SubMLPs, *, key: Key[Array, ""]) -> Solution:
        """Mixes the sub-MLPs of one MLP."""
        width = self.kept(subs)
        whole = min(round(self.keep * width), width - 1)
        score = importance(subs)
        order = jnp.argsort(-score, stable=True)
        rows = subs.rows()
        best, rest = rows[order[:whole]], rows[order[whole:]]
        shape = (width - whole, subs.width - whole)
        sketch = jax.random.normal(key, shape, rows.dtype) / shape[0] ** 0.5
        mixed = jnp.matmul(sketch, rest, precision="highest")
        facts = PruneFacts(score[order[:whole]].sum() / jnp.maximum(score.sum(), 1e-30))
        return Solution(subs.with_rows(jnp.concatenate([best, mixed])), facts)
