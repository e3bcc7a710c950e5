"""Language modeling of plain text: windows of tokens, fine-tuning, and nats per token."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.models.tokens import check_finite, check_tokens, tokenizer_of
from fusion_jax.progress import show_progress, show_stage
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import TokenIds
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.base import Prepared
from fusion_jax.training.tasks.generation import load_generative

PlainTokens = TokenIds | Int[Array, " _"]
"""The token ids of a text, (t,)."""
CONTEXT = 512
"""The number of tokens of a window by default."""


class Windows:
    """The batches of one long text, for `fit` and `fusion_jax.tune`.

    Each batch depends only on its step, so that a run can resume anywhere. Windows overlap by one
    token, since a window predicts all its tokens but the first: an epoch predicts every token of
    the text once, except a rest at the end that is shorter than a window.

    Args:
        ids: The tokens of the text.
        context: The number of tokens of a window.
        batch_size: The number of windows in a batch; the last batch is padded with windows of
            weight 0.
        seed: Seed of the order; None keeps the order of the text.
        start: The token that every window starts with, for models that expect one, see
            `start_token`. Windows then do not overlap, and the text's first token is predicted too.

    Raises:
        InputError: The text is shorter than a window.

    Example:
        >>> windows = Windows(np.arange(10), context=4, batch_size=2)
        >>> len(windows), windows(1)["input_ids"].tolist(), windows(1)["weights"].tolist()
        (2, [[6, 7, 8, 9], [6, 7, 8, 9]], [1.0, 0.0])
        >>> Windows(np.arange(6), context=4, batch_size=2, start=9)(0)["input_ids"].tolist()
        [[9, 0, 1, 2], [9, 3, 4, 5]]
    """

    def __init__(
        self,
        ids: PlainTokens,
        context: int,
        batch_size: int,
        *,
        seed: int | None = None,
        start: int | None = None,
    ):
        self._start = start
        # A first token in front of the text leaves one of overlap, which the start replaces.
        before = [] if start is None else [start]
        self._ids = np.concatenate([np.asarray(before, np.int32), np.asarray(ids, np.int32)])
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
        """Returns where the windows of a batch come from."""
        return [f"tokens from {row * (self._context - 1):,}" for row in self._rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step.

        Args:
            step: The step, counted from 0 over all epochs.

        Returns:
            ``input_ids`` (b, context) int32, ``attention_mask`` (b, context) bool, and ``weights``
            (b,) float32, 0 for padded windows.
        """
        rows = self._rows(step)
        weights = np.zeros(self._batch_size, np.float32)
        weights[: len(rows)] = 1
        rows = np.resize(rows, self._batch_size)
        ids = self._ids[rows[:, None] * (self._context - 1) + np.arange(self._context)]
        if self._start is not None:
            ids[:, 0] = self._start
        return {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool), "weights": weights}


@dataclass(frozen=True, eq=False)
class PlainText:
    """A task of modeling plain text with a decoder-only model, for `fusion_jax.finetune`.

    Args:
        train: The training text: its token ids, or a text file, which is tokenized for the model
            without special tokens.
        dev: The text to measure on, or None.
        context: The number of tokens of a window.

    Example:
        >>> model = load("gpt2", head="causal-lm")  # doctest: +SKIP
        >>> fit = finetune(model, PlainText("book.txt", context=256), key=key)  # doctest: +SKIP
    """

    train: PlainTokens | str | os.PathLike[str]
    dev: PlainTokens | str | os.PathLike[str] | None = None
    context: int = CONTEXT

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        if config.max_length is not None or config.truncate:
            raise InputError("max_length and truncate do not apply to plain text; see context")
        check_context(model, self.context)
        provenance = getattr(model, "provenance", None)
        if provenance is not None and provenance.head != "causal-lm":
            raise InputError("the model has no language-model head; load it with head='causal-lm'")
        order, _ = jax.random.split(key)
        batches = self._windows(model, config, order)
        loss = losses.with_routers(losses.next_token, model, config)
        if self.dev is None:
            return Prepared(batches, loss)
        dev = token_ids(model, self.dev)
        Windows(dev, self.context, 1)  # raises if the text is too short

        def evaluate(model: Model) -> dict[str, float]:
            return {"nats": nats_per_token(model, dev, self.context, batch_size=config.batch_size)}

        return Prepared(batches, loss, evaluate, lowest=True)

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Windows:
        """Returns windows of the training text in batches."""
        check_context(model, self.context)
        return self._windows(model, config, key)

    def _windows(self, model: Model, config: TrainConfig, order: Array) -> Windows:
        ids, seed = token_ids(model, self.train), int(jax.random.bits(order))
        return Windows(ids, self.context, config.batch_size, seed=seed)

    def load(self, name: str, *, key: Key[Array, ""] | None = None) -> Model:
        """Loads a model with its language-model head, see `fusion_jax.load`."""
        return load_generative(name)

    def to_json(self) -> dict[str, object]:
        """Returns a description of the task as JSON values by name."""
        file = self.train if isinstance(self.train, str | os.PathLike) else None
        name = None if file is None else Path(file).name
        return {"kind": "text", "name": name, "context": self.context}


