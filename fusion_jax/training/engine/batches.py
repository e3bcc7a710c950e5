"""Tokenized examples, and batches of few shapes whose order depends only on a seed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

TokenIds = Int[np.ndarray, " _"]
"""The token ids of one text, (t,)."""
_STEP = 8
"""Padded lengths are multiples of this."""
BatchesT = TypeVar("BatchesT", bound="Batches")


@runtime_checkable
class BatchSource(Protocol):
    """Batches by step, such as `Batches`: arrays of the same number of rows, by name.

    The losses here need the model's inputs with ``attention_mask`` (b, t), ``weights`` (b,), which
    are 0 for padded rows, and ``labels`` where there are labels.
    """

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        ...

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step, counted from 0 over all epochs."""
        ...

    def names(self, step: int) -> list[str]:
        """Returns where the examples of a batch come from, for error messages."""
        ...


class Examples(NamedTuple):
    """Tokenized examples.

    Args:
        tokens: The token ids of each example, (t,).
        types: The token types of each example, or None if the model has no token types.
        labels: (n,) classes as int32, (n,) numbers as float32, (n, 2) positions as int32, or None.
        names: Where each example comes from, such as ``"train.tsv:12"``.
    """

    tokens: Sequence[TokenIds]
    types: Sequence[TokenIds] | None
    labels: Shaped[np.ndarray, "n ..."] | None
    names: Sequence[str]


class Batches:
    """The batches of a run; each depends only on its step, so that a run can resume anywhere.

    Examples of similar lengths share a batch and are padded to one of a few lengths. Every example
    occurs once in an epoch; the last batch of an epoch is padded with rows of weight 0.

    Args:
        examples: The examples.
        batch_size: The number of rows of every batch.
        pad_id: The token id of padding.
        shapes: The largest number of padded lengths.
        seed: Seed of the order; None sorts the batches by padded length.

    Example:
        >>> tokens = [np.arange(n, dtype=np.int32) for n in (3, 5, 30, 4, 2)]
        >>> batches = Batches(Examples(tokens, None, None, list("abcde")), 2, pad_id=0, shapes=2)
        >>> [batches(i)["input_ids"].shape for i in range(len(batches))]
        [(2, 8), (2, 8), (2, 32)]
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        pad_id: int,
        shapes: int = 4,
        seed: int | None = None,
    ):
        self.examples = examples
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self._lengths = np.array([len(tokens) for tokens in examples.tokens])
        self.padded_lengths = padded_lengths(self._lengths, shapes)
        self._aligned = False
        # Computed once for each epoch, since steps come in order.
        self._rows_of_epoch = lru_cache(maxsize=2)(self._assign_rows)

    def __len__(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def aligned(self: BatchesT) -> BatchesT:
        """Returns these batches in an order whose padded lengths do not depend on the seed.

        Runs with different seeds then have batches of the same shape at each step, as
        `fusion_jax.training.fit_many` needs. Which examples are in a batch still depends on the
        seed. With one padded length, nothing changes.
        """
        if len(self.padded_lengths) == 1:
            return self
        other = copy.copy(self)
        other._aligned = True
        other._rows_of_epoch = lru_cache(maxsize=2)(other._assign_rows)
        return other

    def _assign_rows(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """Returns the examples and the padded length of each batch of an epoch."""
        rng = (
            None if self.seed is None else np.random.Generator(np.random.Philox([self.seed, epoch]))
        )
        buckets = np.searchsorted(self.padded_lengths, self._lengths)
        assigned, left = [], np.zeros(0, int)
        for i, length in enumerate(self.padded_lengths):
            rows = np.flatnonzero(buckets == i)
            if rng is not None:
                rng.shuffle(rows)
            # Examples that are too few for a whole batch join those of the next length.
            rows = np.concatenate([left, rows])
            full = len(rows) // self.batch_size * self.batch_size
            assigned += [(part, length) for part in rows[:full].reshape(-1, self.batch_size)]
            left = rows[full:]
        if len(left):
            assigned.append((left, self.padded_lengths[-1]))
        if rng is not None and self._aligned:
            # The lengths before shuffling are the same for all seeds.
            rng = np.random.Generator(np.random.Philox([0, epoch]))
        if rng is not None:
            rng.shuffle(assigned)
        return assigned

    def rows(self, step: int) -> Int[np.ndarray, " n"]:
        """Returns the indices of the examples in the batch of a step."""
        epoch, i = divmod(step, len(self))
        return self._rows_of_epoch(epoch)[i][0]

    def names(self, step: int) -> list[str]:
        """Returns where the examples in the batch of a step come from."""
        return [self.examples.names[int(i)] for i in self.rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step.

        Args:
            step: The step, counted from 0 over all epochs.

        Returns:
            ``input_ids`` (b, t) int32, ``attention_mask`` (b, t) bool, ``weights`` (b,) float32,
            which is 0 for padded rows; ``token_type_ids`` (b, t) int32 and ``labels`` (b,) or
            (b, 2) if the examples have them.
        """
        epoch, i = divmod(step, len(self))
        rows, length = self._rows_of_epoch(epoch)[i]
        shape = (self.batch_size, length)
        # Padded rows see one token, so that their softmax and norms are finite.
        mask = np.arange(length)[None] < np.ones((self.batch_size, 1), int)
        mask[: len(rows)] = np.arange(length)[None] < self._lengths[rows, None]
        batch: dict[str, np.ndarray] = {"attention_mask": mask}
        columns = {"input_ids": (self.examples.tokens, self.pad_id)}
        if self.examples.types is not None:
            columns["token_type_ids"] = (self.examples.types, 0)
        for name, (values, fill) in columns.items():
            batch[name] = np.full(shape, fill, np.int32)
            for row, example in enumerate(rows):
                batch[name][row, : self._lengths[example]] = values[example]
        weights = np.zeros(self.batch_size, np.float32)
        weights[: len(rows)] = 1
        batch["weights"] = weights
        if self.examples.labels is not None:
            given = self.examples.labels
            labels = np.zeros((self.batch_size, *given.shape[1:]), given.dtype)
            labels[: len(rows)] = given[rows]
            batch["labels"] = labels
        return batch


def round_up(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Returns lengths rounded up to multiples of 8, as all padded lengths are."""
    return -(-lengths // _STEP) * _STEP


def padded_lengths(lengths: Int[np.ndarray, " n"], shapes: int) -> list[int]:
    """Returns the lengths to pad to that need the smallest number of padding tokens.

    Args:
        lengths: The lengths of the examples.
        shapes: The largest number of padded lengths.

    Returns:
        At most ``shapes`` increasing multiples of 8; the last is enough for the longest example.

    Example:
        >>> padded_lengths(np.array([5, 6, 7, 8, 30, 31, 100]), 2)
        [32, 104]
    """
    # Dynamic programming over the distinct lengths.
    sizes, counts = np.unique(round_up(lengths), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    n = len(sizes)
    best = np.full((shapes + 1, n + 1), np.inf)
    best[0, 0] = 0
    choice = np.zeros((shapes + 1, n + 1), int)
    for k in range(1, shapes + 1):
        best[k, 0] = 0
        for j in range(1, n + 1):
            costs = best[k - 1, :j] + (before[j] - before[:j]) * sizes[j - 1]
            choice[k, j] = costs.argmin()
            best[k, j] = costs.min()
    ends, j = [n], n
    for k in range(shapes, 0, -1):
        j = choice[k, j]
        if j == 0:
            break
        ends.append(j)
    return [int(sizes[end - 1]) for _, end in pairwise([0, *sorted(set(ends))])]
