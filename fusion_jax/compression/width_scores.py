"""What each site loses at each width: solved for any budget, without calibrating again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np

from fusion_jax.compression.budgets import Budget, UnitCost
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method
from fusion_jax.methods.fusion import Fusion
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.registry import method_from_json

MethodT = TypeVar("MethodT", Fusion, Prune)
FORMAT = 1
TOTALS = ("params", "megabytes", "flops")
BINS = 65_536
"""Steps that a budget is divided into where costs are not whole numbers; costs are rounded up."""


class SiteScores(NamedTuple):
    """What a site loses at each width that it can get.

    Args:
        path: Its path.
        widths: Rising widths; the last one is the original's.
        errors: The error at each width, which falls.
        unit: What a unit costs.
    """

    path: str
    widths: np.ndarray
    errors: np.ndarray
    unit: UnitCost


@dataclass(frozen=True, kw_only=True)
class WidthScores(Generic[MethodT]):
    """What each site of a model loses at each width; `plan` solves for any budget in seconds.

    Args:
        method: The method, whose ``width`` is not used.
        by: What an error is, see `fusion_jax.score_widths`.
        sites: The sites.
        totals: What the whole model has: ``params``, ``megabytes`` and ``flops`` of its MLPs.
    """

    method: MethodT
    by: str
    sites: tuple[SiteScores, ...]
    totals: Mapping[str, int | float]

    def plan(self, budget: Budget) -> dict[str, MethodT]:
        """Returns the method for each site's path, with the widths whose errors add up to least.

        Args:
            budget: What the result may cost.

        Returns:
            The methods, for `fusion_jax.compress`. Widths are multiples of the method's
            ``round_to``, or the original width.

        Raises:
            InputError: Not even the smallest widths are within the budget.

        Example:
            >>> unit = UnitCost(params=9, bytes=36, flops=16, kind="relu 4x4 float32")
            >>> sites = tuple(
            ...     SiteScores(path, np.arange(1, 5), error / np.arange(1, 5), unit)
            ...     for path, error in (("a", 1.0), ("b", 4.0))
            ... )
            >>> totals = {"params": 172, "megabytes": 0.000688, "flops": 128}
            >>> scores = WidthScores(method=Fusion(), by="loss", sites=sites, totals=totals)
            >>> {path: how.width for path, how in scores.plan(Budget(params=150)).items()}
            {'a': 2, 'b': 3}
        """
        name, limit = budget.limit
        costs = [budget.costs(site.unit, site.widths) for site in self.sites]
        whole = sum(float(cost[-1]) for cost in costs)
        # What is not in the chosen MLPs cannot be saved.
        total = self.totals.get(name, whole)
        allowed = limit * total if isinstance(limit, float) and limit <= 1 else limit
        fixed = max(0.0, total - whole)
        least = fixed + sum(float(cost.min()) for cost in costs)
        if allowed < least * (1 - 1e-9):
            raise InputError(
                f"a budget of {name} {limit:g} is too small: the smallest widths need "
                f"{least / total:.3f} of the original's {total:,.6g}"
            )
        whole_costs, room = _in_steps(costs, allowed - fixed)
        chosen = _best_widths([site.errors for site in self.sites], whole_costs, room)
        return {
            site.path: dataclasses.replace(self.method, width=int(site.widths[i]))
            for site, i in zip(self.sites, chosen, strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the scores as JSON values."""
        sites = [
            {
                "path": site.path,
                "widths": site.widths.tolist(),
                "errors": site.errors.tolist(),
                "unit": site.unit._asdict(),
            }
            for site in self.sites
        ]
        totals, method = dict(self.totals), self.method.to_json()
        return {"format": FORMAT, "method": method, "by": self.by, "totals": totals, "sites": sites}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WidthScores[Any]:
        """Returns the scores of JSON values, as `to_json` gives them.

        Raises:
            InputError: The values are not scores of widths.
        """
        try:
            assert fields["format"] == FORMAT
            made = cls(
                method=cast(Any, method_from_json(fields["method"])),
                by=str(fields["by"]),
                sites=tuple(
                    SiteScores(
                        str(site["path"]),
                        np.asarray(site["widths"], np.int64),
                        np.asarray(site["errors"], np.float64),
                        UnitCost(**site["unit"]),
                    )
                    for site in fields["sites"]
                ),
                totals={name: float(fields["totals"][name]) for name in TOTALS},
            )
            for site in made.sites:
                assert site.widths.ndim == 1 and site.widths.shape == site.errors.shape
                assert (np.diff(site.widths) > 0).all() and (site.widths > 0).all()
                assert np.isfinite(site.errors).all()
            assert made.sites and isinstance(made.method, Fusion | Prune)
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError):
            raise InputError("these are not scores of widths") from None
        return made


def plan_to_json(plan: Mapping[str, Method]) -> dict[str, Any]:
    """Returns a plan, the method of each site, as JSON values.

    Example:
        >>> plan_to_json({"layers.0.mlp": Prune(width=8)})["sites"]["layers.0.mlp"]["width"]
        8
    """
    return {"format": FORMAT, "sites": {path: how.to_json() for path, how in plan.items()}}


def plan_from_json(fields: Mapping[str, Any]) -> dict[str, Method]:
    """Returns the plan of JSON values, for `fusion_jax.compress`.

    Raises:
        InputError: The values are not a plan.
    """
    try:
        assert fields["format"] == FORMAT
        plan = {str(path): method_from_json(how) for path, how in fields["sites"].items()}
        assert plan
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        why = f": {error}" if isinstance(error, InputError) else ""
        raise InputError(f"this is not a plan of widths{why}") from None
    return plan


def _in_steps(costs: Sequence[np.ndarray], room: float) -> tuple[list[np.ndarray], int]:
    """Returns costs in whole steps, rounded up, and how many steps there are room for."""
    numbers = np.concatenate(costs)
    if (numbers == np.round(numbers)).all():
        step = float(np.gcd.reduce(numbers.astype(np.int64)))
        if room / step <= BINS:
            return [(cost // step).astype(np.int64) for cost in costs], int(room // step)
    step = room / BINS
    # A cost of a whole number of steps may come out a rounding error above it.
    whole = [np.ceil(cost / step - 1e-6).astype(np.int64) for cost in costs]
    return whole, max(BINS, sum(int(cost.min()) for cost in whole))


def _best_widths(
    errors: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: int
) -> list[int]:
    """Returns which width each site gets, so that the sum of errors within a budget is smallest.

    Args:
        errors: The errors of each site at its widths.
        costs: What the widths cost, whole numbers.
        budget: The largest sum of costs.
    """
    best = np.zeros(budget + 1)
    choices = []
    for error, cost in zip(errors, costs, strict=True):
        total = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, np.int32)
        for i, (e, w) in enumerate(zip(error, cost, strict=True)):
            if w > budget:
                break
            candidate = best[: budget + 1 - w] + e
            better = candidate < total[w:]
            total[w:][better] = candidate[better]
            choice[w:][better] = i
        best = total
        choices.append(choice)
    left, chosen = budget, []
    for choice, cost in zip(reversed(choices), reversed(costs), strict=True):
        chosen.append(int(choice[left]))
        left -= int(cost[chosen[-1]])
    return chosen[::-1]
