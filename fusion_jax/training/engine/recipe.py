"""What methods customize about training, beyond the settings of `TrainConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.training.engine.growth import Growth
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import Multipliers
from fusion_jax.training.engine.partition import Trains
from fusion_jax.training.engine.step import TrainState, VariableUpdate

OnStep = Callable[[int, TrainState], TrainState | None]
"""Called after each step with the steps done and the state; may return a state to continue with."""
Save = Callable[[Any, Path], object]
"""Writes a model into a folder that does not exist yet, as `fusion_jax.save` does."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Customizes training, for methods that need more than the settings of `TrainConfig`.

    Args:
        trains: Which parameters train; None for ``config.train``.
        loss: Makes the loss to minimize from the loss of the task, for teachers and penalties.
        multipliers: Multiplies the learning rate of some parameters: by path, a number or an array
            that broadcasts to the parameter.
        update: Sets non-trainable variables before each step: (params, rest, step) -> values by
            path.
        growth: Changes the model's structure while it trains.
        on_step: Called after each step with the steps done and the state; may return another state.
        save: Writes the artefacts ``best`` and ``last`` of the run folder.
        best_from: Evaluations after fewer steps than this do not count for ``best``, such as those
            before a schedule has reached its end.
        about: Settings that must match on resume, as JSON values by name.

    Example:
        >>> recipe = Recipe(loss=partial(losses.distilled, teacher))  # doctest: +SKIP
        >>> fit = finetune(model, data, key=key, recipe=recipe)  # doctest: +SKIP
    """

    trains: Trains | None = None
    loss: Callable[[Loss], Loss] | None = None
    multipliers: Multipliers | None = None
    update: VariableUpdate | None = None
    growth: Growth | None = None
    on_step: OnStep | None = None
    save: Save | None = None
    best_from: int = 0
    about: Mapping[str, object] = field(default_factory=dict)

    def check_only(self, *names: str, method: str) -> None:
        """Raises `InputError` if another field than these is set, which a method would not use."""
        for each in fields(self):
            if each.name not in names and getattr(self, each.name) != getattr(_DEFAULT, each.name):
                raise InputError(f"recipe.{each.name} does not apply to {method}; leave it out")


_DEFAULT = Recipe()
