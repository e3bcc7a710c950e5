"""The artefacts that a run leaves: its best model and its last."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fusion_jax.models.base import Model
from fusion_jax.training.engine.trainer import Fit, fit

BEST = "best"
LAST = "last"


Write = Callable[[Model, Path], Any]
"""Writes a model into a folder that does not exist yet, as `fusion_jax.save` does."""


def fit_and_keep(
    *arguments: Any,
    folder: str | os.PathLike[str] | None,
    lowest: bool = False,
    best_from: int = 0,
    write: Write | None = None,
    **options: Any,
) -> Fit:
    """Trains by `fit`, and saves artefacts: ``best`` by the first metric, and ``last``.

    Args:
        *arguments: As for `fit`.
        folder: The folder of the run; None keeps nothing.
        lowest: Whether low values are better.
        best_from: Evaluations after fewer steps do not count.
        write: What writes an artefact; None for `fusion_jax.save`.
        **options: As for `fit`.

    Returns:
        What `fit` returns.
    """
    if folder is None:
        return fit(*arguments, **options)
    folder = Path(folder)
    sign = -1 if lowest else 1

    def keep(model: Model, history: list[dict[str, Any]]) -> None:
        *before, now = history
        if now["step"] < best_from:
            return
        main = next(name for name in now if name != "step")
        before = [earlier[main] for earlier in before if earlier["step"] >= best_from]
        numbers = [x for x in before if not math.isnan(x)]
        better = not math.isnan(now[main]) and all(sign * now[main] > sign * x for x in numbers)
        if better or not before:
            replace(model, folder / BEST, write)

    result = fit(*arguments, folder=folder, on_evaluation=keep, **options)
    if result.finished:
        replace(result.model, folder / LAST, write)
    return result


def replace(model: Model, folder: Path, write: Write | None = None) -> None:
    """Saves an artefact in the place of an earlier one, by `fusion_jax.save` or as told."""
    from fusion_jax.checkpoint import save

    if jax.process_index():
        return
    new, old = (folder.with_name(f"{folder.name}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    (save if write is None else write)(model, new)
    shutil.rmtree(old, ignore_errors=True)
    # Removing takes a while, and renaming none: there is hardly a moment without an artefact.
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
