"""Makes the optax optimizer of a configuration, for parameters by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from fusion_jax.errors import InputError
from fusion_jax.training.engine.config import TrainConfig
from ntk.selection import select

Params = Mapping[str, Float[Array, "..."]]
Multipliers = Mapping[str, ArrayLike]
"""Learning-rate multipliers by path of a parameter: a number, or an array that broadcasts to the
parameter, such as (c, 1) for one number for each row."""


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step.

    Args:
        config: The configuration.
        steps: The number of steps of the run.

    Returns:
        A function of the step, counted from 0, that rises to ``config.learning_rate`` during the
        warmup and falls to 0 at ``steps``.

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


def make_optimizer(
    config: TrainConfig,
    steps: int,
    factors: Mapping[str, Sequence[ArrayLike]] | None = None,
    cohorts: Mapping[str, int] | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer of a configuration.

    Args:
        config: The configuration.
        steps: The number of steps of the run.
        factors: The learning-rate multipliers of some parameters, see `find_multipliers`.
        cohorts: The number of the cohort of each parameter, for runs that add parameters while they
            train: parameters of one cohort were added at the same step. AdamW counts the steps of
            each cohort, since moments that started later are nearer to 0. Parameters that are
            missing here belong to cohort 0.

    Returns:
        An optax transformation for a dict of parameters by path.

    References:
        Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.optimizer == "adamw":
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

    counts: Mapping[str, ArrayLike]
    mu: PyTree
    nu: PyTree


def _adam(
    b1: float, b2: float, eps: float, cohorts: Mapping[str, int]
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` for parameters that were added at different steps.

    ``optax.partition`` does not work on meshes: ``tree.map_params`` cannot tell which arrays of its
    state belong to parameters.
    """

    def init(params: PyTree) -> _Moments:
        # `tree.map_params` calls this with one placeholder for all parameters.
        numbers = {"0", *map(str, cohorts.values())}
        counts = {number: jnp.zeros((), jnp.int32) for number in sorted(numbers)}
        return _Moments(counts, optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, _Moments]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        counts = {number: optax.safe_increment(n) for number, n in state.counts.items()}
        result = {}
        for path in updates:
            count = counts[str(cohorts.get(path, 0))]
            first = optax.tree.bias_correction(mu[path], b1, count)
            second = optax.tree.bias_correction(nu[path], b2, count)
            result[path] = first / (jnp.sqrt(second) + eps)
        return result, _Moments(counts, mu, nu)

    return optax.GradientTransformation(init, update)


def _decays(params: Params) -> dict[str, bool]:
    # By name: in stacks of layers or experts a bias has more than one axis.
    return {path: path.rpartition(".")[2] not in ("bias", "scale") for path in params}


def _scaling(factors: Mapping[str, Sequence[ArrayLike]]) -> Callable[..., dict[str, Array]]:
    def scale(updates: Params, params: Params | None) -> dict[str, Array]:
        result = dict(updates)
        for path, each in factors.items():
            for factor in each:
                factor = jnp.asarray(factor, result[path].dtype)
                result[path] = result[path] * jnp.broadcast_to(factor, result[path].shape)
        return result

    return scale


def find_multipliers(
    config: TrainConfig, multipliers: Multipliers | None, params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, list[ArrayLike]]:
    """Returns the learning-rate multipliers of each parameter.

    Args:
        config: The configuration; of its patterns, the first match applies.
        multipliers: Further multipliers by path.
        params: The parameters that train, by path.

    Returns:
        The factors of each parameter that has any; their product multiplies the learning rate.

    Raises:
        InputError: A multiplier matches no parameter or does not fit its shape.
    """
    found: dict[str, list[ArrayLike]] = {}
    paths = list(params)
    for pattern, factor in config.multipliers:
        for i in select(pattern, paths, argument="multipliers", noun="parameter that trains"):
            found.setdefault(paths[i], [factor])
    for path, factor in (multipliers or {}).items():
        if path not in params:
            raise InputError(f"multipliers: {path} is not a parameter that trains")
        try:
            jax.eval_shape(lambda f, p: jnp.broadcast_to(f, p.shape), factor, params[path])
        except ValueError:
            raise InputError(
                f"multipliers: {path} has shape {params[path].shape}, to which "
                f"{jnp.shape(factor)} does not broadcast"
            ) from None
        found.setdefault(path, []).append(factor)
    return found
