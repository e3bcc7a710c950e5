"""Where a model comes from: what saving, loading again and exporting need to know."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

Head = Literal["classification", "masked-lm", "causal-lm", "seq2seq-lm"]
"""The heads that a model can have."""


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from; the static, hashable attribute ``provenance`` of a model.

    Args:
        name: The hub id or folder of the original model. It stays the same when a compressed model
            is saved and loaded again.
        folder: The local folder whose files were loaded; tokenizer files are copied from it.
        config: The text of the original ``config.json``, verbatim.
        head: The head of the model, or None.
        history: What was done to the model, such as compressing it: JSON texts, oldest first.
        base: The base model of a mask artefact, if it was loaded with ``base=``; None for the base
            that the artefact refers to.
    """

    name: str
    folder: str
    config: str
    head: Head | None
    history: tuple[str, ...] = ()
    base: str | None = None

    def after(self, step: dict[str, Any]) -> Provenance:
        """Returns the provenance after one more step of the history."""
        return replace(self, history=(*self.history, json.dumps(step)))
