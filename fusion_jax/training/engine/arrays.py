"""Examples that are arrays, such as images, and their batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from fusion_jax.errors import InputError


class Arrays(NamedTuple):
    """Examples that are arrays, with labels.

    Args:
        inputs: The arguments of a model by name, such as ``{"pixel_values": images}``, each with n
            examples along axis 0.
        labels: (n,) classes as integers from 0, or numbers, or None.
    """

    inputs: Mapping[str, Shaped[np.ndarray, "n ..."]]
    labels: Shaped[np.ndarray, " n"] | None = None

    def checked(self, name: str, classes: int | None) -> Arrays:
        """Returns the examples with labels as int32 or, without classes, as float32.

        Args:
            name: What the examples are called in errors.
            classes: The number of classes; None for numbers.

        Raises:
            InputError: There are no examples, not as many labels, or other labels.
        """
        arrays = {argument: np.asarray(x) for argument, x in self.inputs.items()}
        labels = None if self.labels is None else np.asarray(self.labels)
        sizes = {argument: len(x) if x.ndim else 0 for argument, x in arrays.items()}
        sizes |= {} if labels is None else {"labels": len(labels) if labels.ndim == 1 else 0}
        if not arrays or len(set(sizes.values())) != 1 or 0 in sizes.values():
            found = ", ".join(f"{argument} has {size}" for argument, size in sizes.items())
            raise InputError(
                f"{name} must have as many labels as examples; {found or 'none given'}"
            )
        if labels is None:
            return Arrays(arrays)
        if classes is None:
            if not np.isfinite(labels.astype(np.float32)).all():
                raise InputError(f"{name}: a label is NaN or infinite")
            return Arrays(arrays, labels.astype(np.float32))
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"{name}: labels must be integers; got {labels.dtype}")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if wrong.size:
            raise InputError(f"{name}: label {wrong[0]} is not from 0 to {classes - 1}")
        return Arrays(arrays, labels.astype(np.int32))


class ArrayBatches:
    """The batches of examples that are arrays, see `fusion_jax.training.BatchSource`.

    Every example occurs once in an epoch; the last batch of an epoch is padded with rows of weight
    0, which are the first example again.

    Args:
        data: The examples.
        batch_size: The number of rows of every batch.
        seed: Seed of the order; None for that of the examples.
        name: What the examples are called in errors.

    Example:
        >>> batches = ArrayBatches(Arrays({"x": np.arange(5)}, np.arange(5) % 2), 2)
        >>> len(batches), batches(2)["x"].tolist(), batches(2)["weights"].tolist()
        (3, [4, 0], [1.0, 0.0])
    """

    def __init__(self, data: Arrays, batch_size: int, *, seed: int | None = None, name: str = ""):
        self.data, self.batch_size, self.seed, self.name = data, batch_size, seed, name
        self.count = len(next(iter(data.inputs.values())))
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def _order_of(self, epoch: int) -> Int[np.ndarray, " n"]:
        rows = np.arange(self.count)
        if self.seed is not None:
            np.random.Generator(np.random.Philox([self.seed, epoch])).shuffle(rows)
        return rows

    def rows(self, step: int) -> Int[np.ndarray, " n"]:
        """Returns the indices of the examples in the batch of a step."""
        epoch, i = divmod(step, len(self))
        return self._order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def names(self, step: int) -> list[str]:
        """Returns which examples are in the batch of a step."""
        return [f"{self.name}[{i}]" for i in self.rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step: inputs, ``weights``, and ``labels`` if there are any."""
        rows = self.rows(step)
        weights = (np.arange(self.batch_size) < len(rows)).astype(np.float32)
        rows = np.pad(rows, (0, self.batch_size - len(rows)))
        batch = {argument: x[rows] for argument, x in self.data.inputs.items()}
        batch["weights"] = weights
        if self.data.labels is not None:
            batch["labels"] = self.data.labels[rows]
        return batch