def token_ids(model: Model, text: PlainTokens | str | os.PathLike[str]) -> TokenIds:
    """Returns the token ids of a text, (t,) int32.

    Args:
        model: A model from `fusion_jax.load`, if the text is a file.
        text: Token ids, or a text file, which is tokenized without special tokens.

    Raises:
        InputError: The file is missing or is not UTF-8.
    """
    if not isinstance(text, str | os.PathLike):
        check_tokens(model, [text])
        return np.asarray(text, np.int32)
    tokenizer = tokenizer_of(model)
    with show_stage(f"Tokenizing {text}"):
        out = tokenizer(tables.read_text(Path(text)), add_special_tokens=False, verbose=False)
    check_tokens(model, [out["input_ids"]], names=[os.fspath(text)], tokenizer=tokenizer)
    return np.array(out["input_ids"], np.int32)


def start_token(model: Model) -> int | None:
    """Returns the token that a model's texts start with, as its tokenizer says; None without one.

    A model that was trained with one, such as Gemma, says little of use without it.
    """
    tokenizer = tokenizer_of(model)
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


def check_context(model: Model, context: int) -> None:
    """Raises `InputError` if a model cannot read windows of this number of tokens."""
    if not getattr(model, "reads_prompts", True):
        raise InputError("plain text is for decoder-only models; an encoder-decoder takes pairs")
    most = getattr(model, "max_length", None)
    if most is not None and context > most:
        raise InputError(f"context {context} is above the model's {most} positions")


_BATCH = 32
"""Windows that are evaluated at once."""
_LOGITS = 1 << 28
"""The most logits of one batch, 1 GiB in float32."""


@on_auto_axes
def nats_per_token(
    model: Model,
    ids: PlainTokens,
    context: int,
    *,
    batch_size: int | None = None,
    start: int | None = None,
) -> float:
    """Returns the mean of -log p of each token given the tokens before it in its window.

    Args:
        model: A language model.
        ids: The tokens of a text.
        context: The number of tokens of a window, see `Windows`.
        batch_size: The number of windows per batch; None for 32, or fewer if their logits would
            take more than 1 GiB.
        start: The token that every window starts with, or None, see `start_token`.

    Returns:
        Nats per token; the exponential is the perplexity.

    Raises:
        InputError: The model is not a decoder-only language model, has fewer positions than a
            window, or the text is shorter than a window.
    """
    check_context(model, context)
    if not getattr(model, "has_logits", True):
        raise InputError("the model has no language-model head; load it with head='causal-lm'")
    if batch_size is None:
        vocab = model.config.vocab_size
        batch_size = max(1, min(_BATCH, _LOGITS // (context * vocab)))
    windows = Windows(ids, context, batch_size, start=start)
    totals: list[losses.Total] = []
    with show_progress("Evaluating", len(windows), first="compiling") as advance:
        for step in range(len(windows)):
            totals.append(_total(model, windows(step)))
            jax.block_until_ready(totals[-2:-1])  # one batch is computed while the next is made
            advance("batches")
    total, count = np.asarray(jax.device_get(totals), np.float64).sum(axis=0).tolist()
    check_finite(total, "the log-probabilities of the text")
    return total / count


@jax.jit
def _total(model: Model, batch: losses.Batch) -> losses.Total:
    return losses.next_token(model, batch, None)
