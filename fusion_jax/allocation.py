"""One budget of hidden units for several sites: how much each gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration import Calibrator, Source
from fusion_jax.compress import compress
from fusion_jax.errors import InputError
from fusion_jax.methods.fusion import Fusion
from fusion_jax.mlp import Mlp
from fusion_jax.progress import progress as show_progress
from fusion_jax.sites import Layers, select, sites

TRIED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the original width at which a site's error is measured."""
POSITIONS = 512
"""Positions at which kernels are compared, kept out of what sites are fitted to."""


def allocate(
    model: nnx.Module,
    method: Fusion,
    *,
    total_width: int | float,
    calibration: Source,
    key: Key[Array, ""],
    layers: Layers = None,
    progress: bool | None = None,
) -> dict[str, Fusion]:
    """Gives each site its own width, so that the sum of their errors is least.

    Each site is fused alone at a few widths, and its error measured at positions of the calibration
    that it was not fitted to: the relative change of its neural tangent kernel, SGD's or Adam's as
    the scaling says, or of its outputs if that is ``"folded"``. Between the widths tried, errors
    are interpolated; the widths are then an exact minimum over all that add up to the budget.

    Args:
        model: The model.
        method: The method; its ``width`` is not used.
        total_width: Hidden units of all sites together: an int, or a fraction of what they have.
        calibration: As for `compress`.
        key: Random key.
        layers: Which sites, as for `compress`.
        progress: As for `compress`.

    Returns:
        The method for each site's path, to be given to `compress`. Widths are multiples of the
        method's ``round_to`` or the original width; the sum is at most ``total_width``.

    Raises:
        InputError: The budget is below ``round_to`` for each site or above what the sites have.

    Example:
        >>> mlps = nnx.List([Mlp(4, 16, act="relu", rngs=nnx.Rngs(i)) for i in range(2)])
        >>> seen = {path: jax.random.normal(jax.random.key(0), (64, 4)) for path in ("0", "1")}
        >>> plan = allocate(mlps, Fusion(round_to=4), total_width=0.5, calibration=seen,
        ...                 key=jax.random.key(1))
        >>> sum(method.width for method in plan.values())
        16
    """
    chosen = select(sites(model), layers)
    originals = [site.mlp.width for site in chosen]
    if isinstance(total_width, float):
        total_width = int(total_width * sum(originals))
    unit = method.round_to
    smallest = [min(unit, width) for width in originals]
    if not sum(smallest) <= total_width <= sum(originals):
        raise InputError(
            f"total_width must be {sum(smallest)} to {sum(originals)} for {len(chosen)} sites with "
            f"round_to {unit}; got {total_width}"
        )
    source = Calibrator(model, chosen, calibration, sequential=False, key=key)
    errors = []
    with show_progress("Allocating", len(chosen) * len(TRIED), progress) as advance:
        for site in chosen:
            inputs = source.of(site).inputs
            held_out = min(POSITIONS, inputs.shape[-2] // 4)
            seen = {"": inputs[..., held_out:, :]}
            points = []
            for share in TRIED:
                width = min(site.mlp.width, max(1, round(share * site.mlp.width / unit)) * unit)
                made = dataclasses.replace(method, width=width, by_use=0.0)
                fused, _ = compress(site.mlp, made, key=key, calibration=seen, progress=False)
                error = _error(site.mlp, fused, inputs[..., :held_out, :], method.scaling)
                points.append((width, error))
                advance(f"{site.path} at {width}")
            errors.append(_curve([*points, (site.mlp.width, 0.0)], site.mlp.width, unit))
    steps = _least([np.asarray(e) for _, e in errors], [w for w, _ in errors], total_width)
    return {
        site.path: dataclasses.replace(method, width=int(widths[i]))
        for site, (widths, _), i in zip(chosen, errors, steps, strict=True)
    }


def _error(old: Mlp, new: Mlp, x: Float[Array, "*s t d"], scaling: str) -> float:
    """The relative change of the kernel that the scaling is for, or of the outputs."""
    if old.stack:
        each = range(old.stack[0])
        one = [jax.tree.map(lambda a, i=i: a[i], (old, new, x)) for i in each]
        return float(np.mean([_error(a, b, c, scaling) for a, b, c in one]))
    # Only here, so that importing the library does not import ntk.
    from ntk.mlp import mlp_weights, traced_kernel, upstream_kernel

    if scaling == "folded":
        results = [mlp(x) for mlp in (old, new)]
    elif scaling == "sgd":
        results = [traced_kernel(mlp_weights(mlp), x) for mlp in (old, new)]
    else:
        up = jax.random.normal(jax.random.key(0), (x.shape[0], old.d_out))
        results = [upstream_kernel(mlp_weights(mlp), x, up, kind="adam") for mlp in (old, new)]
    before, after = results
    return float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))


def _curve(
    points: Sequence[tuple[int, float]], original: int, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Widths that a site can have, at most `_GRID` or so, and the errors there."""
    step = unit * -(-original // (unit * _GRID))
    widths = np.unique([min(unit, original), *range(step, original, step), original])
    known = dict(points)
    tried = sorted(known)
    # More units cannot do worse; what is measured otherwise is noise.
    falling = np.minimum.accumulate([known[w] for w in tried])
    return widths, np.interp(np.log(widths), np.log(tried), falling)


_GRID = 512


def _least(errors: list[np.ndarray], widths: list[np.ndarray], budget: int) -> list[int]:
    """The choice of one width per site with the least sum of errors within a budget."""
    best = np.zeros(budget + 1)
    choices = []
    for error, width in zip(errors, widths, strict=True):
        total = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, np.int32)
        for i, (e, w) in enumerate(zip(error, width, strict=True)):
            if w > budget:
                break
            candidate = best[: budget + 1 - w] + e
            better = candidate < total[w:]
            total[w:][better] = candidate[better]
            choice[w:][better] = i
        best = total
        choices.append(choice)
    left, chosen = budget, []
    for choice, width in zip(reversed(choices), reversed(widths), strict=True):
        chosen.append(int(choice[left]))
        left -= int(width[chosen[-1]])
    return chosen[::-1]
