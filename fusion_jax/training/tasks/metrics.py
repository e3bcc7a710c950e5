"""Computes the metrics of GLUE in float64, equal to those of scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Shaped

Values = Shaped[np.ndarray, " n"]
"""(n,) one class or number for each example."""


def accuracy(predicted: Values, labels: Values) -> float:
    """Returns the share of predictions that are right."""
    return float(np.mean(predicted == labels))


def f1(predicted: Values, labels: Values) -> float:
    """Returns the F1 score of class 1; 0 if class 1 occurs in neither predictions nor labels."""
    both = np.sum((predicted == 1) & (labels == 1))
    either = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * both / either) if either else 0.0


def matthews(predicted: Values, labels: Values) -> float:
    """Returns Matthews' correlation coefficient for any number of classes; 0 if it is undefined.

    References:
        Gorodkin (2004), Comparing two K-category assignments by a K-category correlation.
    """
    n = 1 + int(max(predicted.max(), labels.max()))
    confusion = np.zeros((n, n))
    np.add.at(confusion, (labels, predicted), 1)
    total, right = confusion.sum(), np.trace(confusion)
    true, said = confusion.sum(1), confusion.sum(0)
    scale = np.sqrt((total**2 - said @ said) * (total**2 - true @ true))
    return float((right * total - true @ said) / scale) if scale else 0.0


def pearson(predicted: Values, labels: Values) -> float:
    """Returns Pearson's correlation; NaN if one side is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (predicted, labels))
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale else float("nan")


def spearman(predicted: Values, labels: Values) -> float:
    """Returns Spearman's rank correlation; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Values) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS: Mapping[str, Callable[[Values, Values], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "matthews": matthews,
        "pearson": pearson,
        "spearman": spearman,
    }
)
"""Functions of (predictions, labels) by name."""
