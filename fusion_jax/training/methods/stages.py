"""Methods that train in rounds: what they keep of each, and go on from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Provenance
from fusion_jax.training.engine.artefacts import replace
from fusion_jax.training.engine.fingerprints import fingerprint_of_model
from fusion_jax.training.engine.trainer import Fit, check_same


def outcome(result: Any) -> tuple[Any, bool]:
    """The model that a round's training gave, and whether it was trained to the end.

    Args:
        result: A `Fit`, or a model, which counts as finished.

    Returns:
        The model and the answer.

    Raises:
        InputError: It is neither.
    """
    if isinstance(result, Fit):
        return result.model, result.finished
    if not isinstance(result, nnx.Module):
        raise InputError(f"train must give its Fit, or the model; it gave {type(result).__name__}")
    return result, True


class Rounds:
    """Rounds in a folder: notes as JSON, the model after the last round, and a run's folder.

    Args:
        folder: The folder; None keeps nothing.
        name: What the method makes, such as "squeezed": names of its notes and models.
        model: The model that rounds begin with.
        settings: What a call that goes on must have had the same, besides the model, as JSON
            values by name.

    Raises:
        InputError: The model cannot be saved, or the folder is a file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        name: str,
        model: Any,
        settings: Mapping[str, Any],
    ):
        self.folder = None if folder is None else Path(folder)
        self._name, self._settings = name, dict(settings)
        if folder is not None:
            if not isinstance(getattr(model, "provenance", None), Provenance):
                raise InputError(
                    "only models that came from fusion_jax.load can be kept in a folder; leave "
                    "folder out"
                )
            if self.folder is not None and self.folder.is_file():
                raise InputError(f"{folder} is a file; give a folder")
            self._settings["model"] = fingerprint_of_model(model)

    def notes(self) -> dict[str, Any] | None:
        """What was noted last; None if nothing was.

        Raises:
            InputError: The folder was begun with other settings, or another model, or its notes are
                no notes.
        """
        if self.folder is None or not self._notes.is_file():
            return None
        try:
            read = json.loads(self._notes.read_text(encoding="utf-8"))
            settings = read["settings"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self._notes} is none of ours; give another folder") from None
        check_same(self.folder, settings, self._settings)
        return read

    def model(self, count: int, first: Any) -> Any:
        """The model after so many rounds, which was kept; from where the first one is."""
        from fusion_jax.checkpoint import load

        assert self.folder is not None
        found = load(self.folder / f"{self._name}-{count}")
        # Its own folder goes with the next round, and the tokenizer with it.
        place = {"name": first.provenance.name, "folder": first.provenance.folder}
        found.provenance = dataclasses.replace(found.provenance, **place)
        return found

    def run(self, count: int) -> Path | None:
        """The folder for training in the round after so many."""
        return None if self.folder is None else self.folder / f"round-{count}"

    def note(self, fields: Mapping[str, Any], *, model: Any = None, count: int = 0) -> None:
        """Notes fields, and keeps a model, if given, as that after so many rounds.

        In an order in which stopping at any moment loses nothing.
        """
        if self.folder is None:
            return
        if model is not None:
            replace(model, self.folder / f"{self._name}-{count}")
        if jax.process_index():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self._notes.with_suffix(".new")
        text = json.dumps({**fields, "settings": self._settings}, indent=1)
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self._notes)
        if model is not None:
            shutil.rmtree(self.folder / f"{self._name}-{count - 1}", ignore_errors=True)

    def trained(self, count: int) -> None:
        """Removes the folder of the training in the round after so many."""
        if self.folder is not None and not jax.process_index():
            shutil.rmtree(self.folder / f"round-{count}", ignore_errors=True)

    @property
    def _notes(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._name}.json"
