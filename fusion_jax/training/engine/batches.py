"""Tokenised examples, and batches of few shapes whose order depends only on a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

_STEP = 8
"""Lengths are padded to multiples of this at least."""


class Examples(NamedTuple):
    """Tokenised examples.

    Args:
        tokens: The token ids of each, (t,).
        types: The token types of each, or None if the model has none.
        labels: (n,) classes as int32, numbers as float32, or None.
        names: Where each comes from, such as ``"train.tsv:12"``.
    """

    tokens: Sequence[Int[np.ndarray, " t"]]
    types: Sequence[Int[np.ndarray, " t"]] | None
    labels: Shaped[np.ndarray, " n"] | None
    names: Sequence[str]


class Batches:
    """The batches of a run, each found by its step alone, so that a run can go on anywhere.

    Examples of like lengths share a batch and are padded to one of few lengths. Every example comes
    once in an epoch; the last batch of an epoch is filled up with rows of weight 0.

    Args:
        examples: The examples.
        batch_size: Rows of every batch.
        pad_id: The token id of padding.
        shapes: Most different lengths.
        seed: Seed of the order; None keeps like lengths together, in order.

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
        self.bounds = bounds(self._lengths, shapes)
        # The plan of an epoch is made once; steps come in order.
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def __len__(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def _make_plan(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        rng = (
            None if self.seed is None else np.random.Generator(np.random.Philox([self.seed, epoch]))
        )
        buckets = np.searchsorted(self.bounds, self._lengths)
        plan, left = [], np.zeros(0, int)
        for i, bound in enumerate(self.bounds):
            rows = np.flatnonzero(buckets == i)
            if rng is not None:
                rng.shuffle(rows)
            # What does not fill a batch goes on to the next length, and so up to the longest.
            rows = np.concatenate([left, rows])
            full = len(rows) // self.batch_size * self.batch_size
            plan += [(part, bound) for part in rows[:full].reshape(-1, self.batch_size)]
            left = rows[full:]
        if len(left):
            plan.append((left, self.bounds[-1]))
        if rng is not None:
            rng.shuffle(plan)
        return plan

    def rows(self, step: int) -> Int[np.ndarray, " n"]:
        """Which examples are in the batch of a step."""
        epoch, i = divmod(step, len(self))
        return self._plan(epoch)[i][0]

    def names(self, step: int) -> list[str]:
        """Where the examples in the batch of a step come from."""
        return [self.examples.names[int(i)] for i in self.rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Args:
            step: Counted from 0, over all epochs.

        Returns:
            ``input_ids`` (b, t) int32, ``attention_mask`` (b, t) bool, ``weights`` (b,) float32, 0
            for rows that fill up; ``token_type_ids`` (b, t) int32 and ``labels`` (b,) where the
            examples have them.
        """
        epoch, i = divmod(step, len(self))
        rows, length = self._plan(epoch)[i]
        shape = (self.batch_size, length)
        # Rows that fill up see one token, so that their softmax and norms are finite.
        mask = np.arange(length)[None] < np.ones((self.batch_size, 1), int)
        mask[: len(rows)] = np.arange(length)[None] < self._lengths[rows, None]
        batch: dict[str, Any] = {"attention_mask": mask}
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
            labels = np.zeros(self.batch_size, self.examples.labels.dtype)
            labels[: len(rows)] = self.examples.labels[rows]
            batch["labels"] = labels
        return batch


def round_up(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The next multiples of 8, of which all padded lengths are."""
    return -(-lengths // _STEP) * _STEP


def bounds(lengths: Int[np.ndarray, " n"], shapes: int) -> list[int]:
    """The lengths to pad to for which the least padding is computed.

    Args:
        lengths: The examples' lengths.
        shapes: How many lengths there may be.

    Returns:
        At most that many multiples of 8, rising; the last holds the longest example.

    Example:
        >>> bounds(np.array([5, 6, 7, 8, 30, 31, 100]), 2)
        [32, 104]
    """
    # Least cost by dynamic programming over the distinct lengths.
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
