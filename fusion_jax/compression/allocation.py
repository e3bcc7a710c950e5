"""Splits one budget of hidden units among several sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.calibrator import Calibrator
from fusion_jax.calibration.data import Calibration
from fusion_jax.calibration.sample import stack_padded
from fusion_jax.calibration.sources import CalibrationSource
from fusion_jax.compression.budgets import Budget, UnitCost
from fusion_jax.compression.mlps import compress
from fusion_jax.compression.width_scores import MethodT, SiteScores, WidthScores
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import check_choice, check_method
from fusion_jax.methods.fusion import Fusion
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.scores import loss_of_removal
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import Site, select_sites, sites
from fusion_jax.progress import show_progress
from fusion_jax.report import size_of
from ntk.mlp import mlp_weights, traced_kernel, upstream_kernel
from ntk.selection import Selection

TRIED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""The shares of the original width at which a site's error is measured, besides the smallest."""
HELD_OUT_POSITIONS = 512
"""The largest number of positions at which kernels are compared, and which no site is fitted to."""
NEEDED_POSITIONS = 8
"""The number of positions that a site or an expert needs; kernels are compared at two of them."""
CURVE_POINTS = 512
"""The number of widths, about, that a site can get."""
TIE_BREAK = 1e-6
"""The weight of a site's width among equal errors: more units are better, so that none is left."""


@on_auto_axes
def allocate(
    model: nnx.Module,
    method: MethodT,
    *,
    total_width: int | float | None = None,
    budget: Budget | None = None,
    calibration: CalibrationSource,
    key: Key[Array, ""],
    by: Literal["kernel", "loss"] = "kernel",
    layers: Selection = None,
    progress: bool | None = None,
) -> dict[str, MethodT]:
    """Gives each site its own width, so that the sum of the sites' errors is smallest.

    The same as ``score_widths(...).plan(budget)``; keep the scores to solve for other budgets.

    Args:
        model: As for `score_widths`, as are all arguments but two.
        method: The method; its ``width`` is not used.
        total_width: The hidden units of all sites together: an int, or a fraction of the original.
        budget: What the model may cost, in place of ``total_width``.
        calibration: Text, tokens, or inputs.
        key: Random key.
        by: What an error is, ``"kernel"`` or ``"loss"``.
        layers: Which sites.
        progress: As for `compress`.

    Returns:
        The method for each site's path, for `compress`. Widths are multiples of the method's
        ``round_to``, or the original width; what they cost is at most the budget.

    Raises:
        InputError: As for `score_widths`; or the budget is below ``round_to`` for each site or
            above the original width of the sites.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlps = nnx.List([Mlp(4, 16, act="relu", rngs=nnx.Rngs(i)) for i in range(2)])
        >>> seen = {path: jax.random.normal(jax.random.key(0), (64, 4)) for path in ("0", "1")}
        >>> plan = allocate(mlps, Fusion(round_to=4), total_width=0.5, calibration=seen,
        ...                 key=jax.random.key(1))
        >>> sum(method.width for method in plan.values())
        16
    """
    if (total_width is None) == (budget is None):
        raise InputError("give total_width or budget, and not both")
    check_method(method)
    if budget is None:
        assert total_width is not None
        chosen = select_sites(sites(model), layers)
        budget = _budget_of_units(total_width, chosen, getattr(method, "round_to", 1))
    scores = score_widths(
        model, method, calibration=calibration, key=key, by=by, layers=layers, progress=progress
    )
    return scores.plan(budget)


def _budget_of_units(total_width: int | float, chosen: Sequence[Site], unit: int) -> Budget:
    """Returns the budget of a number of hidden units, or of a fraction of them."""
    originals = [site.mlp.width for site in chosen]
    if isinstance(total_width, float):
        if not 0 < total_width <= 1:
            raise InputError(
                f"a total_width given as a fraction must be in (0, 1]; got {total_width}"
            )
        total_width = int(total_width * sum(originals) + 1e-6)
    smallest = [min(unit, width) for width in originals]
    if not sum(smallest) <= total_width <= sum(originals):
        raise InputError(
            f"total_width must be {sum(smallest)} to {sum(originals)} for {len(chosen)} sites with "
            f"round_to {unit}; got {total_width}"
        )
    return Budget(width=total_width)


