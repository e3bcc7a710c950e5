"""Words with tags: reads CoNLL text and JSON lines, and measures tags by entities."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusion_jax.errors import InputError
from fusion_jax.training.tasks import tables

OUTSIDE = "O"
"""The tag of words outside all entities."""
Tags = Sequence[str]
"""The tags of the words of one text."""


class TaggedWords(NamedTuple):
    """Texts in words, with a tag for each word.

    Args:
        words: The words of each text.
        tags: The tags of each text, one for each word; None for texts without tags.
        names: Where each text comes from, such as ``"conll/train.txt:12"``.
    """

    words: Sequence[tuple[str, ...]]
    tags: Sequence[tuple[str, ...]] | None
    names: Sequence[str]


class Entity(NamedTuple):
    """An entity in a text.

    Args:
        kind: Its type, such as ``"PER"``.
        first: The index of its first word.
        last: The index of its last word.
    """

    kind: str
    first: int
    last: int


def tagged_words_of(
    path: Path, words: str = "words", tags: str | None = "tags", *, tagged: bool = True
) -> TaggedWords:
    """Returns the texts of a file, checked.

    Args:
        path: A .jsonl file with lists of words and of tags, or CoNLL text: a word on each line with
            its tag at the end, and an empty line after each text.
        words: The field of the words in a .jsonl file.
        tags: The field of the tags.
        tagged: Whether there must be tags. Without, tags are not read, and CoNLL text may have
            words alone.

    Raises:
        InputError: The file is missing, has no texts, or a line cannot be read; names the line.
    """
    read = _from_json if path.suffix in (".jsonl", ".json") else _from_conll
    found = list(read(path, words, tags if tagged else None))
    if not found:
        raise InputError(f"{path} has no texts")
    all_words, all_tags, lines = zip(*found, strict=True)
    names = [tables.place(path, line) for line in lines]
    return TaggedWords(all_words, all_tags if tagged else None, names)


Rows = Iterator[tuple[tuple[str, ...], tuple[str, ...], int]]
"""The words and tags of each text, and the line in which it starts."""


def _from_json(path: Path, words: str, tags: str | None) -> Rows:
    table = tables.read(path)
    given = [table.column(name) for name in (words, tags) if name is not None]
    for line, *cells in zip(table.lines, *given, strict=True):
        with tables.at_line(path, line):
            own = _strings(cells[0], words)
            theirs = () if tags is None else _strings(cells[1], tags)
            if tags is not None and len(own) != len(theirs):
                raise InputError(f"{len(own)} words, but {len(theirs)} tags")
        yield own, theirs, line


def _strings(cell: Any, name: str) -> tuple[str, ...]:
    """Returns a list of words, or of tags, which may also be numbers."""
    if not isinstance(cell, list) or not cell:
        what = "no list" if cell is None else f"{str(cell)[:100]!r} is not a list of words"
        raise InputError(f"{what} in field {name!r}")
    result = []
    for i, item in enumerate(cell):
        whole = isinstance(item, int) and not isinstance(item, bool)
        text = str(item).strip() if whole or isinstance(item, str) else ""
        if not text:
            raise InputError(
                f"item {i + 1} of field {name!r} is not a word; got {str(item)[:100]!r}"
            )
        result.append(text)
    return tuple(result)


def _from_conll(path: Path, words: str, tags: str | None) -> Rows:
    own: list[str] = []
    theirs: list[str] = []
    start, width = 1, 0
    for i, line in enumerate([*tables.read_text(path).split("\n"), ""]):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            if own:
                yield tuple(own), tuple(theirs), start
            own, theirs = [], []
            continue
        with tables.at_line(path, i + 1):
            if tags is not None and len(cells) < 2:
                raise InputError(f"the word {cells[0][:100]!r} has no tag")
            width = width or len(cells)
            if len(cells) != width:
                raise InputError(f"{len(cells)} columns, but {width} in the lines before")
        start = start if own else i + 1
        own.append(cells[0])
        theirs.append(cells[-1])


def tag_set(*data: TaggedWords | None) -> tuple[str, ...]:
    """Returns the different tags of texts: sorted, the tag of no entity first.

    Tags that are numbers are the numbers of classes, counted from 0: the result has all numbers up
    to the largest.
    """
    found = {tag for each in data if each is not None for text in each.tags or () for tag in text}
    if all(re.fullmatch(r"[0-9]{1,4}", tag) for tag in found):
        return tuple(map(str, range(max(map(int, found)) + 1)))
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))


def are_entities(tags: Sequence[str]) -> bool:
    """Returns whether tags name entities by a prefix, as B-PER does."""
    return all(tag == OUTSIDE or re.fullmatch(r"[BIESLU]-.+", tag) for tag in tags)


def entities(tags: Tags) -> list[Entity]:
    """Returns the entities of a text.

    An entity ends where the next begins (B-, S- and U-), where the type changes, outside of
    entities, and after E-, L-, S- and U-. One that does not begin with B- is an entity, too.

    References:
        The script conlleval of CoNLL-2000, and seqeval (its default mode), which give the same.

    Example:
        >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [Entity(kind='PER', first=0, last=1), Entity(kind='LOC', first=3, last=3), ...]
    """
    result: list[Entity] = []
    open_kind, first, closed = None, 0, True
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, _, kind = tag.partition("-")
        begins = tag != OUTSIDE and (mark in ("B", "S", "U") or closed or kind != open_kind)
        if not closed and (begins or tag == OUTSIDE):
            result.append(Entity(str(open_kind), first, i - 1))
        if begins:
            open_kind, first = kind, i
        closed = tag == OUTSIDE
        if mark in ("E", "L", "S", "U") and not closed:
            result.append(Entity(kind, first, i))
            closed = True
    return result


def measure_tags(predicted: Sequence[Tags], right: Sequence[Tags]) -> dict[str, float]:
    """Returns the metrics of predicted tags.

    Args:
        predicted: The predicted tags of each text.
        right: The right tags of each text.

    Returns:
        ``f1``, ``precision`` and ``recall`` of the entities of all texts, each of which counts only
        if its type and all its words are right, and the ``accuracy`` of tags. Tags that are not
        names of entities, such as parts of speech, have ``accuracy`` alone.

    Example:
        >>> measure_tags([["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]])["precision"]
        0.5
    """
    same = [
        a == b for x, y in zip(predicted, right, strict=True) for a, b in zip(x, y, strict=True)
    ]
    accuracy = {"accuracy": sum(same) / len(same)}
    if not are_entities([tag for text in (*predicted, *right) for tag in text]):
        return accuracy
    said, true = (
        {(i, entity) for i, tags in enumerate(texts) for entity in entities(tags)}
        for texts in (predicted, right)
    )
    both = len(said & true)
    precision, recall = (both / len(found) if found else 0.0 for found in (said, true))
    total = len(said) + len(true)
    f1 = 2 * both / total if total else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, **accuracy}
