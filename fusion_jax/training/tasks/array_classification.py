"""Classification and regression of what arrays hold, such as images and sounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Key

from fusion_jax.models.base import Model
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.arrays import ArrayBatches, Arrays
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks.base import Prepared
from fusion_jax.training.tasks.classes import TaskSpec, check_head, classes_of, in_columns, measure
from fusion_jax.training.tasks.classification import logits_by_row


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrayClassification:
    """A task of classes or numbers for arrays, such as images, for `fusion_jax.finetune`.

    Args:
        labels: The names of the classes; None for regression.
        train: The training examples.
        dev: The examples to measure on, by name; may be empty.
        metrics: The names of the metrics; the first one chooses the best model.

    Example:
        >>> images = np.zeros((4, 3, 224, 224), np.float32)
        >>> train = Arrays({"pixel_values": images}, np.array([0, 1, 1, 0]))
        >>> data = ArrayClassification(labels=("cat", "dog"), train=train)
        >>> fit = finetune(model, data, key=key)  # doctest: +SKIP
    """

    labels: tuple[str, ...] | None
    train: Arrays
    dev: Mapping[str, Arrays] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def spec(self) -> TaskSpec:
        """The labels and metrics."""
        return TaskSpec(name="the task", labels=self.labels, metrics=self.metrics)

    def _checked(self, name: str, data: Arrays) -> Arrays:
        return data.checked(name, None if self.labels is None else len(self.labels))

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        spec = self.spec
        columns = check_head(model, spec, trains=True)
        order, _ = jax.random.split(key)
        train = self._checked("train", self.train)
        train = train._replace(labels=in_columns(train.labels, columns))
        loss = losses.regression if spec.labels is None else losses.classification
        loss = losses.with_routers(loss, model, config)
        dev = {name: self._checked(name, data) for name, data in self.dev.items()}

        def evaluate(model: Model) -> dict[str, float]:
            results = {}
            for name, data in dev.items():
                inputs = data._replace(labels=None)
                rows = logits_by_row(model, ArrayBatches(inputs, config.batch_size))
                prefix = "" if len(dev) == 1 else f"{name} "
                measured = measure(spec, np.stack(rows)[:, columns], data)
                results |= {f"{prefix}{metric}": value for metric, value in measured.items()}
            return results

        return Prepared(
            _shuffled(train, config, order),
            loss,
            evaluate if dev else None,
            classes=classes_of(model, spec, columns),
        )

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> ArrayBatches:
        """Returns the training examples in batches, without labels."""
        train = self._checked("train", self.train)
        return _shuffled(train._replace(labels=None), config, key)


def _shuffled(data: Arrays, config: TrainConfig, key: Key[Array, ""]) -> ArrayBatches:
    """Returns examples in batches, in an order that depends on the key."""
    seed = int(jax.random.bits(key))
    return ArrayBatches(data, config.batch_size, seed=seed, name="train")