@on_auto_axes
def score_widths(
    model: nnx.Module,
    method: MethodT,
    *,
    calibration: CalibrationSource,
    key: Key[Array, ""],
    by: Literal["kernel", "loss"] = "kernel",
    layers: Selection = None,
    progress: bool | None = None,
) -> WidthScores[MethodT]:
    """Returns what each site of a model loses at each width that it can get.

    By ``"kernel"``, each site is fused alone at a few widths. Its error is measured at held-out
    positions of the calibration: the relative change of its neural tangent kernel, SGD's or Adam's
    as the scaling says, or of its outputs if the scaling is ``"folded"``. Errors at other widths
    are interpolated. By ``"loss"``, the error is by how much the model's loss grows, to second
    order, with every unit that goes: see `fusion_jax.methods.scores.loss_of_removal`. That takes
    one backward pass and no labels. `WidthScores.plan` finds an exact minimum over all widths
    within a budget.

    Args:
        model: The model.
        method: The method; its ``width`` is not used. By ``"loss"`` it is one that removes one unit
            at a time: ``Fusion()``, not of means, or ``Prune(score="relative")``.
        calibration: As for `compress`; by ``"loss"`` text, or what `calibrate` returns with
            ``upstream=True``.
        key: Random key.
        by: What an error is, ``"kernel"`` or ``"loss"``.
        layers: Which sites, as for `compress`.
        progress: As for `compress`.

    Returns:
        The scores.

    Raises:
        InputError: Calibration is missing, the method cannot measure these errors, or a site or an
            expert has too few positions to hold some out.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlps = nnx.List([Mlp(4, 16, act="relu", rngs=nnx.Rngs(i)) for i in range(2)])
        >>> seen = {path: jax.random.normal(jax.random.key(0), (64, 4)) for path in ("0", "1")}
        >>> scores = score_widths(mlps, Fusion(), calibration=seen, key=jax.random.key(1))
        >>> for share in (0.5, 0.75):  # another budget takes no other calibration
        ...     plan = scores.plan(Budget(params=share))
        ...     print(sum(method.width for method in plan.values()))
        15
        23
    """
    check_method(method)
    check_choice("by", by, ("kernel", "loss"))
    one_at_a_time = (isinstance(method, Fusion) and method.of_members) or (
        isinstance(method, Prune) and method.score == "relative"
    )
    if by == "loss" and not one_at_a_time:
        raise InputError(
            "widths by loss are for Fusion with represent='member', its default, and for "
            "Prune(score='relative'), which remove one unit at a time"
        )
    if by == "kernel" and not isinstance(method, Fusion):
        raise InputError(f"widths are allocated for Fusion, not for {type(method).__name__}")
    if calibration is None:
        raise InputError("allocating needs calibration: texts, or 'random' if there are none")
    chosen = select_sites(sites(model), layers)
    unit = method.round_to
    text_key, fit_key, up_key = jax.random.split(key, 3)
    source = Calibrator(
        model, chosen, calibration, sequential=False, upstream=by == "loss", key=text_key
    )
    for site in chosen if by == "loss" else ():
        if site.mlp.stack:
            raise InputError(f"{site.path or 'the model'}: widths by loss are not for experts")
        if not source.has_upstream(site):
            raise InputError(
                f"{site.path or 'the model'}: widths by loss need calibration text or tokens, or "
                "what calibrate(..., upstream=True) returns"
            )
    source.capture(progress)
    if by == "loss":
        curves = []
        with show_progress("Allocating", len(chosen), progress, first="compiling") as advance:
            for site in chosen:
                curves.append(_loss_curve(site, source.of(site), method.ridge, unit))
                advance(site.path)
        return _scores(model, method, by, chosen, curves)
    assert isinstance(method, Fusion)
    tried = [_tried_widths(site.mlp.width, unit) for site in chosen]
    curves = []
    total = sum(map(len, tried))
    with show_progress("Allocating", total, progress, first="compiling") as advance:
        for site, widths in zip(chosen, tried, strict=True):
            fitted, held_out = _held_out_split(source.of(site), site.path)
            points = [(site.mlp.width, 0.0)]
            for width in widths:
                made = dataclasses.replace(method, width=width, by_use=0.0, sequential=False)
                seen = {"": fitted}
                fused, _ = compress(site.mlp, made, key=fit_key, calibration=seen, progress=False)
                error = _error(site.mlp, fused, jnp.asarray(held_out), method.scaling, up_key)
                points.append((width, error))
                advance(f"{site.path} at {width}")
            curves.append(_curve(points, site.mlp.width, unit))
    return _scores(model, method, by, chosen, curves)


