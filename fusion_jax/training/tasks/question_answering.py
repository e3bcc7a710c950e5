"""Question answering: finds the part of a text that answers a question."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fusion_jax import checkpoint
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.progress import show_progress
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples, TokenIds
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks.base import Prepared
from fusion_jax.training.tasks.classification import TextEncoder, logits_of
from fusion_jax.training.tasks.questions import (
    Answer,
    Questions,
    measure_answers,
    questions_of,
)

_log = logging.getLogger("fusion_jax")

STRIDE = 128
"""The number of tokens by which windows of a context overlap by default."""
LONGEST = 30
"""The largest number of tokens of an answer by default."""
_CHUNK = 1000
"""Questions that are tokenized at a time, as the tokenizer's lists need much memory."""
Spans = Int[np.ndarray, "_ 2"]
"""Where in the context the tokens of a window are, first and last character; -1 outside of it."""


class ContextWindow(NamedTuple):
    """A question, with as much of its context as a model reads at a time.

    Args:
        question: The number of the question.
        tokens: The token ids.
        types: The token types, or None.
        spans: Where in the context the tokens are.
    """

    question: int
    tokens: TokenIds
    types: TokenIds | None
    spans: Spans


@dataclass(frozen=True, eq=False)
class QuestionAnswering:
    """A task of finding answers in texts, for `fusion_jax.finetune`.

    A context that is too long is read in windows that overlap. The answer of a window that does not
    have the whole answer is its first token. Measured on dev are F1 and exact matches, see
    `measure_answers`.

    Args:
        train: The training questions.
        dev: The questions to measure on, or None.
        stride: The number of tokens by which windows overlap; None for 128, or for a third of the
            longest text where this is less.
        longest: The largest number of tokens of an answer that is looked for.

    Example:
        >>> data = read_questions("train.jsonl", "dev.jsonl")  # doctest: +SKIP
        >>> model = load("bert-base-cased", head="question-answering", key=key)  # doctest: +SKIP
        >>> fit = finetune(model, data, TrainConfig(max_length=384), key=key)  # doctest: +SKIP
    """

    train: Questions
    dev: Questions | None = None
    stride: int | None = None
    longest: int = LONGEST

    def __post_init__(self) -> None:
        check_at_least(1, longest=self.longest)
        if self.stride is not None:
            check_at_least(0, stride=self.stride)
        for what, questions in (("training", self.train), ("dev", self.dev)):
            if questions is not None and questions.answers is None:
                raise InputError(f"the {what} questions have no answers")

    @property
    def empty(self) -> bool:
        """Whether there are questions that their context does not answer."""
        parts = (self.train, self.dev)
        return not all(own for part in parts if part is not None for own in part.answers or ())

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        check_answers_head(model)
        encoder = self._encoder(model, config)
        order, _ = jax.random.split(key)
        batches = _batches(encoder, self._examples(encoder), config, order)
        loss = losses.with_routers(losses.question_answering, model, config)
        if self.dev is None:
            return Prepared(batches, loss)
        dev, right = list(windows(encoder, self.dev, self.stride)), self.dev.answers
        assert right is not None

        def evaluate(model: Model) -> dict[str, float]:
            limits = config.batch_size, config.shapes
            assert self.dev is not None and right is not None
            found = _answered(model, encoder, self.dev, dev, self.longest, self.empty, *limits)
            return measure_answers(found, right)

        return Prepared(batches, loss, evaluate)

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Batches:
        """Returns the windows of the training questions in batches, without answers."""
        encoder = self._encoder(model, config)
        examples = self._examples(encoder)._replace(labels=None)
        return _batches(encoder, examples, config, key)

    def load(
        self, name: str | os.PathLike[str], *, key: Key[Array, ""], new_head: bool = False
    ) -> Model:
        """Loads a model with a head for the task, see `fusion_jax.load`."""
        return checkpoint.load(name, head="question-answering", key=key, new_head=new_head)

    def to_json(self) -> dict[str, Any]:
        """Returns a description of the task as JSON values by name."""
        fields = {"stride": self.stride, "longest": self.longest, "empty": self.empty}
        return {"kind": "question-answering", **fields}

    def _encoder(self, model: Model, config: TrainConfig) -> TextEncoder:
        if config.truncate:
            raise InputError(
                "truncate does not apply to questions, whose contexts are read in windows; leave "
                "it out"
            )
        return TextEncoder(model, config.max_length)

    def _examples(self, encoder: TextEncoder) -> Examples:
        """Returns the windows of the training questions, with the positions of answers."""
        found = []
        labels: list[tuple[int, int]] = []
        assert self.train.answers is not None
        lost = {i for i, answers in enumerate(self.train.answers) if answers}
        for window in windows(encoder, self.train, self.stride):
            labels.append(_place(window.spans, self.train.answers[window.question]))
            found.append(window)
            if labels[-1] != (0, 0):
                lost.discard(window.question)
        if lost:
            _log.warning(
                "no window has the whole answer of %s questions, such as %s; they train as without "
                "an answer",
                len(lost),
                self.train.names[min(lost)],
            )
        return _as_examples(self.train, found)._replace(labels=np.array(labels, np.int32))


