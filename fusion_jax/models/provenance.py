"""Where a model comes from: what is needed to save it, load it back and export it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Travels with a model as its static attribute ``provenance``; hashable.

    Args:
        name: The hub id or folder that was loaded.
        folder: The folder with its files on this machine, where tokenizer files are copied from.
        config: The text of its ``config.json``, verbatim.
        head: The head that the model has, or None.
        history: What was done to the model, oldest first: JSON texts.
        base: Where the base of masks is, if it was said to be elsewhere than their file says.
    """

    name: str
    folder: str
    config: str
    head: str | None
    history: tuple[str, ...] = ()
    base: str | None = None

    def after(self, step: dict[str, Any]) -> Provenance:
        """The provenance of the model after one more step."""
        return replace(self, history=(*self.history, json.dumps(step)))
