"""Where a model comes from: what saving, loading again and exporting need to know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fusion_jax.errors import InputError

Fields = Mapping[str, Any]
"""The fields of a ``config.json``: JSON values by name, not checked yet."""

Head = Literal[
    "classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "seq2seq-lm",
]
"""The heads that a model can have."""
CLASS_HEADS: tuple[Head, ...] = ("classification", "token-classification")
"""The heads with one logit for each class."""


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from; the static, hashable attribute ``provenance`` of a model.

    Args:
        name: The hub id or folder of the original model. It stays the same when a compressed model
            is saved and loaded again.
        folder: The local folder whose files were loaded; tokenizer files are copied from it.
        config: The text of the original ``config.json``, verbatim but for the number of experts
            where some were dropped.
        head: The head of the model, or None.
        history: What was done to the model, such as compressing it: JSON texts, oldest first.
        base: The base model of a mask artefact, if it was loaded with ``base=``; None for the base
            that the artefact refers to.
        labels: The names of the classes of a classification or token-classification head, in the
            order of its logits. None if they are not known, and for a head that predicts a number.
        problem_type: The purpose of a classification head, as ``config.json`` calls it:
            ``"single_label_classification"``, ``"multi_label_classification"`` or
            ``"regression"``. None if that is not known.
        new_head: Whether the head has random weights and was not trained.
        untied: The names of tensors that ``config.json`` calls tied, but that differ in the files.
    """

    name: str
    folder: str
    config: str
    head: Head | None
    history: tuple[str, ...] = ()
    base: str | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    new_head: bool = False
    untied: tuple[str, ...] = ()

    def after(self, step: dict[str, Any]) -> Provenance:
        """Returns the provenance after one more step of the history."""
        return replace(self, history=(*self.history, json.dumps(step)))


def class_names(config: Fields) -> tuple[str, ...] | None:
    """Returns the names of the classes in a ``config.json``, or None if it names none.

    The names ``LABEL_0``, ``LABEL_1``, ... that transformers gives, and the numbers of the classes,
    are not names.

    Args:
        config: The fields of the file.

    Returns:
        The names in the order of the logits.

    Raises:
        InputError: ``id2label`` is not a JSON object with the keys 0, 1, ...

    Example:
        >>> class_names({"id2label": {"0": "negative", "1": "positive"}})
        ('negative', 'positive')
        >>> class_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    """
    given = config.get("id2label")
    if given is None:
        return None
    if not isinstance(given, dict) or set(given) != {str(i) for i in range(len(given))}:
        raise InputError("id2label is not a JSON object with the keys 0, 1, ...")
    names = tuple(str(given[str(i)]) for i in range(len(given)))
    plain = ([f"LABEL_{i}" for i in range(len(names))], [str(i) for i in range(len(names))])
    return None if list(names) in plain else names


def class_order(wanted: Sequence[str], given: Sequence[str]) -> list[int] | None:
    """Returns where classes are among the classes of a head, by their names.

    Capital letters, and spaces, dashes and underscores count as equal, as in ``Not entailment`` and
    ``not_entailment``.

    Args:
        wanted: The names of the classes.
        given: The names of the classes of the head, in the order of its logits.

    Returns:
        The position of each wanted class, or None if the names are not the same ones.

    Example:
        >>> class_order(["negative", "positive"], ["POSITIVE", "NEGATIVE"])
        [1, 0]
    """
    first, second = ([re.sub(r"[\W_]+", "_", n.casefold()) for n in x] for x in (wanted, given))
    if sorted(first) != sorted(second) or len(set(first)) < len(first):
        return None
    return [second.index(name) for name in first]


def history_in_words(history: Iterable[str]) -> str:
    """Returns in a few words what was done to a model, given the history of its provenance.

    Example:
        >>> history_in_words(['{"compress": {"method": "fusion", "width": 0.25}}'])
        'compressed by fusion (width 0.25)'
    """
    names = []
    for text in history:
        step = json.loads(text)
        step = step if isinstance(step, dict) and step else {"a step that is not known": None}
        what, details = next(iter(step.items()))
        if what == "compress" and isinstance(details, dict):
            what = _method_name(details)
        names.append(what)
    return f"compressed by {', then '.join(names)}" if names else "compressed"


def _method_name(method: Mapping[str, object]) -> str:
    """Returns the name and size of a method, or of each if sites have methods of their own."""
    if "method" not in method:
        names = {str(own.get("method")) for own in method.values() if isinstance(own, dict)}
        return f"{' and '.join(sorted(names))}, sizes by site"
    sizes = [f"{k} {method[k]}" for k in ("width", "keep", "rank", "bond") if k in method]
    return f"{method['method']} ({', '.join(sizes)})" if sizes else str(method["method"])