def read_questions(
    train: str | Path, dev: str | Path | None = None, *, stride: int | None = None
) -> QuestionAnswering:
    """Reads a task of answering questions from your own files, or from those of SQuAD.

    Args:
        train: A .jsonl file with the fields ``question``, ``context`` and ``answers`` in each line:
            ``{"text": [...], "answer_start": [...]}``, or a list of objects with ``text`` and
            ``answer_start``; both empty for a question that the context does not answer. Or a .json
            file as SQuAD distributes it.
        dev: Another file to measure on, or None.
        stride: The number of tokens by which windows of a long context overlap, see
            `QuestionAnswering`.

    Returns:
        The task.

    Raises:
        InputError: A file or a field is missing, or an answer is not where ``answer_start`` says;
            names file and line.

    Example:
        >>> data = read_questions("train-v1.1.json", "dev-v1.1.json")  # doctest: +SKIP
    """
    parts = [None if file is None else questions_of(Path(file)) for file in (train, dev)]
    assert parts[0] is not None
    return QuestionAnswering(parts[0], parts[1], stride)


def check_answers_head(model: Any) -> None:
    """Raises `InputError` if a model has no head for question answering."""
    provenance = getattr(model, "provenance", None)
    if provenance is None or provenance.head != "question-answering":
        raise InputError(
            "the model has no question-answering head; load it with head='question-answering' and "
            "a key"
        )


