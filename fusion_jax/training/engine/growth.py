"""Trains models whose structure changes while they train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.optimizer import Multipliers
from fusion_jax.training.engine.partition import Partition, Trains
from fusion_jax.training.engine.step import CompiledStep, TrainState


@runtime_checkable
class Growth(Protocol):
    """Changes a model's structure while it trains.

    Parameters that stay keep their state in the optimizer; new parameters start without moments. A
    parameter that replaces a removed one of its layer trains if that one did, at the same learning
    rate. Checkpoints record the changes, so that a run can resume.
    """

    every: int
    """Steps between changes."""

    def replaceable(self, model: nnx.Module) -> Collection[str]:
        """Returns the paths of all parameters that changes may replace, before training."""
        ...

    def choose(self, model: nnx.Module, step: int) -> object:
        """Returns the change to make after this step as a JSON value, or None for no change."""
        ...

    def apply(self, model: nnx.Module, change: Any) -> nnx.Module:
        """Returns the model with a change made; must give the same result each time."""
        ...

    def to_json(self) -> dict[str, object]:
        """Returns the settings that must match on resume, as JSON values by name."""
        ...


class GrowingStep:
    """The compiled step of a model that grows; recompiled after each change.

    Args:
        make: Makes the compiled step of a model: `CompiledStep` with loss, steps, key and update
            bound.
        model: The model before training.
        growth: Chooses and makes the changes.
        config: The settings of training.
        trains: Which parameters of the first model train.
        multipliers: Learning-rate multipliers of the first model.

    Raises:
        InputError: The arguments do not fit together.
    """

    def __init__(
        self,
        make: Callable[..., CompiledStep],
        model: nnx.Module,
        growth: Growth,
        config: TrainConfig,
        trains: Trains | None,
        multipliers: Multipliers | None,
    ):
        self.every = growth.every
        """Steps between changes."""
        self.changes: list[object] = []
        """The changes so far."""
        self._growth, self._cohorts = growth, {}
        self.compiled = first = make(
            model, config=config, trains=trains, multipliers=multipliers, cohorts=self._cohorts
        )
        self._multipliers, self._training = first.multipliers, set(first.partition.training)
        self._parameters = first.partition.parameters
        _check_numbers(self._multipliers, growth.replaceable(model))
        self._cohorts.update(dict.fromkeys(self._parameters, 0))
        # The patterns in the configuration are for paths of the first model.
        config = dataclasses.replace(config, multipliers=())
        self._make = lambda model, **options: make(
            model, config=config, cohorts=self._cohorts, **options
        )

    def resume(self, model: nnx.Module, changes: Sequence[object]) -> TrainState:
        """Returns a state of the structure that the model has after some changes."""
        for change in changes:
            model = self._apply(model, change)
        if changes:
            self._recompile(model)
        return self.compiled.start(model)

    def grow(self, state: TrainState, done: int) -> TrainState:
        """Returns the state after a change of the structure, if the growth chooses one.

        Args:
            state: The state.
            done: The steps done.

        Returns:
            The state of the changed model, or the same state.
        """
        model = self.compiled.model(state)
        change = self._growth.choose(model, done)
        if change is None:
            return state
        unrounded = self.compiled.unrounded_model(state)
        if unrounded is not None:
            unrounded = self._growth.apply(unrounded, change)
        model = self._apply(model, change)
        self._recompile(model)
        return _transfer(state, self.compiled.start(model, unrounded))

    def _apply(self, model: nnx.Module, change: object) -> nnx.Module:
        self.changes.append(change)
        model = self._growth.apply(model, change)
        for path in Partition(model).parameters:
            self._cohorts.setdefault(path, len(self.changes))
        return model

    def _recompile(self, model: nnx.Module) -> None:
        now = Partition(model).parameters
        origin = _find_origins(self._parameters, now)
        rates = {p: self._multipliers[origin[p]] for p in now if origin.get(p) in self._multipliers}
        self.compiled = self._make(
            model,
            trains=lambda path: path not in origin or origin[path] in self._training,
            multipliers={path: math.prod(each) for path, each in rates.items()},
        )


def _transfer(old: TrainState, new: TrainState) -> TrainState:
    """Returns a new state with the arrays of the old one where path and shape are the same."""
    known = dict(jax.tree_util.tree_leaves_with_path(old))

    def leaf(path: KeyPath, x: Array) -> Array:
        # Weights too: the model between the two states may have them rounded to its own dtype.
        return known[path] if path in known and known[path].shape == x.shape else x

    return jax.tree_util.tree_map_with_path(leaf, new)


def _find_origins(before: Collection[str], now: Collection[str]) -> dict[str, str]:
    """Returns the first model's parameter whose settings each parameter of a changed model takes.

    A parameter that stays takes its own; a new parameter takes those of a removed one of its layer.
    """
    same = set(before) & set(now)
    removed = {path.rpartition(".")[0]: path for path in before if path not in same}
    origins = {path: path for path in same}
    for path in set(now) - same:
        layer = path.rpartition(".")[0]
        while layer and layer not in removed:
            layer = layer.rpartition(".")[0]
        if layer in removed:
            origins[path] = removed[layer]
    return origins


def _check_numbers(
    multipliers: Mapping[str, Collection[ArrayLike]], replaceable: Collection[str]
) -> None:
    for path, factors in multipliers.items():
        if path in replaceable and any(np.ndim(factor) for factor in factors):
            raise InputError(
                f"multipliers: {path} has an array, but growth may replace it by parameters of "
                "other shapes; give a number"
            )
