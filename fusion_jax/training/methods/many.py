"""Fine-tunes and tunes several models of one structure at once, such as the seeds of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.nn.surgery import ModuleT
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.joint import check_alike, fit_jointly
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.methods.finetuning import prepare
from fusion_jax.training.methods.layerwise import compressed, tuning_config, tuning_loss
from fusion_jax.training.tasks.base import Task
from fusion_jax.training.tasks.unlabeled import Inputs, unlabeled

Keys = Sequence[Key[Array, ""]] | Key[Array, " n"]
"""A random key for each run."""


def fit_many(
    models: Sequence[ModuleT],
    data: Task[ModuleT],
    config: TrainConfig | None = None,
    *,
    keys: Keys,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    progress: bool | None = None,
) -> list[Fit[ModuleT]]:
    """Fine-tunes models of one structure on a task, all at once in one compiled program.

    An accelerator that a small model does not fill trains many in little more time than one. A CPU
    does not gain: there, `finetune` takes the same time, and its runs resume.

    Run i is ``finetune(models[i], data, config, key=keys[i])`` up to rounding if batches have one
    padded length (``TrainConfig(shapes=1)``). With more, the order of the lengths is another one,
    the same in all runs, so that at each step all batches have the same shape.

    Not offered: a folder with checkpoints and artefacts, growth, and meshes; memory for weights,
    moments and activations of all runs is needed at once. If one run fails, all end.

    Args:
        models: The models, not changed. They have the same structure and shapes, such as a model
            with heads of different seeds, or compressed by methods that give the same kind of MLP.
        data: The task.
        config: The settings of training of all runs; None for the paper's settings.
        keys: The random key of each run.
        recipe: What a method customizes: ``trains``, ``loss``, ``multipliers``, ``update`` and
            ``on_step``, whose state has an axis of runs in front of every array.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        For each run, the trained model and the metrics of all evaluations.

    Raises:
        InputError: The models differ in structure (the message names the first difference), or
            models, data and settings do not fit together. Raised before training starts.
        FloatingPointError: The loss or the gradient of a run was NaN or infinite; the message names
            the run.

    Example:
        >>> import jax
        >>> keys = [jax.random.key(seed) for seed in range(16)]
        >>> models = [load("minilm", head="classification", key=key)
        ...           for key in keys]  # doctest: +SKIP
        >>> fits = fit_many(models, data, keys=keys)  # doctest: +SKIP
    """
    config = TrainConfig() if config is None else config
    _check(models, keys)
    made = [prepare(m, data, config, key) for m, key in zip(models, keys, strict=True)]
    return fit_jointly(
        [model for model, *_ in made],
        [prepared.batches for _, prepared, _ in made],
        [prepared.loss for _, prepared, _ in made],
        config,
        keys=[dropout for *_, dropout in made],
        evaluates=[prepared.evaluate for _, prepared, _ in made],
        recipe=recipe,
        progress=progress,
    )


def tune_many(
    students: Sequence[Model],
    teacher: Model,
    data: Inputs,
    config: TrainConfig | None = None,
    *,
    keys: Keys,
    progress: bool | None = None,
) -> list[Fit[Model]]:
    """Tunes compressed models of one structure towards one original model, all at once.

    Does for `tune` what `fit_many` does for `finetune`; see there for what is not offered.

    Args:
        students: The compressed models, not changed.
        teacher: The model before compression; its head has no part in the loss.
        data: The task, whose training inputs are used, or other texts, see `tune`.
        config: The settings of training; None for one epoch with the paper's settings.
        keys: The random key of each run.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        For each run, the tuned model.

    Raises:
        InputError: The models do not fit together. Raised before training starts.
        FloatingPointError: The loss or the gradient of a run was NaN or infinite.

    Example:
        >>> fits = tune_many([smaller, other], model, data, keys=keys)  # doctest: +SKIP
    """
    config = tuning_config(config)
    _check(students, keys)
    places = compressed(students[0], teacher)
    loss = tuning_loss(teacher, config)
    return fit_jointly(
        students,
        [
            unlabeled(student, data, config, key)
            for student, key in zip(students, keys, strict=True)
        ],
        [loss] * len(students),
        config,
        keys=list(keys),
        recipe=Recipe(trains=lambda path: path.startswith(places)),
        progress=progress,
    )


def _check(models: Sequence[Any], keys: Keys) -> None:
    if not len(models):
        raise InputError("there are no models to train")
    if len(models) != len(keys):
        raise InputError(
            f"each run needs a key of its own; got {len(models)} models and {len(keys)} keys"
        )
    check_alike(models)