def windows(
    encoder: TextEncoder, questions: Questions, stride: int | None
) -> Iterator[ContextWindow]:
    """Yields the windows of each question, in order.

    Args:
        encoder: The encoder of texts of a model, whose ``max_length`` is that of a window.
        questions: The questions.
        stride: The number of tokens by which windows overlap; None for the default.

    Raises:
        InputError: A question leaves no room for its context, or the tokenizer does not say where
            tokens are.
    """
    encoder.check_offsets()
    tokenizer, most = encoder.tokenizer, encoder.max_length
    overlap = min(STRIDE, most // 3) if stride is None else stride
    special = tokenizer.num_special_tokens_to_add(pair=True)
    # Where a tokenizer puts nothing between two texts, as GPT-2's does.
    end = "\n" if special == tokenizer.num_special_tokens_to_add(pair=False) else ""
    count = len(questions.questions)
    with show_progress("Tokenizing", count) as advance:
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            first = [question + end for question in questions.questions[rows]]
            names = list(questions.names[rows])
            alone = tokenizer(first, add_special_tokens=False, verbose=False)["input_ids"]
            for ids, name in zip(alone, names, strict=True):
                if most - len(ids) - special <= overlap:
                    raise InputError(
                        f"{name}: a question of {len(ids)} tokens leaves too little of the "
                        f"{most} tokens of a window for contexts that overlap by {overlap}; set a "
                        "larger max_length or a smaller stride"
                    )
            out = tokenizer(
                first,
                list(questions.contexts[rows]),
                truncation="only_second",
                max_length=most,
                stride=overlap,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            which = out["overflow_to_sample_mapping"]
            examples = encoder.examples(out, None, [names[i] for i in which])
            for i, tokens in enumerate(examples.tokens):
                inside = np.array([part == 1 for part in out.sequence_ids(i)])
                spans = np.asarray(out["offset_mapping"][i], np.int32).reshape(-1, 2)
                spans = np.where(inside[:, None], spans, -1)
                types = None if examples.types is None else examples.types[i]
                yield ContextWindow(start + which[i], tokens, types, spans)
            advance("questions", len(first))


def _place(spans: Spans, answers: Sequence[Answer]) -> tuple[int, int]:
    """Returns the first and the last token of the first answer; (0, 0) if it is not in a window."""
    if not answers:
        return 0, 0
    text, start = answers[0]
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    own = np.flatnonzero(spans[:, 0] >= 0)
    # Of the window, not of the tokens: a tokenizer may leave out a character of the answer.
    if not len(own) or start < spans[own[0], 0] or end > spans[own[-1], 1]:
        return 0, 0
    inside = own[(spans[own, 1] > start) & (spans[own, 0] < end)]
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)


def _as_examples(questions: Questions, found: Sequence[ContextWindow]) -> Examples:
    types = [window.types for window in found if window.types is not None]
    names = [questions.names[window.question] for window in found]
    return Examples([window.tokens for window in found], types or None, None, names)


def _batches(
    encoder: TextEncoder, examples: Examples, config: TrainConfig, order: Key[Array, ""]
) -> Batches:
    seed = int(jax.random.bits(order))
    return encoder.batches(examples, config.batch_size, shapes=config.shapes, seed=seed)


def _best(
    logits: Float[np.ndarray, "t 2"], spans: Spans, longest: int
) -> tuple[float, tuple[int, int]]:
    """Returns the largest sum of a start's and an end's logit, and where in the context it is."""
    inside = spans[:, 0] >= 0
    starts, ends = (np.where(inside, logits[:, i], -np.inf) for i in range(2))
    best, where = -np.inf, (0, 0)
    for length in range(min(longest, len(spans))):
        sums = starts[: len(starts) - length] + ends[length:]
        i = int(sums.argmax())
        if sums[i] > best:
            best, where = float(sums[i]), (int(spans[i, 0]), int(spans[i + length, 1]))
    return best, where


def _answered(
    model: Any,
    encoder: TextEncoder,
    questions: Questions,
    found: Sequence[ContextWindow],
    longest: int,
    empty: bool,
    batch_size: int,
    shapes: int = 4,
) -> list[str]:
    """Returns the answer to each question; "" where ``empty`` allows that there is none."""
    examples = _as_examples(questions, found)
    logits = logits_of(model, encoder, examples, batch_size, shapes)
    count = len(questions.questions)
    best, none, answers = [-np.inf] * count, [np.inf] * count, [""] * count
    for window, rows in zip(found, logits, strict=True):
        i = window.question
        score, (first, last) = _best(rows, window.spans, longest)
        none[i] = min(none[i], float(rows[0].sum()))
        if score > best[i]:
            best[i], answers[i] = score, questions.contexts[i][first:last].strip()
    if not empty:
        return answers
    rows = zip(answers, best, none, strict=True)
    return ["" if nothing > score else text for text, score, nothing in rows]


@on_auto_axes
def answer_questions(
    model: Model,
    questions: Questions,
    *,
    stride: int | None = None,
    longest: int = LONGEST,
    empty: bool = False,
    max_length: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Returns the answers to questions.

    Args:
        model: A model with a question-answering head.
        questions: The questions; their answers are not used.
        stride: The number of tokens by which windows of a long context overlap, see
            `QuestionAnswering`.
        longest: The largest number of tokens of an answer.
        empty: Whether the answer may be that there is none: ``""``, where the logits of the first
            token are larger in every window.
        max_length: The number of tokens of a window; None for the number of the model's positions.
        batch_size: The number of rows per batch.

    Returns:
        A part of its context for each question.

    Raises:
        InputError: The model has no question-answering head, or a question is too long.

    Example:
        >>> questions = Questions(["Who wrote it?"], ["Ada wrote it."], None, ["mine"])
        >>> answer_questions(model, questions)  # doctest: +SKIP
        ['Ada']
    """
    check_answers_head(model)
    encoder = TextEncoder(model, max_length)
    if not questions.questions:
        return []
    found = list(windows(encoder, questions, stride))
    return _answered(model, encoder, questions, found, longest, empty, batch_size)
