"""Questions about texts: reads them in the form of SQuAD, and measures answers as it does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusion_jax.errors import InputError
from fusion_jax.training.tasks import tables


class Answer(NamedTuple):
    """A right answer.

    Args:
        text: The answer, a part of the context.
        start: The index of its first character in the context.
    """

    text: str
    start: int


class Questions(NamedTuple):
    """Questions about texts, with their answers.

    Args:
        questions: The questions.
        contexts: The text that each question is about.
        answers: The right answers of each question, none for a question that the context does not
            answer; None for questions without known answers.
        names: Where each question comes from, such as ``"squad/train.jsonl:12"``.
    """

    questions: Sequence[str]
    contexts: Sequence[str]
    answers: Sequence[tuple[Answer, ...]] | None
    names: Sequence[str]


def questions_of(path: Path, *, answered: bool = True) -> Questions:
    """Returns the questions of a file, checked.

    Args:
        path: A .jsonl file with the fields ``question``, ``context`` and ``answers`` in each line,
            or a .json file as SQuAD distributes it.
        answered: Whether there must be answers; without, they are not read.

    Raises:
        InputError: The file is missing, a field is missing or of a wrong type, or an answer is not
            where it is said to be; names file and line.
    """
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} is not a .jsonl or .json file")
    table = tables.read(path)
    if "data" in table.columns and "question" not in table.columns:
        rows = _published(table)
    else:
        columns = table.columns
        numbered = zip(table.lines, zip(*columns.values(), strict=True), strict=True)
        rows = ((f":{i}", dict(zip(columns, row, strict=True))) for i, row in numbered)
    found: list[tuple[str, str, tuple[Answer, ...]]] = []
    names: list[str] = []
    for where, row in rows:
        try:
            texts = [_text(row, field) for field in ("question", "context")]
            answers = _answers(row, texts[1]) if answered else ()
        except InputError as error:
            raise InputError(f"{path}{where}: {error}") from None
        found.append((texts[0], texts[1], answers))
        names.append(f"{tables.place(path)}{where}")
    if not found:
        raise InputError(f"{path} has no questions")
    questions, contexts, answers = zip(*found, strict=True)
    return Questions(questions, contexts, answers if answered else None, names)


def _published(table: tables.Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the questions of a file as SQuAD distributes it, each with its place."""
    try:
        for article in table.columns["data"][0]:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    where = f", question {str(row.get('id'))[:100]}"
                    yield where, {**row, "context": paragraph["context"]}
    except (KeyError, TypeError, AttributeError, IndexError):
        raise InputError(
            f"{table.path} is neither in the form of SQuAD nor has it lines with question, context "
            "and answers"
        ) from None


def _text(row: Mapping[str, Any], field: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"no text in field {field!r}")
    return text


def _answers(row: Mapping[str, Any], context: str) -> tuple[Answer, ...]:
    """Returns the answers of a row: a list of objects, or an object of lists."""
    given = row.get("answers")
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise InputError("answers needs the lists text and answer_start, of the same length")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(given, list) and all(isinstance(each, dict) for each in given):
        pairs = [(each.get("text"), each.get("answer_start")) for each in given]
    else:
        raise InputError(
            "no answers; a question that its context does not answer has an empty list"
        )
    result = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise InputError("an answer has no text")
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise InputError(f"answer_start must be an index; got {str(start)[:100]!r}")
        if context[start : start + len(text)] != text:
            at = context.find(text)
            there = f"; it is at {at}" if at >= 0 else "; the context does not have it"
            raise InputError(f"the answer {text[:100]!r} is not at answer_start {start}{there}")
        result.append(Answer(text, start))
    return tuple(result)


def normalized(answer: str) -> str:
    """Returns an answer in small letters, without punctuation, articles and more than one space.

    Example:
        >>> normalized("The Sun's  light.")
        'suns light'
    """
    text = "".join(c for c in answer.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _is_exact(predicted: str, right: str) -> float:
    return float(normalized(predicted) == normalized(right))


def _f1(predicted: str, right: str) -> float:
    """Returns the F1 of the words of an answer."""
    said, true = (normalized(text).split() for text in (predicted, right))
    if not said or not true:
        return float(said == true)
    both = sum((Counter(said) & Counter(true)).values())
    return 2 * both / (len(said) + len(true))


def measure_answers(
    predicted: Sequence[str], right: Sequence[Sequence[Answer | str]]
) -> dict[str, float]:
    """Returns the metrics of answers, as the script of SQuAD 2.0 defines them.

    Args:
        predicted: The answer to each question; ``""`` says that the context has no answer.
        right: The right answers to each question; none if the context has no answer.

    Returns:
        ``f1``, of words, and ``exact_match``, both from 0 to 100: means over questions of the best
        value among the right answers, without regard to articles, punctuation and case.

    References:
        Rajpurkar et al. (ACL 2018), Know What You Don't Know.

    Example:
        >>> measure_answers(["the Sun"], [["Sun", "the star"]])
        {'f1': 100.0, 'exact_match': 100.0}
    """

    def mean(score: Callable[[str, str], float]) -> float:
        values = []
        for answer, known in zip(predicted, right, strict=True):
            texts = [each.text if isinstance(each, Answer) else each for each in known]
            texts = [text for text in texts if normalized(text)] or [""]
            values.append(max(score(answer, text) for text in texts))
        return 100 * sum(values) / len(values)

    return {"f1": mean(_f1), "exact_match": mean(_is_exact)}
