"""The base of methods that make an MLP of the same kind with fewer hidden units."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fusion_jax.errors import check_at_least
from fusion_jax.methods.base import Method, Solution, check_width, kept_width, width_within
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs


@dataclass(frozen=True, kw_only=True)
class Narrower(Method):
    """Base of methods whose ``parts`` are the sub-MLPs of a narrower MLP of the same kind."""

    width: int | float = 0.25
    """Hidden units to keep: an int, or a fraction of the MLP's width."""
    round_to: int = 1
    """Round fractions of a width up to a multiple of this (128 suits TPUs)."""

    def __post_init__(self):
        check_width(self.width)
        check_at_least(1, round_to=self.round_to)

    def kept(self, subs: SubMLPs) -> int:
        """Returns the width of the narrower MLP."""
        return kept_width(self.width, subs.width, self.round_to)

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the width is above the MLP's own."""
        self.kept(subs)

    def within(self, subs: SubMLPs, share: float) -> Narrower:
        """Returns the method with the largest width within a share of the parameters."""
        return dataclasses.replace(self, width=width_within(subs, share, self.round_to))

    def build(self, mlp: Mlp, solution: Solution) -> Mlp:
        """Returns the narrower MLP, in the dtype of the original."""
        new = mlp.abstract(type(mlp), solution.parts.width)
        new.load_sub_mlps(solution.parts, mlp.out_bias())
        return new
