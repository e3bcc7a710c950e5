"""Fine-tuning on a task, predicting, and measuring."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Generative, Model, max_positions
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.artefacts import Write, fit_and_keep
from fusion_jax.training.engine.batches import Batches, Examples
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import Multipliers
from fusion_jax.training.engine.partition import Trains
from fusion_jax.training.engine.sharding import Layout
from fusion_jax.training.engine.step import Rule
from fusion_jax.training.engine.trainer import Fit, Growth, OnStep
from fusion_jax.training.tasks.glue import Task, TaskData, Texts, encode
from fusion_jax.training.tasks.metrics import METRICS


def finetune(
    model: Model,
    data: TaskData,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    trains: Trains | None = None,
    loss: Callable[[Loss], Loss] | None = None,
    multipliers: Multipliers | None = None,
    on_step: OnStep | None = None,
    rule: Rule | None = None,
    growth: Growth | None = None,
    save: Write | None = None,
    best_from: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fine-tunes a model on a task; the model itself is not changed.

    On the mesh that the caller has set, if any. With a folder, the run can be stopped at any time,
    also by killing it: the same call goes on with it and ends with the same bits.

    Args:
        model: A model from `fusion_jax.load` with a classification head.
        data: From `load_task` or `read_task`.
        config: How to train; None for the paper's settings.
        key: Random key of dropout and of the order of the examples.
        folder: Where checkpoints, ``metrics.jsonl``, and the artefacts ``best`` (by the first
            metric of the first dev set) and ``last`` go; None keeps nothing.
        trains: What trains, if not what ``config.train`` says.
        loss: What is minimised, made of the task's loss: for teachers and penalties.
        multipliers: What multiplies the learning rate of some parameters, see `fit`.
        on_step: Called after each step with the steps done and the state; may return another.
        rule: What variables that do not train are in each step, see `fit`.
        growth: What changes the model's structure now and then, see `fit`.
        save: What writes the artefacts; None for `fusion_jax.save`.
        best_from: Evaluations after fewer steps do not count for ``best``, such as those while a
            schedule still changes the model.
        about: What else the run is about, see `fit`.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The trained model, and the metrics of every evaluation.

    Raises:
        InputError: Model, data and configuration do not fit together, or the folder holds another
            run. Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    Example:
        >>> data = load_task("sst2", "glue/SST-2")  # doctest: +SKIP
        >>> model = load("minilm-fused", head="classification", key=key)  # doctest: +SKIP
        >>> fit = finetune(model, data, TrainConfig(epochs=3), key=key)  # doctest: +SKIP
    """
    config = TrainConfig() if config is None else config
    task = data.task
    encoder = Encoder(model, config.max_length, config.truncate)
    _, dropout = jax.random.split(key)
    train, own = task_source(model, data, config, key=key)
    dev = {name: encoder(texts) for name, texts in data.dev.items()}

    def evaluate(model: Any) -> dict[str, float]:
        results = {}
        for name, examples in dev.items():
            logits = _logits(model, encoder, examples, config.batch_size, config.shapes)
            prefix = "" if len(dev) == 1 else f"{name} "
            results |= {f"{prefix}{k}": v for k, v in measure(task, logits, examples).items()}
        return results

    return fit_and_keep(
        model,
        train,
        own if loss is None else loss(own),
        config,
        key=dropout,
        trains=trains,
        multipliers=multipliers,
        folder=folder,
        evaluate=evaluate if dev else None,
        best_from=best_from,
        write=save,
        on_step=on_step,
        rule=rule,
        growth=growth,
        about=about,
        progress=progress,
    )


def task_source(
    model: Model, data: TaskData, config: TrainConfig, *, key: Key[Array, ""]
) -> tuple[Batches, Loss]:
    """The batches that `finetune` trains on, and the loss that it minimises.

    Args:
        model: A model with a classification head for the task.
        data: The task.
        config: How it trains.
        key: The key that `finetune` gets.

    Returns:
        The batches and the loss.

    Raises:
        InputError: Model, data and configuration do not fit together.
    """
    check_head(model, data.task)
    encoder = Encoder(model, config.max_length, config.truncate)
    order, _ = jax.random.split(key)
    batches = encoder.batches(
        encoder(data.train),
        config.batch_size,
        shapes=config.shapes,
        seed=int(jax.random.bits(order)),
    )
    loss = losses.regression if data.task.labels is None else losses.classification
    return batches, losses.with_routers(loss, model, config)


