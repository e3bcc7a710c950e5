"""Language models on plain text: windows of tokens, nats per token, and fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.artefacts import Write, fit_and_keep
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import Multipliers
from fusion_jax.training.engine.partition import Trains
from fusion_jax.training.engine.step import Rule
from fusion_jax.training.engine.trainer import Fit, Growth, OnStep

Ids = Int[np.ndarray, " _"] | Int[Array, " _"]


class Windows:
    """The batches of one long text, each found by its step alone: a source for `fit`.

    Windows overlap by one token, as all tokens of a window but the first are predicted: every token
    of the text is predicted once in an epoch, but for what is left at the end and fills no window.

    Args:
        ids: The tokens of the text.
        context: Tokens of a window.
        batch_size: Windows of a batch; the last batch is filled up with windows of weight 0.
        seed: Seed of the order; None keeps the text's.

    Raises:
        InputError: The text is shorter than a window.

    Example:
        >>> windows = Windows(np.arange(10), context=4, batch_size=2)
        >>> len(windows), windows(1)["input_ids"].tolist(), windows(1)["weights"].tolist()
        (2, [[6, 7, 8, 9], [6, 7, 8, 9]], [1.0, 0.0])
    """

    def __init__(self, ids: Ids, context: int, batch_size: int, *, seed: int | None = None):
        self._ids = np.asarray(ids, np.int32)
        if context < 2 or len(self._ids) < context:
            raise InputError(
                f"a text of {len(self._ids)} tokens has no window of {context}; windows have at "
                "least 2"
            )
        self._count = (len(self._ids) - 1) // (context - 1)
        self._context, self._batch_size, self._seed = context, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(self._count)
        rng = np.random.Generator(np.random.Philox([self._seed, epoch]))
        return rng.permutation(self._count)

    def _rows(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, len(self))
        return self._order(epoch)[i * self._batch_size : (i + 1) * self._batch_size]

    def names(self, step: int) -> list[str]:
        """Where the windows of a batch come from."""
        return [f"tokens from {row * (self._context - 1):,}" for row in self._rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Args:
            step: Counted from 0, over all epochs.

        Returns:
            ``input_ids`` (b, context) int32, ``attention_mask`` (b, context) bool, and ``weights``
            (b,) float32, 0 for windows that fill up.
        """
        rows = self._rows(step)
        weights = np.zeros(self._batch_size, np.float32)
        weights[: len(rows)] = 1
        rows = np.resize(rows, self._batch_size)
        ids = self._ids[rows[:, None] * (self._context - 1) + np.arange(self._context)]
        return {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool), "weights": weights}


def check_context(model: Any, context: int) -> None:
    """Raises `InputError` if a model cannot read windows of so many tokens."""
    if not getattr(model, "reads_prompts", True):
        raise InputError("plain text is for decoder-only models; an encoder-decoder takes pairs")
    most = getattr(model, "max_length", None)
    if most is not None and context > most:
        raise InputError(f"context {context} is above the model's {most} positions")


@on_auto_axes
def nats_per_token(model: Model, ids: Ids, context: int, *, batch_size: int = 32) -> float:
    """The mean of minus the log-probability of each token after those before it in its window.

    Args:
        model: A language model.
        ids: The tokens of a text.
        context: Tokens of a window, see `Windows`.
        batch_size: Windows at a time.

    Returns:
        Nats; the exponential is the perplexity.

    Raises:
        InputError: The model is no language model, has fewer positions than a window, or the text
            is shorter than one.
    """
    check_context(model, context)
    windows = Windows(ids, context, batch_size)
    totals = [_total(model, windows(step)) for step in range(len(windows))]
    total, count = np.asarray(jax.device_get(totals), np.float64).sum(axis=0).tolist()
    return total / count


@jax.jit
def _total(model: Model, batch: Any) -> losses.Total:
    return losses.next_token(model, batch, None)


def finetune_language(
    model: Model,
    ids: Ids,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    context: int,
    dev: Ids | None = None,
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
    """Trains a decoder-only language model on a text; the model itself is not changed.

    On the caller's mesh, stopped and gone on with as `finetune`.

    Args:
        model: A model from `fusion_jax.load` with ``head="causal-lm"``.
        ids: The tokens to train on.
        config: How to train; None for the paper's settings.
        key: Random key of dropout and of the order of the windows.
        context: Tokens of a window.
        dev: The tokens to measure on, by ``nats`` per token.
        folder: Where checkpoints, ``metrics.jsonl``, and the artefacts ``best`` (fewest nats) and
            ``last`` go; None keeps nothing.
        trains: What trains, if not what ``config.train`` says.
        loss: What is minimised, made of the model's own loss: for teachers and penalties.
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
        The trained model, and the nats per token of every evaluation.

    Raises:
        InputError: Model, text and configuration do not fit together, or the folder holds another
            run. Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    Example:
        >>> model = load("gpt2", head="causal-lm")  # doctest: +SKIP
        >>> fit = finetune_language(model, ids, key=key, context=512)  # doctest: +SKIP
    """
    config = TrainConfig() if config is None else config
    if config.max_length is not None or config.truncate:
        raise InputError("max_length and truncate do not apply to plain text; see context")
    provenance = getattr(model, "provenance", None)
    if provenance is not None and provenance.head != "causal-lm":
        check_context(model, context)
        raise InputError("the model has no language head; load it with head='causal-lm'")
    check_context(model, context)
    order, dropout = jax.random.split(key)
    windows = Windows(ids, context, config.batch_size, seed=int(jax.random.bits(order)))
    own = losses.with_routers(losses.next_token, model, config)
    held_out = None if dev is None else np.asarray(dev, np.int32)
    if held_out is not None:
        Windows(held_out, context, 1)

    def evaluate(model: Any) -> dict[str, float]:
        assert held_out is not None
        return {"nats": nats_per_token(model, held_out, context, batch_size=config.batch_size)}

    return fit_and_keep(
        model,
        windows,
        own if loss is None else loss(own),
        config,
        key=dropout,
        trains=trains,
        multipliers=multipliers,
        folder=folder,
        evaluate=None if dev is None else evaluate,
        lowest=True,
        best_from=best_from,
        write=save,
        on_step=on_step,
        rule=rule,
        growth=growth,
        about=about,
        progress=progress,
    )
