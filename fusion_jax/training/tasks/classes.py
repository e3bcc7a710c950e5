"""The classes of a task and of a model's head, and how good predictions of them are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import class_order
from fusion_jax.training.tasks.base import Classes
from fusion_jax.training.tasks.metrics import METRICS

_log = logging.getLogger("fusion_jax")

Columns = Int[np.ndarray, " classes"]
"""The column of a model's logits for each class of a task."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The labels and metrics of a classification or regression task.

    Args:
        name: The name of the task.
        labels: The names of the classes; None for regression.
        metrics: The names of the metrics; the first one chooses the best model.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def numbered(self) -> bool:
        """Whether the names of the classes are just their numbers 0, 1, ..."""
        return self.labels == tuple(map(str, range(self.num_labels)))

    def to_json(self) -> dict[str, object]:
        """Returns the fields as JSON values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """Returns the object that `to_json` gave these fields of."""
        labels = fields["labels"]
        return cls(
            name=fields["name"],
            labels=None if labels is None else tuple(labels),
            metrics=tuple(fields["metrics"]),
        )


def check_head(model: Model, spec: TaskSpec, *, trains: bool = False) -> Columns:
    """Checks that a model's head fits a task, and returns which logits are the task's classes.

    Args:
        model: The model.
        spec: The task.
        trains: Whether the head is about to be trained, so that it may have other classes before.

    Returns:
        (classes,) the column of the logits of each class. Classes are found by their names where
        the model has names, otherwise by their positions.

    Raises:
        InputError: The model has no classification head, or one with other classes.
    """
    provenance = getattr(model, "provenance", None)
    if provenance is None or provenance.head != "classification":
        raise InputError(
            "the model has no classification head; load it with head='classification', "
            f"num_labels={spec.num_labels} and a key"
        )
    if model.config.num_labels != spec.num_labels:
        raise InputError(
            f"the model's head has {model.config.num_labels} outputs, {spec.name} needs "
            f"{spec.num_labels}; load it with num_labels={spec.num_labels}"
        )
    plain = np.arange(spec.num_labels)
    names = provenance.labels
    if names is None or spec.labels is None or spec.numbered:
        return plain
    order = class_order(spec.labels, names)
    if order is None and not trains:
        raise InputError(
            f"the classes of the model's head ({', '.join(names)}) are not those of {spec.name} "
            f"({', '.join(spec.labels)})"
        )
    if order is None:
        _log.warning("the head's classes %s become %s", ", ".join(names), ", ".join(spec.labels))
        return plain
    return np.array(order)


def classes_of(model: Model, spec: TaskSpec, columns: Columns) -> Classes:
    """Returns what the head of a model is for after training on a task."""
    if spec.labels is None:
        return Classes(None, "regression")
    trained = tuple(spec.labels[i] for i in np.argsort(columns))
    names = model.provenance.labels if spec.numbered else trained
    return Classes(names, "single_label_classification")


def in_columns(
    labels: Shaped[np.ndarray, "n ..."] | None, columns: Columns
) -> Shaped[np.ndarray, "n ..."] | None:
    """Returns columns of a model's logits instead of classes; numbers and None stay."""
    if labels is None or labels.dtype != np.int32:
        return labels
    return columns.astype(np.int32)[labels]


@runtime_checkable
class Labeled(Protocol):
    """Examples, of texts or of arrays, with their labels."""

    @property
    def labels(self) -> Shaped[np.ndarray, "n ..."] | None:
        """(n,) classes as int32, or numbers as float32; None without labels."""


def measure(
    spec: TaskSpec, logits: Float[np.ndarray, "n classes"], examples: Labeled
) -> dict[str, float]:
    """Returns the metrics of a task.

    Args:
        spec: The labels and metrics of the task.
        logits: The logits of the examples.
        examples: The examples with their labels.

    Returns:
        Metrics by name.
    """
    labels = examples.labels
    assert labels is not None
    predicted = logits[:, 0] if spec.labels is None else logits.argmax(-1)
    return {name: METRICS[name](predicted, labels) for name in spec.metrics}