def check_head(model: Model, task: Task) -> None:
    """Raises `InputError` if the model's head is not for the task."""
    provenance = getattr(model, "provenance", None)
    if provenance is None or provenance.head != "classification":
        raise InputError(
            "the model has no classification head; load it with head='classification', "
            f"num_labels={task.num_labels} and a key"
        )
    if model.config.num_labels != task.num_labels:
        raise InputError(
            f"the model's head has {model.config.num_labels} outputs, {task.name} wants "
            f"{task.num_labels}; load it with num_labels={task.num_labels}"
        )


class Encoder:
    """Turns texts into what a model takes.

    Args:
        model: A model from `fusion_jax.load`.
        max_length: Most tokens; None for what the model has positions for.
        truncate: Whether longer texts are cut off.

    Raises:
        InputError: The model has fewer positions than ``max_length``.
    """

    def __init__(self, model: Model, max_length: int | None = None, truncate: bool = False):
        if isinstance(model, Generative) and not model.reads_prompts:
            raise InputError(
                "texts alone are not enough for an encoder-decoder; give pairs of texts"
            )
        most = max_positions(model) or 1 << 20  # rotary positions have no end
        if max_length is not None and max_length > most:
            raise InputError(f"max_length {max_length} is above the model's {most} positions")
        self.max_length = most if max_length is None else max_length
        self.truncate = truncate
        if not isinstance(getattr(model, "provenance", None), Provenance):
            raise InputError("the model has no tokenizer, as it did not come from fusion_jax.load")
        self.tokenizer = load_tokenizer(model.provenance.folder)
        # Language models may have none; what stands under the mask does not matter.
        self.pad_id: int = getattr(model.config, "pad_token_id", None) or 0

    def __call__(self, texts: Texts) -> Examples:
        """Tokenises texts; raises `InputError` that names the first one that is too long."""
        return encode(self.tokenizer, texts, max_length=self.max_length, truncate=self.truncate)

    def batches(
        self, examples: Examples, batch_size: int, *, shapes: int = 4, seed: int | None = None
    ) -> Batches:
        """Batches padded for the model."""
        return Batches(examples, batch_size, pad_id=self.pad_id, shapes=shapes, seed=seed)


@jax.jit
def _forward(model: Any, batch: Any) -> Array:
    return losses.run(model, batch).logits


def _logits(
    model: Any, encoder: Encoder, examples: Examples, batch_size: int, shapes: int = 4
) -> Float[np.ndarray, "n classes"]:
    """The logits of each example, in order."""
    layout = Layout({})
    layout.check_batch(batch_size)
    batches = encoder.batches(examples._replace(labels=None), batch_size, shapes=shapes)
    with layout.active():
        found: dict[int, Any] = {}
        for step in range(len(batches)):
            out = _forward(model, layout.batch(batches(step)))
            out = layout.gathered({"logits": out})["logits"]
            found |= zip(batches.rows(step).tolist(), np.asarray(out, np.float32), strict=False)
    return np.stack([found[i] for i in range(len(found))])


@on_auto_axes
def predict(
    model: Model,
    texts: Texts,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    truncate: bool = False,
) -> Float[np.ndarray, "n classes"]:
    """The logits of texts.

    Args:
        model: A model with a classification head.
        texts: The texts; labels are not looked at.
        max_length: Most tokens of a text; None for what the model has positions for.
        batch_size: Rows per batch.
        truncate: Whether texts that are too long are cut off.

    Returns:
        (n, classes) float32, in the order of the texts.

    Raises:
        InputError: A text is too long.
    """
    encoder = Encoder(model, max_length, truncate)
    if not texts.texts:
        return np.zeros((0, model.config.num_labels), np.float32)
    return _logits(model, encoder, encoder(texts), batch_size)


def measure(
    task: Task, logits: Float[np.ndarray, "n classes"], examples: Examples | Texts
) -> dict[str, float]:
    """The metrics of a task.

    Args:
        task: The task.
        logits: What the model said.
        examples: What is right.

    Returns:
        Metrics by name.
    """
    labels = examples.labels
    assert labels is not None
    predicted = logits[:, 0] if task.labels is None else logits.argmax(-1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}
