"""Token classification: a tag for each word of a text, such as the entity that it belongs to."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from fusion_jax import checkpoint
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.progress import show_stage
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples, TokenIds
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks.base import Classes, Prepared
from fusion_jax.training.tasks.classification import (
    TextEncoder,
    Texts,
    logits_of,
    unlabeled_batches,
)
from fusion_jax.training.tasks.pair_encoding import PairBatches
from fusion_jax.training.tasks.tagged_words import (
    OUTSIDE,
    TaggedWords,
    measure_tags,
    tag_set,
    tagged_words_of,
)

_log = logging.getLogger("fusion_jax")

Firsts = Int[np.ndarray, " _"]
"""The position of the first token of each word of a text; -1 for a word without tokens."""


@dataclass(frozen=True, eq=False)
class TokenClassification:
    """A task of tagging words, for `fusion_jax.finetune`.

    The first token of a word has the word's tag; its other tokens do not count. Measured on dev are
    the F1 of entities and the accuracy of tags, see `measure_tags`.

    Args:
        train: The training texts.
        dev: The texts to measure on, or None.
        labels: The tags; None for those of ``train`` and ``dev``.

    Example:
        >>> data = read_tagged_words("train.conll", "dev.conll")  # doctest: +SKIP
        >>> head = {"head": "token-classification", "num_labels": 9}
        >>> model = load("bert-base-cased", **head, key=key)  # doctest: +SKIP
        >>> fit = finetune(model, data, key=key)  # doctest: +SKIP
    """

    train: TaggedWords
    dev: TaggedWords | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, texts in (("training", self.train), ("dev", self.dev)):
            if texts is not None and texts.tags is None:
                raise InputError(f"the {what} texts have no tags")
        object.__setattr__(self, "labels", tuple(self.labels or tag_set(self.train, self.dev)))
        unknown = set(tag_set(self.train, self.dev)) - set(self.labels)
        if unknown:
            raise InputError(f"tags that are not among the labels: {', '.join(sorted(unknown))}")
        if len(self.labels) < 2:
            raise InputError("all words have the same tag; there is nothing to learn")

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        tags = head_tags(model, self.labels, trains=True)
        encoder = TextEncoder(model, config.max_length, config.truncate)
        order, _ = jax.random.split(key)
        examples, firsts = encode(encoder, self.train)
        batches = PairBatches(
            examples,
            _labels(examples, firsts, self.train, tags),
            config.batch_size,
            pad_id=encoder.pad_id,
            shapes=config.shapes,
            seed=int(jax.random.bits(order)),
        )
        loss = losses.with_routers(losses.token_classification, model, config)
        numbered = tags == _numbers(len(tags))  # which are not names
        classes = Classes(model.provenance.labels if numbered else tags, None)
        if self.dev is None:
            return Prepared(batches, loss, classes=classes)
        dev, right = encode(encoder, self.dev), self.dev.tags
        assert right is not None

        def evaluate(model: Model) -> dict[str, float]:
            found = _tagged(model, encoder, *dev, tags, config.batch_size, config.shapes)
            return measure_tags(found, right)

        return Prepared(batches, loss, evaluate, classes=classes)

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Batches:
        """Returns the training texts in batches, without tags."""
        texts = [(" ".join(words),) for words in self.train.words]
        return unlabeled_batches(Texts(texts, None, self.train.names), model, config, key=key)

    def load(
        self, name: str | os.PathLike[str], *, key: Key[Array, ""], new_head: bool = False
    ) -> Model:
        """Loads a model with a head for the task, see `fusion_jax.load`."""
        head: Any = {"head": "token-classification", "num_labels": len(self.labels)}
        return checkpoint.load(name, **head, key=key, new_head=new_head)

    def to_json(self) -> dict[str, Any]:
        """Returns a description of the task as JSON values by name."""
        return {"kind": "token-classification", "labels": list(self.labels)}


def read_tagged_words(
    train: str | Path, dev: str | Path | None = None, *, words: str = "words", tags: str = "tags"
) -> TokenClassification:
    """Reads a task of tagging words from your own files.

    Args:
        train: A file in the form of CoNLL (a word on each line, with its tag in the last column,
            and an empty line after each text), or a .jsonl file with a list of words and a list of
            tags in each line.
        dev: Another file to measure on, or None.
        words: The field of the words in a .jsonl file.
        tags: The field of the tags in a .jsonl file: names, or numbers of classes from 0.

    Returns:
        The task; its labels are the tags in the files, sorted, ``O`` first.

    Raises:
        InputError: A file is missing or has no texts, a word has no tag, or a text has more words
            than tags; names file and line.

    Example:
        >>> data = read_tagged_words("train.conll", "dev.conll")  # doctest: +SKIP
    """
    files = [None if file is None else Path(file) for file in (train, dev)]
    parts = [None if file is None else tagged_words_of(file, words, tags) for file in files]
    assert parts[0] is not None
    return TokenClassification(parts[0], parts[1])


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def head_tags(model: Any, labels: Sequence[str], *, trains: bool = False) -> tuple[str, ...]:
    """Checks that a model's head fits a task, and returns the tag of each of its logits.

    Args:
        model: The model.
        labels: The tags of the task. Tags that are numbers are the numbers of the classes.
        trains: Whether the head is about to be trained, so that it may have other tags before.

    Returns:
        The tags, by the names of the classes where the model has names.

    Raises:
        InputError: The model has no token-classification head, or one with other tags.
    """
    provenance = getattr(model, "provenance", None)
    if provenance is None or provenance.head != "token-classification":
        raise InputError(
            "the model has no token-classification head; load it with "
            f"head='token-classification', num_labels={len(labels)} and a key"
        )
    names, count = provenance.labels, model.config.num_labels
    for known in (names, _numbers(count)):
        if known is not None and set(labels) <= set(known):
            return known
    if count != len(labels):
        raise InputError(
            f"the model's head has {count} outputs, but there are {len(labels)} tags "
            f"({', '.join(labels[:20])}); load it with num_labels={len(labels)}"
        )
    if not trains:
        own = "no names" if names is None else f"the names {', '.join(names)}"
        raise InputError(
            f"the classes of the model's head have {own}, but the tags are {', '.join(labels)}"
        )
    if names is not None:
        _log.warning("the head's classes %s become %s", ", ".join(names), ", ".join(labels))
    return tuple(labels)


def encode(encoder: TextEncoder, data: TaggedWords) -> tuple[Examples, list[Firsts]]:
    """Tokenizes words, joined by spaces as in a text.

    Args:
        encoder: The encoder of texts of a model.
        data: The words.

    Returns:
        The examples, and for each the position of the first token of each word: -1 for words that
        are cut off or have no tokens.

    Raises:
        InputError: A text is longer than the encoder's length, and it does not truncate; or its
            tokenizer does not say where tokens are.
    """
    encoder.check_offsets()
    with show_stage(f"Tokenizing {len(data.words):,} texts"):
        out = encoder.tokenizer(
            [" ".join(words) for words in data.words],
            truncation=encoder.truncate,
            max_length=encoder.max_length if encoder.truncate else None,
            return_offsets_mapping=True,
            verbose=False,
        )
    examples = encoder.examples(out, None, data.names)
    offsets = (np.asarray(each, np.int64).reshape(-1, 2) for each in out["offset_mapping"])
    pairs = zip(data.words, offsets, strict=True)
    return examples, [_firsts(words, spans) for words, spans in pairs]


def _firsts(words: Sequence[str], spans: Int[np.ndarray, "t 2"]) -> Firsts:
    """Returns the first token of each word, from where in the text each token is."""
    begins = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    positions = np.flatnonzero(spans[:, 1] > spans[:, 0])  # special tokens are nowhere
    # By its last character, since a token may begin with the space before its word.
    word = np.searchsorted(begins, spans[positions, 1] - 1, side="right") - 1
    firsts = np.full(len(words), len(spans))
    np.minimum.at(firsts, word, positions)
    firsts[firsts == len(spans)] = -1
    return firsts


def _labels(
    examples: Examples, firsts: Sequence[Firsts], data: TaggedWords, tags: Sequence[str]
) -> list[TokenIds]:
    """Returns the label of each token, -100 where it does not count."""
    columns = {tag: i for i, tag in enumerate(tags)}
    result = []
    assert data.tags is not None
    for tokens, at, own, name in zip(
        examples.tokens, firsts, data.tags, examples.names, strict=True
    ):
        labels = np.full(len(tokens), -100, np.int32)
        labels[at[at >= 0]] = np.array([columns[tag] for tag in own], np.int32)[at >= 0]
        if (at < 0).all():
            raise InputError(f"{name}: none of the words has a token")
        result.append(labels)
    return result


def _tagged(
    model: Any,
    encoder: TextEncoder,
    examples: Examples,
    firsts: Sequence[Firsts],
    tags: Sequence[str],
    batch_size: int,
    shapes: int = 4,
) -> list[list[str]]:
    """Returns the tag of each word; that of no entity for words without tokens."""
    logits = logits_of(model, encoder, examples, batch_size, shapes)
    return [
        [OUTSIDE if i < 0 else tags[int(rows[i].argmax())] for i in at]
        for at, rows in zip(firsts, logits, strict=True)
    ]


@on_auto_axes
def tag_words(
    model: Model,
    words: TaggedWords | Sequence[Sequence[str]],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    truncate: bool = False,
) -> list[list[str]]:
    """Returns the tags of words.

    Args:
        model: A model with a token-classification head.
        words: The words of each text; tags are not used.
        max_length: The largest number of tokens of a text; None for the number of the model's
            positions.
        batch_size: The number of rows per batch.
        truncate: Whether longer texts are cut off. Words that are cut off have the tag ``O``.

    Returns:
        The tags of each text, one for each word: names of classes, or their numbers if the model
        has no names.

    Raises:
        InputError: The model has no token-classification head, or a text is too long.

    Example:
        >>> tag_words(model, [["EU", "rejects", "German", "call"]])  # doctest: +SKIP
        [['B-ORG', 'O', 'B-MISC', 'O']]
    """
    if not isinstance(words, TaggedWords):
        names = [f"text {i}" for i in range(len(words))]
        words = TaggedWords([tuple(text) for text in words], None, names)
    tags = head_tags(model, ())
    encoder = TextEncoder(model, max_length, truncate)
    if not words.words:
        return []
    return _tagged(model, encoder, *encode(encoder, words), tags, batch_size)
