"""The optimiser of a configuration: optax, on parameters by path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fusion_jax.errors import InputError
from fusion_jax.training.engine.config import TrainConfig

Params = Mapping[str, Float[Array, "..."]]
Multipliers = Mapping[str, Any]
"""What multiplies the learning rate, by path of a parameter: a number, or an array that broadcasts
to the parameter, such as (c, 1) for one number a row."""


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """The learning rate by step.

    Args:
        config: The configuration.
        steps: All steps of the run.

    Returns:
        A function of the step, counted from 0: rising to ``config.learning_rate`` in the warmup,
        and falling to 0 at ``steps``.

    Example:
        >>> rate = schedule(TrainConfig(learning_rate=1.0, warmup=0.5), 8)
        >>> [round(float(rate(i)), 2) for i in range(8)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    """
    top = config.learning_rate
    warmup = round(config.warmup * steps)
    left = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(top)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(top, left)
    else:
        power = config.power if config.schedule == "polynomial" else 1.0
        after = optax.polynomial_schedule(top, 0.0, power, left)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, top, warmup), after], [warmup])


def optimiser(
    config: TrainConfig,
    steps: int,
    factors: Mapping[str, Sequence[Any]] | None = None,
    cohorts: Mapping[str, int] | None = None,
) -> optax.GradientTransformation:
    """The optimiser of a configuration.

    Args:
        config: The configuration.
        steps: All steps of the run.
        factors: What multiplies the learning rate of some parameters, see `resolved`.
        cohorts: Which parameters began together, for a run in which they begin at several times:
            AdamW counts the steps of each cohort by itself, since moments that began later are
            nearer to 0. Those that are not named are of cohort 0.

    Returns:
        An optax transformation for parameters in a dict by path.

    References:
        Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.optimiser == "adamw":
        numbers = config.beta1, config.beta2, config.epsilon
        parts.append(optax.scale_by_adam(*numbers) if cohorts is None else _adam(*numbers, cohorts))
    elif config.momentum:
        parts.append(optax.trace(config.momentum))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    if factors:
        parts.append(optax.stateless(_scaling(factors)))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    return optax.chain(*parts)


class _Moments(NamedTuple):
    """The state of `_adam`: `optax.ScaleByAdamState` with a count for each cohort."""

    counts: Mapping[str, Any]
    mu: Any
    nu: Any


def _adam(
    b1: float, b2: float, eps: float, cohorts: Mapping[str, int]
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` for parameters that begin at several times.

    Of optax's own, ``partition`` would do this, but for meshes: ``tree.map_params`` does not know
    what is a parameter in its state.
    """

    def init(params: Any) -> _Moments:
        # For `tree.map_params`, parameters are one placeholder.
        every = {"0", *map(str, cohorts.values())}
        counts = {number: jnp.zeros((), jnp.int32) for number in sorted(every)}
        return _Moments(counts, optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        counts = {number: optax.safe_increment(n) for number, n in state.counts.items()}
        found = {}
        for path in updates:
            count = counts[str(cohorts.get(path, 0))]
            first = optax.tree.bias_correction(mu[path], b1, count)
            second = optax.tree.bias_correction(nu[path], b2, count)
            found[path] = first / (jnp.sqrt(second) + eps)
        return found, _Moments(counts, mu, nu)

    return optax.GradientTransformation(init, update)


def _decays(params: Params) -> dict[str, bool]:
    # By name: in stacks of layers or experts a bias has more than one axis.
    return {path: path.rpartition(".")[2] not in ("bias", "scale") for path in params}


def _scaling(factors: Mapping[str, Sequence[Any]]) -> Any:
    def scale(updates: Params, params: Params | None) -> dict[str, Array]:
        result = dict(updates)
        for path, each in factors.items():
            for factor in each:
                factor = jnp.asarray(factor, result[path].dtype)
                result[path] = result[path] * jnp.broadcast_to(factor, result[path].shape)
        return result

    return scale


def resolved(
    config: TrainConfig, multipliers: Multipliers | None, params: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """What multiplies the learning rate, by parameter.

    Args:
        config: The configuration, of whose patterns the first that matches counts.
        multipliers: Further ones, by path.
        params: What trains, by path.

    Returns:
        The factors of each parameter that has any.

    Raises:
        InputError: A multiplier matches no parameter or does not fit its shape.
    """
    found: dict[str, list[Any]] = {}
    for pattern, factor in config.multipliers:
        try:
            known = [path for path in params if re.fullmatch(pattern, path)]
        except re.error as error:
            raise InputError(
                f"multipliers: {pattern!r} is no regular expression: {error}"
            ) from None
        if not known:
            raise InputError(
                f"multipliers: {pattern!r} matches no parameter that trains (a pattern must match "
                f"a whole path, such as {next(iter(params))})"
            )
        for path in known:
            found.setdefault(path, [factor])
    for path, factor in (multipliers or {}).items():
        if path not in params:
            raise InputError(f"multipliers: {path} is no parameter that trains")
        try:
            jax.eval_shape(lambda f, p: jnp.broadcast_to(f, p.shape), factor, params[path])
        except ValueError:
            raise InputError(
                f"multipliers: {path} has shape {params[path].shape}, to which "
                f"{jnp.shape(factor)} does not broadcast"
            ) from None
        found.setdefault(path, []).append(factor)
    return found
