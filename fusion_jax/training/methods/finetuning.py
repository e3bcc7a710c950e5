"""Fine-tunes a model on a task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.checkpoint import save
from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.surgery import ModuleT
from fusion_jax.training.engine.arrays import Arrays
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.fingerprints import (
    fingerprint_of_tokenizer,
    fingerprint_of_values,
)
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.trainer import Fit, fit
from fusion_jax.training.tasks.base import Prepared, Task
from fusion_jax.training.tasks.classification import Texts
from fusion_jax.training.tasks.pair_encoding import Pairs
from fusion_jax.training.tasks.questions import Questions
from fusion_jax.training.tasks.tagged_words import TaggedWords
from fusion_jax.training.tasks.token_classification import TokenClassification


def finetune(
    model: ModuleT,
    data: Task[ModuleT],
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    progress: bool | None = None,
) -> Fit[ModuleT]:
    """Fine-tunes a model on a task; the model itself is not changed.

    Runs on the mesh that the caller has set, if any. With a folder, the run can be stopped at any
    time, even by killing the process: the same call resumes it and ends with the same bits.

    Args:
        model: A model from `fusion_jax.load` with the head that the task needs.
        data: The task, from `load_task`, `read_task`, `load_pairs`, `read_pairs`, `PlainText` or
            `ArrayClassification`, or one of your own.
        config: The settings of training; None for the paper's settings.
        key: Random key of dropout and of the order of the examples.
        folder: Where checkpoints, ``metrics.jsonl``, and the artefacts ``best`` and ``last`` go.
            The first metric chooses ``best``: for classification the first metric of the first dev
            set, for texts the nats per token, for tags and answers the F1. None keeps nothing.
        recipe: What a method customizes, such as the loss or which parameters train.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The trained model, and the metrics of all evaluations: for classification the metrics of the
        task; for texts ``nats`` per token, and for pairs also their exponential, ``perplexity``.

    Raises:
        InputError: Model, data and settings do not fit together, or the folder holds another run.
            Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    Example:
        >>> data = load_task("sst2", "glue/SST-2")  # doctest: +SKIP
        >>> model = load("minilm-fused", head="classification", key=key)  # doctest: +SKIP
        >>> fit = finetune(model, data, TrainConfig(epochs=3), key=key)  # doctest: +SKIP
    """
    config = TrainConfig() if config is None else config
    model, prepared, dropout = prepare(model, data, config, key)
    if folder is not None:
        about = {**recipe.about, **_facts(model, data)}
        recipe = dataclasses.replace(recipe, save=recipe.save or save, about=about)
    return fit(
        model,
        prepared.batches,
        prepared.loss,
        config,
        key=dropout,
        folder=folder,
        evaluate=prepared.evaluate,
        lowest=prepared.lowest,
        recipe=recipe,
        progress=progress,
    )


def prepare(
    model: ModuleT, data: Task[ModuleT], config: TrainConfig, key: Key[Array, ""]
) -> tuple[ModuleT, Prepared, Key[Array, ""]]:
    """Prepares a fine-tuning run.

    Args:
        model: The model; not changed.
        data: The task.
        config: The settings of training.
        key: The key that `finetune` gets.

    Returns:
        The model with the provenance of a trained one, what training needs, and the key of dropout.

    Raises:
        InputError: Model, data and settings do not fit together.
    """
    if not isinstance(data, Task):
        raise InputError(
            "data must be a task, such as those of load_task, read_pairs or PlainText; got "
            f"{type(data).__name__}"
        )
    prepared = data.prepare(model, config, key=key)
    provenance = getattr(model, "provenance", None)
    if isinstance(provenance, Provenance):
        trained = {} if prepared.classes is None else prepared.classes._asdict()
        model = nnx.clone(model)
        own = dataclasses.replace(provenance, new_head=False, **trained)
        model.provenance = own  # type: ignore[attr-defined]
    _, dropout = jax.random.split(key)
    return model, prepared, dropout


def _facts(model: nnx.Module, data: Task) -> dict[str, object]:
    """Returns what the batches do not show of a run's data, as JSON values by name."""
    dev: object = getattr(data, "dev", None)
    if isinstance(dev, str | os.PathLike):
        dev = Path(dev)
    elif isinstance(dev, Mapping):
        dev = {name: _without_places(texts) for name, texts in dev.items()}
    elif isinstance(dev, _DATA):
        dev = _without_places(dev)
    elif not isinstance(dev, np.ndarray | jax.Array):
        dev = None  # none, or of a task of one's own
    named = data if isinstance(data, TokenClassification) else getattr(data, "spec", None)
    labels = getattr(named, "labels", None)
    return {
        "dev data": fingerprint_of_values(dev),
        "classes": None if labels is None else list(labels),
        "tokenizer": fingerprint_of_tokenizer(model),
    }


def _without_places(texts: object) -> Texts | Pairs | TaggedWords | Questions | Arrays | None:
    """Returns texts or other data without the names of their files, which may be moved."""
    if isinstance(texts, Arrays):
        return texts
    return texts._replace(names=()) if isinstance(texts, _DATA) else None


_DATA = (Texts, Pairs, TaggedWords, Questions)
"""The kinds of data whose examples have names."""