def _scores(
    model: nnx.Module,
    method: MethodT,
    by: str,
    chosen: Sequence[Site],
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> WidthScores[MethodT]:
    """Returns the scores, with what the units and the whole model cost."""
    size = size_of(model, [site.mlp for site in sites(model)])
    every = zip(chosen, curves, strict=True)
    scored = [SiteScores(s.path, *curve, UnitCost.of(s.mlp)) for s, curve in every]
    totals = {"params": size.params, "megabytes": size.bytes / 1e6, "flops": size.mlp_flops}
    return WidthScores(method=method, by=by, sites=tuple(scored), totals=totals)


def _loss_curve(
    site: Site, seen: Calibration, ridge: float, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the widths that a site can have, and by how much the loss grows there."""
    mlp = site.mlp
    smallest = min(unit, mlp.width)
    costs = loss_of_removal(mlp.sub_mlps(), seen, mlp.act, smallest, ridge)
    # A unit cannot be worth less than nothing, and the last ones to go are worth the most.
    total = np.cumsum(np.maximum.accumulate(np.asarray(costs, np.float64)))
    points = [(mlp.width, 0.0)]
    points += [(mlp.width - i - 1, float(cost)) for i, cost in enumerate(total)]
    return _curve(points, mlp.width, unit)


def _tried_widths(original: int, unit: int) -> list[int]:
    """Returns the widths at which a site's error is measured, among them the smallest possible."""
    widths = {max(1, round(share * original / unit)) * unit for share in (0, *TRIED)}
    return sorted(width for width in widths if width < original)


def _held_out_split(seen: Calibration, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs to fit to and the inputs held out; each expert's are padded with zeros."""
    inputs = np.asarray(seen.inputs)
    rows = [inputs]
    if seen.weights is not None:
        rows = [x[used > 0] for x, used in zip(inputs, np.asarray(seen.weights), strict=True)]
    fewest = min(map(len, rows))
    if fewest < NEEDED_POSITIONS:
        whose = "an expert of " if seen.weights is not None else ""
        raise InputError(
            f"{whose}{path or 'the model'} has {fewest} positions of calibration; at least "
            f"{NEEDED_POSITIONS} are needed, of which some are held out to compare widths"
        )
    fitted, held_out = [], []
    for x in rows:
        step = max(4, -(-len(x) // HELD_OUT_POSITIONS))
        out = np.arange(len(x)) % step == step - 1
        fitted.append(x[~out])
        held_out.append(x[out])
    if seen.weights is None:
        return fitted[0], held_out[0]
    return stack_padded(fitted), stack_padded(held_out)


def _error(
    old: AnyMlp, new: AnyMlp, x: Float[Array, "*s t d"], scaling: str, key: Key[Array, ""]
) -> float:
    """Returns the relative change of the scaling's kernel, or of the outputs if it has none.

    Inputs of zeros do not count: they are the padding of experts.
    """
    if old.stack:
        each = range(old.stack[0])
        one = [jax.tree.map(lambda a, i=i: a[i], (old, new, x)) for i in each]
        return float(np.mean([_error(a, b, c, scaling, key) for a, b, c in one]))
    real = (x != 0).any(-1)
    counts = real[:, None] & real[None]
    if scaling == "folded":
        results, counts = [mlp(x) for mlp in (old, new)], real[:, None]
    elif scaling == "sgd":
        results = [traced_kernel(mlp_weights(mlp), x) for mlp in (old, new)]
    else:
        up = jax.random.normal(key, (x.shape[0], old.d_out))
        results = [upstream_kernel(mlp_weights(mlp), x, up, kind="adam") for mlp in (old, new)]
    before, after = results
    lost, whole = (jnp.linalg.norm(jnp.where(counts, y, 0)) for y in (after - before, before))
    return float(lost / jnp.where(whole > 0, whole, 1))


def _curve(
    points: Sequence[tuple[int, float]], original: int, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the widths that a site can have, about `CURVE_POINTS`, and the errors there."""
    step = unit * -(-original // (unit * CURVE_POINTS))
    widths = np.unique([min(unit, original), *range(step, original, step), original])
    known = dict(points)
    tried = sorted(known)
    # More units cannot be worse: a measured rise is noise.
    falling = np.minimum.accumulate([known[w] for w in tried])
    errors = np.interp(np.log(widths), np.log(tried), falling)
    return widths, errors + TIE_BREAK * (1 - widths / original)
