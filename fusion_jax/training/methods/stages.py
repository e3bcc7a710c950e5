"""Keeps and resumes the progress of methods that train in several stages."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fusion_jax.checkpoint import load, save
from fusion_jax.checkpoint.files import write_text
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.training.engine.fingerprints import fingerprint_of_model
from fusion_jax.training.engine.locks import FolderLock
from fusion_jax.training.engine.run_folder import SAME_DATA, check_same, replace_artefact
from fusion_jax.training.engine.trainer import Fit


def unpack_fit(result: object) -> tuple[Any, bool]:
    """Returns the model that a stage's training gave, and whether training was finished.

    Args:
        result: A `Fit`, or a model, which counts as finished.

    Raises:
        InputError: The result is neither.
    """
    if isinstance(result, Fit):
        return result.model, result.finished
    if not isinstance(result, nnx.Module):
        raise InputError(
            f"train must return its Fit, or the model; it returned {type(result).__name__}"
        )
    return result, True


class Stages:
    """The stages of a method in a folder: a JSON record, the last model, and a run folder.

    A ``with`` block locks the folder.

    Args:
        folder: The folder; None keeps nothing.
        name: The name of the record and of the models, such as "squeezed".
        model: The model before the first stage.
        settings: Settings that must match on resume, besides the model, as JSON values by name.

    Raises:
        InputError: The model cannot be saved, the folder is a file, or it is in use.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        name: str,
        model: nnx.Module,
        settings: Mapping[str, object],
    ):
        self.folder = None if folder is None else Path(folder)
        self._name, self._settings = name, dict(settings)
        self._data: dict[str, object] = {}
        self._lock: FolderLock | None = None
        if folder is not None:
            if not isinstance(getattr(model, "provenance", None), Provenance):
                raise InputError(
                    "only models that came from fusion_jax.load can be kept in a folder; leave "
                    "folder out"
                )
            if self.folder is not None and self.folder.is_file():
                raise InputError(f"{folder} is a file; give a folder")
            self._settings["model"] = fingerprint_of_model(model)

    def __enter__(self) -> Stages:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder)
            for left in self.folder.glob(f".{self._name}-*.new*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def read_record(self) -> dict[str, Any] | None:
        """Returns the record in the folder, or None if there is none.

        Raises:
            InputError: The folder was started with other settings or another model, or the file is
                not a record.
        """
        if self.folder is None or not self._record.is_file():
            return None
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            settings = record["settings"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self._record} was not written by fusion_jax; give another folder"
            ) from None
        check_same(self.folder, settings, self._settings)
        self._data = record.get("data", {})
        return record

    def load_model(self, done: int, original: Model) -> Model:
        """Returns the model after some stages, with the name and tokenizer of the original."""
        assert self.folder is not None
        model = load(self.folder / f"{self._name}-{done}")
        # The model's own folder, and the tokenizer in it, is removed after the next stage.
        place = {"name": original.provenance.name, "folder": original.provenance.folder}
        model.provenance = dataclasses.replace(model.provenance, **place)
        return model

    def train(
        self, train: Callable[[Any, Path | None], Fit | nnx.Module], model: Any, done: int
    ) -> tuple[Any, bool]:
        """Trains the model of the stage that follows ``done`` stages, in a folder of its own.

        Args:
            train: (model, run folder or None) -> `Fit`, or the model.
            model: The model.
            done: The stages done.

        Returns:
            The trained model, and whether training was finished.

        Raises:
            InputError: ``train`` returned neither, or its data is not that of the stages before.
        """
        folder = self._run_folder(done)
        if folder is not None and self._data and not jax.process_index():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SAME_DATA, json.dumps(self._data) + "\n")
        result = train(model, folder)
        if isinstance(result, Fit) and result.data:
            self._data = dict(result.data)
        return unpack_fit(result)

    def _run_folder(self, done: int) -> Path | None:
        return None if self.folder is None else self.folder / f"round-{done}"

    def write(
        self, record: Mapping[str, object], *, model: nnx.Module | None = None, done: int = 0
    ) -> None:
        """Writes the record, and the model after ``done`` stages if it is given.

        The order of writing is such that stopping at any moment loses nothing.
        """
        if self.folder is None:
            return
        if model is not None:
            replace_artefact(model, self.folder / f"{self._name}-{done}", save)
        if jax.process_index():
            return
        fields = {**record, "settings": self._settings, "data": self._data}
        write_text(self._record, json.dumps(fields, indent=1) + "\n")
        if model is not None:
            shutil.rmtree(self.folder / f"{self._name}-{done - 1}", ignore_errors=True)

    def remove_run(self, done: int) -> None:
        """Removes the folder in which `train` trained after the same number of stages."""
        folder = self._run_folder(done)
        if folder is not None and not jax.process_index():
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _record(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._name}.json"
